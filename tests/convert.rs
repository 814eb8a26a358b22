//! The example that converts adapters and quantised models, run as a function.

mod common;

#[allow(dead_code)]
#[path = "../examples/convert.rs"]
mod example;

use std::path::{Path, PathBuf};

use common::{assert_close, assert_same, read, rng};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{AdapterFile, AdapterFormat, Base, LoraConfig, LoraModel, TorchScript};

/// A linear layer `blocks.0.to_q`, another one `to_q`, as a TorchScript module.
fn module(dir: &Path) -> PathBuf {
    let path = dir.join("model.pt");
    if !path.exists() {
        let script = "
import sys, torch
from torch import nn
torch.manual_seed(0)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(64, 64)
    def forward(self, x):
        return self.to_q(x)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.to_q = nn.Linear(64, 64)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.to_q(x)
torch.jit.script(Net()).save(sys.argv[1])
";
        let script_path = dir.join("module.py");
        std::fs::write(&script_path, script).unwrap();
        common::peer(script_path.to_str().unwrap(), &[&path]);
    }
    path
}

fn load(path: &Path) -> Base<TorchScript> {
    Base::torchscript(path).unwrap()
}

fn convert(args: &[&str]) -> Result<Vec<String>, String> {
    example::run(args).map_err(|error| error.to_string())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn input() -> Tensor {
    Tensor::arange(128, (Kind::Float, Device::Cpu)).view([2, 64]).sin()
}

/// Round the circle of layouts, each step by the example, the model knows nothing of it.
#[test]
fn an_adapter_goes_through_every_layout_and_back() {
    let (Some(_), _rng) = (common::python(), rng()) else { return };
    let dir = common::fresh_dir("convert");
    let module = module(&dir);
    let config = LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(["to_q"]).rank_pattern([("^to_q", 2)]);
    let model = LoraModel::wrap(load(&module), config.build().unwrap()).unwrap();
    tch::no_grad(|| {
        for mut p in model.trainable_parameters() {
            let _ = p.tensor.normal_(0.0, 0.2);
        }
    });
    model.save_pretrained(dir.join("start")).unwrap();
    let expected = model.forward(&input()).unwrap();

    let at = |name: &str| dir.join(name);
    let steps: [(&str, &str, &str, &[&str]); 6] = [
        ("start", "one.safetensors", "diffusers", &["--component", "transformer"]),
        ("one.safetensors", "two.safetensors", "comfyui", &[]),
        ("two.safetensors", "three.safetensors", "kohya", &[]),
        ("three.safetensors", "four", "peft", &["--base", "model.pt"]),
        ("four", "five.safetensors", "diffusers-old", &["--component", "unet"]),
        ("five.safetensors", "six", "peft", &[]),
    ];
    for (from, to, layout, more) in steps {
        let (from_path, to_path, base) = (at(from), at(to), at("model.pt"));
        let more = more.iter().map(|arg| if *arg == "model.pt" { text(&base) } else { arg });
        let args: Vec<&str> =
            ["adapter", text(&from_path), text(&to_path), "--to", layout].into_iter().chain(more).collect();
        let told = convert(&args).unwrap();
        assert!(told[0].starts_with("read"), "{told:?}");
        let loaded = LoraModel::from_pretrained(load(&module), to_path).unwrap();
        assert_eq!(loaded.layers(), ["blocks.0.to_q", "to_q"], "{to}");
        assert_close(to, &loaded.forward(&input()).unwrap(), &expected, 1e-6);
    }
    let [start, end] = ["start", "four"].map(|name| read(at(name).join("adapter_model.safetensors")));
    for (key, tensor) in &start {
        assert_same(key, &end[key], tensor);
    }

    // Two parts of a pipeline in one file, and LyCORIS' names.
    let other = at("other.safetensors");
    convert(&[
        "adapter",
        text(&at("two.safetensors")),
        text(&other),
        "--to",
        "diffusers",
        "--component",
        "text_encoder",
    ])
    .unwrap();
    let told = convert(&["join", text(&at("joined.safetensors")), text(&at("one.safetensors")), text(&other)]).unwrap();
    assert!(told[0].contains("components: text_encoder, transformer"), "{told:?}");
    let lycoris = at("lycoris.safetensors");
    convert(&["adapter", text(&at("two.safetensors")), text(&lycoris), "--to", "lycoris"]).unwrap();
    assert!(read(&lycoris).contains_key("lycoris_blocks_0_to_q.lora_down.weight"));
    let loaded = LoraModel::from_pretrained(load(&module), lycoris).unwrap();
    assert_close("lycoris", &loaded.forward(&input()).unwrap(), &expected, 1e-6);

    // kohya's names need the base's.
    let error = convert(&["adapter", text(&at("three.safetensors")), text(&at("x")), "--to", "peft"]).unwrap_err();
    assert!(error.contains("the names of the base's weights"), "{error}");
    assert!(!at("x").exists());
    // PEFT's folder read without a model must have the rank that its configuration says.
    let folder = at("start");
    let text_of = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    std::fs::write(folder.join("adapter_config.json"), text_of.replace("\"r\": 4", "\"r\": 3")).unwrap();
    let error = AdapterFile::new(&folder).convert(AdapterFormat::Kohya, at("x.safetensors"), &[]).unwrap_err();
    assert!(error.to_string().contains("rank 3"), "{error}");
}

#[test]
fn a_quantised_model_is_written_anew() {
    let (Some(_), _rng) = (common::python(), rng()) else { return };
    let dir = common::fresh_dir("convert_model");
    let module = module(&dir);
    let at = |name: &str| dir.join(name);
    let (module, first, second) = (text(&module).to_string(), at("first"), at("second"));
    convert(&["model", text(&first), "--module", &module, "--scheme", "nf4-double"]).unwrap();
    let told = convert(&["model", text(&first), text(&second), "--module", &module]).unwrap();
    assert!(told[0].contains("2 packed weights"), "{told:?}");
    let [one, two] = [&first, &second].map(|folder| read(folder.join("model.safetensors")));
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    for (key, tensor) in &one {
        assert_same(key, &two[key], tensor);
    }
    assert!(one.contains_key("to_q.weight.quant_state.bitsandbytes__nf4"), "{:?}", one.keys());
    // The names of a packed model tell those of a kohya file.
    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root() / "to_q", 64, 64, Default::default());
    let config = LoraConfig::builder().r(2).target_modules(["to_q"]).build().unwrap();
    let model = LoraModel::wrap(Base::new(vs, net), config).unwrap();
    let _ = model.module().forward(&input());
    let kohya = at("kohya.safetensors");
    model.save_as("default", AdapterFormat::Kohya, &kohya).unwrap();
    convert(&["adapter", text(&kohya), text(&at("peft")), "--to", "peft", "--base", text(&first)]).unwrap();
    let keys = read(at("peft/adapter_model.safetensors"));
    assert_eq!(
        keys.keys().collect::<Vec<_>>(),
        ["base_model.model.to_q.lora_A.weight", "base_model.model.to_q.lora_B.weight"]
    );
    assert!(convert(&["model", "x"]).unwrap_err().contains("usage"));
}
