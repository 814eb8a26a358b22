//! Every kind of layer and variant against HF PEFT: outputs, gradients of the input and of every
//! adapter tensor, and a few training steps, on dense and quantised bases, in f32 and bf16.
//!
//! The bases are TorchScript exports; tests/python/layers_reference.py makes them and PEFT's record.

mod common;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::follow::{self, follow_steps};
use common::{device, read, rng};
use tch_peft::{Base, InitLoraWeights, LoraConfig, LoraModel};

fn fixtures() -> Option<&'static Path> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let prefixes = ["conv", "embedding", "linear", "gpt", "dora", "init"];
    MADE.get_or_init(|| follow::make("layers", &prefixes)).as_deref()
}

/// Follows PEFT's record of the cases that start with `prefix`.
fn follow(prefix: &str) {
    let (Some(dir), _rng) = (fixtures(), rng()) else { return };
    follow::follow(dir, prefix);
}

#[test]
fn convolutions_follow_peft() {
    follow("conv");
}

#[test]
fn embeddings_follow_peft() {
    follow("embedding");
}

#[test]
fn linears_follow_peft() {
    follow("linear");
}

#[test]
fn transposed_weights_follow_peft() {
    follow("gpt");
}

#[test]
fn dora_follows_peft() {
    follow("dora");
}

/// The initialisations that are taken out of the base: a new adapter starts as PEFT's does, and
/// loading one takes the same part out of the base again.
#[test]
fn initialisations_follow_peft() {
    follow("init");
    let Some(dir) = fixtures() else { return };
    for (case, init, targets, turned) in [
        ("init_pissa", InitLoraWeights::Pissa, vec!["up"], false),
        ("init_olora", InitLoraWeights::Olora, vec!["up"], false),
        ("init_pissa_gpt", InitLoraWeights::Pissa, vec!["c_fc", "c_proj"], true),
    ] {
        let folder = dir.join(format!("{case}-dense-float32"));
        let record = read(folder.join("record.safetensors"));
        let config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(targets).fan_in_fan_out(turned);
        let config = config.init_lora_weights(init).build().unwrap();
        let base = || Base::torchscript_on_device(folder.join("model.pt"), device()).unwrap();
        let before = base().fingerprint().unwrap();
        let mut model = LoraModel::wrap(base(), config.clone()).unwrap();
        // The base's identity is that of what is left of it, and the same for every new start.
        let after = model.base().fingerprint().unwrap();
        assert_ne!(after, before, "{case}");
        assert_eq!(LoraModel::wrap(base(), config.clone()).unwrap().base().fingerprint().unwrap(), after, "{case}");
        assert!(model.add_adapter("second", config).is_err(), "{case}: the base can't be changed twice");
        follow_steps(case, &mut model, &record, 1e-5);
    }
}
