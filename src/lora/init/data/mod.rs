//! Initialisations from data: what flows through the layers that are to be
//! adapted, or back through them.
//!
//! An [`Observer`] takes an adapter's place on a weight while a caller's data
//! runs through the base. `eva`, `corda` and `lora_ga` make of it what an
//! adapter starts from.

pub(super) mod corda;
mod eva;
pub(super) mod lora_ga;
mod observer;

pub(crate) use corda::Covariance;
pub use corda::{CordaConfig, CordaMethod};
pub(crate) use eva::Eva;
pub use eva::EvaConfig;
pub use lora_ga::{LoraGaConfig, LoraGaDirection, LoraGaScale};
pub(crate) use observer::Observer;

use crate::ffi::shared::SharedTensor;

/// What data said about one layer.
#[derive(Debug)]
pub(crate) enum LayerData {
    /// EVA's directions of the inputs: A (r, in).
    Directions(SharedTensor),
    /// CorDA's mean of the inputs' covariance (in, in).
    Covariance(SharedTensor, CordaMethod),
    /// LoRA-GA's mean gradient of the weight (out, in).
    Gradient(SharedTensor, LoraGaConfig),
}
