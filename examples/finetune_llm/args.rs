//! The command line.

use super::Result;
use super::training::args::{Options, given};
use super::training::options::dtype;
use lexopt::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
use tch::{Device, Kind};
use tch_peft::QuantConfig;

pub const HELP: &str = "\
Fine-tunes a model with LoRA on its quantised weights. Ctrl-C saves and ends;
the same command goes on.

Usage: finetune_llm --model DIR --data FILE --out DIR [OPTIONS]

  --model DIR         Hugging Face folder: config.json, *.safetensors, tokenizer.json
  --data FILE         Text, or .jsonl with a line {\"text\": …} or
                      {\"prompt\": …, \"completion\": …} for each example
  --eval FILE         What to evaluate on (the last twentieth of the data)
  --out DIR           The run's folder

  --dtype NAME        f32 or bf16, of all that is not packed (the model's)
  --length N          Tokens of an example at most (512)

By default the scheme is nf4, with double quantisation, the targets are all linear
layers of attention and MLP, and the device is cuda where there is one.
";

/// What the program is asked to do.
pub struct Args {
    pub model: PathBuf,
    pub data: PathBuf,
    pub eval: Option<PathBuf>,
    pub dtype: Option<Kind>,
    pub length: usize,
    pub device: Device,
    pub options: Options,
}

/// Reads the command line; `None` if help is wanted.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Args>> {
    let targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";
    let mut args = Args {
        model: PathBuf::new(),
        data: PathBuf::new(),
        eval: None,
        dtype: None,
        length: 512,
        device: Device::cuda_if_available(),
        options: Options::new(QuantConfig::nf4().double_quant(true), targets),
    };
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Long("model") => args.model = parser.value()?.into(),
            Long("data") => args.data = parser.value()?.into(),
            Long("eval") => args.eval = Some(parser.value()?.into()),
            Long("dtype") => args.dtype = Some(parser.value()?.parse_with(dtype)?),
            Long("length") => args.length = parser.value()?.parse()?,
            Long(name) => {
                let name = name.to_string();
                args.options.take(&name, &mut parser)?;
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    given("--model", &args.model)?;
    given("--data", &args.data)?;
    args.options.check()?;
    args.device = args.options.device.unwrap_or(args.device);
    match args.length {
        0 => Err("--length: expected a number above 0".into()),
        _ => Ok(Some(args)),
    }
}
