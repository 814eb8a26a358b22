//! safetensors files, alone or sharded with an index, mapped into memory.

use super::{Record, kind_named};
use crate::error::{Error, Result};
use crate::ffi::bytes::tensor_from_bytes;
use crate::ffi::mapped::Mapped;
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The index of a sharded model.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The one file of a model that isn't sharded.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";

/// The tensors of a model by name. Nothing is read before it is asked for.
#[derive(Debug)]
pub(crate) struct Files {
    path: PathBuf,
    shards: Vec<Mapped>,
    entries: BTreeMap<String, Entry>,
    /// What was taken, or passed over on purpose.
    used: RefCell<BTreeSet<String>>,
    index: Index,
    /// `quantization_config` of `config.json`, or `quantize_config.json`.
    config: Value,
    /// quanto's quantisation map.
    map: Value,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    /// Where its bytes are in the shard.
    start: usize,
    end: usize,
    shape: Vec<i64>,
    kind: Kind,
}

#[derive(Debug, Default, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: Metadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
struct Metadata {
    /// What we wrote about packed weights.
    #[serde(default)]
    tch_peft: BTreeMap<String, Record>,
}

impl Files {
    /// Opens a folder with `model.safetensors`, or with an index and shards, or
    /// one safetensors file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let index_path = folder.join(INDEX_FILE);
        let mut index = Index::default();
        let names: BTreeSet<String> = if path.is_file() {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            name.into_iter().collect()
        } else if index_path.is_file() {
            index = json(&index_path)?;
            index.weight_map.values().cloned().collect()
        } else {
            BTreeSet::from([SINGLE_FILE.to_string()])
        };
        let mut files = Files {
            path: path.into(),
            shards: Vec::new(),
            entries: BTreeMap::new(),
            used: RefCell::default(),
            index,
            config: config(folder)?,
            map: Value::Null,
        };
        for name in ["quantization_map.json", "quanto_qmap.json"] {
            let path = folder.join(name);
            if path.is_file() {
                files.map = json(&path)?;
            }
        }
        for name in names {
            // An index must not lead out of its folder.
            let plain = Path::new(&name).components().all(|part| matches!(part, Component::Normal(_)));
            if !plain || name.is_empty() {
                return Err(files.corrupt(format!("the index names the file {name:?}")));
            }
            files.add(&folder.join(name))?;
        }
        if let Some(missing) = files.index.weight_map.keys().find(|key| !files.has(key)) {
            return Err(files.corrupt(format!("the index names {missing}, which no file has")));
        }
        Ok(files)
    }

    /// Adds the tensors of a file, whose header is checked.
    fn add(&mut self, path: &Path) -> Result<()> {
        let mapped = Mapped::open(path)?;
        let whole = |error| Error::corrupt(path, format!("not a whole safetensors file ({error})"));
        let bytes = mapped.bytes();
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(whole)?;
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let dtype = format!("{:?}", info.dtype);
            let kind = kind_named(&dtype)
                .ok_or_else(|| Error::corrupt(path, format!("{name} has dtype {dtype}, unknown to libtorch")))?;
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            if start > end || end > bytes.len() {
                return Err(Error::corrupt(path, format!("{name} ends after the end of the file")));
            }
            let shape = info.shape.iter().map(|&d| i64::try_from(d)).collect::<Result<_, _>>();
            let shape = shape.map_err(|_| Error::corrupt(path, format!("{name} has an impossible shape")))?;
            let entry = Entry { shard: self.shards.len(), start, end, shape, kind };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Error::corrupt(path, format!("{name} is in two files")));
            }
        }
        self.shards.push(mapped);
        Ok(())
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The keys that begin so.
    pub(super) fn beginning<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.entries
            .range(prefix.to_string()..)
            .map(|(key, _)| key.as_str())
            .take_while(move |key| key.starts_with(prefix))
    }

    /// Shape and dtype of a tensor.
    pub(crate) fn describe(&self, key: &str) -> Option<(&[i64], Kind)> {
        self.entries.get(key).map(|entry| (entry.shape.as_slice(), entry.kind))
    }

    /// A copy of a tensor that must be there.
    pub(crate) fn take(&self, key: &str, device: Device) -> Result<Tensor> {
        let Some(entry) = self.entries.get(key) else {
            return Err(Error::Keys { path: self.path.clone(), missing: vec![key.into()], unexpected: vec![] });
        };
        self.pass_over(key);
        let shard = &self.shards[entry.shard];
        let tensor = tensor_from_bytes(&shard.bytes()[entry.start..entry.end], &entry.shape, entry.kind)?;
        shard.release(entry.start..entry.end);
        Ok(tensor.f_to_device(device)?)
    }

    /// Whether two tensors have the same shape, dtype and bits.
    pub(crate) fn are_same(&self, a: &str, b: &str) -> bool {
        let (Some(a), Some(b)) = (self.entries.get(a), self.entries.get(b)) else { return false };
        let bytes = |entry: &Entry| &self.shards[entry.shard].bytes()[entry.start..entry.end];
        let same = (&a.shape, a.kind, bytes(a)) == (&b.shape, b.kind, bytes(b));
        for entry in [a, b] {
            self.shards[entry.shard].release(entry.start..entry.end);
        }
        same
    }

    /// Counts a tensor as known without reading it.
    pub(crate) fn pass_over(&self, key: &str) {
        self.used.borrow_mut().insert(key.to_string());
    }

    /// Keys that nobody asked for.
    pub(crate) fn unexpected(&self) -> Vec<String> {
        let used = self.used.borrow();
        self.entries.keys().filter(|key| !used.contains(*key)).cloned().collect()
    }

    /// What the index says about a weight, if we wrote it.
    pub(super) fn record(&self, weight: &str) -> Option<&Record> {
        self.index.metadata.tch_peft.get(weight)
    }

    /// A field of the model's quantisation configuration.
    pub(super) fn config(&self, field: &str) -> &Value {
        &self.config[field]
    }

    /// quanto's names of the dtypes of a module's weights and activations.
    pub(super) fn quanto(&self, path: &str) -> Option<[&str; 2]> {
        let of_module = self.map.get(path)?;
        Some(["weights", "activations"].map(|what| of_module[what].as_str().unwrap_or("none")))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn corrupt(&self, reason: impl ToString) -> Error {
        Error::corrupt(&self.path, reason)
    }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| Error::corrupt(path, error))
}

/// How the model was quantised, where its configuration says so.
fn config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    if path.is_file() {
        let config: Value = json(&path)?;
        if let Some(quantization) = config.get("quantization_config") {
            return Ok(quantization.clone());
        }
    }
    let path = folder.join("quantize_config.json");
    if path.is_file() { json(&path) } else { Ok(Value::Null) }
}
