//! Causal self-attention with grouped keys and values.

use super::config::{Config, Family};
use super::layers::{Places, RmsNorm};
use super::rotary::Turns;
use tch::nn::{self, Module};
use tch::{Kind, Tensor};

#[derive(Debug)]
pub struct Attention {
    q_proj: nn::Linear,
    k_proj: nn::Linear,
    v_proj: nn::Linear,
    o_proj: nn::Linear,
    /// Of each head; Qwen3 has them.
    norms: Option<[RmsNorm; 2]>,
    head_dim: i64,
    /// How many positions a query sees, its own among them.
    window: Option<i64>,
}

impl Attention {
    pub fn new(p: &Places, config: &Config, layer: usize) -> Self {
        let (width, head_dim) = (config.hidden_size, config.head_dim());
        let (queries, keys) = (config.num_attention_heads * head_dim, config.key_value_heads() * head_dim);
        let qwen2 = config.model_type == Family::Qwen2;
        let bias = config.attention_bias || qwen2;
        let norm = |name| RmsNorm::new(&p.sub(name), head_dim, config.rms_norm_eps);
        Attention {
            q_proj: p.sub("q_proj").linear(width, queries, bias),
            k_proj: p.sub("k_proj").linear(width, keys, bias),
            v_proj: p.sub("v_proj").linear(width, keys, bias),
            o_proj: p.sub("o_proj").linear(queries, width, bias && !qwen2),
            norms: (config.model_type == Family::Qwen3).then(|| [norm("q_norm"), norm("k_norm")]),
            head_dim,
            window: config.window(layer),
        }
    }

    /// (batch, time, width) in and out.
    pub fn forward(&self, x: &Tensor, turns: &Turns) -> Tensor {
        let (batch, time) = (x.size()[0], x.size()[1]);
        let heads = |x: Tensor| x.view([batch, time, -1, self.head_dim]);
        let mut q = heads(self.q_proj.forward(x));
        let mut k = heads(self.k_proj.forward(x));
        if let Some([q_norm, k_norm]) = &self.norms {
            (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
        }
        let (q, k) = (turns.apply(&q.transpose(1, 2)), turns.apply(&k.transpose(1, 2)));
        let v = heads(self.v_proj.forward(x)).transpose(1, 2);
        let mask = self.window.filter(|window| *window < time).map(|window| {
            // Ones on the diagonal and on the `window - 1` below it.
            Tensor::ones([time, time], (Kind::Bool, x.device())).tril(0).triu(1 - window)
        });
        let causal = mask.is_none();
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, causal, None, true);
        self.o_proj.forward(&y.transpose(1, 2).reshape([batch, time, -1]))
    }
}
