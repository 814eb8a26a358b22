//! A Llama in plain `tch::nn`, small and over bytes. It knows nothing about
//! adapters or quantisation.

use tch::nn::{self, Module, Path};
use tch::{Device, Kind, Tensor};

/// Bytes that the model sees at once.
pub const CONTEXT: i64 = 128;
const VOCABULARY: i64 = 256;
const DIM: i64 = 256;
const LAYERS: i64 = 4;
const HEADS: i64 = 4;
const HEAD_DIM: i64 = DIM / HEADS;
const FEED_FORWARD: i64 = 688;

/// Bytes (batch, time) in, logits (batch, time, 256) out.
#[derive(Debug)]
pub struct Llama {
    embed_tokens: nn::Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: nn::Linear,
    rotary: Rotary,
}

impl Llama {
    /// The names are those of Hugging Face's Llama.
    pub fn new(root: &Path) -> Self {
        let model = root / "model";
        let normal = nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        let embedding = nn::EmbeddingConfig { ws_init: normal, ..Default::default() };
        Llama {
            embed_tokens: nn::embedding(&model / "embed_tokens", VOCABULARY, DIM, embedding),
            layers: (0..LAYERS).map(|n| Layer::new(&(&model / "layers" / n))).collect(),
            norm: RmsNorm::new(&(&model / "norm")),
            lm_head: linear(root / "lm_head", DIM, VOCABULARY),
            rotary: Rotary::new(root.device()),
        }
    }
}

impl Module for Llama {
    fn forward(&self, bytes: &Tensor) -> Tensor {
        let mut x = self.embed_tokens.forward(bytes);
        for layer in &self.layers {
            x = layer.forward(&x, &self.rotary);
        }
        self.lm_head.forward(&self.norm.forward(&x))
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
    fn new(p: &Path) -> Self {
        Layer {
            input_layernorm: RmsNorm::new(&(p / "input_layernorm")),
            self_attn: Attention::new(&(p / "self_attn")),
            post_attention_layernorm: RmsNorm::new(&(p / "post_attention_layernorm")),
            mlp: Mlp::new(&(p / "mlp")),
        }
    }

    fn forward(&self, x: &Tensor, rotary: &Rotary) -> Tensor {
        let x = x + self.self_attn.forward(&self.input_layernorm.forward(x), rotary);
        &x + self.mlp.forward(&self.post_attention_layernorm.forward(&x))
    }
}

/// Causal self-attention with rotary positions.
#[derive(Debug)]
struct Attention {
    q_proj: nn::Linear,
    k_proj: nn::Linear,
    v_proj: nn::Linear,
    o_proj: nn::Linear,
}

impl Attention {
    fn new(p: &Path) -> Self {
        let square = |name| linear(p / name, DIM, DIM);
        Attention {
            q_proj: square("q_proj"),
            k_proj: square("k_proj"),
            v_proj: square("v_proj"),
            o_proj: square("o_proj"),
        }
    }

    fn forward(&self, x: &Tensor, rotary: &Rotary) -> Tensor {
        let (batch, time, _) = x.size3().expect("(batch, time, dim)");
        let heads = |x: Tensor| x.view([batch, time, HEADS, HEAD_DIM]).transpose(1, 2);
        let q = rotary.turn(&heads(self.q_proj.forward(x)));
        let k = rotary.turn(&heads(self.k_proj.forward(x)));
        let v = heads(self.v_proj.forward(x));
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None, false);
        self.o_proj.forward(&y.transpose(1, 2).reshape([batch, time, DIM]))
    }
}

/// The gated feed-forward layer, SwiGLU.
#[derive(Debug)]
struct Mlp {
    gate_proj: nn::Linear,
    up_proj: nn::Linear,
    down_proj: nn::Linear,
}

impl Mlp {
    fn new(p: &Path) -> Self {
        Mlp {
            gate_proj: linear(p / "gate_proj", DIM, FEED_FORWARD),
            up_proj: linear(p / "up_proj", DIM, FEED_FORWARD),
            down_proj: linear(p / "down_proj", FEED_FORWARD, DIM),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.down_proj.forward(&(self.gate_proj.forward(x).silu() * self.up_proj.forward(x)))
    }
}

/// Division by the root of the mean square.
#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
}

impl RmsNorm {
    fn new(p: &Path) -> Self {
        RmsNorm { weight: p.ones("weight", &[DIM]) }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mean_square = x.square().mean_dim(-1, true, Kind::Float);
        x * (mean_square + 1e-5).rsqrt() * &self.weight
    }
}

/// Rotary positions: each pair of features is turned by an angle that grows
/// with the position. The tables are computed, so they are no weights.
#[derive(Debug)]
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(device: Device) -> Self {
        let options = (Kind::Float, device);
        let exponents = Tensor::arange_start_step(0, HEAD_DIM, 2, options) / HEAD_DIM as f64;
        let frequencies = (exponents * -f64::ln(10_000.0)).exp();
        let angles = Tensor::arange(CONTEXT, options).outer(&frequencies);
        let angles = Tensor::cat(&[&angles, &angles], 1);
        Rotary { cos: angles.cos(), sin: angles.sin() }
    }

    fn turn(&self, x: &Tensor) -> Tensor {
        let time = x.size()[2];
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[&-&halves[1], &halves[0]], -1);
        x * self.cos.narrow(0, 0, time) + turned * self.sin.narrow(0, 0, time)
    }
}

fn linear(p: Path, inputs: i64, outputs: i64) -> nn::Linear {
    let normal = nn::Init::Randn { mean: 0.0, stdev: 0.02 };
    nn::linear(p, inputs, outputs, nn::LinearConfig { ws_init: normal, bs_init: None, bias: false })
}
