//! What python/export.py writes beside a module.

use super::Result;
use super::training::options::device;
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
}

/// An input, as it was when the module was traced.
#[derive(Debug, Deserialize)]
pub struct Input {
    pub name: String,
    pub shape: Vec<i64>,
    dtype: String,
}

impl Record {
    /// Of an exported module's folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("export.json");
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| at(&error))?;
        let record: Record = serde_json::from_str(&text).map_err(|error| at(&error))?;
        match record.free.iter().any(|size| size == "batch") {
            true => Ok(record),
            false => Err(at(&"expected a module that takes any batch size").into()),
        }
    }

    /// Where it was traced: constants that the model made on the way are there.
    pub fn device(&self) -> Result<Device> {
        let name = self.device.split(':').next().unwrap_or_default();
        Ok(device(name).map_err(|error| format!("exported on {}; {error}", self.device))?)
    }

    pub fn input(&self, name: &str) -> Option<&Input> {
        self.inputs.iter().find(|input| input.name == name)
    }
}

impl Input {
    pub fn kind(&self) -> Result<Kind> {
        Ok(match self.dtype.as_str() {
            "torch.float32" => Kind::Float,
            "torch.bfloat16" => Kind::BFloat16,
            "torch.float16" => Kind::Half,
            "torch.int64" => Kind::Int64,
            other => return Err(format!("{}: {other} is no dtype of an exported input", self.name).into()),
        })
    }
}
