//! The twin of `Net` in tests/python/mirror.py.

#![allow(dead_code, missing_docs)]

use crate::common::device;
use std::path::Path;
use tch::Tensor;
use tch::nn::{self, Module};
use tch_peft::Base;

pub const VOCABULARY: i64 = 23;
pub const WIDTH: i64 = 16;
pub const HIDDEN: i64 = 24;
pub const LAYERS: usize = 2;

#[derive(Debug)]
pub struct Block {
    pub norm: nn::LayerNorm,
    pub q_proj: nn::Linear,
    pub v_proj: nn::Linear,
    pub fc: nn::Linear,
}

/// The twin of `Net` in mirror.py.
#[derive(Debug)]
pub struct Net {
    pub embed: nn::Embedding,
    pub h: Vec<Block>,
    pub head: nn::Linear,
}

impl Net {
    pub fn new(vs: &nn::Path) -> Self {
        let no_bias = nn::LinearConfig { bias: false, ..Default::default() };
        let block = |p: nn::Path| Block {
            norm: nn::layer_norm(&p / "norm", vec![WIDTH], Default::default()),
            q_proj: nn::linear(&p / "q_proj", WIDTH, HIDDEN, Default::default()),
            v_proj: nn::linear(&p / "v_proj", WIDTH, HIDDEN, no_bias),
            fc: nn::linear(&p / "fc", HIDDEN, WIDTH, Default::default()),
        };
        Net {
            embed: nn::embedding(vs / "embed", VOCABULARY, WIDTH, Default::default()),
            h: (0..LAYERS).map(|i| block(vs / "h" / i)).collect(),
            head: nn::linear(vs / "head", WIDTH, VOCABULARY, no_bias),
        }
    }

    /// With the weights of the PyTorch twin.
    pub fn load(dir: &Path) -> Base<Net> {
        let mut vs = nn::VarStore::new(device());
        let net = Net::new(&vs.root());
        vs.load(dir.join("net.safetensors")).unwrap();
        Base::new(vs, net)
    }
}

impl Module for Net {
    fn forward(&self, ids: &Tensor) -> Tensor {
        let mut x = ids.apply(&self.embed);
        for block in &self.h {
            let h = x.apply(&block.norm);
            let gated = h.apply(&block.q_proj).gelu("none") * h.apply(&block.v_proj);
            // Not in place: the norm's backward needs what x was.
            x = &x + gated.apply(&block.fc);
        }
        x.apply(&self.head)
    }
}
