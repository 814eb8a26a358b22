//! What an exported transformer takes and answers.

use super::Result;
use super::record::{Input, Place, Record};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tch_peft::TorchScript;

/// Inputs that are made here; all others are conditions.
const MADE: [&str; 5] = ["hidden_states", "timestep", "guidance", "img_ids", "txt_ids"];

/// Calls a transformer of diffusers by its inputs' names.
pub struct Denoiser {
    record: Record,
    guidance: f64,
}

impl Denoiser {
    /// Of an exported module's folder.
    pub fn read(folder: &Path, guidance: f64, place: Place) -> Result<Self> {
        let record = Record::read(folder, place)?;
        match ["hidden_states", "timestep"].iter().find(|name| record.input(name).is_none()) {
            Some(name) => Err(format!("{}: no input {name}; is it a transformer?", folder.display()).into()),
            None => Ok(Denoiser { record, guidance }),
        }
    }

    /// The inputs that depend on the prompt.
    pub fn conditions(&self) -> impl Iterator<Item = &Input> {
        self.record.inputs.iter().filter(|input| !MADE.contains(&input.name.as_str()))
    }

    /// Whether prompts may have any length.
    pub fn free_length(&self) -> bool {
        self.record.free.iter().any(|size| size == "length")
    }

    /// Refuses latents (channels, height, width) of another size than the trace has.
    pub fn check(&self, latents: &[i64]) -> Result<()> {
        let expected = self.record.input("hidden_states").map_or(&[][..], |input| &input.shape[1..]);
        let fits = match (latents, expected) {
            ([c, h, w], [tokens, width]) => h % 2 == 0 && w % 2 == 0 && (h * w / 4, c * 4) == (*tokens, *width),
            _ => latents == expected,
        };
        match fits {
            true => Ok(()),
            false => Err(format!("latents {latents:?} are not what the model takes, {expected:?}").into()),
        }
    }

    /// The velocity at noisy latents (batch, channels, height, width), as f32.
    pub fn velocity(
        &self,
        module: &TorchScript,
        noisy: &Tensor,
        sigmas: &Tensor,
        conditions: &BTreeMap<String, Tensor>,
    ) -> Result<Tensor> {
        let inputs = self.record.inputs.iter().map(|input| self.input(input, noisy, sigmas, conditions));
        let answer = module.forward_ts(&inputs.collect::<Result<Vec<_>>>()?)?;
        let velocity = if answer.dim() == 3 { unpack(&answer, &noisy.size())? } else { answer };
        match velocity.size() == noisy.size() {
            true => Ok(velocity.to_kind(Kind::Float)),
            false => Err(format!(
                "the model answers {:?}, expected the latents' shape, {:?}: it was not trained by flow matching",
                velocity.size(),
                noisy.size()
            )
            .into()),
        }
    }

    fn input(
        &self,
        input: &Input,
        noisy: &Tensor,
        sigmas: &Tensor,
        conditions: &BTreeMap<String, Tensor>,
    ) -> Result<Tensor> {
        let (kind, sizes) = (self.record.kind(input)?, noisy.size());
        Ok(match input.name.as_str() {
            "hidden_states" if input.shape.len() == 3 => pack(noisy).to_kind(kind),
            "hidden_states" => noisy.to_kind(kind),
            // Integers of a thousand steps, though any number between them will do.
            "timestep" if kind == Kind::Int64 => sigmas * 1000.0,
            "timestep" => sigmas.to_kind(kind),
            "guidance" => Tensor::full([sizes[0]], self.guidance, (kind, noisy.device())),
            "img_ids" => places(sizes[2] / 2, sizes[3] / 2, noisy.device()).to_kind(kind),
            "txt_ids" => {
                let length = conditions.get("encoder_hidden_states").map_or(0, |states| states.size()[1]);
                Tensor::zeros([length, 3], (kind, noisy.device()))
            }
            name => conditions.get(name).ok_or_else(|| format!("no {name}"))?.to_kind(kind),
        })
    }
}

/// Each two by two pixels as one token, as Flux has it: (batch, tokens, channels · 4).
fn pack(latents: &Tensor) -> Tensor {
    let size = latents.size();
    let blocks = latents.view([size[0], size[1], size[2] / 2, 2, size[3] / 2, 2]);
    blocks.permute([0, 2, 4, 1, 3, 5]).reshape([size[0], size[2] * size[3] / 4, size[1] * 4])
}

/// Turns tokens back into latents of this size.
fn unpack(tokens: &Tensor, size: &[i64]) -> Result<Tensor> {
    let blocks = tokens.f_reshape([size[0], size[2] / 2, size[3] / 2, size[1], 2, 2])?;
    Ok(blocks.permute([0, 3, 1, 4, 2, 5]).reshape(size))
}

/// Row and column of each token, (tokens, 3); the first number is 0.
fn places(rows: i64, columns: i64, device: Device) -> Tensor {
    let count = |n: i64| Tensor::arange(n, (Kind::Float, device));
    let row = count(rows).view([-1, 1]).expand([rows, columns], false);
    let column = count(columns).expand([rows, columns], false);
    Tensor::stack(&[row.zeros_like(), row, column], -1).view([rows * columns, 3])
}
