//! Fine-tunes a Llama, Mistral, Qwen2 or Qwen3 from a Hugging Face folder on a
//! JSONL or text file: LoRA on a quantised base.
//!
//! ```console
//! $ cargo run --release --example finetune_llm -- --model Qwen3-0.6B --data notes.jsonl --out runs/notes
//! ```
//!
//! Ctrl-C saves a checkpoint and ends; the same command goes on from there, to
//! the same bits as if it had never been stopped. So it does after a kill, from
//! the last checkpoint. `--out` holds in the end:
//!
//! | | |
//! |---|---|
//! | `adapter/` | the adapter, for PEFT or `LoraModel::from_pretrained` |
//! | `checkpoint-…/` | what the run goes on from |
//! | `metrics.csv`, `loss.png` | losses and learning rate; the losses as a picture |
//! | `events.out.tfevents…` | the same and tokens a second, for TensorBoard: `tensorboard --logdir runs` |

mod args;
pub(crate) mod data;
mod train;

#[path = "../llama/mod.rs"]
pub(crate) mod llama;
#[path = "../training/mod.rs"]
pub(crate) mod training;

pub(crate) use training::Result;

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(run(std::env::args_os().skip(1)))
}

/// The program with these arguments, and its exit code.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    training::run("finetune_llm", args::HELP, args::parse(arguments), train::train)
}
