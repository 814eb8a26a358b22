//! The options that every run has.

use super::Result;
use super::options::{device, scheme};
use lexopt::{Parser, ValueExt};
use std::path::{Path, PathBuf};
use tch::Device;
use tch_peft::{LoraConfig, LoraConfigBuilder, QuantConfigBuilder, Schedule};

/// Of the options here; defaults that differ are told by each program.
pub const HELP: &str = "
  --scheme NAME       nf4, fp4, int8, int4, int2, fp8; none: as it is in the files
  --device NAME       cpu or cuda
  --r N               Rank (16)
  --alpha X           lora_alpha (32)
  --dropout X         lora_dropout (0.05)
  --targets A,B,…     target_modules

  --steps N           Optimizer steps (1000)
  --batch N           Examples of a step (4)
  --lr X              Highest learning rate (1e-4), by a cosine with warmup
  --every N           Steps between checkpoints (100)
  --eval-every N      Steps between evaluations (100)
  --seed N            Of all that is random (0)
  -h, --help          This text";

/// What a run is made with.
pub struct Options {
    pub out: PathBuf,
    pub quantize: Option<QuantConfigBuilder>,
    pub device: Option<Device>,
    pub r: i64,
    pub alpha: f64,
    pub dropout: f64,
    pub targets: Vec<String>,
    pub steps: u64,
    pub batch: usize,
    pub lr: f64,
    pub every: u64,
    pub eval_every: u64,
    pub seed: u64,
}

impl Options {
    /// The defaults.
    pub fn new(quantize: QuantConfigBuilder, targets: &str) -> Self {
        Options {
            out: PathBuf::new(),
            quantize: Some(quantize),
            device: None,
            r: 16,
            alpha: 32.0,
            dropout: 0.05,
            targets: list(targets),
            steps: 1000,
            batch: 4,
            lr: 1e-4,
            every: 100,
            eval_every: 100,
            seed: 0,
        }
    }

    /// Takes the value of the long option of this name.
    pub fn take(&mut self, name: &str, parser: &mut Parser) -> Result<()> {
        match name {
            "out" => self.out = parser.value()?.into(),
            "scheme" => self.quantize = scheme(&parser.value()?.string()?)?,
            "device" => self.device = Some(parser.value()?.parse_with(device)?),
            "r" => self.r = parser.value()?.parse()?,
            "alpha" => self.alpha = parser.value()?.parse()?,
            "dropout" => self.dropout = parser.value()?.parse()?,
            "targets" => self.targets = list(&parser.value()?.string()?),
            "steps" => self.steps = parser.value()?.parse()?,
            "batch" => self.batch = parser.value()?.parse()?,
            "lr" => self.lr = parser.value()?.parse()?,
            "every" => self.every = parser.value()?.parse()?,
            "eval-every" => self.eval_every = parser.value()?.parse()?,
            "seed" => self.seed = parser.value()?.parse()?,
            other => return Err(format!("no option --{other}; see --help").into()),
        }
        Ok(())
    }

    /// Refuses what can't be run.
    pub fn check(&self) -> Result<()> {
        given("--out", &self.out)?;
        if self.steps == 0 || self.eval_every == 0 {
            return Err("--steps and --eval-every: expected numbers above 0".into());
        }
        Ok(())
    }

    /// The adapter to train, on a base of this name.
    pub fn lora(&self, base: &Path) -> LoraConfigBuilder {
        LoraConfig::builder()
            .r(self.r)
            .lora_alpha(self.alpha)
            .lora_dropout(self.dropout)
            .target_modules(self.targets.clone())
            .base_model_name_or_path(&base.to_string_lossy())
    }

    pub fn schedule(&self) -> Schedule {
        Schedule::cosine(self.steps / 20, self.steps)
    }
}

/// Refuses an option that was left out.
pub fn given(option: &str, path: &Path) -> Result<()> {
    match path.as_os_str().is_empty() {
        true => Err(format!("{option} is missing; see --help").into()),
        false => Ok(()),
    }
}

fn list(names: &str) -> Vec<String> {
    names.split(',').map(String::from).collect()
}
