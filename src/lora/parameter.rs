//! LoRA on a parameter that is targeted by its own name: a matrix
//! (rows, columns), or a stack (n, rows, columns) of one for each expert.
//!
//! ΔW = s · U · V, for each matrix of a stack. U (…, rows, r) and V
//! (…, r, columns) are B and A of PEFT's `ParamWrapper`, for which the rows are
//! the output features; where `is_transposed`, they are the input features, and
//! U and V are Aᵀ and Bᵀ. Of a stack, A (n · r, in) lists all of a matrix's
//! factors before the next one's, and B (out, r · n) one of each matrix in turn.

use super::factors::Factors;
use super::layer::LoraLayer;
use super::linear::{LowRank, adapted};
use crate::base::Adapter;
use crate::error::Result;
use crate::ffi::hook::Operator;
use crate::quant::frozen::{frozen, matrix, on_dense};
use crate::quant::{LinearMap, PackedWeight};
use std::sync::Arc;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct LoraParameter {
    factors: Factors,
    /// How many matrices a stack has.
    count: Option<i64>,
    is_transposed: bool,
}

impl LoraParameter {
    /// On a weight of these sizes.
    pub(super) fn new(factors: Factors, sizes: &[i64], is_transposed: bool) -> Self {
        let count = sizes.first().filter(|_| sizes.len() == 3).copied();
        LoraParameter { factors, count, is_transposed }
    }

    /// U and V, of the whole weight.
    fn halves(&self) -> Result<(Tensor, Tensor)> {
        let (a, b) = (self.factors.a(), self.factors.b());
        let Some(n) = self.count else { return Ok((b, a)) };
        let (out, inn) = (b.size2()?.0, a.size2()?.1);
        let a = a.f_view([n, -1, inn])?;
        let b = b.f_view([out, -1, n])?.f_permute([2i64, 0, 1].as_slice())?;
        Ok(if self.is_transposed { (a.f_transpose(1, 2)?, b.f_transpose(1, 2)?) } else { (b, a) })
    }

    /// The factors of a linear layer on one matrix, by its halves.
    fn low_rank(&self, (u, v): (Tensor, Tensor), transposed: bool) -> Result<LowRank> {
        let (a, b) = if transposed { (u.f_tr()?, v.f_tr()?) } else { (v, u) };
        Ok(LowRank { a, b, bias: None, scaling: self.factors.scaling(), dropout: 0.0 })
    }

    /// U and V of one matrix.
    fn halves_at(&self, index: i64) -> Result<(Tensor, Tensor)> {
        let (u, v) = self.halves()?;
        Ok((u.f_select(0, index)?, v.f_select(0, index)?))
    }

    /// s · (x · U) · V, or s · (x · Vᵀ) · Uᵀ.
    fn product(&self, x: &Tensor, (u, v): (Tensor, Tensor), transposed: bool) -> Result<Tensor> {
        let kind = x.f_kind()?;
        let (u, v) = (u.f_to_kind(kind)?, v.f_to_kind(kind)?);
        let (first, second) = if transposed { (u, v) } else { (v.f_transpose(-2, -1)?, u.f_transpose(-2, -1)?) };
        Ok(x.f_matmul(&first)?.f_matmul(&second)?.f_mul_scalar(self.factors.scaling())?)
    }
}

impl Adapter for LoraParameter {
    fn active(&self) -> bool {
        self.factors.active()
    }

    fn follows_stacks(&self) -> bool {
        true
    }

    fn addition(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Option<Tensor>> {
        Ok(Some(match *operator {
            Operator::Linear { x, transposed, .. } | Operator::Stack { x, transposed } => {
                self.product(x, self.halves()?, transposed)?
            }
            Operator::Matrix { x, index, transposed, .. } => self.product(x, self.halves_at(index)?, transposed)?,
            _ => on_dense(&self.delta(weight, weight.kind())?, &operator.without_bias())?,
        }))
    }

    fn apply(&self, weight: &Arc<dyn PackedWeight>, operator: &Operator) -> Result<Tensor> {
        match *operator {
            Operator::Linear { x, bias, transposed } => {
                let low_rank = self.low_rank(self.halves()?, transposed)?;
                adapted(LinearMap::new(weight, transposed), x, bias, &low_rank)
            }
            Operator::Matrix { x, bias, index, transposed } => {
                let low_rank = self.low_rank(self.halves_at(index)?, transposed)?;
                adapted(LinearMap::new(&matrix(weight, index)?, transposed), x, bias, &low_rank)
            }
            _ => {
                let base = frozen(weight, operator)?;
                match self.addition(weight, operator)? {
                    Some(addition) => Ok(base.f_add(&addition)?.f_to_kind(base.f_kind()?)?),
                    None => Ok(base),
                }
            }
        }
    }

    fn delta(&self, _: &Arc<dyn PackedWeight>, kind: Kind) -> Result<Tensor> {
        let (u, v) = self.halves()?;
        Ok(u.f_matmul(&v)?.f_mul_scalar(self.factors.scaling())?.f_to_kind(kind)?)
    }
}

impl LoraLayer for LoraParameter {
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        self.factors.tensors("lora_A.weight", "lora_B.weight")
    }

    fn scaling(&self) -> f64 {
        self.factors.scaling()
    }

    fn set_scaling(&self, scaling: f64) {
        self.factors.set_scaling(scaling);
    }
}
