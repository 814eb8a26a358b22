//! From a Hugging Face folder to a base.

use super::{Config, Llama, Result};
use std::path::Path;
use tch::nn::VarStore;
use tch::{Device, Kind};
use tch_peft::{Base, QuantConfig, QuantizeOptions};

/// Loads `config.json` and the safetensors beside it, weight by weight from
/// memory-mapped files. With `quantize`, each weight is packed as it is read, so
/// that the dense model is never in memory; without, a folder of bitsandbytes or
/// optimum-quanto is loaded packed as it is.
pub fn load(
    folder: &Path,
    device: Device,
    kind: Kind,
    quantize: Option<&QuantConfig>,
    options: QuantizeOptions,
) -> Result<Base<Llama>> {
    let config = Config::read(folder)?;
    let store = VarStore::new(device);
    let net = Llama::new(&store.root(), kind, &config);
    let base = Base::new(store, net);
    Ok(match quantize {
        Some(quantize) => base.load_and_quantize_with(folder, quantize, options)?,
        None => base.load_quantized(folder)?,
    })
}
