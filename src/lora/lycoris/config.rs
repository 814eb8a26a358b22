//! `LohaConfig` and `LokrConfig`, with PEFT's names, defaults and meaning.

use super::super::config::{
    ALPHA, LayerPattern, LayerSettings, OneOrMany, Selection, TargetModules, is_alpha, shared_accessors,
};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use tch::Kind;

/// A configuration of LoHa: ΔW is the product, value by value, of two
/// low-rank matrices (FedPara, arXiv:2108.06098, as LyCORIS, arXiv:2309.14859,
/// uses it).
///
/// ```
/// use tch_peft::LohaConfig;
/// let config = LohaConfig::builder().r(4).alpha(8.0).target_modules(["to_q", "to_v"]).build()?;
/// assert_eq!(config.scaling(), 2.0);
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub type LohaConfig = LycorisConfig<Loha>;

/// A configuration of LoKr: ΔW is the Kronecker product of two matrices, each
/// whole or of low rank (KronA, arXiv:2212.10650, as LyCORIS,
/// arXiv:2309.14859, uses it).
///
/// ```
/// use tch_peft::LokrConfig;
/// let config = LokrConfig::builder().r(4).decompose_factor(8).target_modules(["to_q"]).build()?;
/// assert_eq!(config.method().decompose_factor, 8);
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub type LokrConfig = LycorisConfig<Lokr>;

/// What LoHa's and LoKr's configurations have in common; `M` has the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct LycorisConfig<M> {
    pub(crate) r: i64,
    pub(crate) alpha: f64,
    pub(crate) rank_dropout: f64,
    pub(crate) module_dropout: f64,
    pub(crate) use_effective_conv2d: bool,
    pub(crate) target_modules: Option<TargetModules>,
    pub(crate) exclude_modules: Option<TargetModules>,
    pub(crate) layers_to_transform: Option<OneOrMany<i64>>,
    pub(crate) layers_pattern: Option<OneOrMany<String>>,
    pub(crate) rank_pattern: LayerPattern<i64>,
    pub(crate) alpha_pattern: LayerPattern<f64>,
    pub(crate) modules_to_save: Option<Vec<String>>,
    /// Of the adapter's tensors; not in a file.
    pub(crate) dtype: Option<Kind>,
    pub(crate) method: M,
    /// Keys of an `adapter_config.json` that don't change the result, or that
    /// we don't know; kept so that saving loses nothing.
    pub(crate) other: Map<String, Value>,
}

/// The fields that only LoHa has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loha {
    /// Whether ΔW starts at zero; else all of it is drawn, and the model
    /// changes at once.
    pub init_weights: bool,
}

impl Default for Loha {
    fn default() -> Self {
        Loha { init_weights: true }
    }
}

/// The fields that only LoKr has.
#[derive(Debug, Clone, PartialEq)]
pub struct Lokr {
    /// How the factors start.
    pub init_weights: LokrInit,
    /// Whether the left factor may be of low rank too; else it is whole.
    pub decompose_both: bool,
    /// The size of the left factor, where it divides the weight's; -1 for the
    /// divisor next to the square root.
    pub decompose_factor: i64,
    /// Whether rows that rank dropout keeps are scaled up.
    pub rank_dropout_scale: bool,
    /// The sizes (a, c) of the left factor in some of the layers, in place of
    /// those by `decompose_factor`; W₂ has what is left, (out / a, in / c). PEFT
    /// doesn't have this: it is for files of LyCORIS, whose modules may each
    /// have a factor of their own.
    pub w1_pattern: LayerPattern<[i64; 2]>,
}

impl Default for Lokr {
    fn default() -> Self {
        Lokr {
            init_weights: LokrInit::Default,
            decompose_both: false,
            decompose_factor: -1,
            rank_dropout_scale: false,
            w1_pattern: LayerPattern::default(),
        }
    }
}

/// How LoKr's factors start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LokrInit {
    /// PEFT's `true`: the left factor at zero, the right one drawn.
    #[default]
    Default,
    /// PEFT's `false`: both are drawn, and the model changes at once.
    Random,
    /// `"lycoris"`: the right factor at zero, the left one drawn.
    Lycoris,
}

/// `true` or `false`, as in PEFT.
impl From<bool> for LokrInit {
    fn from(on: bool) -> Self {
        if on { LokrInit::Default } else { LokrInit::Random }
    }
}

/// PEFT's defaults. The target has none.
impl<M: Default> Default for LycorisConfig<M> {
    fn default() -> Self {
        LycorisConfig {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            use_effective_conv2d: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: LayerPattern::default(),
            alpha_pattern: LayerPattern::default(),
            modules_to_save: None,
            dtype: None,
            method: M::default(),
            other: Map::new(),
        }
    }
}

impl<M> LycorisConfig<M> {
    shared_accessors!();

    /// The numerator of the scale, where `alpha_pattern` says nothing else.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Probability that a row of ΔW is dropped while training.
    pub fn rank_dropout(&self) -> f64 {
        self.rank_dropout
    }

    /// Probability that all of a layer's ΔW is dropped while training.
    pub fn module_dropout(&self) -> f64 {
        self.module_dropout
    }

    /// Whether the kernel of a convolution is decomposed too.
    pub fn use_effective_conv2d(&self) -> bool {
        self.use_effective_conv2d
    }

    /// The fields that only this method has.
    pub fn method(&self) -> &M {
        &self.method
    }

    /// The factor s = alpha/r of ΔW.
    pub fn scaling(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// Rank and scale of the module at each path, by `rank_pattern` and
    /// `alpha_pattern`.
    pub(crate) fn layer_settings<'a>(&self, paths: impl IntoIterator<Item = &'a str>) -> Vec<LayerSettings> {
        let (ranks, alphas) = (self.rank_pattern.lookup(), self.alpha_pattern.lookup());
        let settings = |path| {
            let r = ranks.get(path).unwrap_or(self.r);
            let alpha = alphas.get(path).unwrap_or(self.alpha);
            LayerSettings { r, lora_alpha: alpha, scaling: alpha / r as f64, w1: None }
        };
        paths.into_iter().map(settings).collect()
    }

    /// Which modules it means.
    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            target_modules: self.target_modules.as_ref(),
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            modules_to_save: self.modules_to_save(),
            target_parameters: &[],
        }
    }

    /// The shared fields that change training, each in a form to compare and
    /// to read.
    fn shared(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("r", self.r.to_string()),
            ("alpha", self.alpha.to_string()),
            ("rank_dropout", self.rank_dropout.to_string()),
            ("module_dropout", self.module_dropout.to_string()),
            ("use_effective_conv2d", self.use_effective_conv2d.to_string()),
            ("rank_pattern", format!("{:?}", self.rank_pattern.entries().collect::<Vec<_>>())),
            ("alpha_pattern", format!("{:?}", self.alpha_pattern.entries().collect::<Vec<_>>())),
        ];
        fields.extend(self.selection().fields());
        fields
    }

    /// Ranges and contradictions.
    pub(crate) fn validate_shared(&self) -> Result<()> {
        if self.r < 1 {
            return Err(Error::config("r", "a rank of at least 1", self.r));
        }
        if !is_alpha(self.alpha) {
            return Err(Error::config("alpha", ALPHA, self.alpha));
        }
        for (field, p) in [("rank_dropout", self.rank_dropout), ("module_dropout", self.module_dropout)] {
            if !(0.0..1.0).contains(&p) {
                return Err(Error::config(field, "a probability in [0, 1)", p));
            }
        }
        let floats = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half];
        if let Some(kind) = self.dtype.filter(|kind| !floats.contains(kind)) {
            return Err(Error::config("dtype", "f32, f64, bf16 or f16", format!("{kind:?}")));
        }
        if self.target_modules.is_none() {
            return Err(Error::config("target_modules", "names, a regular expression or \"all-linear\"", "not given"));
        }
        self.rank_pattern.validate("rank_pattern", "ranks of at least 1", |r| r >= 1)?;
        self.alpha_pattern.validate("alpha_pattern", ALPHA, is_alpha)?;
        self.selection().validate()
    }
}

impl LohaConfig {
    /// The fields that change training.
    pub(crate) fn trained_by(&self) -> Vec<(&'static str, String)> {
        let mut fields = self.shared();
        fields.push(("init_weights", self.method.init_weights.to_string()));
        fields
    }

    pub(crate) fn validate(self) -> Result<Self> {
        self.validate_shared()?;
        Ok(self)
    }
}

impl LokrConfig {
    /// [`LycorisConfig::layer_settings`] with the sizes by `w1_pattern`.
    pub(crate) fn lokr_settings<'a>(&self, paths: impl IntoIterator<Item = &'a str>) -> Vec<LayerSettings> {
        let paths: Vec<&str> = paths.into_iter().collect();
        let sizes = self.method.w1_pattern.lookup();
        let settings = self.layer_settings(paths.iter().copied()).into_iter().zip(paths);
        settings.map(|(settings, path)| LayerSettings { w1: sizes.get(path), ..settings }).collect()
    }

    /// The fields that change training.
    pub(crate) fn trained_by(&self) -> Vec<(&'static str, String)> {
        let Lokr { init_weights, decompose_both, decompose_factor, rank_dropout_scale, w1_pattern } = &self.method;
        let mut fields = self.shared();
        fields.extend([
            ("init_weights", format!("{init_weights:?}")),
            ("decompose_both", decompose_both.to_string()),
            ("decompose_factor", decompose_factor.to_string()),
            ("rank_dropout_scale", rank_dropout_scale.to_string()),
            ("w1_pattern", format!("{:?}", w1_pattern.entries().collect::<Vec<_>>())),
        ]);
        fields
    }

    pub(crate) fn validate(self) -> Result<Self> {
        self.validate_shared()?;
        let sizes = |[a, c]: [i64; 2]| a >= 1 && c >= 1;
        self.method.w1_pattern.validate("w1_pattern", "two sizes of at least 1", sizes)?;
        match self.method.decompose_factor {
            -1 => Ok(self),
            factor if factor >= 1 => Ok(self),
            factor => Err(Error::config("decompose_factor", "-1 or a size of at least 1", factor)),
        }
    }
}
