//! What to quantise, and how.

use crate::error::{Error, Result};
use crate::names::suffix_matches;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a weight is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "scheme", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scheme {
    /// Symmetric 8-bit integers, one scale per output channel:
    /// `scale = max|w| / 127`, `q = round(w / scale)`, value `q · scale`, all in
    /// the weight's dtype. The definition of optimum-quanto's `qint8`.
    Int8,
    /// 4-bit NormalFloat (QLoRA, arXiv:2305.14314, appendix E): each block of 64
    /// consecutive values shares one f32 scale, `max|w|`, and each value is the
    /// nearest of 16 quantiles of a normal distribution. Bytes as in
    /// bitsandbytes.
    Nf4 {
        /// Whether the scales are quantised too, to 8 bits in blocks of 256
        /// (0.127 instead of 0.5 bits per weight).
        double_quant: bool,
    },
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scheme::Int8 => "int8",
            Scheme::Nf4 { double_quant: false } => "nf4",
            Scheme::Nf4 { double_quant: true } => "nf4+dq",
        })
    }
}

/// Which weights of a base are quantised, and how.
///
/// ```
/// use tch_peft::QuantConfig;
/// let config = QuantConfig::nf4().double_quant(true).skip(["lm_head"]).build()?;
/// assert_eq!(config.scheme().to_string(), "nf4+dq");
/// assert!(config.skips("model.lm_head") && !config.skips("model.head"));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantConfig {
    #[serde(flatten)]
    scheme: Scheme,
    #[serde(default)]
    skip: Vec<String>,
}

impl QuantConfig {
    /// 8-bit integers, see [`Scheme::Int8`].
    pub fn int8() -> QuantConfigBuilder {
        QuantConfigBuilder { scheme: Scheme::Int8, double_quant: None, skip: Vec::new() }
    }

    /// 4-bit NormalFloat, see [`Scheme::Nf4`]; without double quantisation
    /// unless asked for.
    pub fn nf4() -> QuantConfigBuilder {
        let scheme = Scheme::Nf4 { double_quant: false };
        QuantConfigBuilder { scheme, double_quant: None, skip: Vec::new() }
    }

    /// The scheme of the weights that are quantised.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The entries given to [`QuantConfigBuilder::skip`].
    pub fn skip(&self) -> &[String] {
        &self.skip
    }

    /// Whether the module at `path` keeps its dense weight.
    pub fn skips(&self, path: &str) -> bool {
        self.skip.iter().any(|entry| suffix_matches(path, entry))
    }
}

/// Makes a [`QuantConfig`].
#[derive(Debug, Clone)]
#[must_use = "call build()"]
pub struct QuantConfigBuilder {
    scheme: Scheme,
    double_quant: Option<bool>,
    skip: Vec<String>,
}

impl QuantConfigBuilder {
    /// Quantise the scales too. Only `nf4` has that.
    pub fn double_quant(mut self, on: bool) -> Self {
        self.double_quant = Some(on);
        self
    }

    /// Modules that stay dense: whole paths or their last segments, as in
    /// PEFT's `target_modules`. An entry that matches no linear weight is an
    /// error when the base is quantised.
    pub fn skip<S: Into<String>>(mut self, entries: impl IntoIterator<Item = S>) -> Self {
        self.skip.extend(entries.into_iter().map(Into::into));
        self
    }

    /// Checks the choices.
    ///
    /// # Errors
    /// [`Error::Config`] for double quantisation of a scheme without it, or an
    /// empty skip entry.
    pub fn build(self) -> Result<QuantConfig> {
        let scheme = match (self.scheme, self.double_quant) {
            (Scheme::Nf4 { .. }, Some(double_quant)) => Scheme::Nf4 { double_quant },
            (Scheme::Int8, Some(true)) => {
                return Err(Error::config("double_quant", "false for int8, whose scales are per row", true));
            }
            (scheme, _) => scheme,
        };
        if self.skip.iter().any(String::is_empty) {
            return Err(Error::config("skip", "entries that name a module", "an empty entry"));
        }
        Ok(QuantConfig { scheme, skip: self.skip })
    }
}
