//! The schemes, as a caller names them and as files record them.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a weight is packed.
///
/// `n` values are packed row by row; a weight of more than two dimensions
/// counts as the matrix (first size, product of the others). "In the weight's
/// dtype" means that each step of the arithmetic is rounded to it.
///
/// ```
/// use tch_peft::{QuantConfig, Scheme};
///
/// let scheme = Scheme::Nf4 { block_size: 128, double_quant: true };
/// assert_eq!(scheme.to_string(), "nf4-b128+dq");
/// assert_eq!(QuantConfig::builder(scheme).build()?.scheme(), scheme);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "scheme", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scheme {
    /// Symmetric 8-bit integers, one scale per output channel:
    /// `scale = max|w| / 127`, `q = round(w / scale)`, value `q · scale`, all in
    /// the weight's dtype. The definition of optimum-quanto's `qint8`.
    Int8,
    /// Symmetric 8-bit integers as bitsandbytes keeps them (LLM.int8(),
    /// arXiv:2208.07339): the f32 maximum `SCB` of each output channel of the
    /// weight in f16, `q = round(w · (127 / SCB))`, value `q · SCB / 127`.
    #[serde(rename = "llm_int8")]
    LlmInt8,
    /// 4-bit integers with a scale and a float shift for each group of values
    /// of a row: `scale = (max − min) / 15`, `shift = −min`,
    /// `q = round((w + shift) / scale)`, value `scale · q − shift`, all in the
    /// weight's dtype. The definition of optimum-quanto's `qint4`.
    Int4 {
        /// Values in a group: 128, 64 or 32. Where a row isn't a multiple of
        /// it, the next smaller multiple of 32 is taken that divides the row,
        /// and the whole row where there is none or it is no longer than that.
        #[serde(default = "group")]
        group_size: i64,
        /// Whether scale and shift are searched for by half-quadratic
        /// optimisation (HQQ), which lowers the error and takes longer.
        #[serde(default)]
        hqq: bool,
    },
    /// 2-bit integers; otherwise as [`Scheme::Int4`], with 3 for 15.
    Int2 {
        /// As in [`Scheme::Int4`].
        #[serde(default = "group")]
        group_size: i64,
        /// As in [`Scheme::Int4`].
        #[serde(default)]
        hqq: bool,
    },
    /// 8-bit floats, one scale per output channel: `scale = max|w| / largest`,
    /// value `q · scale`, in the weight's dtype. The definition of
    /// optimum-quanto's `qfloat8`; a scale below the smallest normal number of
    /// the dtype, a row of zeros included, is raised to it.
    Fp8 {
        /// Which 8-bit float.
        format: Fp8Format,
    },
    /// 4-bit NormalFloat (QLoRA, arXiv:2305.14314, appendix E): each block of
    /// consecutive values shares one f32 scale, `max|w|`, and each value is the
    /// nearest of 16 quantiles of a normal distribution. Bytes as in
    /// bitsandbytes.
    Nf4 {
        /// Values in a block: a power of two from 32 to 4096.
        #[serde(default = "block", skip_serializing_if = "is_block")]
        block_size: i64,
        /// Whether the scales are quantised too, to 8 bits in blocks of 256
        /// (0.127 instead of 0.5 bits per weight, in blocks of 64).
        double_quant: bool,
    },
    /// 4-bit floats (sign, two bits of exponent, one of mantissa) in the
    /// variant of bitsandbytes; otherwise as [`Scheme::Nf4`].
    Fp4 {
        /// As in [`Scheme::Nf4`].
        #[serde(default = "block", skip_serializing_if = "is_block")]
        block_size: i64,
        /// As in [`Scheme::Nf4`].
        double_quant: bool,
    },
    /// MXFP4 of the OCP microscaling specification 1.0: 32 consecutive values
    /// of a row are e2m1 floats and share one power of two.
    Mxfp4,
    /// A plain cast to bfloat16.
    Bf16,
    /// A plain cast to IEEE half precision.
    F16,
    /// 4-bit integers with an integer zero point, `scale · (q − zero)`, as GPTQ
    /// and AWQ files hold them. Such weights are read, not made here.
    Gptq {
        /// Values of a row that share scale and zero.
        group_size: i64,
    },
}

/// An 8-bit float format.
///
/// ```
/// use tch_peft::{Fp8Format, QuantConfig};
///
/// assert_eq!(QuantConfig::fp8(Fp8Format::E5m2).build()?.scheme().to_string(), "fp8-e5m2");
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fp8Format {
    /// Four bits of exponent, three of mantissa, no infinities; up to 448.
    E4m3,
    /// Five bits of exponent, two of mantissa; up to 57344.
    E5m2,
}

/// quanto's group size.
fn group() -> i64 {
    128
}

/// bitsandbytes' block size.
fn block() -> i64 {
    64
}

fn is_block(size: &i64) -> bool {
    *size == block()
}

impl Scheme {
    /// [`Scheme::Int4`] in groups of 128, without a search.
    pub const INT4: Scheme = Scheme::Int4 { group_size: 128, hqq: false };
    /// [`Scheme::Int2`] in groups of 128, without a search.
    pub const INT2: Scheme = Scheme::Int2 { group_size: 128, hqq: false };
    /// [`Scheme::Fp8`] as e4m3.
    pub const FP8: Scheme = Scheme::Fp8 { format: Fp8Format::E4m3 };
    /// [`Scheme::Nf4`] in blocks of 64, scales in f32.
    pub const NF4: Scheme = Scheme::Nf4 { block_size: 64, double_quant: false };
    /// [`Scheme::Nf4`] in blocks of 64 with double quantisation.
    pub const NF4_DOUBLE: Scheme = Scheme::Nf4 { block_size: 64, double_quant: true };
    /// [`Scheme::Fp4`] in blocks of 64, scales in f32.
    pub const FP4: Scheme = Scheme::Fp4 { block_size: 64, double_quant: false };

    /// Checks the sizes in it, and that weights can be packed so.
    pub(crate) fn validate(self) -> Result<Self> {
        match self {
            Scheme::Int4 { group_size, .. } | Scheme::Int2 { group_size, .. }
                if ![32, 64, 128].contains(&group_size) =>
            {
                Err(Error::config("group_size", "32, 64 or 128", group_size))
            }
            Scheme::Nf4 { block_size, .. } | Scheme::Fp4 { block_size, .. } if !valid_block(block_size) => {
                Err(Error::config("block_size", "a power of two from 32 to 4096", block_size))
            }
            Scheme::Gptq { .. } => Err(only_read(self)),
            _ => Ok(self),
        }
    }
}

/// The error for a scheme that weights can't be packed in.
pub(super) fn only_read(scheme: Scheme) -> Error {
    Error::config("scheme", "one that weights can be packed in; gptq is only read from files", scheme)
}

/// bitsandbytes' block sizes.
pub(super) fn valid_block(size: i64) -> bool {
    (32..=4096).contains(&size) && size & (size - 1) == 0
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let affine = |f: &mut fmt::Formatter<'_>, name, size, hqq| {
            f.write_str(name)?;
            if size != group() {
                write!(f, "-g{size}")?;
            }
            f.write_str(if hqq { "+hqq" } else { "" })
        };
        let blocks = |f: &mut fmt::Formatter<'_>, name, size, double| {
            f.write_str(name)?;
            if !is_block(&size) {
                write!(f, "-b{size}")?;
            }
            f.write_str(if double { "+dq" } else { "" })
        };
        match *self {
            Scheme::Int8 => f.write_str("int8"),
            Scheme::LlmInt8 => f.write_str("llm_int8"),
            Scheme::Int4 { group_size, hqq } => affine(f, "int4", group_size, hqq),
            Scheme::Int2 { group_size, hqq } => affine(f, "int2", group_size, hqq),
            Scheme::Fp8 { format: Fp8Format::E4m3 } => f.write_str("fp8-e4m3"),
            Scheme::Fp8 { format: Fp8Format::E5m2 } => f.write_str("fp8-e5m2"),
            Scheme::Nf4 { block_size, double_quant } => blocks(f, "nf4", block_size, double_quant),
            Scheme::Fp4 { block_size, double_quant } => blocks(f, "fp4", block_size, double_quant),
            Scheme::Mxfp4 => f.write_str("mxfp4"),
            Scheme::Bf16 => f.write_str("bf16"),
            Scheme::F16 => f.write_str("f16"),
            Scheme::Gptq { group_size } => write!(f, "gptq-g{group_size}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serialised_form_is_stable() {
        for (scheme, json) in [
            (Scheme::Int8, r#"{"scheme":"int8"}"#),
            (Scheme::LlmInt8, r#"{"scheme":"llm_int8"}"#),
            (Scheme::INT4, r#"{"scheme":"int4","group_size":128,"hqq":false}"#),
            (Scheme::Int2 { group_size: 32, hqq: true }, r#"{"scheme":"int2","group_size":32,"hqq":true}"#),
            (Scheme::FP8, r#"{"scheme":"fp8","format":"e4m3"}"#),
            (Scheme::NF4_DOUBLE, r#"{"scheme":"nf4","double_quant":true}"#),
            (
                Scheme::Fp4 { block_size: 256, double_quant: false },
                r#"{"scheme":"fp4","block_size":256,"double_quant":false}"#,
            ),
            (Scheme::Mxfp4, r#"{"scheme":"mxfp4"}"#),
            (Scheme::Bf16, r#"{"scheme":"bf16"}"#),
            (Scheme::F16, r#"{"scheme":"f16"}"#),
            (Scheme::Gptq { group_size: 128 }, r#"{"scheme":"gptq","group_size":128}"#),
        ] {
            assert_eq!(serde_json::to_string(&scheme).unwrap(), json);
            assert_eq!(serde_json::from_str::<Scheme>(json).unwrap(), scheme);
        }
        assert!(serde_json::from_str::<Scheme>(r#"{"scheme":"nf3"}"#).is_err());
    }
}
