//! A configuration of any kind of adapter.

use super::{Bias, LayerPattern, LayerSettings, LoraConfig, OneOrMany, Selection, TargetModules};
use crate::error::Result;
use crate::lora::lycoris::{LohaConfig, LokrConfig};
use serde_json::{Map, Value};
use tch::Kind;

/// The configuration of an adapter, whatever its kind.
///
/// ```
/// use tch_peft::{AdapterConfig, LokrConfig, LoraConfig};
///
/// let lora: AdapterConfig = LoraConfig::builder().r(4).target_modules(["to_q"]).build()?.into();
/// let lokr: AdapterConfig = LokrConfig::builder().r(4).target_modules(["to_q"]).build()?.into();
/// assert_eq!((lora.peft_type(), lokr.peft_type()), ("LORA", "LOKR"));
/// assert!(lora.as_lora().is_some() && lokr.as_lora().is_none());
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AdapterConfig {
    /// LoRA and its variants.
    Lora(LoraConfig),
    /// LoHa.
    Loha(LohaConfig),
    /// LoKr.
    Lokr(LokrConfig),
}

impl From<LoraConfig> for AdapterConfig {
    fn from(config: LoraConfig) -> Self {
        AdapterConfig::Lora(config)
    }
}

impl From<LohaConfig> for AdapterConfig {
    fn from(config: LohaConfig) -> Self {
        AdapterConfig::Loha(config)
    }
}

impl From<LokrConfig> for AdapterConfig {
    fn from(config: LokrConfig) -> Self {
        AdapterConfig::Lokr(config)
    }
}

impl AdapterConfig {
    /// PEFT's name of the kind: `LORA`, `LOHA` or `LOKR`.
    pub fn peft_type(&self) -> &'static str {
        match self {
            AdapterConfig::Lora(_) => "LORA",
            AdapterConfig::Loha(_) => "LOHA",
            AdapterConfig::Lokr(_) => "LOKR",
        }
    }

    /// The configuration, if it is LoRA's.
    pub fn as_lora(&self) -> Option<&LoraConfig> {
        match self {
            AdapterConfig::Lora(config) => Some(config),
            _ => None,
        }
    }

    /// `field: recorded …, given …` for each field that changes training and
    /// differs in `given`. Targets are compared as sets.
    pub fn differences(&self, given: &AdapterConfig) -> Vec<String> {
        let fields = |config: &AdapterConfig| match config {
            AdapterConfig::Lora(config) => config.trained_by(),
            AdapterConfig::Loha(config) => config.trained_by(),
            AdapterConfig::Lokr(config) => config.trained_by(),
        };
        match (self.peft_type(), given.peft_type()) {
            (recorded, given) if recorded != given => vec![format!("peft_type: recorded {recorded}, given {given}")],
            _ => differences(fields(self), fields(given)),
        }
    }

    /// Which modules it means.
    pub(crate) fn selection(&self) -> Selection<'_> {
        match self {
            AdapterConfig::Lora(config) => config.selection(),
            AdapterConfig::Loha(config) => config.selection(),
            AdapterConfig::Lokr(config) => config.selection(),
        }
    }

    /// Rank and scale of the module at each path, by `rank_pattern` and
    /// `alpha_pattern`.
    pub fn layer_settings<'a>(&self, paths: impl IntoIterator<Item = &'a str>) -> Vec<LayerSettings> {
        match self {
            AdapterConfig::Lora(config) => config.layer_settings(paths),
            AdapterConfig::Loha(config) => config.layer_settings(paths),
            AdapterConfig::Lokr(config) => config.lokr_settings(paths),
        }
    }

    /// Whether what is trained of a tied weight stays tied.
    pub(crate) fn ensure_weight_tying(&self) -> bool {
        self.as_lora().is_some_and(LoraConfig::ensure_weight_tying)
    }

    /// The dtype of what is trained, if the caller asked for one.
    pub(crate) fn dtype(&self) -> Option<Kind> {
        match self {
            AdapterConfig::Lora(config) => config.dtype,
            AdapterConfig::Loha(config) => config.dtype,
            AdapterConfig::Lokr(config) => config.dtype,
        }
    }

    /// Which biases of the base are trained.
    pub(crate) fn bias(&self) -> Bias {
        self.as_lora().map_or(Bias::None, |config| config.bias)
    }

    /// The fields that say which layers it means, and their ranks and alphas.
    pub(crate) fn placed_mut(&mut self) -> Placed<'_> {
        macro_rules! placed {
            ($config:ident, $alpha:ident) => {
                Placed {
                    r: &mut $config.r,
                    alpha: &mut $config.$alpha,
                    rank_pattern: &mut $config.rank_pattern,
                    alpha_pattern: &mut $config.alpha_pattern,
                    target_modules: &mut $config.target_modules,
                    exclude_modules: &mut $config.exclude_modules,
                    layers_to_transform: &mut $config.layers_to_transform,
                    layers_pattern: &mut $config.layers_pattern,
                }
            };
        }
        match self {
            AdapterConfig::Lora(config) => placed!(config, lora_alpha),
            AdapterConfig::Loha(config) => placed!(config, alpha),
            AdapterConfig::Lokr(config) => placed!(config, alpha),
        }
    }

    /// Those of `paths` that it targets, as [`LoraConfig::matched`] has them.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn matched<'a>(&self, paths: impl IntoIterator<Item = &'a str>) -> Result<Vec<&'a str>> {
        self.selection().matched(paths)
    }

    /// Whether it is in range and doesn't contradict itself.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), naming the field.
    pub(crate) fn validate(self) -> Result<Self> {
        Ok(match self {
            AdapterConfig::Lora(config) => config.validate()?.into(),
            AdapterConfig::Loha(config) => config.validate()?.into(),
            AdapterConfig::Lokr(config) => config.validate()?.into(),
        })
    }

    /// The fields of a file that have no place of their own.
    pub(crate) fn other_mut(&mut self) -> &mut Map<String, Value> {
        match self {
            AdapterConfig::Lora(config) => &mut config.other,
            AdapterConfig::Loha(config) => &mut config.other,
            AdapterConfig::Lokr(config) => &mut config.other,
        }
    }

    /// Refuses a configuration that needs a feature that this version lacks.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) with every such field.
    pub(crate) fn check_supported(&self) -> Result<()> {
        self.as_lora().map_or(Ok(()), LoraConfig::check_supported)
    }

    /// Makes the configuration say what it meant: `all-linear` becomes the list
    /// of `modules`, as in PEFT's files, and patterns, which were matched with
    /// `names`, are put into an order that survives a save.
    pub(crate) fn settle(&mut self, names: &[String], modules: Vec<String>) {
        if let AdapterConfig::Lokr(config) = self {
            config.method.w1_pattern = config.method.w1_pattern.settle(names);
        }
        let Placed { rank_pattern: ranks, alpha_pattern: alphas, target_modules: target, .. } = self.placed_mut();
        for (field, unmatched) in [("rank_pattern", ranks.unmatched(names)), ("alpha_pattern", alphas.unmatched(names))]
        {
            if let Some(pattern) = unmatched {
                tracing::warn!(field, pattern, "a pattern matches no adapted module");
            }
        }
        *ranks = ranks.settle(names);
        *alphas = alphas.settle(names);
        if *target == Some(TargetModules::AllLinear) {
            *target = Some(TargetModules::List(modules));
        }
    }
}

/// Fields that every kind of configuration has.
#[derive(Debug)]
pub(crate) struct Placed<'a> {
    pub(crate) r: &'a mut i64,
    pub(crate) alpha: &'a mut f64,
    pub(crate) rank_pattern: &'a mut LayerPattern<i64>,
    pub(crate) alpha_pattern: &'a mut LayerPattern<f64>,
    pub(crate) target_modules: &'a mut Option<TargetModules>,
    pub(crate) exclude_modules: &'a mut Option<TargetModules>,
    pub(crate) layers_to_transform: &'a mut Option<OneOrMany<i64>>,
    pub(crate) layers_pattern: &'a mut Option<OneOrMany<String>>,
}

/// `field: recorded …, given …` for each field that differs, of lists in the
/// same order.
pub(super) fn differences(recorded: Vec<(&'static str, String)>, given: Vec<(&'static str, String)>) -> Vec<String> {
    let pairs = recorded.into_iter().zip(given);
    pairs
        .filter(|((_, recorded), (_, given))| recorded != given)
        .map(|((field, recorded), (_, given))| format!("{field}: recorded {recorded}, given {given}"))
        .collect()
}
