//! `LoraConfig`, with PEFT's names, defaults and meaning.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::fmt;

/// Which linear layers are adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Whole module paths or their last segments: `q_proj` matches every
    /// `….q_proj`. An entry that matches nothing is an error.
    List(Vec<String>),
    /// A regular expression that must match the whole path.
    Regex(String),
    /// Every linear layer but the output layer (`lm_head`).
    AllLinear,
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(entries: [S; N]) -> Self {
        TargetModules::List(entries.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(entries: Vec<S>) -> Self {
        TargetModules::List(entries.into_iter().map(Into::into).collect())
    }
}

/// As PEFT reads a string: `all-linear`, or a regular expression.
impl From<&str> for TargetModules {
    fn from(pattern: &str) -> Self {
        if pattern.eq_ignore_ascii_case("all-linear") {
            TargetModules::AllLinear
        } else {
            TargetModules::Regex(pattern.into())
        }
    }
}

/// How A and B start. B is zero unless said, so that the model starts as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitLoraWeights {
    /// PEFT's `true`: A uniform in ±1/√in (Kaiming uniform with a = √5).
    Default,
    /// `"gaussian"`: A normal with standard deviation 1/r.
    Gaussian,
    /// PEFT's `false`: A uniform in ±1/√in and B in ±1/√r. The model changes
    /// at once; meant for tests.
    Random,
}

/// `true` or `false`, as in PEFT.
impl From<bool> for InitLoraWeights {
    fn from(on: bool) -> Self {
        if on { InitLoraWeights::Default } else { InitLoraWeights::Random }
    }
}

/// What to adapt, and with which rank, scale and dropout.
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
    pub(crate) target_modules: TargetModules,
    pub(crate) use_rslora: bool,
    pub(crate) init_lora_weights: InitLoraWeights,
    /// Keys of an `adapter_config.json` that don't change the result or that
    /// we don't know, kept so that saving loses nothing.
    pub(crate) other: Map<String, Value>,
}

impl LoraConfig {
    /// A builder with PEFT's defaults: r 8, alpha 8, no dropout. The target
    /// has none and must be given.
    pub fn builder() -> LoraConfigBuilder {
        LoraConfigBuilder {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Default,
        }
    }

    /// Rank of the adapters.
    pub fn r(&self) -> i64 {
        self.r
    }

    /// The numerator of the scale.
    pub fn lora_alpha(&self) -> f64 {
        self.lora_alpha
    }

    /// Probability that an input feature is dropped on the way to A.
    pub fn lora_dropout(&self) -> f64 {
        self.lora_dropout
    }

    /// Which layers are adapted.
    pub fn target_modules(&self) -> &TargetModules {
        &self.target_modules
    }

    /// Whether the scale is alpha/√r.
    pub fn use_rslora(&self) -> bool {
        self.use_rslora
    }

    /// How A and B start.
    pub fn init_lora_weights(&self) -> InitLoraWeights {
        self.init_lora_weights
    }

    /// The factor s of ΔW = s · B · A: alpha/r (LoRA, arXiv:2106.09685), or
    /// alpha/√r with rsLoRA (arXiv:2312.03732).
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// `field: recorded …, given …` for each field that changes training and
    /// differs in `given`. Targets are compared as sets.
    pub fn differences(&self, given: &LoraConfig) -> Vec<String> {
        let fields = |c: &LoraConfig| {
            let mut target = c.target_modules.clone();
            if let TargetModules::List(list) = &mut target {
                list.sort();
            }
            [
                ("r", c.r.to_string()),
                ("lora_alpha", c.lora_alpha.to_string()),
                ("lora_dropout", c.lora_dropout.to_string()),
                ("target_modules", format!("{target:?}")),
                ("use_rslora", c.use_rslora.to_string()),
                ("init_lora_weights", format!("{:?}", c.init_lora_weights)),
            ]
        };
        let pairs = fields(self).into_iter().zip(fields(given));
        pairs
            .filter(|((_, recorded), (_, given))| recorded != given)
            .map(|((field, recorded), (_, given))| format!("{field}: recorded {recorded}, given {given}"))
            .collect()
    }

    /// Checks ranges; the one place where they stand.
    pub(crate) fn validate(self) -> Result<Self> {
        if self.r < 1 {
            return Err(Error::config("r", "a rank of at least 1", self.r));
        }
        if !self.lora_alpha.is_finite() {
            return Err(Error::config("lora_alpha", "a finite number", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::config("lora_dropout", "a probability in [0, 1)", self.lora_dropout));
        }
        match &self.target_modules {
            TargetModules::List(list) if list.is_empty() || list.iter().any(String::is_empty) => {
                Err(Error::config("target_modules", "at least one module name, none empty", format!("{list:?}")))
            }
            TargetModules::Regex(pattern) => super::target::whole(pattern).map(|_| self),
            _ => Ok(self),
        }
    }
}

/// Makes a [`LoraConfig`].
#[derive(Debug, Clone)]
#[must_use = "call build()"]
pub struct LoraConfigBuilder {
    r: i64,
    lora_alpha: f64,
    lora_dropout: f64,
    target_modules: Option<TargetModules>,
    use_rslora: bool,
    init_lora_weights: InitLoraWeights,
}

impl LoraConfigBuilder {
    /// Rank of the adapters, at least 1.
    pub fn r(mut self, r: i64) -> Self {
        self.r = r;
        self
    }

    /// The numerator of the scale, see [`LoraConfig::scaling`].
    pub fn lora_alpha(mut self, alpha: f64) -> Self {
        self.lora_alpha = alpha;
        self
    }

    /// Probability in [0, 1) that an input feature is dropped on the way to A
    /// while training; the others are scaled by 1/(1 − p).
    pub fn lora_dropout(mut self, p: f64) -> Self {
        self.lora_dropout = p;
        self
    }

    /// A list of names, a regular expression, or `"all-linear"`.
    pub fn target_modules(mut self, target: impl Into<TargetModules>) -> Self {
        self.target_modules = Some(target.into());
        self
    }

    /// Scale by alpha/√r instead of alpha/r.
    pub fn use_rslora(mut self, on: bool) -> Self {
        self.use_rslora = on;
        self
    }

    /// How A and B start: `true`, `false`, or an [`InitLoraWeights`].
    pub fn init_lora_weights(mut self, init: impl Into<InitLoraWeights>) -> Self {
        self.init_lora_weights = init.into();
        self
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field.
    pub fn build(self) -> Result<LoraConfig> {
        let Some(target_modules) = self.target_modules else {
            return Err(Error::config("target_modules", "names, a regular expression or \"all-linear\"", "not given"));
        };
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules,
            use_rslora: self.use_rslora,
            init_lora_weights: self.init_lora_weights,
            other: Map::new(),
        }
        .validate()
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetModules::List(list) => f.write_str(&list.join(", ")),
            TargetModules::Regex(pattern) => f.write_str(pattern),
            TargetModules::AllLinear => f.write_str("all-linear"),
        }
    }
}
