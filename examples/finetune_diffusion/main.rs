//! Fine-tunes a diffusion transformer (SD3, Flux, Sana, AuraFlow) on a folder of
//! images: flow matching, with LoRA on a quantised base, as SimpleTuner does it.
//!
//! ```console
//! $ python python/export.py --from sd3/transformer --out exported/sd3 --input … # see docs/diffusion.md
//! $ python python/export.py --from sd3/vae --out exported/vae --input sample=normal:batch,3,1024,1024
//! $ python python/embed.py --from sd3 --images photos --out photos/embeds.safetensors
//! $ cargo run --release --example finetune_diffusion -- --model exported/sd3 --vae exported/vae \
//!       --images photos --embeds photos/embeds.safetensors --out runs/photos
//! ```
//!
//! Ctrl-C saves a checkpoint and ends; the same command goes on from there, to
//! the same bits as if it had never been stopped. So it does after a kill, from
//! the last checkpoint. `--out` holds in the end:
//!
//! | | |
//! |---|---|
//! | `pytorch_lora_weights.safetensors` | the adapter for diffusers' `load_lora_weights` |
//! | `checkpoint-…/` | what the run goes on from; each a folder of PEFT's |
//! | `latents-….safetensors` | the images' latents, made once |
//! | `metrics.csv`, `loss.png` | losses and learning rate; the losses as a picture |
//! | `events.out.tfevents…` | the same and images a second, for TensorBoard: `tensorboard --logdir runs` |

mod args;
mod conditions;
pub(crate) mod data;
pub(crate) mod denoiser;
pub(crate) mod flow;
pub(crate) mod images;
pub(crate) mod latents;
pub(crate) mod record;
mod train;

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
    training::run("finetune_diffusion", args::HELP, args::parse(arguments), train::train)
}
