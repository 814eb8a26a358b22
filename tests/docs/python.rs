//! Python blocks are run, one after the other, in a folder with what they load.

use super::common;
use super::texts::Text;
use serde_json::json;
use tch::{Device, nn};
use tch_peft::{AdapterFile, AdapterFormat, Base, LoraConfig, LoraModel};

#[test]
fn every_python_block_runs() {
    if common::python().is_none() {
        return;
    }
    let blocks = Text::blocks("python");
    assert!(!blocks.is_empty());
    let dir = common::fresh_dir("docs_python");
    // The network of README.md, and an adapter on it.
    let vs = nn::VarStore::new(Device::Cpu);
    let _up = nn::linear(vs.root() / "up", 64, 256, Default::default());
    let _down = nn::linear(vs.root() / "down", 256, 64, Default::default());
    vs.save(dir.join("base.safetensors")).unwrap();
    let config = LoraConfig::builder().r(4).target_modules(["up", "down"]).init_lora_weights(false).build().unwrap();
    let model = LoraModel::wrap(Base::from(vs), config).unwrap();
    model.save_pretrained(dir.join("adapter")).unwrap();
    model
        .save_as("default", AdapterFormat::Diffusers, AdapterFile::new(dir.join("lora")).component("transformer"))
        .unwrap();
    let list: Vec<_> = blocks.iter().map(|b| json!({"place": b.place(), "text": b.text})).collect();
    let file = dir.join("blocks.json");
    std::fs::write(&file, json!(list).to_string()).unwrap();
    common::peer("docs_blocks.py", &[&file]);
}
