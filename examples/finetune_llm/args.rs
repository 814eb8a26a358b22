//! The command line.

use super::Result;
use super::llama::options::{device, dtype, scheme};
use lexopt::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
use tch::{Device, Kind};
use tch_peft::QuantConfigBuilder;

pub const HELP: &str = "\
Fine-tunes a model with LoRA on its quantised weights. Ctrl-C saves and ends;
the same command goes on.

Usage: finetune_llm --model DIR --data FILE --out DIR [OPTIONS]

  --model DIR         Hugging Face folder: config.json, *.safetensors, tokenizer.json
  --data FILE         Text, or .jsonl with a line {\"text\": …} or
                      {\"prompt\": …, \"completion\": …} for each example
  --eval FILE         What to evaluate on (the last twentieth of the data)
  --out DIR           The run's folder

  --scheme NAME       nf4, fp4, int8, int4, int2, fp8; none: as it is in the files (nf4)
  --dtype NAME        f32 or bf16, of all that is not packed (the model's)
  --device NAME       cpu or cuda (cuda where there is one)
  --r N               Rank (16)
  --alpha X           lora_alpha (32)
  --dropout X         lora_dropout (0.05)
  --targets A,B,…     target_modules (all linear layers of attention and MLP)

  --steps N           Optimizer steps (1000)
  --batch N           Examples of a step (4)
  --length N          Tokens of an example at most (512)
  --lr X              Highest learning rate (1e-4), by a cosine with warmup
  --every N           Steps between checkpoints (100)
  --eval-every N      Steps between evaluations (100)
  --seed N            Of the adapter's values and the data's order (0)
  -h, --help          This text";

/// What the program is asked to do.
pub struct Args {
    pub model: PathBuf,
    pub data: PathBuf,
    pub eval: Option<PathBuf>,
    pub out: PathBuf,
    pub quantize: Option<QuantConfigBuilder>,
    pub dtype: Option<Kind>,
    pub device: Device,
    pub r: i64,
    pub alpha: f64,
    pub dropout: f64,
    pub targets: Vec<String>,
    pub steps: u64,
    pub batch: usize,
    pub length: usize,
    pub lr: f64,
    pub every: u64,
    pub eval_every: u64,
    pub seed: u64,
}

/// Reads the command line; `None` if help is wanted.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Args>> {
    let mut args = Args {
        model: PathBuf::new(),
        data: PathBuf::new(),
        eval: None,
        out: PathBuf::new(),
        quantize: scheme("nf4")?,
        dtype: None,
        device: Device::cuda_if_available(),
        r: 16,
        alpha: 32.0,
        dropout: 0.05,
        targets: list("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
        steps: 1000,
        batch: 4,
        length: 512,
        lr: 1e-4,
        every: 100,
        eval_every: 100,
        seed: 0,
    };
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Long("model") => args.model = parser.value()?.into(),
            Long("data") => args.data = parser.value()?.into(),
            Long("eval") => args.eval = Some(parser.value()?.into()),
            Long("out") => args.out = parser.value()?.into(),
            Long("scheme") => args.quantize = scheme(&parser.value()?.string()?)?,
            Long("dtype") => args.dtype = Some(parser.value()?.parse_with(dtype)?),
            Long("device") => args.device = parser.value()?.parse_with(device)?,
            Long("r") => args.r = parser.value()?.parse()?,
            Long("alpha") => args.alpha = parser.value()?.parse()?,
            Long("dropout") => args.dropout = parser.value()?.parse()?,
            Long("targets") => args.targets = list(&parser.value()?.string()?),
            Long("steps") => args.steps = parser.value()?.parse()?,
            Long("batch") => args.batch = parser.value()?.parse()?,
            Long("length") => args.length = parser.value()?.parse()?,
            Long("lr") => args.lr = parser.value()?.parse()?,
            Long("every") => args.every = parser.value()?.parse()?,
            Long("eval-every") => args.eval_every = parser.value()?.parse()?,
            Long("seed") => args.seed = parser.value()?.parse()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    for (option, path) in [("--model", &args.model), ("--data", &args.data), ("--out", &args.out)] {
        if path.as_os_str().is_empty() {
            return Err(format!("{option} is missing; see --help").into());
        }
    }
    if args.length == 0 || args.steps == 0 || args.eval_every == 0 {
        return Err("--length, --steps and --eval-every: expected numbers above 0".into());
    }
    Ok(Some(args))
}

fn list(names: &str) -> Vec<String> {
    names.split(',').map(String::from).collect()
}
