//! The builders of `LohaConfig` and `LokrConfig`.

use super::super::config::{LayerPattern, OneOrMany, TargetModules, shared_setters};
use super::config::{Loha, LohaConfig, Lokr, LokrConfig, LokrInit, LycorisConfig};
use crate::error::Result;
use serde_json::json;
use tch::Kind;

/// Makes a [`LohaConfig`].
pub type LohaConfigBuilder = LycorisConfigBuilder<Loha>;
/// Makes a [`LokrConfig`].
pub type LokrConfigBuilder = LycorisConfigBuilder<Lokr>;

/// Makes a [`LycorisConfig`].
///
/// ```
/// use tch_peft::{LohaConfig, LokrConfig, LokrInit};
///
/// let loha = LohaConfig::builder().r(8).alpha(4.0).rank_dropout(0.1).target_modules(["to_q", "conv1"]).build()?;
/// let lokr = LokrConfig::builder()
///     .r(8)
///     .decompose_both(true)
///     .decompose_factor(16)
///     .init_weights(LokrInit::Lycoris)
///     .target_modules(["to_q"])
///     .build()?;
/// assert_eq!(loha.scaling(), 0.5);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "call build()"]
pub struct LycorisConfigBuilder<M> {
    config: LycorisConfig<M>,
}

impl<M> LycorisConfigBuilder<M> {
    fn with(mut self, change: impl FnOnce(&mut LycorisConfig<M>)) -> Self {
        change(&mut self.config);
        self
    }

    shared_setters!();

    /// The numerator of the scale alpha/r.
    pub fn alpha(self, alpha: f64) -> Self {
        self.with(|c| c.alpha = alpha)
    }

    /// Probability in [0, 1) that a row of ΔW is dropped while training. LoHa
    /// scales up the rows that are kept, LoKr where `rank_dropout_scale` says so.
    pub fn rank_dropout(self, p: f64) -> Self {
        self.with(|c| c.rank_dropout = p)
    }

    /// Probability in [0, 1) that all of a layer's ΔW is dropped while training.
    pub fn module_dropout(self, p: f64) -> Self {
        self.with(|c| c.module_dropout = p)
    }

    /// Decomposes the kernel of a convolution too (FedPara, proposition 3).
    pub fn use_effective_conv2d(self, on: bool) -> Self {
        self.with(|c| c.use_effective_conv2d = on)
    }

    /// A list of names, a regular expression, or `"all-linear"`: linear layers,
    /// and convolutions over one or two dimensions.
    pub fn target_modules(self, target: impl Into<TargetModules>) -> Self {
        self.with(|c| c.target_modules = Some(target.into()))
    }

    /// The dtype of the factors, as in
    /// [`LoraConfigBuilder`](crate::LoraConfigBuilder::dtype).
    pub fn dtype(self, kind: Kind) -> Self {
        self.with(|c| c.dtype = Some(kind))
    }
}

impl LohaConfig {
    /// A builder with PEFT's defaults: r 8, alpha 8, no dropout. The target
    /// has none and must be given.
    pub fn builder() -> LohaConfigBuilder {
        LycorisConfigBuilder { config: LycorisConfig::default() }
    }
}

impl LohaConfigBuilder {
    /// Whether ΔW starts at zero.
    pub fn init_weights(self, on: bool) -> Self {
        self.with(|c| c.method.init_weights = on)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), naming the field.
    pub fn build(self) -> Result<LohaConfig> {
        self.config.validate()
    }
}

impl LokrConfig {
    /// A builder with PEFT's defaults: r 8, alpha 8, no dropout. The target
    /// has none and must be given.
    pub fn builder() -> LokrConfigBuilder {
        LycorisConfigBuilder { config: LycorisConfig::default() }
    }
}

impl LokrConfigBuilder {
    /// How the factors start: `true`, `false`, or a [`LokrInit`].
    pub fn init_weights(self, init: impl Into<LokrInit>) -> Self {
        self.with(|c| c.method.init_weights = init.into())
    }

    /// Lets the left factor be of low rank too.
    pub fn decompose_both(self, on: bool) -> Self {
        self.with(|c| c.method.decompose_both = on)
    }

    /// The size of the left factor; -1 for the divisor next to the square root
    /// of the weight's.
    pub fn decompose_factor(self, factor: i64) -> Self {
        self.with(|c| c.method.decompose_factor = factor)
    }

    /// The sizes (a, c) of the left factor in some of the layers, see
    /// [`Lokr::w1_pattern`].
    pub fn w1_pattern<S: Into<String>>(self, sizes: impl IntoIterator<Item = (S, [i64; 2])>) -> Self {
        self.with(|c| c.method.w1_pattern = LayerPattern::new(sizes))
    }

    /// Scales up the rows that rank dropout keeps.
    pub fn rank_dropout_scale(self, on: bool) -> Self {
        self.with(|c| c.method.rank_dropout_scale = on)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), naming the field.
    pub fn build(self) -> Result<LokrConfig> {
        self.config.validate()
    }
}
