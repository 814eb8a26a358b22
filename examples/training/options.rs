//! What programs are told about a model on their command line: what each word means.

use super::Result;
use tch::{Device, Kind};
use tch_peft::{Fp8Format, QuantConfig, QuantConfigBuilder};

/// How to pack the weights; `None` for `none`: as they are in the files.
pub fn scheme(name: &str) -> Result<Option<QuantConfigBuilder>> {
    Ok(Some(match name {
        "nf4" => QuantConfig::nf4().double_quant(true),
        "fp4" => QuantConfig::fp4().double_quant(true),
        "int8" => QuantConfig::int8(),
        "int4" => QuantConfig::int4(),
        "int2" => QuantConfig::int2(),
        "fp8" => QuantConfig::fp8(Fp8Format::E4m3),
        "none" => return Ok(None),
        other => return Err(format!("--scheme {other}: expected nf4, fp4, int8, int4, int2, fp8 or none").into()),
    }))
}

/// The dtype of what is not packed.
pub fn dtype(name: &str) -> Result<Kind, &'static str> {
    match name {
        "f32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        _ => Err("expected f32 or bf16"),
    }
}

pub fn device(name: &str) -> Result<Device, &'static str> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" if tch::Cuda::is_available() => Ok(Device::Cuda(0)),
        "cuda" => Err("libtorch sees no GPU; see `tch_peft::cuda_status`"),
        _ => Err("expected cpu or cuda"),
    }
}
