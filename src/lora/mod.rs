//! Floor 3: LoRA itself: configuration, target matching, initialisation, and
//! the kinds of adapters.

mod config;
mod conv;
mod dora;
mod embedding;
mod factors;
mod init;
mod layer;
mod linear;
mod target;

pub(crate) use config::FOREIGN;
pub use config::{
    Bias, InitLoraWeights, LayerPattern, LayerSettings, LoraConfig, LoraConfigBuilder, OneOrMany, TargetModules,
    TokenIndices,
};
pub(crate) use layer::{LayerForm, LayerSpec, LoraLayer, Switches};
pub(crate) use target::resolve;
