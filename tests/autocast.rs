//! Adapted weights under autocast, against libtorch's own operators under it.

mod common;

use common::device;
use tch::nn::{self, Module};
use tch::{Kind, Tensor};
use tch_peft::{Autocast, Base, LoraConfig, LoraModel, QuantConfig};

const SCALE: f64 = 2.0;

/// A convolution and a linear layer behind it.
#[derive(Debug)]
struct Net {
    conv: nn::Conv2D,
    linear: nn::Linear,
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.apply(&self.conv).relu().mean_dim([2i64, 3].as_slice(), false, None::<Kind>).apply(&self.linear)
    }
}

fn near(name: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.kind(), expected.kind(), "{name}");
    let norm = |t: Tensor| f64::try_from(t.to_kind(Kind::Double).norm()).unwrap();
    let error = norm(found - expected) / norm(expected.shallow_clone());
    assert!(error < tolerance, "{name}: {error}");
}

#[test]
fn products_are_taken_in_autocasts_dtype() {
    for (kind, tolerance) in [(Kind::BFloat16, 2e-2), (Kind::Half, 4e-3)] {
        for quantized in [false, true] {
            tch::manual_seed(3);
            let vs = nn::VarStore::new(device());
            let net = Net {
                conv: nn::conv2d(vs.root() / "conv", 3, 64, 3, nn::ConvConfig { padding: 1, ..Default::default() }),
                linear: nn::linear(vs.root() / "linear", 64, 32, Default::default()),
            };
            let weights = vs.variables();
            let mut base = Base::new(vs, net);
            if quantized {
                base = base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
            }
            // The values that the base computes with.
            let weight = |name: &str| tch::no_grad(|| &weights[name] * 1.0);
            let [conv_w, conv_b, linear_w, linear_b] =
                ["conv.weight", "conv.bias", "linear.weight", "linear.bias"].map(weight);
            let config = LoraConfig::builder().r(4).lora_alpha(4.0 * SCALE).target_modules(["conv", "linear"]);
            let model = LoraModel::wrap(base, config.build().unwrap()).unwrap();
            // Two copies of A and B: ours and those of the formula.
            let mut copies = std::collections::BTreeMap::new();
            for parameter in model.parameters() {
                let value = Tensor::randn(parameter.tensor.size(), (Kind::Float, device())) * 0.2;
                tch::no_grad(|| parameter.tensor.shallow_clone().copy_(&value));
                copies.insert(parameter.name.clone(), value.set_requires_grad(true));
            }
            let copy = |end: &str| copies.iter().find(|(name, _)| name.contains(end)).unwrap().1;
            let x = Tensor::randn([4, 3, 10, 10], (Kind::Float, device()));

            let formula = || {
                let conv = |x: &Tensor, w: &Tensor, b: Option<&Tensor>, pad: i64| x.conv2d(w, b, 1, pad, 1, 1);
                let low = conv(&x, copy("conv.lora_A"), None, 1);
                let h = conv(&x, &conv_w, Some(&conv_b), 1) + conv(&low, copy("conv.lora_B"), None, 0) * SCALE;
                let h = h.relu().mean_dim([2i64, 3].as_slice(), false, None::<Kind>);
                let low = h.linear(copy("linear.lora_A"), None::<&Tensor>);
                h.linear(&linear_w, Some(&linear_b)) + low.linear(copy("linear.lora_B"), None::<&Tensor>) * SCALE
            };
            let (ours, theirs) = {
                let _autocast = Autocast::new(device(), kind).unwrap();
                (model.forward(&x).unwrap(), formula())
            };
            let name = format!("{kind:?}, quantised {quantized}");
            assert_eq!(ours.kind(), kind, "{name}");
            near(&name, &ours, &theirs, tolerance);
            for y in [&ours, &theirs] {
                y.to_kind(Kind::Float).square().sum(Kind::Float).backward();
            }
            for parameter in model.parameters() {
                let name = format!("{name}: {}", parameter.name);
                near(&name, &parameter.tensor.grad(), &copies[&parameter.name].grad(), tolerance);
            }
        }
    }
}
