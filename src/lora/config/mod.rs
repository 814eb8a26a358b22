//! `LoraConfig`, with PEFT's names, defaults and meaning.

mod any;
mod builder;
mod loftq;
mod pattern;
mod selection;
mod support;
mod validate;
mod values;

pub use any::AdapterConfig;
pub use builder::LoraConfigBuilder;
pub(in crate::lora) use builder::shared_setters;
pub use loftq::LoftqConfig;
pub use pattern::LayerPattern;
pub(crate) use selection::Selection;
pub(crate) use support::FOREIGN;
use support::means_nothing;
pub(in crate::lora) use validate::{ALPHA, is_alpha, layer_number, whole};
pub use values::{Bias, InitLoraWeights, OneOrMany, TargetModules, TokenIndices};

use super::init::data::{CordaConfig, EvaConfig, LoraGaConfig};
use crate::error::Error;
use regex::Regex;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Kind;

/// The accessors of what every kind of adapter's configuration has.
macro_rules! shared_accessors {
    () => {
        /// Rank, where `rank_pattern` says nothing else.
        pub fn r(&self) -> i64 {
            self.r
        }

        /// Which layers are adapted; `None` for a configuration from a file that
        /// targets parameters only.
        pub fn target_modules(&self) -> Option<&TargetModules> {
            self.target_modules.as_ref()
        }

        /// Which layers are left out although the target means them.
        pub fn exclude_modules(&self) -> Option<&TargetModules> {
            self.exclude_modules.as_ref()
        }

        /// Ranks of some of the layers.
        pub fn rank_pattern(&self) -> &LayerPattern<i64> {
            &self.rank_pattern
        }

        /// Numerators of the scale of some of the layers.
        pub fn alpha_pattern(&self) -> &LayerPattern<f64> {
            &self.alpha_pattern
        }

        /// Modules of which a full copy is trained and saved.
        pub fn modules_to_save(&self) -> &[String] {
            self.modules_to_save.as_deref().unwrap_or_default()
        }

        /// A field of `adapter_config.json` that has no accessor of its own, as it
        /// stands in the file: `task_type`, `base_model_name_or_path`, …
        pub fn other(&self, key: &str) -> Option<&Value> {
            self.other.get(key).filter(|value| !value.is_null())
        }
    };
}
pub(in crate::lora) use shared_accessors;

/// What to adapt, and with which rank, scale and dropout.
///
/// All fields of PEFT's `LoraConfig` are kept, those that this version can't
/// act on too; [`LoraModel`](crate::LoraModel) refuses a configuration that
/// needs one of them, and names it.
///
/// ```
/// use tch_peft::LoraConfig;
/// let config = LoraConfig::builder().r(16).lora_alpha(32.0).target_modules(["q_proj", "v_proj"]).build()?;
/// assert_eq!(config.scaling(), 2.0);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    pub(crate) r: i64,
    pub(crate) lora_alpha: f64,
    pub(crate) lora_dropout: f64,
    pub(crate) target_modules: Option<TargetModules>,
    pub(crate) exclude_modules: Option<TargetModules>,
    pub(crate) layers_to_transform: Option<OneOrMany<i64>>,
    pub(crate) layers_pattern: Option<OneOrMany<String>>,
    pub(crate) rank_pattern: LayerPattern<i64>,
    pub(crate) alpha_pattern: LayerPattern<f64>,
    pub(crate) modules_to_save: Option<Vec<String>>,
    pub(crate) bias: Bias,
    pub(crate) lora_bias: bool,
    pub(crate) fan_in_fan_out: bool,
    pub(crate) use_rslora: bool,
    pub(crate) use_dora: bool,
    pub(crate) init_lora_weights: InitLoraWeights,
    pub(crate) trainable_token_indices: Option<TokenIndices>,
    pub(crate) target_parameters: Option<Vec<String>>,
    pub(crate) ensure_weight_tying: bool,
    pub(crate) layer_replication: Option<Vec<(i64, i64)>>,
    /// Of A and B; not in a file.
    pub(crate) dtype: Option<Kind>,
    /// Keys of an `adapter_config.json` that don't change the result, that
    /// only variants of which we have none read, or that we don't know; kept
    /// so that saving loses nothing.
    pub(crate) other: Map<String, Value>,
}

/// PEFT's defaults. The target has none.
impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: LayerPattern::default(),
            alpha_pattern: LayerPattern::default(),
            modules_to_save: None,
            bias: Bias::None,
            lora_bias: false,
            fan_in_fan_out: false,
            use_rslora: false,
            use_dora: false,
            init_lora_weights: InitLoraWeights::Default,
            trainable_token_indices: None,
            target_parameters: None,
            ensure_weight_tying: false,
            layer_replication: None,
            dtype: None,
            other: Map::new(),
        }
    }
}

/// Rank and scale of one layer.
///
/// ```
/// use tch_peft::LoraConfig;
///
/// let config = LoraConfig::builder().r(8).lora_alpha(16.0).target_modules(["q", "v"]).alpha_pattern([("v", 4.0)]).build()?;
/// let [q, v] = &config.layer_settings(["h.0.q", "h.0.v"])[..] else { panic!("two") };
/// assert_eq!((q.scaling, v.scaling), (2.0, 0.5));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSettings {
    /// Rank: that of `rank_pattern`, else `r`.
    pub r: i64,
    /// The numerator of the scale: that of `alpha_pattern`, else `lora_alpha`.
    pub lora_alpha: f64,
    /// The factor s of ΔW = s · B · A, see [`LoraConfig::scaling`].
    pub scaling: f64,
    /// The sizes (a, c) of LoKr's W₁, where [`Lokr::w1_pattern`](crate::Lokr::w1_pattern) gives them.
    pub w1: Option<[i64; 2]>,
}

impl LoraConfig {
    shared_accessors!();

    /// A builder with PEFT's defaults: r 8, alpha 8, no dropout. The target
    /// has none and must be given.
    pub fn builder() -> LoraConfigBuilder {
        LoraConfigBuilder::default()
    }

    /// The numerator of the scale, where `alpha_pattern` says nothing else.
    pub fn lora_alpha(&self) -> f64 {
        self.lora_alpha
    }

    /// Probability that an input feature is dropped on the way to A.
    pub fn lora_dropout(&self) -> f64 {
        self.lora_dropout
    }

    /// The numbers of the layers in which targets count; empty for all.
    pub fn layers_to_transform(&self) -> &[i64] {
        self.layers_to_transform.as_ref().map_or(&[], OneOrMany::as_slice)
    }

    /// The names of the lists of layers that `layers_to_transform` counts.
    pub fn layers_pattern(&self) -> &[String] {
        self.layers_pattern.as_ref().map_or(&[], OneOrMany::as_slice)
    }

    /// Which biases of the base are trained.
    pub fn bias(&self) -> Bias {
        self.bias
    }

    /// Whether B has a bias.
    pub fn lora_bias(&self) -> bool {
        self.lora_bias
    }

    /// Whether the weights are stored as (in, out).
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// Whether the scale is alpha/√r.
    pub fn use_rslora(&self) -> bool {
        self.use_rslora
    }

    /// Whether magnitude and direction are trained apart (DoRA).
    pub fn use_dora(&self) -> bool {
        self.use_dora
    }

    /// How A and B start.
    pub fn init_lora_weights(&self) -> InitLoraWeights {
        self.init_lora_weights
    }

    /// Rows of embeddings that are trained as they are.
    pub fn trainable_token_indices(&self) -> Option<&TokenIndices> {
        self.trainable_token_indices.as_ref()
    }

    /// Parameters that are adapted by their own names.
    pub fn target_parameters(&self) -> &[String] {
        self.target_parameters.as_deref().unwrap_or_default()
    }

    /// Whether what is trained of a tied weight stays tied.
    pub fn ensure_weight_tying(&self) -> bool {
        self.ensure_weight_tying
    }

    /// Ranges [start, end) of layers that are stacked anew.
    pub fn layer_replication(&self) -> &[(i64, i64)] {
        self.layer_replication.as_deref().unwrap_or_default()
    }

    /// The dtype that A and B are made in, if one was given; see
    /// [`LoraConfigBuilder::dtype`].
    pub fn dtype(&self) -> Option<Kind> {
        self.dtype
    }

    /// How `eva` goes about it, by default as in PEFT.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a value of another form.
    pub fn eva_config(&self) -> crate::Result<EvaConfig> {
        self.part::<EvaConfig>("eva_config")?.validate()
    }

    /// How `corda` goes about it, by default as in PEFT.
    ///
    /// # Errors
    /// As [`LoraConfig::eva_config`].
    pub fn corda_config(&self) -> crate::Result<CordaConfig> {
        self.part("corda_config")
    }

    /// How `lora_ga` goes about it, by default as in PEFT.
    ///
    /// # Errors
    /// As [`LoraConfig::eva_config`].
    pub fn lora_ga_config(&self) -> crate::Result<LoraGaConfig> {
        self.part("lora_ga_config")
    }

    /// How `loftq` goes about it, by default as in PEFT: nf4, once.
    ///
    /// # Errors
    /// As [`LoraConfig::eva_config`].
    pub fn loftq_config(&self) -> crate::Result<LoftqConfig> {
        LoftqConfig::read(self.other("loftq_config"))
    }

    /// Whether inputs are pooled over groups of features (QALoRA).
    pub fn use_qalora(&self) -> bool {
        self.other("use_qalora").and_then(Value::as_bool).unwrap_or(false)
    }

    /// Features in a group of QALoRA's.
    pub fn qalora_group_size(&self) -> i64 {
        self.other("qalora_group_size").and_then(Value::as_i64).unwrap_or(16)
    }

    /// A configuration within it, kept in the form of the file.
    fn part<T: DeserializeOwned + Default>(&self, key: &str) -> crate::Result<T> {
        let Some(value) = self.other(key) else { return Ok(T::default()) };
        T::deserialize(value).map_err(|error| Error::config(key, format!("PEFT's fields ({error})"), value))
    }

    /// The factor s of ΔW = s · B · A: alpha/r (LoRA, arXiv:2106.09685), or
    /// alpha/√r with rsLoRA (arXiv:2312.03732).
    ///
    /// ```
    /// use tch_peft::LoraConfig;
    ///
    /// let config = LoraConfig::builder().r(16).lora_alpha(32.0).target_modules(["q_proj"]);
    /// assert_eq!(config.clone().build()?.scaling(), 2.0);
    /// assert_eq!(config.use_rslora(true).build()?.scaling(), 8.0);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn scaling(&self) -> f64 {
        self.scaling_of(self.r, self.lora_alpha)
    }

    fn scaling_of(&self, r: i64, alpha: f64) -> f64 {
        let r = r as f64;
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Rank and scale of the module at each path, by `rank_pattern` and
    /// `alpha_pattern`.
    pub fn layer_settings<'a>(&self, paths: impl IntoIterator<Item = &'a str>) -> Vec<LayerSettings> {
        let (ranks, alphas) = (self.rank_pattern.lookup(), self.alpha_pattern.lookup());
        let settings = |path| {
            let r = ranks.get(path).unwrap_or(self.r);
            let lora_alpha = alphas.get(path).unwrap_or(self.lora_alpha);
            LayerSettings { r, lora_alpha, scaling: self.scaling_of(r, lora_alpha), w1: None }
        };
        paths.into_iter().map(settings).collect()
    }

    /// The paths that PEFT's rules mean, in their order: not excluded, not in
    /// `modules_to_save`, in the target, and in a layer to transform.
    ///
    /// `all-linear` means every path given but the output layer's.
    ///
    /// ```
    /// use tch_peft::LoraConfig;
    ///
    /// let config = LoraConfig::builder().target_modules("all-linear").build()?;
    /// assert_eq!(config.matched(["h.0.up", "h.0.down", "lm_head"])?, ["h.0.up", "h.0.down"]);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a regular expression that
    /// can't be compiled.
    pub fn matched<'a>(&self, paths: impl IntoIterator<Item = &'a str>) -> crate::Result<Vec<&'a str>> {
        self.selection().matched(paths)
    }

    /// Which modules it means.
    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            target_modules: self.target_modules.as_ref(),
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            modules_to_save: self.modules_to_save(),
            target_parameters: self.target_parameters(),
        }
    }

    /// `field: recorded …, given …` for each field that changes training and
    /// differs in `given`. Targets are compared as sets.
    ///
    /// ```
    /// use tch_peft::LoraConfig;
    ///
    /// let config = |r| LoraConfig::builder().r(r).target_modules(["q_proj"]).build();
    /// assert_eq!(config(8)?.differences(&config(16)?), ["r: recorded 8, given 16"]);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn differences(&self, given: &LoraConfig) -> Vec<String> {
        any::differences(self.trained_by(), given.trained_by())
    }

    /// The fields that change training, each in a form to compare and to read.
    pub(super) fn trained_by(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("r", self.r.to_string()),
            ("lora_alpha", self.lora_alpha.to_string()),
            ("lora_dropout", self.lora_dropout.to_string()),
            ("rank_pattern", format!("{:?}", self.rank_pattern.entries().collect::<Vec<_>>())),
            ("alpha_pattern", format!("{:?}", self.alpha_pattern.entries().collect::<Vec<_>>())),
            ("bias", format!("{:?}", self.bias)),
            ("lora_bias", self.lora_bias.to_string()),
            ("fan_in_fan_out", self.fan_in_fan_out.to_string()),
            ("use_rslora", self.use_rslora.to_string()),
            ("use_dora", self.use_dora.to_string()),
            ("init_lora_weights", format!("{:?}", self.init_lora_weights)),
            ("trainable_token_indices", format!("{:?}", self.trainable_token_indices)),
            ("target_parameters", format!("{:?}", self.target_parameters())),
            ("ensure_weight_tying", self.ensure_weight_tying.to_string()),
            ("layer_replication", format!("{:?}", self.layer_replication())),
            ("qalora_group_size", self.qalora_group_size().to_string()),
        ];
        fields.extend(self.selection().fields());
        for key in FOREIGN.into_iter().map(|(key, _)| key).chain(["loftq_config"]) {
            let value = self.other.get(key).filter(|value| !means_nothing(value)).cloned();
            let text = value.map_or("none".to_string(), |mut value| {
                value.sort_all_objects();
                value.to_string()
            });
            fields.push((key, text));
        }
        fields
    }
}

/// What is expected where a Python expression can't be taken over.
pub(crate) const NO_LOOK_AROUND: &str = "a regular expression without look-around or backreferences";

/// Compiles an expression; the error is the reason in one line.
pub(crate) fn compile(pattern: &str) -> std::result::Result<Regex, String> {
    Regex::new(pattern).map_err(|error| {
        let reason = error.to_string();
        reason.lines().last().unwrap_or_default().trim().to_string()
    })
}
