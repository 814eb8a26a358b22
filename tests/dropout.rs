//! Dropout on inputs is libtorch's own, bit by bit.
//!
//! One test: it needs the default generator for itself.

use tch::{Device, Kind, Tensor, nn};
use tch_peft::{Base, LoraConfig, LoraModel};

// With W = 0 and A = B = 1 the adapted linear is the dropout alone.
#[test]
fn what_is_kept_is_what_libtorch_keeps() {
    for (width, p) in [(1, 0.5), (7, 0.1), (16, 0.9), (40, 0.05), (256, 0.1)] {
        let vs = nn::VarStore::new(Device::Cpu);
        let linear = nn::linear(vs.root() / "h", width, width, nn::LinearConfig { bias: false, ..Default::default() });
        let _ = tch::no_grad(|| vs.trainable_variables()[0].zero_());
        let config = LoraConfig::builder().r(width).lora_alpha(width as f64).lora_dropout(p).target_modules(["h"]);
        let model = LoraModel::wrap(Base::from(vs), config.build().unwrap()).unwrap();
        for parameter in model.parameters() {
            tch::no_grad(|| parameter.tensor.shallow_clone().copy_(&Tensor::eye(width, (Kind::Float, Device::Cpu))));
        }
        for rows in [1, 5, 312, 700] {
            let x = Tensor::randn([rows, width], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            // Numbers of one word each, so that a pair may lie across two
            // states of the generator.
            let drawn = |dropout: &dyn Fn() -> Tensor| {
                tch::manual_seed(rows);
                let _ = Tensor::zeros([rows % 2 + 17], (Kind::Float, Device::Cpu)).uniform_(0.0, 1.0);
                let first = dropout();
                let second = dropout();
                let gradient = Tensor::run_backward(&[second.square().sum(Kind::Float)], &[&x], false, false).remove(0);
                // What the generator draws next shows its state.
                (first, second, gradient, Tensor::randn([40], (Kind::Float, Device::Cpu)))
            };
            let ours = drawn(&|| x.apply(&linear));
            let theirs = drawn(&|| x.dropout(p, true));
            let close = |a: &Tensor, b: &Tensor| assert!(a.allclose(b, 1e-5, 1e-6, false), "{width} {p} {rows}");
            close(&ours.0, &theirs.0);
            close(&ours.1, &theirs.1);
            close(&ours.2, &theirs.2);
            assert_eq!(ours.1.ne(0.0), theirs.1.ne(0.0));
            assert_eq!(ours.3, theirs.3, "{width} {p} {rows}");
        }
    }
}
