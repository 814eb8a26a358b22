//! The errors of quantising, measured.

use super::Result;
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{Fp8Format, Generator, Scheme};

/// Rows of the weights that are packed; their columns are as in a model of 7B.
pub const ROWS: i64 = 512;
const COLUMNS: i64 = 4096;

/// What packing costs and loses.
#[derive(Debug, Clone)]
pub struct Measured {
    /// How the weight is packed.
    pub scheme: Scheme,
    /// Bits of a value, scales included, of an f32 weight.
    pub bits_f32: f64,
    /// The same of a bf16 weight.
    pub bits_bf16: f64,
    /// ‖W' − W‖ / ‖W‖ of standard normal values.
    pub normal: f64,
    /// The same of values of Student's t distribution with five degrees of freedom.
    pub heavy: f64,
}

/// The schemes, by falling bits.
pub fn schemes() -> Vec<Scheme> {
    let int4 = |group_size, hqq| Scheme::Int4 { group_size, hqq };
    let int2 = |group_size, hqq| Scheme::Int2 { group_size, hqq };
    vec![
        Scheme::F16,
        Scheme::Bf16,
        Scheme::Int8,
        Scheme::LlmInt8,
        Scheme::FP8,
        Scheme::Fp8 { format: Fp8Format::E5m2 },
        int4(32, false),
        int4(64, false),
        int4(64, true),
        Scheme::NF4,
        Scheme::FP4,
        int4(128, false),
        int4(128, true),
        Scheme::Mxfp4,
        Scheme::NF4_DOUBLE,
        int2(32, true),
        int2(128, false),
        int2(128, true),
    ]
}

/// Packs weights of so many rows by each scheme.
pub fn all(rows: i64) -> Result<Vec<Measured>> {
    let (normal, heavy) = weights(rows)?;
    schemes().into_iter().map(|scheme| one(scheme, &normal, &heavy)).collect()
}

/// Values that are the same on every machine: standard normal ones, and of Student's t distribution.
fn weights(rows: i64) -> Result<(Tensor, Tensor)> {
    let (mut generator, shape) = (Generator::new(1), [rows, COLUMNS]);
    let mut draw = || generator.normal(&shape, Device::Cpu);
    let (normal, above) = (draw()?, draw()?);
    let mut squares = draw()?.f_square()?;
    for _ in 1..5 {
        squares = squares.f_add(&draw()?.f_square()?)?;
    }
    Ok((normal, above.f_div(&squares.f_div_scalar(5.0)?.f_sqrt()?)?))
}

fn one(scheme: Scheme, normal: &Tensor, heavy: &Tensor) -> Result<Measured> {
    let bits = |weight: &Tensor| -> Result<f64> {
        Ok(8.0 * quantize("weight", weight, scheme)?.nbytes()? as f64 / weight.numel() as f64)
    };
    let error = |weight: &Tensor| -> Result<f64> {
        let packed = quantize("weight", weight, scheme)?.dequantize(Kind::Float)?;
        let norm = |t: Tensor| -> Result<f64> { Ok(f64::try_from(t.f_to_kind(Kind::Double)?.f_norm()?)?) };
        Ok(norm(packed.f_sub(weight)?)? / norm(weight.shallow_clone())?)
    };
    Ok(Measured {
        scheme,
        bits_f32: bits(normal)?,
        bits_bf16: bits(&normal.f_to_kind(Kind::BFloat16)?)?,
        normal: error(normal)?,
        heavy: error(heavy)?,
    })
}

/// The file's text.
pub fn csv(rows: &[Measured]) -> String {
    let mut text = format!(
        "# Made by `cargo run --release --example charts -- --measure`: f32 weights of {ROWS} x {COLUMNS}.\n\
         scheme,bits_f32,bits_bf16,normal,heavy\n"
    );
    for Measured { scheme, bits_f32, bits_bf16, normal, heavy } in rows {
        text += &format!("{scheme},{bits_f32:.3},{bits_bf16:.3},{normal:.3e},{heavy:.3e}\n");
    }
    text
}
