//! A batch in which each row has its own adapter, or none.

use super::site::Adapter;
use crate::error::{Error, Result};
use crate::ffi::hook::Operator;
use crate::quant::PackedWeight;
use crate::quant::frozen::frozen;
use std::sync::Arc;
use tch::Tensor;

/// Which rows of a batch an adapter of one weight is for.
#[derive(Debug)]
pub(crate) struct MixedRows {
    /// Rows of the batch.
    rows: i64,
    /// Adapters, each with its rows.
    parts: Vec<(Arc<dyn Adapter>, Vec<i64>)>,
}

impl MixedRows {
    pub(crate) fn new(rows: i64, parts: Vec<(Arc<dyn Adapter>, Vec<i64>)>) -> Self {
        MixedRows { rows, parts }
    }

    /// The base's result for all rows, and on each row what its adapter adds.
    pub(super) fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        let mut y = frozen(weight, operator)?;
        let input = operator.input();
        let repeats = self.repeats(&input.size())?;
        for (adapter, rows) in self.parts.iter().filter(|(adapter, _)| adapter.active()) {
            let rows: Vec<i64> = rows.iter().flat_map(|row| row * repeats..(row + 1) * repeats).collect();
            let index = Tensor::from_slice(&rows).f_to_device(input.device())?;
            let part = input.f_index_select(0, &index)?;
            if let Some(addition) = adapter.addition(weight, &operator.with_input(&part))? {
                y = y.f_index_add(0, &index, &addition.f_to_kind(y.f_kind()?)?)?;
            }
        }
        Ok(y)
    }

    /// How many rows of the input stand for one of the batch: one, or all
    /// positions of a row where the model has flattened batch and positions.
    fn repeats(&self, size: &[i64]) -> Result<i64> {
        let first = size.first().copied().unwrap_or(0);
        if first == self.rows {
            return Ok(1);
        }
        if size.len() == 2 && self.rows > 0 && first % self.rows == 0 {
            return Ok(first / self.rows);
        }
        Err(Error::Mismatch {
            name: "input of an adapted weight in a mixed batch".into(),
            expected: format!("{} rows, one for each adapter named", self.rows),
            found: format!("{size:?}"),
        })
    }
}
