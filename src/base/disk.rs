//! A quantised base on disk.

use super::weights::{Weight, Weights, dtype_name};
use super::{Progress, QuantizationReport, QuantizeOptions, QuantizedWeight, Site, WeightRole};
use crate::error::{Error, Result};
use crate::ffi::{bytes::element_size, hook, runtime::trim_heap};
use crate::quant::disk::{self, Files, Record, Shard, Wanted};
use crate::quant::{self, PackedWeight, Parts, QuantConfig, Scheme};
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

/// Loads every weight, packed or dense, over the module's own; those that
/// `config` means are dense in the files, and packed as they are read.
pub(super) fn load(
    weights: &Weights,
    path: &Path,
    config: Option<&QuantConfig>,
    options: &mut QuantizeOptions<'_>,
) -> Result<QuantizationReport> {
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
    let chosen = config.map(|config| weights.chosen(config)).transpose()?.unwrap_or_default();
    // Tied weights are packed once, under the first of their names.
    let mut schemes: HashMap<usize, Scheme> = HashMap::new();
    for (weight, scheme) in chosen {
        schemes.entry(aliases.group(weight).unwrap_or_default()).or_insert(scheme);
    }
    let (mut done, total) = (0, schemes.len());
    let mut report = QuantizationReport::default();
    let mut missing = Vec::new();
    // The name under which each group of tied weights was loaded.
    let mut loaded: HashMap<usize, &str> = HashMap::new();
    weights.freeze()?;
    for weight in weights.iter() {
        if let Some(first) = aliases.group(weight).and_then(|group| loaded.get(&group)) {
            pass_over_tied(&files, &weight.name, first)?;
            continue;
        }
        let parts = match weight.module_path().filter(|_| weight.role != WeightRole::Other) {
            Some(path) => {
                let (sizes, kind, device) = (weight.tensor.size(), weight.tensor.f_kind()?, weight.tensor.device());
                disk::read(&files, Wanted { path, sizes: &sizes, kind, device })?
            }
            None => None,
        };
        let scheme = aliases.group(weight).and_then(|group| schemes.get(&group));
        match (parts, scheme) {
            (Some(parts), None) => report.push(attach(weight, quant::assemble(parts)?)?),
            (Some(parts), Some(_)) => {
                return Err(Error::AlreadyQuantized { name: parts.name, scheme: parts.scheme.to_string() });
            }
            (None, Some(scheme)) if files.has(&weight.name) => {
                report.push(attach(weight, read_and_pack(&files, weight, *scheme, options.device)?)?);
                // What dense weights took would be kept for others of their size.
                trim_heap();
                done += 1;
                if let (Some(progress), Some(weight)) = (&mut options.progress, report.weights().last()) {
                    progress(Progress { weight, done, total });
                }
            }
            (None, None) if files.has(&weight.name) => copy(&files, weight)?,
            (None, None) if weight.optional => {
                tracing::debug!(name = weight.name, "not in the files: left as the module has it");
                continue;
            }
            (None, _) => {
                missing.push(weight);
                continue;
            }
        }
        loaded.extend(aliases.group(weight).map(|group| (group, weight.name.as_str())));
    }
    let missing: Vec<String> = missing
        .into_iter()
        .filter(|weight| !aliases.group(weight).is_some_and(|group| loaded.contains_key(&group)))
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

/// A tied weight that was loaded as `first`: files may hold its values once more.
fn pass_over_tied(files: &Files, name: &str, first: &str) -> Result<()> {
    if files.has(name) && !files.are_same(name, first) {
        return Err(Error::Mismatch {
            name: name.into(),
            expected: format!("the values of {first}, to which the module ties it"),
            found: "others".into(),
        });
    }
    files.pass_over(name);
    Ok(())
}

/// Puts a packed weight in the place of a dense one.
fn attach(weight: &Weight, packed: Arc<dyn PackedWeight>) -> Result<QuantizedWeight> {
    let scheme = packed.scheme().ok_or_else(|| Error::config("scheme", "a packed weight", "a dense one"))?;
    let (sizes, kind) = (packed.sizes().to_vec(), packed.kind());
    let mut tensor = weight.tensor.shallow_clone();
    if tensor.f_kind()? != kind {
        // The weight takes on the dtype that was packed; its memory is not
        // touched before it is let go.
        let _no_grad = tch::no_grad_guard();
        tensor.f_set_data(&Tensor::f_empty(sizes.as_slice(), (kind, tensor.device()))?)?;
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

/// A dense tensor as the module has it: of its dtype, where it has it.
fn read_dense(files: &Files, weight: &Weight) -> Result<Tensor> {
    let (found, tensor) = (files.take(&weight.name, Device::Cpu)?, &weight.tensor);
    let same_class = found.is_floating_point() == tensor.is_floating_point();
    if found.size() != tensor.size() || !same_class {
        return Err(Error::Mismatch {
            name: weight.name.clone(),
            expected: format!("{:?} {:?}", tensor.f_kind()?, tensor.size()),
            found: format!("{:?} {:?}", found.f_kind()?, found.size()),
        });
    }
    Ok(found.f_to_device(tensor.device())?.f_to_kind(tensor.f_kind()?)?)
}

/// A dense tensor of the files, packed.
fn read_and_pack(
    files: &Files,
    weight: &Weight,
    scheme: Scheme,
    device: Option<Device>,
) -> Result<Arc<dyn PackedWeight>> {
    let dense = read_dense(files, weight)?;
    quant::check(&weight.name, &dense, scheme)?;
    quant::pack_on(&weight.name, &dense, scheme, device)
}

/// Fills a dense weight.
fn copy(files: &Files, weight: &Weight) -> Result<()> {
    let dense = read_dense(files, weight)?;
    // Other tensors may hold -inf on purpose, such as masks.
    if weight.role != WeightRole::Other {
        quant::check_finite(&weight.name, &dense, "the file is broken: take another copy of it")?;
    }
    let mut tensor = weight.tensor.shallow_clone();
    let _no_grad = tch::no_grad_guard();
    // One element that was expanded has no memory to copy to.
    let is_place = tensor.size().iter().zip(tensor.stride()).any(|(size, stride)| *size > 1 && stride == 0);
    match is_place {
        true => tensor.f_set_data(&dense)?,
        false => tensor.f_copy_(&dense).map(drop)?,
    }
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
