//! Latents: made once from images, and kept in a file.

use super::Result;
use super::images::{self, Image};
use super::record::{Place, Record};
use super::training::show;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use tch::{CModule, Device, Kind, Tensor};

/// Latents (channels, height, width), f32, by the images' names.
pub struct Latents {
    pub by_name: BTreeMap<String, Tensor>,
    /// A hash of what they were made from.
    pub key: String,
}

/// Those of the images, out of the cache if it has them. Other images, a
/// changed one, or another VAE have another key, and so a file of their own.
pub fn of_images(folder: &Path, vae: &Path, cache: &Path, device: Device) -> Result<Latents> {
    let record = Record::read(vae, Place { device, kind: None })?;
    let [_, 3, height, width] = record.inputs[0].shape[..] else {
        return Err(format!("{}: expected a VAE that takes (batch, 3, height, width)", vae.display()).into());
    };
    let images = images::list(folder)?;
    let key = key(&images, &vae.join("model.pt"))?;
    let path = cache.join(format!("latents-{}.safetensors", &key[..16]));
    if !path.exists() {
        let module = CModule::load_on_device(vae.join("model.pt"), device)?;
        let latents = encode(&images, [height, width], module, (record.kind(&record.inputs[0])?, device))?;
        std::fs::create_dir_all(cache)?;
        write(&path, &latents)?;
    }
    let by_name = read(&path)?;
    Ok(Latents { by_name, key })
}

/// Those in a file that was made elsewhere.
pub fn of_file(path: &Path) -> Result<Latents> {
    let by_name = read(path)?;
    match by_name.is_empty() {
        true => Err(format!("{}: no latents", path.display()).into()),
        false => Ok(Latents { by_name, key: hash(path)?.to_string() }),
    }
}

fn key(images: &[Image], vae: &Path) -> Result<String> {
    let mut key = blake3::Hasher::new();
    key.update(hash(vae)?.as_bytes());
    for Image { name, path } in images {
        key.update(blake3::hash(name.as_bytes()).as_bytes()).update(hash(path)?.as_bytes());
    }
    Ok(key.finalize().to_string())
}

/// The hash of a file.
pub fn hash(path: &Path) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let read = File::open(path).and_then(|file| hasher.update_reader(file).map(|hasher| hasher.finalize()));
    Ok(read.map_err(|error| format!("{}: {error}", path.display()))?)
}

/// What the VAE makes of each image.
fn encode(
    images: &[Image],
    size: [i64; 2],
    mut vae: CModule,
    (kind, device): (Kind, Device),
) -> Result<Vec<(String, Tensor)>> {
    vae.f_set_eval()?;
    let _no_grad = tch::no_grad_guard();
    let bar = show::bar(images.len() as u64, 0).with_message("images to latents");
    let mut latents = Vec::new();
    for Image { name, path } in images {
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let bytes = std::fs::read(path).map_err(|error| at(&error))?;
        let image = images::decode(&bytes, size).map_err(|error| at(&error))?;
        let made = vae.forward_ts(&[image.unsqueeze(0).to_device(device).to_kind(kind)])?;
        latents.push((name.clone(), made.squeeze_dim(0).to_kind(Kind::Float).to_device(Device::Cpu).contiguous()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(latents)
}

/// The file appears whole or not at all.
fn write(path: &Path, latents: &[(String, Tensor)]) -> Result<()> {
    let partial = path.with_extension(format!("{}.tmp", std::process::id()));
    Tensor::write_safetensors(latents, &partial)?;
    File::open(&partial)?.sync_all()?;
    Ok(std::fs::rename(partial, path)?)
}

fn read(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let tensors = Tensor::read_safetensors(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(tensors.into_iter().map(|(name, latents)| (name, latents.to_kind(Kind::Float))).collect())
}
