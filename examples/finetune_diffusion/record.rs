//! What python/export.py writes beside a module.

use super::Result;
use serde::Deserialize;
use std::path::Path;
use tch::{Device, Kind};

/// `export.json`, as far as it is needed.
#[derive(Debug, Deserialize)]
pub struct Record {
    /// In the order in which the module takes them.
    pub inputs: Vec<Input>,
    /// `batch` and `length`, where a trace doesn't hold them fast.
    pub free: Vec<String>,
    device: String,
    /// Whether it runs elsewhere than on `device`, and in other dtypes.
    portable: bool,
    #[serde(skip)]
    kind: Option<Kind>,
}

/// Where a module is to run, and in which dtype if not that of its export.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub device: Device,
    pub kind: Option<Kind>,
}

/// An input, as it was when the module was traced.
#[derive(Debug, Deserialize)]
pub struct Input {
    pub name: String,
    pub shape: Vec<i64>,
    dtype: String,
}

impl Record {
    /// Of an exported module's folder; refuses a place where it can't run.
    pub fn read(folder: &Path, place: Place) -> Result<Self> {
        let path = folder.join("export.json");
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| at(&error))?;
        let mut record: Record = serde_json::from_str(&text).map_err(|error| at(&error))?;
        if !record.free.iter().any(|size| size == "batch") {
            return Err(at(&"expected a module that takes any batch size").into());
        }
        let is_there = matches!(place.device, Device::Cpu) == (record.device == "cpu");
        if !record.portable && (place.kind.is_some() || !is_there) {
            let message =
                format!("it runs on {} only, in the dtype of its export; export it as it is to run", record.device);
            return Err(at(&message).into());
        }
        record.kind = place.kind;
        Ok(record)
    }

    pub fn input(&self, name: &str) -> Option<&Input> {
        self.inputs.iter().find(|input| input.name == name)
    }

    /// The dtype of an input: floats have the module's.
    pub fn kind(&self, input: &Input) -> Result<Kind> {
        Ok(match (input.dtype.as_str(), self.kind) {
            ("torch.int64", _) => Kind::Int64,
            ("torch.float32" | "torch.bfloat16" | "torch.float16", Some(kind)) => kind,
            ("torch.float32", None) => Kind::Float,
            ("torch.bfloat16", None) => Kind::BFloat16,
            ("torch.float16", None) => Kind::Half,
            (other, _) => return Err(format!("{}: {other} is no dtype of an exported input", input.name).into()),
        })
    }
}
