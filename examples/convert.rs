//! Converts adapters between layouts, and quantised models between theirs.
//!
//! An adapter; the layout it has is told by its keys:
//!
//!     cargo run --example convert -- adapter sdxl.safetensors peft-folder --to peft --component unet --base model.pt
//!     cargo run --example convert -- adapter simpletuner/checkpoint-500 comfyui.safetensors --to comfyui
//!
//! The adapters of several parts of a pipeline into one file:
//!
//!     cargo run --example convert -- join out.safetensors unet.safetensors text_encoder.safetensors
//!
//! A quantised model (bitsandbytes, optimum-quanto, GPTQ, AWQ, or this crate's) over the TorchScript module that it
//! belongs to; or, with a scheme, a dense one:
//!
//!     cargo run --example convert -- model gptq-folder out --module model.pt
//!     cargo run --example convert -- model --module model.pt out --scheme nf4

use lexopt::prelude::*;
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use tch_peft::{AdapterFile, AdapterFormat, Base, QuantConfig, TorchScript};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "usage: convert adapter FROM TO --to peft|diffusers|diffusers-old|kohya|comfyui|lycoris \
    [--component unet|transformer|text_encoder|…] [--base MODEL]\n       \
    convert join TO FROM FROM…\n       \
    convert model [FROM] TO --module MODEL.pt [--scheme int8|int4|nf4|nf4-double|fp4|mxfp4]";

fn main() -> Result<()> {
    for line in run(std::env::args_os().skip(1))? {
        println!("{line}");
    }
    Ok(())
}

/// What is to be converted, and how.
#[derive(Default)]
pub struct Args {
    /// `adapter` or `model`, then files or folders.
    paths: Vec<PathBuf>,
    to: Option<String>,
    component: Option<String>,
    base: Option<PathBuf>,
    scheme: Option<String>,
}

/// Reads the command line.
pub fn parse(args: impl IntoIterator<Item = impl Into<std::ffi::OsString>>) -> Result<Args> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut given = Args::default();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("to") => given.to = Some(parser.value()?.string()?),
            Long("component") => given.component = Some(parser.value()?.string()?),
            Long("base" | "module") => given.base = Some(parser.value()?.into()),
            Long("scheme") => given.scheme = Some(parser.value()?.string()?),
            Value(path) => given.paths.push(path.into()),
            other => return Err(format!("{}\n{USAGE}", other.unexpected()).into()),
        }
    }
    let count = given.paths.len();
    let right = match given.paths.first().and_then(|what| what.to_str()) {
        Some("adapter") => count == 3 && given.to.is_some(),
        Some("join") => count >= 4,
        Some("model") => (count == 2 || count == 3) && given.base.is_some(),
        _ => false,
    };
    if right { Ok(given) } else { Err(USAGE.into()) }
}

/// What was done, line by line.
pub fn run(args: impl IntoIterator<Item = impl Into<std::ffi::OsString>>) -> Result<Vec<String>> {
    let given = parse(args)?;
    let paths: Vec<&Path> = given.paths.iter().map(PathBuf::as_path).collect();
    match paths.as_slice() {
        [what, from, to] if what.as_os_str() == "adapter" => adapter(&given, from, to),
        [what, to, from @ ..] if what.as_os_str() == "join" => join(to, from),
        [what, from, to] if what.as_os_str() == "model" => model(&given, Some(from), to),
        [what, to] if what.as_os_str() == "model" => model(&given, None, to),
        _ => Err(USAGE.into()),
    }
}

fn adapter(given: &Args, from: &Path, to: &Path) -> Result<Vec<String>> {
    let format = match given.to.as_deref() {
        Some("peft") => AdapterFormat::Peft,
        Some("diffusers") => AdapterFormat::Diffusers,
        Some("diffusers-old") => AdapterFormat::DiffusersOld,
        Some("kohya") => AdapterFormat::Kohya,
        Some("comfyui") => AdapterFormat::ComfyUi,
        Some("lycoris") => AdapterFormat::Lycoris,
        _ => return Err(USAGE.into()),
    };
    let (mut from, mut to) = (AdapterFile::new(from), AdapterFile::new(to));
    let found = from.detect()?;
    if let Some(component) = &given.component {
        // Which part of a pipeline: of a file with several, and in the keys that are written.
        if found.components.len() > 1 {
            from = from.component(component);
        }
        to = to.component(component);
    } else if let [only] = found.components.as_slice() {
        to = to.component(only);
    }
    let weights = given.base.as_deref().map(weight_names).transpose()?.unwrap_or_default();
    from.convert(format, to.clone(), &weights)?;
    Ok(vec![format!("read    {found}"), format!("wrote   {}: {format}", to.path().display())])
}

fn join(to: &Path, from: &[&Path]) -> Result<Vec<String>> {
    let files: Vec<AdapterFile> = from.iter().map(AdapterFile::new).collect();
    AdapterFile::join(&files, to)?;
    Ok(vec![format!("wrote   {}: {}", to.display(), AdapterFile::new(to).detect()?)])
}

/// The names of a model's weights: of a TorchScript module, a safetensors file, or all such files in a folder.
fn weight_names(path: &Path) -> Result<Vec<String>> {
    if path.extension().is_some_and(|end| end == "pt") {
        return Ok(Base::torchscript(path)?.weight_names());
    }
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        let entries: Vec<_> = std::fs::read_dir(path)?.collect::<std::io::Result<_>>()?;
        files = entries
            .iter()
            .map(std::fs::DirEntry::path)
            .filter(|p| p.extension() == Some("safetensors".as_ref()))
            .collect();
    }
    let mut names = Vec::new();
    for file in files {
        // Packed weights have names of their own.
        names.extend(header(&file)?.keys().map(|name| match name.split_once(".weight.") {
            Some((module, _)) => format!("{module}.weight"),
            None => name.replace(".qweight", ".weight"),
        }));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// The header of a safetensors file: its length in eight bytes, then JSON.
fn header(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    Ok(serde_json::from_reader(file.take(u64::from_le_bytes(length)))?)
}

fn model(given: &Args, from: Option<&Path>, to: &Path) -> Result<Vec<String>> {
    let module = given.base.as_deref().ok_or(USAGE)?;
    let mut base: Base<TorchScript> = Base::torchscript(module)?;
    if let Some(from) = from {
        base = base.load_quantized(from)?;
    }
    if let Some(scheme) = &given.scheme {
        let config = match scheme.as_str() {
            "int8" => QuantConfig::int8(),
            "int4" => QuantConfig::int4(),
            "nf4" => QuantConfig::nf4(),
            "nf4-double" => QuantConfig::nf4().double_quant(true),
            "fp4" => QuantConfig::fp4(),
            "mxfp4" => QuantConfig::mxfp4(),
            other => return Err(format!("no scheme {other:?}\n{USAGE}").into()),
        };
        base = base.quantize(&config.build()?)?;
    }
    base.save_quantized(to)?;
    let report = base.quantization_report();
    let (weights, bytes) = (report.weights().len(), report.bytes_after());
    Ok(vec![format!("wrote   {}: {weights} packed weights, {bytes} bytes", to.display())])
}
