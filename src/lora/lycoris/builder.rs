//! The builders of `LohaConfig` and `LokrConfig`.

use super::super::config::{LayerPattern, OneOrMany, TargetModules};
use super::config::{Loha, LohaConfig, Lokr, LokrConfig, LokrInit, LycorisConfig};
use crate::error::Result;
use serde_json::json;
use tch::Kind;

/// Makes a [`LohaConfig`].
pub type LohaConfigBuilder = LycorisConfigBuilder<Loha>;
/// Makes a [`LokrConfig`].
pub type LokrConfigBuilder = LycorisConfigBuilder<Lokr>;

/// Makes a [`LycorisConfig`].
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

    /// Rank of the factors, at least 1.
    pub fn r(self, r: i64) -> Self {
        self.with(|c| c.r = r)
    }

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

    /// Names or a regular expression of modules that are left out although the
    /// target means them.
    pub fn exclude_modules(self, modules: impl Into<TargetModules>) -> Self {
        self.with(|c| c.exclude_modules = Some(modules.into()))
    }

    /// As in [`LoraConfigBuilder`](crate::LoraConfigBuilder::layers_to_transform).
    pub fn layers_to_transform(self, layers: impl Into<OneOrMany<i64>>) -> Self {
        self.with(|c| c.layers_to_transform = Some(layers.into()))
    }

    /// As in [`LoraConfigBuilder`](crate::LoraConfigBuilder::layers_pattern).
    pub fn layers_pattern(self, names: impl Into<OneOrMany<String>>) -> Self {
        self.with(|c| c.layers_pattern = Some(names.into()))
    }

    /// Ranks of some of the layers, see [`LayerPattern`].
    pub fn rank_pattern<S: Into<String>>(self, ranks: impl IntoIterator<Item = (S, i64)>) -> Self {
        self.with(|c| c.rank_pattern = LayerPattern::new(ranks))
    }

    /// Numerators of the scale of some of the layers, see [`LayerPattern`].
    pub fn alpha_pattern<S: Into<String>>(self, alphas: impl IntoIterator<Item = (S, f64)>) -> Self {
        self.with(|c| c.alpha_pattern = LayerPattern::new(alphas))
    }

    /// Modules of which a full copy is trained and saved: whole paths or their
    /// last segments.
    pub fn modules_to_save<S: Into<String>>(self, modules: impl IntoIterator<Item = S>) -> Self {
        self.with(|c| c.modules_to_save = Some(modules.into_iter().map(Into::into).collect()))
    }

    /// The dtype of the factors, as in
    /// [`LoraConfigBuilder`](crate::LoraConfigBuilder::dtype).
    pub fn dtype(self, kind: Kind) -> Self {
        self.with(|c| c.dtype = Some(kind))
    }

    /// What the model is for, as PEFT names it. Recorded for other programs.
    pub fn task_type(self, name: &str) -> Self {
        self.with(|c| drop(c.other.insert("task_type".into(), json!(name))))
    }

    /// Where the base came from. Recorded for other programs.
    pub fn base_model_name_or_path(self, name: &str) -> Self {
        self.with(|c| drop(c.other.insert("base_model_name_or_path".into(), json!(name))))
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
