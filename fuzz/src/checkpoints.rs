//! A run's checkpoint: its manifest as it is, and its files behind a manifest
//! that vouches for them.

use super::{Target, contents};
use serde_json::json;
use std::path::Path;
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::checkpoint::{CheckpointFiles, latest, verify};
use tch_peft::{AdamW, Base, LoraConfig, LoraModel, Optimizer, Parts, QuantConfig, Run, Sampler, Schedule, Start};

const STEP: u64 = 2;
const FOLDER: &str = "checkpoint-00000002";

const FILES: [&str; 8] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "environment.json",
    "optimizer.safetensors",
    "parts.safetensors",
    "training_state.json",
    "manifest.json",
];

pub const CHECKPOINT: Target = Target {
    name: "checkpoint",
    files: FILES.split_at(7).0,
    seeds: |folder| vec![contents(&saved(folder), CHECKPOINT.files)],
    open: |folder| {
        let dir = folder.join("run").join(FOLDER);
        std::fs::create_dir_all(&dir).expect("a folder");
        let files = contents(folder, CHECKPOINT.files);
        super::write(&dir, CHECKPOINT.files, &files);
        vouch(&dir, &files);
        let mut training = Training::new();
        let Ok(Start::Resumed { step, .. }) = training.resume(&folder.join("run")) else { return false };
        assert_eq!(step, STEP);
        for p in training.model.parameters() {
            assert!(i64::try_from(p.tensor.isfinite().all()).is_ok_and(|all| all == 1), "{} is not finite", p.name);
        }
        true
    },
};

pub const MANIFEST: Target = Target {
    name: "manifest",
    files: &FILES,
    seeds: |folder| vec![contents(&saved(folder), &FILES)],
    open: |folder| {
        let dir = folder.join("run").join(FOLDER);
        std::fs::create_dir_all(&dir).expect("a folder");
        super::write(&dir, &FILES, &contents(folder, &FILES));
        let whole = verify(&dir).is_ok();
        assert_eq!(CheckpointFiles::read(&dir).is_ok(), whole);
        assert_eq!(latest(folder.join("run")).is_ok_and(|found| found.found.is_some()), whole);
        whole
    },
};

struct Training {
    model: LoraModel<nn::Linear>,
    optimizer: AdamW,
    schedule: Schedule,
    sampler: Sampler,
}

impl Training {
    fn new() -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let net = nn::linear(vs.root() / "fc", 16, 8, Default::default());
        for (i, (_, mut weight)) in
            vs.variables().into_iter().collect::<std::collections::BTreeMap<_, _>>().into_iter().enumerate()
        {
            let numbers = Tensor::arange(weight.numel() as i64, (Kind::Float, Device::Cpu)) * (37.0 + i as f64);
            tch::no_grad(|| weight.copy_(&((numbers.remainder(127) - 63) / 256).view_as(&weight)));
        }
        let quantized = QuantConfig::nf4().build().and_then(|config| Base::new(vs, net).quantize(&config));
        let config = LoraConfig::builder().r(2).target_modules(["fc"]).build().expect("a configuration");
        tch::manual_seed(1);
        let model = LoraModel::wrap(quantized.expect("a base"), config).expect("an adapter");
        let optimizer = AdamW::builder().lr(1e-2).build(model.trainable_parameters()).expect("an optimizer");
        Training {
            model,
            optimizer,
            schedule: Schedule::cosine(2, 20),
            sampler: Sampler::new(12, 4, 3).expect("a sampler"),
        }
    }

    fn resume(&mut self, run: &Path) -> tch_peft::Result<Start> {
        let mut parts = Parts::new(&mut self.model, &mut self.optimizer, &self.schedule, &mut self.sampler);
        Run::builder(run).build()?.resume_or_start(&mut parts)
    }
}

/// A checkpoint after two steps.
fn saved(folder: &Path) -> std::path::PathBuf {
    let mut training = Training::new();
    let mut run = Run::builder(folder.join("made")).every(STEP).build().expect("a run");
    let x = Tensor::arange(64, (Kind::Float, Device::Cpu)).view([4, 16]).sin();
    for step in 0..=STEP {
        if step > 0 {
            let _ = training.sampler.next_batch();
            training.model.module().forward(&x).square().sum(Kind::Float).backward();
            training.optimizer.step().expect("a step");
            training.optimizer.zero_grad().expect("no gradients");
        }
        let Training { model, optimizer, schedule, sampler } = &mut training;
        let mut parts = Parts::new(model, optimizer, schedule, sampler);
        match step {
            0 => drop(run.resume_or_start(&mut parts).expect("a start")),
            _ => drop(run.step(&mut parts).expect("a step")),
        }
    }
    folder.join("made").join(FOLDER)
}

/// Writes a manifest with the sizes and hashes of the files as they are.
fn vouch(dir: &Path, contents: &[Vec<u8>]) {
    let entries = CHECKPOINT.files.iter().zip(contents).filter(|(_, content)| !content.is_empty());
    let files: serde_json::Map<String, serde_json::Value> = entries
        .map(|(name, content)| {
            let hash = blake3::hash(content).to_hex().to_string();
            (name.to_string(), json!({"size": content.len(), "blake3": hash}))
        })
        .collect();
    let manifest = json!({"format": "tch-peft-checkpoint", "version": 1, "step": STEP, "files": files});
    let text = serde_json::to_string_pretty(&manifest).expect("JSON");
    let body = text.trim_end_matches("\n}");
    let seal = blake3::hash(body.as_bytes()).to_hex();
    std::fs::write(dir.join("manifest.json"), format!("{body},\n  \"seal\": \"{seal}\"\n}}")).expect("a manifest");
}
