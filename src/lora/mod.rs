//! Floor 3: LoRA itself: configuration, target matching, initialisation, and
//! the adapted linear.

mod config;
mod init;
mod linear;
mod target;

pub(crate) use config::FOREIGN;
pub use config::{
    Bias, InitLoraWeights, LayerPattern, LayerSettings, LoraConfig, LoraConfigBuilder, OneOrMany, TargetModules,
    TokenIndices,
};
pub(crate) use linear::{LoraLinear, Switches};
pub(crate) use target::resolve;
