//! LoHa and LoKr: adapters whose ΔW is a formula of a few small tensors.
//!
//! `formula` says what a formula is; `loha` and `lokr` are the two, `product`
//! applies one as an autograd node, and `layer` is the adapter on one weight.

mod builder;
mod config;
mod formula;
mod layer;
mod loha;
mod lokr;
mod product;

pub use builder::{LohaConfigBuilder, LokrConfigBuilder, LycorisConfigBuilder};
pub use config::{Loha, LohaConfig, Lokr, LokrConfig, LokrInit, LycorisConfig};
pub(crate) use layer::layer;
pub(crate) use lokr::{is_low, left_sizes};
