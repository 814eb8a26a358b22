//! Floor 3: LoRA itself: configuration, target matching, initialisation, and
//! the kinds of adapters.

mod config;
mod conv;
mod embedding;
mod factors;
mod init;
mod layer;
mod linear;
mod target;

pub use config::{InitLoraWeights, LoraConfig, LoraConfigBuilder, TargetModules};
pub(crate) use layer::{LayerForm, LayerSpec, LoraLayer, Switches};
pub(crate) use target::resolve;
