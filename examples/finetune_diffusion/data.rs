//! Examples and batches.

use super::Result;
use super::args::{Args, Source};
use super::denoiser::Denoiser;
use super::{conditions, latents};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// An image, encoded, with what goes with its prompt.
pub struct Example {
    /// (channels, height, width), f32.
    pub latents: Tensor,
    pub conditions: BTreeMap<String, Tensor>,
}

/// The examples, and a hash of them.
pub fn read(args: &Args, denoiser: &Denoiser) -> Result<(Vec<Example>, String)> {
    let latents = match &args.source {
        Source::Images { images, vae, cache } => latents::of_images(images, vae, cache, args.place.device)?,
        Source::File(path) => latents::of_file(path)?,
    };
    let mut key = latents.key;
    if let Some(path) = &args.embeds {
        key = format!("{key} {}", latents::hash(path)?);
    }
    let conditions = conditions::read(args.embeds.as_deref(), denoiser, latents.by_name.keys())?;
    latents.by_name.values().try_for_each(|latents| denoiser.check(&latents.size()))?;
    let pairs = latents.by_name.into_values().zip(conditions);
    Ok((pairs.map(|(latents, conditions)| Example { latents, conditions }).collect(), key))
}

/// Examples side by side, on the device.
pub struct Batch {
    /// (batch, channels, height, width), f32.
    pub latents: Tensor,
    pub conditions: BTreeMap<String, Tensor>,
}

impl Batch {
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>, device: Device) -> Result<Self> {
        let (mut latents, mut conditions) = (Vec::new(), BTreeMap::<&String, Vec<&Tensor>>::new());
        for example in examples {
            latents.push(&example.latents);
            example.conditions.iter().for_each(|(name, tensor)| conditions.entry(name).or_default().push(tensor));
        }
        let stack = |name: &str, tensors: &[&Tensor]| -> Result<Tensor> {
            // Prompts of several lengths have no common batch.
            Ok(Tensor::f_stack(tensors, 0).map_err(|error| format!("{name}: {error}"))?.to_device(device))
        };
        let conditions = conditions.iter().map(|(name, tensors)| Ok((name.to_string(), stack(name, tensors)?)));
        let conditions = conditions.collect::<Result<_>>()?;
        Ok(Batch { latents: stack("latents", &latents)?, conditions })
    }

    pub fn len(&self) -> i64 {
        self.latents.size()[0]
    }
}
