//! Floor 3: LoRA itself: configuration, target matching, initialisation, the
//! kinds of adapters, and combining them.

mod combine;
mod config;
mod conv;
mod dora;
mod dropout;
mod embedding;
mod factors;
mod init;
mod layer;
mod linear;
mod parameter;
mod replace;
mod target;
mod tied;
mod tokens;

pub use combine::{Combination, MajoritySign, Merge};
pub(crate) use combine::{Part, combine, rank};
pub(crate) use config::FOREIGN;
pub use config::{
    Bias, InitLoraWeights, LayerPattern, LayerSettings, LoraConfig, LoraConfigBuilder, OneOrMany, TargetModules,
    TokenIndices,
};
pub(crate) use layer::{Built, LayerForm, LayerSpec, LoftQ, LoraLayer, Switches};
pub(crate) use replace::{Replacement, Use};
pub(crate) use target::{resolve, resolve_parameters};
pub(crate) use tied::Tied;
pub(crate) use tokens::TokenRows;
