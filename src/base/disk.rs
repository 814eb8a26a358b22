//! A quantised base on disk.

use super::weights::{Weight, Weights, dtype_name};
use super::{QuantizationReport, QuantizedWeight, Site, WeightRole};
use crate::error::{Error, Result};
use crate::ffi::{bytes::element_size, hook, runtime::trim_heap};
use crate::quant::disk::{self, Files, Record, Shard, Wanted};
use crate::quant::{self, Parts};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Bytes of a shard, as `transformers` has it.
pub(super) const SHARD_BYTES: usize = 5_000_000_000;

/// Writes every weight, packed as it is.
pub(super) fn save(weights: &Weights, folder: &Path, shard_bytes: usize) -> Result<()> {
    let (mut tensors, mut records, mut map) = (Vec::new(), BTreeMap::new(), Map::new());
    let aliases = Aliases::of(weights);
    for weight in weights.iter().filter(|weight| aliases.is_first(weight)) {
        let frozen = weight.site().map(|site| site.frozen());
        let parts = frozen.as_ref().map(|packed| Parts::of(&weight.name, packed.as_ref(), Device::Cpu)).transpose()?;
        match (parts.flatten(), weight.module_path()) {
            (Some(parts), Some(path)) => {
                let (scheme, dtype) = (parts.scheme, dtype_name(parts.kind).to_string());
                if let Some(name) = disk::quanto_name(scheme, &parts.sizes) {
                    map.insert(path.into(), json!({ "weights": name, "activations": "none" }));
                }
                tensors.extend(disk::write(path, parts)?);
                records.insert(weight.name.clone(), Record { scheme, dtype });
            }
            _ => {
                let dense = frozen.and_then(|dense| dense.as_dense());
                tensors.push((weight.name.clone(), dense.unwrap_or_else(|| weight.tensor.shallow_clone())));
            }
        }
    }
    let shards = Shard::split(tensors, shard_bytes)?;
    disk::write_shards(folder, &shards, &records)?;
    if !map.is_empty() {
        disk::write_json(&folder.join(disk::MAP_FILE), &Value::Object(map))?;
    }
    Ok(())
}

/// Loads every weight, packed or dense, over the module's own.
pub(super) fn load(weights: &Weights, path: &Path) -> Result<QuantizationReport> {
    let files = Files::open(path)?;
    for weight in weights.iter() {
        if let Some(site) = weight.site() {
            let name = weight.name.clone();
            return Err(match site.frozen().scheme() {
                Some(scheme) => Error::AlreadyQuantized { name, scheme: scheme.to_string() },
                None => Error::AlreadyAdapted { name },
            });
        }
    }
    let aliases = Aliases::of(weights);
    let mut report = QuantizationReport::default();
    let mut missing = Vec::new();
    let mut loaded: Vec<usize> = Vec::new();
    weights.freeze()?;
    for weight in weights.iter() {
        if weight.site().is_some() {
            // Tied to one that was loaded.
            continue;
        }
        let parts = match weight.module_path().filter(|_| weight.role != WeightRole::Other) {
            Some(path) => {
                let (sizes, kind, device) = (weight.tensor.size(), weight.tensor.f_kind()?, weight.tensor.device());
                disk::read(&files, Wanted { path, sizes: &sizes, kind, device })?
            }
            None => None,
        };
        match parts {
            Some(parts) => report.push(attach(weight, parts)?),
            None if files.has(&weight.name) => copy(&files, weight)?,
            None => {
                missing.push(weight);
                continue;
            }
        }
        loaded.extend(aliases.group(weight));
    }
    let missing: Vec<String> = missing
        .into_iter()
        .filter(|weight| !aliases.group(weight).is_some_and(|group| loaded.contains(&group)))
        .map(|weight| weight.name.clone())
        .collect();
    let unexpected = files.unexpected();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::Keys { path: files.path().into(), missing, unexpected });
    }
    trim_heap();
    tracing::info!(
        weights = report.weights().len(),
        bytes_before = report.bytes_before(),
        bytes_after = report.bytes_after(),
        "loaded a quantised base"
    );
    Ok(report)
}

/// Puts a packed weight in the place of a dense one.
fn attach(weight: &Weight, parts: Parts) -> Result<QuantizedWeight> {
    let packed = quant::assemble(parts)?;
    let scheme = packed.scheme().ok_or_else(|| Error::config("scheme", "a packed weight", "a dense one"))?;
    let (sizes, kind) = (packed.sizes().to_vec(), packed.kind());
    let mut tensor = weight.tensor.shallow_clone();
    if tensor.f_kind()? != kind {
        // The weight takes on the dtype that was packed; its memory is not
        // touched before it is let go.
        let _no_grad = tch::no_grad_guard();
        tensor.set_data(&Tensor::f_empty(sizes.as_slice(), (kind, tensor.device()))?);
    }
    let quantized = QuantizedWeight {
        name: weight.name.clone(),
        bytes_before: sizes.iter().product::<i64>() as usize * element_size(kind),
        bytes_after: packed.nbytes()?,
        shape: sizes,
        scheme,
    };
    hook::attach(&weight.tensor, &weight.name, Arc::new(Site::new(&weight.name, packed)))?;
    Ok(quantized)
}

/// Copies a dense tensor, converting floats to the module's dtype.
fn copy(files: &Files, weight: &Weight) -> Result<()> {
    let found = files.take(&weight.name, Device::Cpu)?;
    let mut tensor = weight.tensor.shallow_clone();
    let same_class = found.is_floating_point() == tensor.is_floating_point();
    if found.size() != tensor.size() || !same_class {
        return Err(Error::Mismatch {
            name: weight.name.clone(),
            expected: format!("{:?} {:?}", tensor.f_kind()?, tensor.size()),
            found: format!("{:?} {:?}", found.f_kind()?, found.size()),
        });
    }
    let _no_grad = tch::no_grad_guard();
    tensor.f_copy_(&found)?;
    Ok(())
}

/// Names that stand for the same tensor.
struct Aliases(HashMap<String, usize>);

impl Aliases {
    /// By the address of the dense bytes; packed weights are told apart by
    /// their sites.
    fn of(weights: &Weights) -> Self {
        let address = |weight: &Weight| match weight.site() {
            Some(site) => Arc::as_ptr(&site) as usize,
            None => weight.tensor.data_ptr() as usize,
        };
        Aliases(weights.iter().filter(|w| w.tensor.numel() > 0).map(|w| (w.name.clone(), address(w))).collect())
    }

    fn group(&self, weight: &Weight) -> Option<usize> {
        self.0.get(&weight.name).copied()
    }

    /// Whether no name that sorts before stands for the same tensor.
    fn is_first(&self, weight: &Weight) -> bool {
        let Some(group) = self.group(weight) else { return true };
        !self.0.iter().any(|(name, other)| *other == group && *name < weight.name)
    }
}
