//! Adapters: PEFT's folder, and files in all other layouts.

use super::{Target, contents};
use std::path::Path;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{
    AdapterConfig, AdapterFile, AdapterFormat, Base, LohaConfig, LokrConfig, LoraConfig, LoraModel, NamedParameter,
};

pub const PEFT: Target = Target {
    name: "adapter_peft",
    files: &["adapter_config.json", "adapter_model.safetensors"],
    seeds: |folder| seeds(folder, &[AdapterFormat::Peft], PEFT.files),
    open: |folder| open(&AdapterFile::new(folder)),
};

pub const FILE: Target = Target {
    name: "adapter_file",
    files: &["adapter.safetensors"],
    seeds: |folder| {
        let formats = [
            AdapterFormat::Diffusers,
            AdapterFormat::DiffusersOld,
            AdapterFormat::Kohya,
            AdapterFormat::ComfyUi,
            AdapterFormat::Lycoris,
        ];
        seeds(folder, &formats, FILE.files)
    },
    open: |folder| open(&AdapterFile::new(folder.join("adapter.safetensors"))),
};

/// A convolution and two linear layers, of which one's name is the end of the other's.
fn base() -> Base<nn::Sequential> {
    let vs = nn::VarStore::new(Device::Cpu);
    let root = vs.root();
    let padded = nn::ConvConfig { padding: 1, ..Default::default() };
    let net = nn::seq()
        .add(nn::conv2d(&root / "conv_in", 2, 4, 3, padded))
        .add_fn(|x| x.flatten(1, -1))
        .add(nn::linear(&root / "blocks" / "0" / "to_q", 36, 6, Default::default()))
        .add(nn::linear(&root / "to_q", 6, 6, Default::default()));
    Base::new(vs, net)
}

fn input() -> Tensor {
    Tensor::arange(18, (Kind::Float, Device::Cpu)).view([1, 2, 3, 3]).sin()
}

fn seeds(folder: &Path, formats: &[AdapterFormat], names: &[&str]) -> Vec<Vec<Vec<u8>>> {
    let target = ["conv_in", "to_q"];
    let lora = || LoraConfig::builder().r(2).lora_alpha(0.3).target_modules(target);
    let loha = || LohaConfig::builder().r(2).alpha(3.0).target_modules(target);
    let lokr = || LokrConfig::builder().r(1).alpha(0.5).target_modules(target);
    let configs: [Option<AdapterConfig>; 8] = [
        lora().build().ok().map(Into::into),
        lora().use_rslora(true).rank_pattern([("conv_in", 1)]).build().ok().map(Into::into),
        lora().use_dora(true).build().ok().map(Into::into),
        loha().build().ok().map(Into::into),
        loha().use_effective_conv2d(true).build().ok().map(Into::into),
        lokr().decompose_both(true).build().ok().map(Into::into),
        lokr().r(36).build().ok().map(Into::into),
        lokr().w1_pattern([("blocks.0.to_q", [2, 6])]).use_effective_conv2d(true).build().ok().map(Into::into),
    ];
    let mut seeds = Vec::new();
    for config in configs {
        let model = LoraModel::wrap(base(), config.expect("a valid configuration")).expect("an adapter");
        fill(model.trainable_parameters());
        for format in formats {
            let component = if *format == AdapterFormat::Lycoris { "" } else { "unet" };
            let path = match format {
                AdapterFormat::Peft => folder.to_path_buf(),
                _ => folder.join(names[0]),
            };
            // Not every layout holds every adapter.
            if model.save_as("default", *format, AdapterFile::new(path).component(component)).is_ok() {
                seeds.push(contents(folder, names));
            }
        }
    }
    seeds
}

fn fill(parameters: Vec<NamedParameter>) {
    let _no_grad = tch::no_grad_guard();
    for mut p in parameters {
        let values = (Tensor::arange(p.tensor.numel() as i64, (Kind::Float, Device::Cpu)) * 0.37).cos();
        p.tensor.copy_(&values.view_as(&p.tensor));
    }
}

fn open(file: &AdapterFile) -> bool {
    let names = ["conv_in.weight", "blocks.0.to_q.weight", "to_q.weight"].map(String::from);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let _ = file.detect();
    for weights in [&names[..], &[]] {
        let _ = file.convert(AdapterFormat::Peft, folder.path().join("converted"), weights);
    }
    let Ok(model) = LoraModel::from_pretrained(base(), file.clone()) else { return false };
    assert_eq!(model.module().forward(&input()).size(), [1, 6]);
    let saved = folder.path().join("saved");
    model.save_pretrained(&saved).expect("saved again");
    let again = LoraModel::from_pretrained(base(), &saved).expect("loaded again");
    let settings = |model: &LoraModel<nn::Sequential>| model.config().layer_settings(model.layers());
    assert_eq!(settings(&again), settings(&model));
    for (one, other) in model.parameters().iter().zip(again.parameters()) {
        assert_eq!(one.name, other.name);
        assert!(i64::try_from(one.tensor.isfinite().all()).is_ok_and(|all| all == 1), "{} is not finite", one.name);
        assert!(one.tensor.equal(&other.tensor), "{} is another when loaded again", one.name);
    }
    true
}
