//! A full copy of a weight that is trained in its place: what
//! `modules_to_save` and `bias` mean.

use super::layer::{Switches, parameter_kind};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use crate::quant::PackedWeight;
use crate::quant::frozen::{frozen, on_dense};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::{Kind, Tensor};

/// A trainable tensor that takes the weight's place.
#[derive(Debug)]
pub(crate) struct Replacement {
    value: SharedTensor,
    part: Use,
    switches: Arc<Switches>,
}

/// Which uses of a weight are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// Every one.
    All,
    /// Rows that are looked up, of a tied weight.
    Lookups,
    /// Products, of a tied weight.
    Products,
}

impl Replacement {
    /// A trainable copy, in the dtype of adapters on this weight.
    pub(crate) fn new(
        weight: &dyn PackedWeight,
        part: Use,
        kind: Option<Kind>,
        switches: Arc<Switches>,
    ) -> Result<Self> {
        let kind = parameter_kind(kind, weight.kind());
        let value = match weight.as_dense() {
            Some(dense) => dense.f_to_dtype(kind, false, true)?,
            None => weight.dequantize(kind)?,
        };
        Ok(Replacement { value: SharedTensor::new(value.f_set_requires_grad(true)?), part, switches })
    }

    pub(crate) fn value(&self) -> Tensor {
        self.value.get()
    }
}

impl Adapter for Replacement {
    fn active(&self) -> bool {
        self.switches.enabled.load(Ordering::Relaxed)
    }

    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        Ok(Some(self.apply(weight, operator)?.f_sub(&frozen(weight, operator)?)?))
    }

    /// The operator on the copy, by autograd's own formulas.
    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        let lookup = matches!(operator, Operator::Embedding { .. });
        if matches!((self.part, lookup), (Use::Lookups, false) | (Use::Products, true)) {
            return frozen(weight, operator);
        }
        let value = self.value.get();
        if lookup {
            return Ok(on_dense(&value, operator)?.f_to_kind(weight.kind())?);
        }
        on_dense(&value.f_to_kind(operator.input().f_kind()?)?, operator)
    }

    fn follows_stacks(&self) -> bool {
        true
    }

    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let base = match weight.as_dense() {
            Some(dense) => dense.f_to_kind(kind)?,
            None => weight.dequantize(kind)?,
        };
        Ok(self.value.get().f_to_kind(kind)?.f_sub(&base)?)
    }

    fn replacement(&self) -> Option<Tensor> {
        Some(self.value.get())
    }
}
