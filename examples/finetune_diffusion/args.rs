//! The command line.

use super::Result;
use super::flow::{Flow, Spread};
use super::record::Place;
use super::training::args::{Options, given};
use super::training::options::dtype;
use lexopt::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
use tch::Device;
use tch_peft::QuantConfig;

pub const HELP: &str = "\
Fine-tunes a diffusion transformer with LoRA on its quantised weights, by flow
matching. Ctrl-C saves and ends; the same command goes on.

Usage: finetune_diffusion --model DIR --images DIR --vae DIR --embeds FILE --out DIR [OPTIONS]

  --model DIR         The transformer, exported by python/export.py
  --images DIR        PNG and JPEG files
  --vae DIR           The VAE, exported by python/export.py; its input's size is
                      that of all images, which are scaled and cut to it
  --cache DIR         Where latents are kept (the run's folder)
  --latents FILE      Latents made elsewhere, in place of images and VAE: a tensor
                      (channels, height, width) for each image, by its name
  --embeds FILE       What the prompts are encoded to, made by python/embed.py: for
                      each image and input of the model a tensor NAME.INPUT; or
                      INPUT, for all images
  --unconditional     Zeros in place of prompts
  --held-out N        Images that are not learnt from, but evaluated on (0)
  --out DIR           The run's folder
  --init-lora FILE    Adapter to begin with, of diffusers, SimpleTuner, kohya, …;
                      rank, alpha and targets are the file's

  --sigmas NAME       How noise levels are spread: logit-normal, uniform (logit-normal)
  --shift X           Shifts them to more noise, as SimpleTuner's flow_schedule_shift (3)
  --guidance X        Of models that take it as an input (1)
  --dtype NAME        f32 or bf16: of activations, and of weights that aren't packed

By default the scheme is int8, and the targets are SimpleTuner's: to_k, to_q, to_v
and to_out.0. Norms and embeddings, the first and the last layer stay dense. The
device is cuda where there is one, and the dtype that of the export.
";

/// What the program is asked to do.
pub struct Args {
    pub model: PathBuf,
    pub source: Source,
    pub embeds: Option<PathBuf>,
    pub held_out: usize,
    pub init_lora: Option<PathBuf>,
    pub flow: Flow,
    pub guidance: f64,
    pub place: Place,
    pub options: Options,
}

/// Where latents come from.
pub enum Source {
    Images { images: PathBuf, vae: PathBuf, cache: PathBuf },
    File(PathBuf),
}

/// Reads the command line; `None` if help is wanted.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Args>> {
    let (mut model, mut images, mut vae) = (PathBuf::new(), PathBuf::new(), PathBuf::new());
    let (mut cache, mut latents, mut embeds, mut init_lora) = (None, None, None, None);
    let (mut unconditional, mut held_out, mut guidance) = (false, 0, 1.0);
    let mut kind = None;
    let mut flow = Flow { spread: Spread::LogitNormal, shift: 3.0 };
    let mut options = Options::new(QuantConfig::int8(), "to_k,to_q,to_v,to_out.0");
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Long("model") => model = parser.value()?.into(),
            Long("images") => images = parser.value()?.into(),
            Long("vae") => vae = parser.value()?.into(),
            Long("cache") => cache = Some(parser.value()?.into()),
            Long("latents") => latents = Some(parser.value()?.into()),
            Long("embeds") => embeds = Some(parser.value()?.into()),
            Long("unconditional") => unconditional = true,
            Long("held-out") => held_out = parser.value()?.parse()?,
            Long("init-lora") => init_lora = Some(parser.value()?.into()),
            Long("sigmas") => flow.spread = parser.value()?.parse_with(spread)?,
            Long("shift") => flow.shift = parser.value()?.parse()?,
            Long("guidance") => guidance = parser.value()?.parse()?,
            Long("dtype") => kind = Some(parser.value()?.parse_with(dtype)?),
            Long(name) => {
                let name = name.to_string();
                options.take(&name, &mut parser)?;
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    given("--model", &model)?;
    options.check()?;
    if embeds.is_some() == unconditional {
        return Err("expected either --embeds, with what the prompts are encoded to, or --unconditional".into());
    }
    if !(flow.shift > 0.0 && flow.shift.is_finite()) {
        return Err("--shift: expected a number above 0".into());
    }
    let source = match latents {
        Some(_) if !images.as_os_str().is_empty() || !vae.as_os_str().is_empty() => {
            return Err("expected either --latents, or --images and --vae".into());
        }
        Some(latents) => Source::File(latents),
        None => {
            given("--images", &images)?;
            given("--vae", &vae)?;
            Source::Images { images, vae, cache: cache.unwrap_or_else(|| options.out.clone()) }
        }
    };
    let place = Place { device: options.device.unwrap_or_else(Device::cuda_if_available), kind };
    Ok(Some(Args { model, source, embeds, held_out, init_lora, flow, guidance, place, options }))
}

fn spread(name: &str) -> Result<Spread, &'static str> {
    match name {
        "logit-normal" => Ok(Spread::LogitNormal),
        "uniform" => Ok(Spread::Uniform),
        _ => Err("expected logit-normal or uniform"),
    }
}
