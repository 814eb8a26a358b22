//! Places for weights, and the layers that are the same in every block.

use super::Config;
use tch::nn::{self, Module, Path};
use tch::{Device, Kind, Tensor};

/// Where weights will be: tensors of the right sizes that are one expanded
/// element each until `Base::load_and_quantize` or `Base::load_quantized` fills
/// them.
pub struct Places<'a> {
    path: Path<'a>,
    kind: Kind,
}

impl<'a> Places<'a> {
    pub fn new(path: &Path<'a>, kind: Kind) -> Self {
        Places { path: path.clone(), kind }
    }

    pub fn sub(&self, name: impl ToString) -> Self {
        Places { path: self.path.sub(name), kind: self.kind }
    }

    pub fn device(&self) -> Device {
        self.path.device()
    }

    pub fn weight(&self, sizes: &[i64]) -> Tensor {
        self.place("weight", sizes)
    }

    /// `nn::Linear` of weight (outputs, inputs).
    pub fn linear(&self, inputs: i64, outputs: i64, bias: bool) -> nn::Linear {
        nn::Linear { ws: self.weight(&[outputs, inputs]), bs: bias.then(|| self.place("bias", &[outputs])) }
    }

    /// `nn::Linear` on the table of the embedding. It has a name of its own, under
    /// which some files keep the same values once more.
    pub fn tied(&self, table: &Tensor) -> nn::Linear {
        nn::Linear { ws: self.path.add("weight", table.shallow_clone(), true), bs: None }
    }

    fn place(&self, name: &str, sizes: &[i64]) -> Tensor {
        let element = Tensor::zeros([1], (self.kind, self.device()));
        self.path.add(name, element.expand(sizes, false), true)
    }
}

/// Division by the root of the mean square, computed in f32.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub fn new(p: &Places, width: i64, eps: f64) -> Self {
        RmsNorm { weight: p.weight(&[width]), eps }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim(-1, true, Kind::Float);
        (wide * (mean_square + self.eps).rsqrt()).to_kind(x.kind()) * &self.weight
    }
}

/// The gated feed-forward layer, SwiGLU.
#[derive(Debug)]
pub struct Mlp {
    gate_proj: nn::Linear,
    up_proj: nn::Linear,
    down_proj: nn::Linear,
}

impl Mlp {
    pub fn new(p: &Places, config: &Config) -> Self {
        let (narrow, wide, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        Mlp {
            gate_proj: p.sub("gate_proj").linear(narrow, wide, bias),
            up_proj: p.sub("up_proj").linear(narrow, wide, bias),
            down_proj: p.sub("down_proj").linear(wide, narrow, bias),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.down_proj.forward(&(self.gate_proj.forward(x).silu() * self.up_proj.forward(x)))
    }
}
