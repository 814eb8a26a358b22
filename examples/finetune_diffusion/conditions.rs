//! What prompts are encoded to.

use super::Result;
use super::denoiser::Denoiser;
use super::record::Input;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// For each image the model's conditions by their inputs' names, from a file,
/// or all zeros. None of them has a batch dimension.
pub fn read<'a>(
    file: Option<&Path>,
    denoiser: &Denoiser,
    images: impl IntoIterator<Item = &'a String>,
) -> Result<Vec<BTreeMap<String, Tensor>>> {
    let Some(path) = file else {
        let zeros = |input: &Input| {
            let zeros = Tensor::zeros(&input.shape[1..], (Kind::Float, Device::Cpu));
            (input.name.clone(), zeros)
        };
        let zeros: BTreeMap<_, _> = denoiser.conditions().map(zeros).collect();
        let copy = |_| zeros.iter().map(|(name, zeros)| (name.clone(), zeros.shallow_clone())).collect();
        return Ok(images.into_iter().map(copy).collect());
    };
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let tensors: HashMap<String, Tensor> =
        Tensor::read_safetensors(path).map_err(|error| at(&error))?.into_iter().collect();
    let of_image = |image: &String| {
        let of_input = |input: &Input| {
            let own = format!("{image}.{}", input.name);
            let found = tensors.get(&own).or_else(|| tensors.get(&input.name));
            let found = found.ok_or_else(|| at(&format!("neither {own} nor {}", input.name)))?;
            match fits(&found.size(), &input.shape[1..], denoiser.free_length()) {
                true => Ok((input.name.clone(), found.shallow_clone())),
                false => {
                    let (found, expected) = (found.size(), &input.shape[1..]);
                    Err(at(&format!("{own} is {found:?}, expected {expected:?}")).into())
                }
            }
        };
        denoiser.conditions().map(of_input).collect()
    };
    images.into_iter().map(of_image).collect()
}

/// Whether the sizes are those of the trace, but for the first where lengths are free.
fn fits(found: &[i64], expected: &[i64], free_length: bool) -> bool {
    let fixed = usize::from(free_length && expected.len() == 2);
    found.len() == expected.len() && found.iter().skip(fixed).eq(expected.iter().skip(fixed))
}
