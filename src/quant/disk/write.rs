//! Writing tensors into shards with an index.

use super::files::{INDEX_FILE, SINGLE_FILE};
use super::{Record, dtype_name};
use crate::error::{Error, Result};
use crate::ffi::bytes::CpuBytes;
use safetensors::{Dtype, View};
use serde::Serialize;
use serde_json::json;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use tch::Tensor;

/// quanto's quantisation map.
pub(crate) const MAP_FILE: &str = "quantization_map.json";

/// Tensors that go into one file.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    tensors: Vec<(String, Held)>,
    bytes: usize,
}

/// A tensor on its way to disk.
#[derive(Debug)]
struct Held {
    bytes: CpuBytes,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Held {
    fn new(name: &str, tensor: &Tensor) -> Result<Self> {
        let kind = tensor.f_kind()?;
        let dtype = serde_json::from_value(json!(dtype_name(kind)));
        let dtype = dtype.map_err(|_| Error::config(name, "a dtype that safetensors has", format!("{kind:?}")))?;
        let shape = tensor.size().iter().map(|&d| d as usize).collect();
        Ok(Held { bytes: CpuBytes::new(tensor)?, dtype, shape })
    }
}

impl View for &Held {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes.as_slice())
    }

    fn data_len(&self) -> usize {
        self.bytes.as_slice().len()
    }
}

impl Shard {
    /// Puts tensors, in order, into as few shards as hold at most `limit` bytes
    /// each, or one tensor.
    pub(crate) fn split(tensors: Vec<(String, Tensor)>, limit: usize) -> Result<Vec<Shard>> {
        let mut shards: Vec<Shard> = vec![Shard::default()];
        for (name, tensor) in tensors {
            let held = Held::new(&name, &tensor)?;
            let len = held.bytes.as_slice().len();
            if shards.last().is_some_and(|shard| !shard.tensors.is_empty() && shard.bytes + len > limit) {
                shards.push(Shard::default());
            }
            if let Some(shard) = shards.last_mut() {
                shard.bytes += len;
                shard.tensors.push((name, held));
            }
        }
        Ok(shards)
    }
}

/// Writes shards and their index, the index last. Each file appears whole or
/// not at all.
pub(crate) fn write_shards(folder: &Path, shards: &[Shard], records: &BTreeMap<String, Record>) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let names: Vec<String> = match shards.len() {
        1 => vec![SINGLE_FILE.into()],
        n => (1..=n).map(|i| format!("model-{i:05}-of-{n:05}.safetensors")).collect(),
    };
    refuse_strangers(folder, &names)?;
    let mut weight_map = BTreeMap::new();
    for (shard, name) in shards.iter().zip(&names) {
        let path = folder.join(name);
        let file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
        let views = shard.tensors.iter().map(|(name, held)| (name, held));
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), file.path()).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => Error::io(&path)(error),
            other => Error::config("tensors", "what safetensors can hold", other),
        })?;
        file.as_file().sync_all().map_err(Error::io(&path))?;
        file.persist(&path).map_err(|error| Error::io(&path)(error.error))?;
        weight_map.extend(shard.tensors.iter().map(|(key, _)| (key.clone(), name.clone())));
    }
    let total: usize = shards.iter().map(|shard| shard.bytes).sum();
    let index = json!({ "metadata": { "total_size": total, "tch_peft": records }, "weight_map": weight_map });
    write_json(&folder.join(INDEX_FILE), &index)
}

/// A file left by an earlier save could be taken for a part of this one.
fn refuse_strangers(folder: &Path, names: &[String]) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") && !names.contains(&name) {
            return Err(Error::config("folder", "one without files of another model", name));
        }
    }
    Ok(())
}

/// Writes a JSON file that appears whole or not at all.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    let text = serde_json::to_vec_pretty(value).map_err(|error| Error::corrupt(path, error))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(Error::io(path))?;
    file.persist(path).map_err(|error| Error::io(path)(error.error))?;
    Ok(())
}
