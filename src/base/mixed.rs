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
            if let Some((first, last)) = ends_of_run(rows) {
                let (from, to) = (first * repeats, (last + 1) * repeats);
                let part = input.f_narrow(0, from, to - from)?;
                if let Some(addition) = adapter.addition(weight, &operator.with_input(&part))? {
                    let sum = y.f_narrow(0, from, to - from)?.f_add(&addition.f_to_kind(y.f_kind()?)?)?;
                    y = y.f_slice_scatter(&sum, 0, from, to, 1)?;
                }
                continue;
            }
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

/// The first and the last of rows that lie one after the other. Such rows are
/// taken and put back as a slice; libtorch's adding by index sorts, on several
/// threads, which takes longer than the product of a few rows.
fn ends_of_run(rows: &[i64]) -> Option<(i64, i64)> {
    let (first, last) = (*rows.first()?, *rows.last()?);
    let in_order = rows.windows(2).all(|pair| pair[0] + 1 == pair[1]);
    in_order.then_some((first, last))
}
