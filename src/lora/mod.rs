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
mod lycoris;
mod parameter;
mod products;
mod qalora;
mod replace;
mod target;
mod tied;
mod tokens;

pub use combine::{Combination, MajoritySign, Merge};
pub(crate) use combine::{Part, combine, rank};
pub use config::{
    AdapterConfig, Bias, InitLoraWeights, LayerPattern, LayerSettings, LoftqConfig, LoraConfig, LoraConfigBuilder,
    OneOrMany, TargetModules, TokenIndices,
};
pub(crate) use config::{FOREIGN, Selection};
pub use init::data::{CordaConfig, CordaMethod, EvaConfig, LoraGaConfig, LoraGaDirection, LoraGaScale};
pub(crate) use init::data::{Covariance, Eva, LayerData, Observer};
pub(crate) use layer::{Built, LayerForm, LayerSpec, LoraLayer, Switches};
pub use lycoris::{
    Loha, LohaConfig, LohaConfigBuilder, Lokr, LokrConfig, LokrConfigBuilder, LokrInit, LycorisConfig,
    LycorisConfigBuilder,
};
pub(crate) use lycoris::{is_low, layer as lycoris_layer, left_sizes};
pub(crate) use replace::{Replacement, Use};
pub(crate) use target::{resolve, resolve_parameters};
pub(crate) use tied::Tied;
pub(crate) use tokens::TokenRows;
