//! Floor 3: LoRA itself: configuration, target matching, initialisation, and
//! the adapted linear.

mod config;
mod init;
mod linear;
mod target;

pub use config::{InitLoraWeights, LoraConfig, LoraConfigBuilder, TargetModules};
pub(crate) use linear::{LoraLinear, Switches};
pub(crate) use target::resolve;
