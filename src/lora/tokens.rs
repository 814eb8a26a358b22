//! Rows of a table that are trained as they are: `trainable_token_indices`.

use super::layer::{Switches, parameter_kind};
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::ffi::hook::Operator;
use crate::ffi::shared::SharedTensor;
use crate::quant::PackedWeight;
use crate::quant::frozen::frozen;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tch::{Kind, Tensor};

/// Trainable rows that take the place of some of a table's.
#[derive(Debug)]
pub(crate) struct TokenRows {
    /// The numbers of the rows (n).
    rows: SharedTensor,
    /// For each row of the table its place among `rows`, or -1.
    places: SharedTensor,
    /// (n, dim)
    value: SharedTensor,
    switches: Arc<Switches>,
}

impl TokenRows {
    /// Trainable copies of the rows of a table (rows, dim).
    pub(crate) fn new(
        name: &str,
        table: &dyn PackedWeight,
        rows: &[i64],
        kind: Option<Kind>,
        switches: Arc<Switches>,
    ) -> Result<Self> {
        let [count, dim] = table.shape();
        if let Some(row) = rows.iter().find(|row| **row >= count) {
            let expected = format!("rows below {count}, which {name} has");
            return Err(Error::config("trainable_token_indices", expected, row));
        }
        let kind = parameter_kind(kind, table.kind());
        let device = table.device();
        let index = Tensor::from_slice(rows).f_to_device(device)?;
        let mut value = Tensor::f_empty([rows.len() as i64, dim], (kind, device))?;
        table.unpack_index(&index, &mut value)?;
        let order = Tensor::f_arange(rows.len() as i64, (Kind::Int64, device))?;
        let places = Tensor::f_full([count], -1, (Kind::Int64, device))?.f_index_copy(0, &index, &order)?;
        Ok(TokenRows {
            rows: SharedTensor::new(index),
            places: SharedTensor::new(places),
            value: SharedTensor::new(value.f_set_requires_grad(true)?),
            switches,
        })
    }

    /// (n, dim)
    pub(crate) fn value(&self) -> Tensor {
        self.value.get()
    }
}

impl Adapter for TokenRows {
    fn active(&self) -> bool {
        self.switches.enabled.load(Ordering::Relaxed)
    }

    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        Ok(Some(self.apply(weight, operator)?.f_sub(&frozen(weight, operator)?)?))
    }

    /// The base's result, with its own where a row is trained: looked up rows,
    /// and for a tied output layer the products with them.
    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        let y = frozen(weight, operator)?;
        let kind = y.f_kind()?;
        match *operator {
            Operator::Embedding { indices, .. } => {
                let places = self.places.get().f_index_select(0, &indices.f_flatten(0, -1)?)?.f_view_as(indices)?;
                let own = Tensor::f_embedding(&self.value(), &places.f_clamp_min(0)?, -1, false, false)?;
                Ok(own.f_to_kind(kind)?.f_where_self(&places.f_ge(0)?.f_unsqueeze(-1)?, &y)?)
            }
            Operator::Linear { x, bias, transposed: false } => {
                let rows = self.rows.get();
                let bias = bias.map(|bias| bias.f_index_select(0, &rows)?.f_to_kind(kind)).transpose()?;
                let own = x.f_to_kind(kind)?.f_linear(&self.value().f_to_kind(kind)?, bias.as_ref())?;
                Ok(y.f_index_copy(-1, &rows, &own)?)
            }
            _ => {
                let found = "another use of the table";
                Err(Error::config("trainable_token_indices", "a table that is looked up, or an output layer", found))
            }
        }
    }

    fn delta(&self, weight: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let rows = self.rows.get();
        let mut base = Tensor::f_empty(self.value().size().as_slice(), (kind, weight.device()))?;
        weight.unpack_index(&rows, &mut base)?;
        let zeros = Tensor::f_zeros(weight.sizes(), (kind, weight.device()))?;
        Ok(zeros.f_index_copy(0, &rows, &self.value().f_to_kind(kind)?.f_sub(&base)?)?)
    }
}
