//! Flow matching (rectified flow): on the straight line from an image to noise,
//! the model learns the velocity.

use super::Result;
use super::data::Batch;
use super::denoiser::Denoiser;
use serde::{Deserialize, Serialize};
use tch::{Reduction, Tensor};
use tch_peft::{Generator, LoraModel, TorchScript};

/// How noise levels are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    pub spread: Spread,
    /// sigma becomes shift sigma / (1 + (shift - 1) sigma): above 1 more noise,
    /// as large images want it.
    pub shift: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Spread {
    /// The logistic function of standard normal values (Esser et al., "Scaling
    /// Rectified Flow Transformers", 2024): the middle is learnt most.
    LogitNormal,
    Uniform,
}

/// What is random in a step.
pub struct Draw {
    /// f32, shaped like the latents.
    pub noise: Tensor,
    /// (batch), from 0, the image, to 1, nothing but noise.
    pub sigmas: Tensor,
}

impl Flow {
    /// For latents (batch, channels, height, width).
    pub fn draw(&self, generator: &mut Generator, latents: &Tensor) -> Result<Draw> {
        let (shape, device) = (latents.size(), latents.device());
        let noise = generator.normal(&shape, device)?;
        let sigmas = match self.spread {
            Spread::LogitNormal => generator.normal(&shape[..1], device)?.sigmoid(),
            Spread::Uniform => generator.uniform(&shape[..1], device)?,
        };
        let sigmas = &sigmas * self.shift / (1.0 + (self.shift - 1.0) * &sigmas);
        Ok(Draw { noise, sigmas })
    }
}

/// The mean square error of the velocity, noise - latents, that the model sees
/// at (1 - sigma) latents + sigma noise.
pub fn loss(model: &LoraModel<TorchScript>, denoiser: &Denoiser, batch: &Batch, draw: &Draw) -> Result<Tensor> {
    let Draw { noise, sigmas } = draw;
    let sigma = sigmas.view([-1, 1, 1, 1]);
    let noisy = (1.0 - &sigma) * &batch.latents + &sigma * noise;
    let velocity = denoiser.velocity(model.module(), &noisy, sigmas, &batch.conditions)?;
    Ok(velocity.mse_loss(&(noise - &batch.latents), Reduction::Mean))
}
