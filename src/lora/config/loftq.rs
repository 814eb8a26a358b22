//! `loftq_config`: what the `loftq` initialisation quantises to.

use crate::error::{Error, Result};
use crate::quant::Scheme;
use serde::Deserialize;
use serde_json::{Value, json};

/// How the `loftq` initialisation quantises a weight, and how often it goes
/// about it.
///
/// PEFT's `loftq_bits` of 4 means nf4, and of 8 int8. Another scheme stands
/// beside the bits, in a field `scheme` that PEFT doesn't read.
///
/// ```
/// use tch_peft::{InitLoraWeights, LoftqConfig, LoraConfig, Scheme};
///
/// let config = LoraConfig::builder()
///     .r(16)
///     .target_modules(["q_proj"])
///     .init_lora_weights(InitLoraWeights::Loftq)
///     .loftq_config(LoftqConfig { scheme: Scheme::INT4, loftq_iter: 5 })
///     .build()?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoftqConfig {
    /// What the weight becomes: any scheme that weights can be quantised to.
    pub scheme: Scheme,
    /// Rounds of quantising and decomposing, at least 1.
    pub loftq_iter: i64,
}

/// PEFT's default: nf4, once.
impl Default for LoftqConfig {
    fn default() -> Self {
        LoftqConfig { scheme: Scheme::NF4, loftq_iter: 1 }
    }
}

/// The form in files.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Fields {
    loftq_bits: i64,
    loftq_iter: i64,
    scheme: Option<Scheme>,
}

impl Default for Fields {
    fn default() -> Self {
        Fields { loftq_bits: 4, loftq_iter: 1, scheme: None }
    }
}

impl LoftqConfig {
    pub(super) fn read(value: Option<&Value>) -> Result<Self> {
        let Some(value) = value else { return Ok(LoftqConfig::default()) };
        let wrong = |expected: &str| Error::config("loftq_config", expected, value);
        let fields = Fields::deserialize(value).map_err(|_| wrong("loftq_bits, loftq_iter and a scheme"))?;
        let scheme = match (fields.scheme, fields.loftq_bits) {
            (Some(scheme), bits) if Some(bits) == bits_of(scheme) => scheme.validate()?,
            (Some(_), _) => return Err(wrong("a scheme that has the loftq_bits")),
            (None, 4) => Scheme::NF4,
            (None, 8) => Scheme::Int8,
            (None, _) => return Err(wrong("loftq_bits of 4 or 8, or another scheme beside them")),
        };
        if fields.loftq_iter < 1 {
            return Err(wrong("a loftq_iter of at least 1"));
        }
        Ok(LoftqConfig { scheme, loftq_iter: fields.loftq_iter })
    }

    pub(super) fn to_json(self) -> Value {
        let mut fields = json!({"loftq_bits": bits_of(self.scheme), "loftq_iter": self.loftq_iter});
        if ![Scheme::NF4, Scheme::Int8].contains(&self.scheme) {
            fields["scheme"] = json!(self.scheme);
        }
        fields
    }
}

/// Bits of one value; `None` for what isn't quantised, or only read.
fn bits_of(scheme: Scheme) -> Option<i64> {
    match scheme {
        Scheme::Int2 { .. } => Some(2),
        Scheme::Int4 { .. } | Scheme::Nf4 { .. } | Scheme::Fp4 { .. } | Scheme::Mxfp4 => Some(4),
        Scheme::Int8 | Scheme::LlmInt8 | Scheme::Fp8 { .. } => Some(8),
        Scheme::Bf16 | Scheme::F16 | Scheme::Gptq { .. } => None,
    }
}
