//! Causal self-attention with grouped keys and values.

use super::cache::Part;
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
        let [q, k, v] = self.project(x, [batch, time], turns);
        let y = self.attend(&q, &k, &v);
        self.o_proj.forward(&y.transpose(1, 2).reshape([batch, time, -1]))
    }

    /// The next tokens of several texts, one text after the other: (tokens, width)
    /// in and out. Each text sees its own tokens only.
    pub fn extend(&self, x: &Tensor, turns: &Turns, layer: usize, parts: &[Part]) -> Tensor {
        let tokens = x.size()[0];
        let all = self.project(x, [1, tokens], turns);
        let mut from = 0;
        let mut results = Vec::with_capacity(parts.len());
        for part in parts {
            let [q, k, v] = all.each_ref().map(|x| x.narrow(2, from, part.time()));
            let [k, v] = part.cache.extend(layer, &k, &v);
            results.push(self.attend(&q, &k, &v));
            from += part.time();
        }
        self.o_proj.forward(&Tensor::cat(&results, 2).transpose(1, 2).reshape([tokens, -1]))
    }

    /// Queries, keys and values, each (batch, heads, time, head_dim).
    fn project(&self, x: &Tensor, [batch, time]: [i64; 2], turns: &Turns) -> [Tensor; 3] {
        let heads = |x: Tensor| x.view([batch, time, -1, self.head_dim]);
        let mut q = heads(self.q_proj.forward(x));
        let mut k = heads(self.k_proj.forward(x));
        if let Some([q_norm, k_norm]) = &self.norms {
            (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
        }
        let v = heads(self.v_proj.forward(x)).transpose(1, 2);
        [turns.apply(&q.transpose(1, 2)), turns.apply(&k.transpose(1, 2)), v]
    }

    /// The queries are of the last of the positions that keys and values are of.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (time, all) = (q.size()[2], k.size()[2]);
        let window = self.window.filter(|window| *window < all);
        let mask = (window.is_some() || (1 < time && time < all)).then(|| {
            // Ones on the diagonal that ends in the lower right corner, and on the
            // `window - 1` left of it.
            let ones = Tensor::ones([time, all], (Kind::Bool, q.device()));
            ones.tril(all - time).triu(all - time + 1 - window.unwrap_or(all))
        });
        let causal = mask.is_none() && time > 1;
        Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, true)
    }
}
