//! A packed weight taken apart: what files hold, checked before it is used.

use super::{PackedWeight, Scheme};
use crate::error::{Error, Result};
use crate::ffi::shared::SharedTensor;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The tensors of a packed weight by their names in [`PackedWeight::tensors`],
/// and what is needed to put it together again.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The weight's name; for errors.
    pub(crate) name: String,
    pub(crate) scheme: Scheme,
    /// The dense sizes.
    pub(crate) sizes: Vec<i64>,
    /// The dtype of its values.
    pub(crate) kind: Kind,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Parts {
    /// The parts of a packed weight, moved to a device. `None` for a dense one.
    pub(crate) fn of(name: &str, packed: &dyn PackedWeight, device: Device) -> Result<Option<Self>> {
        let Some(scheme) = packed.scheme() else { return Ok(None) };
        let tensors = packed.tensors()?.into_iter();
        let tensors = tensors.map(|(name, tensor)| Ok((name, tensor.f_to_device(device)?))).collect::<Result<_>>()?;
        Ok(Some(Parts { name: name.into(), scheme, sizes: packed.sizes().to_vec(), kind: packed.kind(), tensors }))
    }

    pub(crate) fn wrong(&self, what: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let name = if what.is_empty() { self.name.clone() } else { format!("{}: {what}", self.name) };
        Error::Mismatch { name, expected: expected.into(), found: found.into() }
    }

    /// Takes a tensor that must be there, of this dtype and shape. Floats must
    /// be finite.
    pub(super) fn take(&mut self, what: &str, kind: Kind, shape: &[i64]) -> Result<SharedTensor> {
        let expected = || format!("{kind:?} {shape:?}");
        let tensor = self.tensors.remove(what).ok_or_else(|| self.wrong(what, expected(), "no such tensor"))?;
        if tensor.f_kind()? != kind || tensor.size() != shape {
            return Err(self.wrong(what, expected(), format!("{:?} {:?}", tensor.f_kind()?, tensor.size())));
        }
        let wide = matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half);
        if wide {
            super::check_finite(
                &format!("{}: {what}", self.name),
                &tensor,
                "the file is broken: fetch or write it again",
            )?;
        }
        Ok(SharedTensor::new(tensor.f_contiguous()?))
    }

    /// Refuses tensors that are left over.
    pub(super) fn finish(self) -> Result<(Vec<i64>, Kind)> {
        if let Some(what) = self.tensors.keys().next() {
            return Err(self.wrong(what, format!("no such tensor in a weight of {}", self.scheme), "one"));
        }
        Ok((self.sizes, self.kind))
    }

    /// The device that all the tensors are on.
    pub(super) fn device(&self) -> Device {
        self.tensors.values().next().map_or(Device::Cpu, Tensor::device)
    }
}
