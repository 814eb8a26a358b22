//! What to quantise, and how.

use super::pattern::matches;
use super::scheme::{Fp8Format, Scheme};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// What a [`QuantRule`] does with the weights that it matches.
///
/// ```
/// use tch_peft::{QuantConfig, Scheme, Treatment};
///
/// let config = QuantConfig::nf4().rule("h.0.*", Treatment::Keep).rule("*.down", Scheme::Int8).build()?;
/// assert_eq!(config.rules()[1].to, Treatment::Quantize(Scheme::Int8));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Treatment {
    /// The weight stays dense.
    Keep,
    /// The weight is packed by this scheme, be it of a linear layer, an
    /// embedding or a convolution.
    Quantize(Scheme),
}

/// `Scheme → Treatment::Quantize`.
impl From<Scheme> for Treatment {
    fn from(scheme: Scheme) -> Self {
        Treatment::Quantize(scheme)
    }
}

/// One rule of a [`QuantConfig`].
///
/// ```
/// use tch_peft::{QuantConfig, QuantRule, Scheme};
///
/// let config = QuantConfig::nf4().rule("mlp.down_proj", Scheme::Int8).build()?;
/// assert_eq!(config.rules(), [QuantRule { pattern: "mlp.down_proj".into(), to: Scheme::Int8.into() }]);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantRule {
    /// A module's path or its last segments; `*` stands for any characters.
    pub pattern: String,
    /// What is done.
    pub to: Treatment,
}

/// Which weights of a base are quantised, and how.
///
/// The first of these that matches a module's path decides: an entry of `skip`,
/// a rule, in the order they were given, and last the default scheme, which
/// linear layers get, and embeddings and convolutions only if asked for.
///
/// ```
/// use tch_peft::{QuantConfig, Scheme, Treatment};
/// let config = QuantConfig::nf4()
///     .double_quant(true)
///     .skip(["lm_head"])
///     .rule("h.*.mlp.down", Scheme::Int8)
///     .rule("h.0.*", Treatment::Keep)
///     .build()?;
/// assert_eq!(config.scheme().to_string(), "nf4+dq");
/// assert!(config.skips("model.lm_head") && !config.skips("model.head"));
/// assert_eq!(config.choose("model.h.0.mlp.down", true), Some(Scheme::Int8));
/// assert_eq!(config.choose("model.h.0.q_proj", true), None);
/// assert_eq!(config.choose("model.h.1.q_proj", true), Some(config.scheme()));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct QuantConfig {
    #[serde(flatten)]
    scheme: Scheme,
    skip: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rules: Vec<QuantRule>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    embeddings: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    convolutions: bool,
}

/// The fields of a serialised [`QuantConfig`], which may be missing or wrong.
#[derive(Deserialize)]
struct Unchecked {
    #[serde(flatten)]
    scheme: Scheme,
    #[serde(default)]
    skip: Vec<String>,
    #[serde(default)]
    rules: Vec<QuantRule>,
    #[serde(default)]
    embeddings: bool,
    #[serde(default)]
    convolutions: bool,
}

impl TryFrom<Unchecked> for QuantConfig {
    type Error = Error;

    fn try_from(Unchecked { scheme, skip, rules, embeddings, convolutions }: Unchecked) -> Result<Self> {
        QuantConfig { scheme, skip, rules, embeddings, convolutions }.validate()
    }
}

impl QuantConfig {
    /// Any scheme.
    pub fn builder(scheme: Scheme) -> QuantConfigBuilder {
        let (skip, rules) = (Vec::new(), Vec::new());
        let config = QuantConfig { scheme, skip, rules, embeddings: false, convolutions: false };
        QuantConfigBuilder { config, wrong: None }
    }

    /// 8-bit integers, see [`Scheme::Int8`].
    pub fn int8() -> QuantConfigBuilder {
        Self::builder(Scheme::Int8)
    }

    /// 4-bit integers in groups of 128, see [`Scheme::Int4`].
    pub fn int4() -> QuantConfigBuilder {
        Self::builder(Scheme::INT4)
    }

    /// 2-bit integers in groups of 128, see [`Scheme::Int2`].
    pub fn int2() -> QuantConfigBuilder {
        Self::builder(Scheme::INT2)
    }

    /// 8-bit floats, see [`Scheme::Fp8`].
    pub fn fp8(format: Fp8Format) -> QuantConfigBuilder {
        Self::builder(Scheme::Fp8 { format })
    }

    /// 4-bit NormalFloat, see [`Scheme::Nf4`]; blocks of 64, and without double
    /// quantisation unless asked for.
    pub fn nf4() -> QuantConfigBuilder {
        Self::builder(Scheme::NF4)
    }

    /// 4-bit floats, see [`Scheme::Fp4`]; blocks of 64, and without double
    /// quantisation unless asked for.
    pub fn fp4() -> QuantConfigBuilder {
        Self::builder(Scheme::FP4)
    }

    /// Microscaling 4-bit floats, see [`Scheme::Mxfp4`].
    pub fn mxfp4() -> QuantConfigBuilder {
        Self::builder(Scheme::Mxfp4)
    }

    /// The scheme of the weights that are quantised and match no rule.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The entries given to [`QuantConfigBuilder::skip`].
    pub fn skip(&self) -> &[String] {
        &self.skip
    }

    /// The rules, in their order.
    pub fn rules(&self) -> &[QuantRule] {
        &self.rules
    }

    /// Whether embeddings that match no rule are quantised.
    pub fn embeddings(&self) -> bool {
        self.embeddings
    }

    /// Whether convolutions that match no rule are quantised.
    pub fn convolutions(&self) -> bool {
        self.convolutions
    }

    /// Whether `skip` keeps the weight of the module at `path` dense.
    pub fn skips(&self, path: &str) -> bool {
        self.skip.iter().any(|entry| matches(entry, path))
    }

    /// The scheme for the module at `path`; `None` if it stays dense.
    /// `by_default` says whether it is quantised where no rule names it.
    pub fn choose(&self, path: &str, by_default: bool) -> Option<Scheme> {
        if self.skips(path) {
            return None;
        }
        match self.rules.iter().find(|rule| matches(&rule.pattern, path)).map(|rule| rule.to) {
            Some(Treatment::Keep) => None,
            Some(Treatment::Quantize(scheme)) => Some(scheme),
            None => by_default.then_some(self.scheme),
        }
    }

    /// Every pattern in it.
    pub(crate) fn patterns(&self) -> impl Iterator<Item = &str> {
        self.skip.iter().map(String::as_str).chain(self.rules.iter().map(|rule| rule.pattern.as_str()))
    }

    fn validate(self) -> Result<Self> {
        self.scheme.validate()?;
        for rule in &self.rules {
            if let Treatment::Quantize(scheme) = rule.to {
                scheme.validate()?;
            }
        }
        let empty = |field| Error::config(field, "entries that name a module", "an empty entry");
        if self.skip.iter().any(String::is_empty) {
            return Err(empty("skip"));
        }
        if self.rules.iter().any(|rule| rule.pattern.is_empty()) {
            return Err(empty("rules"));
        }
        Ok(self)
    }
}

/// Makes a [`QuantConfig`].
///
/// ```
/// use tch_peft::QuantConfig;
///
/// let config = QuantConfig::int4().group_size(64).hqq(true).skip(["lm_head"]).embeddings(true).build()?;
/// assert_eq!(config.scheme().to_string(), "int4-g64+hqq");
/// assert!(QuantConfig::int8().double_quant(true).build().is_err()); // int8 has no such setting
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "call build()"]
pub struct QuantConfigBuilder {
    config: QuantConfig,
    /// The first setting that the scheme doesn't have.
    wrong: Option<(&'static str, String)>,
}

impl QuantConfigBuilder {
    /// Quantise the scales too. Only `nf4` and `fp4` have that.
    pub fn double_quant(mut self, on: bool) -> Self {
        match &mut self.config.scheme {
            Scheme::Nf4 { double_quant, .. } | Scheme::Fp4 { double_quant, .. } => *double_quant = on,
            // Off is what the other schemes are.
            _ if !on => {}
            _ => self.refuse("double_quant", on),
        }
        self
    }

    /// Values in a block of `nf4` or `fp4`: a power of two from 32 to 4096.
    pub fn block_size(mut self, size: i64) -> Self {
        match &mut self.config.scheme {
            Scheme::Nf4 { block_size, .. } | Scheme::Fp4 { block_size, .. } => *block_size = size,
            _ => self.refuse("block_size", size),
        }
        self
    }

    /// Values in a group of `int4` or `int2`: 32, 64 or 128.
    pub fn group_size(mut self, size: i64) -> Self {
        match &mut self.config.scheme {
            Scheme::Int4 { group_size, .. } | Scheme::Int2 { group_size, .. } => *group_size = size,
            _ => self.refuse("group_size", size),
        }
        self
    }

    /// Search for scale and shift of `int4` or `int2`, see [`Scheme::Int4`].
    pub fn hqq(mut self, on: bool) -> Self {
        match &mut self.config.scheme {
            Scheme::Int4 { hqq, .. } | Scheme::Int2 { hqq, .. } => *hqq = on,
            _ if !on => {}
            _ => self.refuse("hqq", on),
        }
        self
    }

    fn refuse(&mut self, field: &'static str, found: impl ToString) {
        let _ = self.wrong.get_or_insert((field, found.to_string()));
    }

    /// Modules that stay dense: whole paths or their last segments, as in
    /// PEFT's `target_modules`; `*` stands for any characters. An entry that
    /// matches no weight is an error when the base is quantised.
    pub fn skip<S: Into<String>>(mut self, entries: impl IntoIterator<Item = S>) -> Self {
        self.config.skip.extend(entries.into_iter().map(Into::into));
        self
    }

    /// A scheme of their own for the modules that `pattern` matches, or
    /// [`Treatment::Keep`]. Patterns are those of
    /// [`skip`](QuantConfigBuilder::skip); of several rules the first that
    /// matches decides. A pattern that matches no weight is an error when the
    /// base is quantised.
    pub fn rule(mut self, pattern: impl Into<String>, to: impl Into<Treatment>) -> Self {
        self.config.rules.push(QuantRule { pattern: pattern.into(), to: to.into() });
        self
    }

    /// Quantise embeddings as well; off unless asked for.
    pub fn embeddings(mut self, on: bool) -> Self {
        self.config.embeddings = on;
        self
    }

    /// Quantise convolutions as well; off unless asked for.
    pub fn convolutions(mut self, on: bool) -> Self {
        self.config.convolutions = on;
        self
    }

    /// Checks the choices.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting that the scheme doesn't have, a size out
    /// of range, a scheme that is only read from files, or an empty pattern.
    pub fn build(self) -> Result<QuantConfig> {
        match self.wrong {
            Some((field, found)) => {
                let expected = format!("no such setting for {}", self.config.scheme);
                Err(Error::config(field, expected, found))
            }
            None => self.config.validate(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_read_back_and_older_ones_too() {
        let config = QuantConfig::int4()
            .group_size(64)
            .hqq(true)
            .skip(["lm_head"])
            .rule("wte", Scheme::Int8)
            .rule("h.0.*", Treatment::Keep)
            .convolutions(true)
            .build()
            .unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<QuantConfig>(&json).unwrap(), config);
        let old = r#"{"scheme":"nf4","double_quant":true,"skip":["lm_head"]}"#;
        let read: QuantConfig = serde_json::from_str(old).unwrap();
        assert_eq!(read, QuantConfig::nf4().double_quant(true).skip(["lm_head"]).build().unwrap());
        assert_eq!(serde_json::to_string(&read).unwrap(), old);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for builder in [
            QuantConfig::int8().double_quant(true),
            QuantConfig::int8().group_size(64),
            QuantConfig::nf4().hqq(true),
            QuantConfig::nf4().block_size(100),
            QuantConfig::int4().group_size(100),
            QuantConfig::int8().skip([""]),
            QuantConfig::int8().rule("", Scheme::Int8),
            QuantConfig::int8().rule("wte", Scheme::Gptq { group_size: 128 }),
            QuantConfig::builder(Scheme::Gptq { group_size: 128 }),
        ] {
            let error = builder.clone().build().unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error}");
        }
        for json in [
            r#"{"scheme":"int4","group_size":7}"#,
            r#"{"scheme":"int8","rules":[{"pattern":"a","to":"drop"}]}"#,
            r#"{"scheme":"int8","rules":[{"pattern":"","to":"keep"}]}"#,
        ] {
            assert!(serde_json::from_str::<QuantConfig>(json).is_err(), "{json}");
        }
    }
}
