//! Llama, Mistral, Qwen2 and Qwen3 in plain `tch::nn`, from a Hugging Face
//! folder. It knows nothing about adapters; only [`load`] knows about quantising.
//!
//! Names of weights are those of `transformers`, so that adapters made here load
//! in PEFT, and the other way round.

#![allow(dead_code)]

mod attention;
pub mod cache;
mod config;
mod layers;
mod load;
mod rotary;

pub use config::Config;
pub use load::load;

use attention::Attention;
use cache::Part;
use layers::{Mlp, Places, RmsNorm};
use rotary::Rotary;
use tch::nn::{self, Module};
use tch::{Kind, Tensor};

/// Errors of an application: told to a person, not acted on.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Token ids (batch, time) in, logits (batch, time, vocabulary) out.
#[derive(Debug)]
pub struct Llama {
    embed_tokens: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// The same tensor as `embed_tokens` where the model ties them.
    lm_head: nn::Linear,
    rotary: Rotary,
}

impl Llama {
    /// Places for the weights, which take no memory until they are loaded.
    pub fn new(root: &nn::Path, kind: Kind, config: &Config) -> Self {
        let root = Places::new(root, kind);
        let model = root.sub("model");
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = model.sub("embed_tokens").weight(&table);
        let lm_head = match config.tie_word_embeddings {
            true => root.sub("lm_head").tied(&embed_tokens),
            false => root.sub("lm_head").linear(config.hidden_size, config.vocab_size, false),
        };
        let layer = |n| Layer::new(&model.sub("layers").sub(n), config, n);
        Llama {
            embed_tokens,
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            norm: RmsNorm::new(&model.sub("norm"), config.hidden_size, config.rms_norm_eps),
            lm_head,
            rotary: Rotary::new(config, root.device()),
        }
    }
}

impl Module for Llama {
    fn forward(&self, tokens: &Tensor) -> Tensor {
        let positions = Tensor::arange(tokens.size()[1], (Kind::Float, tokens.device()));
        let mut x = self.embed(tokens);
        let turns = self.rotary.turns(&positions, x.kind());
        for layer in &self.layers {
            x = layer.forward(&x, |attention, x| attention.forward(x, &turns));
        }
        self.logits(&self.norm.forward(&x))
    }
}

impl Llama {
    /// Goes on with several texts, whose parts may be of any lengths: takes their
    /// tokens into the caches, and answers the features (tokens, width) of all
    /// of them, one text after the other. For [`Llama::logits`].
    ///
    /// Nothing is padded, and each text attends to itself alone. Rows of every
    /// layer's input are tokens.
    pub fn extend(&self, parts: &mut [Part]) -> Tensor {
        let device = self.embed_tokens.device();
        let tokens: Vec<i64> = parts.iter().flat_map(|part| part.tokens).copied().collect();
        let range = |part: &Part| part.cache.length()..part.cache.length() + part.time();
        let positions: Vec<f32> = parts.iter().flat_map(range).map(|position| position as f32).collect();
        let mut x = self.embed(&Tensor::from_slice(&tokens).to_device(device));
        let turns = self.rotary.turns(&Tensor::from_slice(&positions).to_device(device), x.kind());
        for (n, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, |attention, x| attention.extend(x, &turns, n, parts));
        }
        for part in parts {
            part.cache.advance(part.tokens.len() as i64);
        }
        self.norm.forward(&x)
    }

    /// Features (…, width) to logits (…, vocabulary).
    pub fn logits(&self, features: &Tensor) -> Tensor {
        self.lm_head.forward(features)
    }

    fn embed(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens, tokens, -1, false, false)
    }
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn new(p: &Places, config: &Config, n: usize) -> Self {
        let norm = |name| RmsNorm::new(&p.sub(name), config.hidden_size, config.rms_norm_eps);
        Layer {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(&p.sub("self_attn"), config, n),
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: Mlp::new(&p.sub("mlp"), config),
        }
    }

    fn forward(&self, x: &Tensor, attend: impl Fn(&Attention, &Tensor) -> Tensor) -> Tensor {
        let x = x + attend(&self.self_attn, &self.input_layernorm.forward(x));
        &x + self.mlp.forward(&self.post_attention_layernorm.forward(&x))
    }
}
