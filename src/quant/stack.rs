//! One matrix of a packed stack (n, rows, columns), such as one expert's.

use super::op::{self, Op};
use super::{Meta, PackedWeight, Scheme};
use crate::error::Result;
use std::sync::Arc;
use tch::Tensor;

/// A view: the stack's bytes, unpacked a tile of this matrix at a time.
///
/// A packed stack is a matrix (n, rows · columns), of which this is one row.
#[derive(Debug)]
pub(crate) struct OfStack {
    stack: Arc<dyn PackedWeight>,
    index: i64,
    meta: Meta,
}

impl OfStack {
    /// `index` is one of the stack's.
    pub(crate) fn new(stack: &Arc<dyn PackedWeight>, index: i64) -> Self {
        let sizes = stack.sizes().get(1..).unwrap_or_default().to_vec();
        let meta = Meta { sizes, kind: stack.kind(), device: stack.device() };
        OfStack { stack: Arc::clone(stack), index, meta }
    }
}

impl PackedWeight for OfStack {
    /// Kernels that take a packed weight as a whole have no part in it.
    fn scheme(&self) -> Option<Scheme> {
        None
    }

    fn meta(&self) -> &Meta {
        &self.meta
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.stack.tensors()
    }

    /// By the stack's kernel where it has one, else its whole row by operators.
    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let (rows, columns) = out.size2()?;
        let range = start * columns..(start + rows) * columns;
        let mut flat = out.f_view([1, rows * columns])?;
        if op::run(self.stack.as_ref(), Op::Unpack { row: self.index, columns: range, out: &mut flat })? {
            return Ok(());
        }
        let mut whole = Tensor::f_empty([1, self.stack.shape()[1]], (out.f_kind()?, out.device()))?;
        self.stack.rows_by_operators(self.index, &mut whole)?;
        flat.f_copy_(&whole.f_narrow(1, start * columns, rows * columns)?)?;
        Ok(())
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        let mut whole = Tensor::f_empty(self.shape(), (out.f_kind()?, out.device()))?;
        self.rows_by_operators(0, &mut whole)?;
        out.f_copy_(&whole.f_index_select(0, index)?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Fp8Format, pack};
    use tch::{Device, Kind};

    #[test]
    fn a_matrix_is_that_of_the_whole_stack() {
        let e5m2 = Scheme::Fp8 { format: Fp8Format::E5m2 };
        let schemes = [Scheme::Int8, Scheme::LlmInt8, Scheme::INT4, Scheme::INT2, Scheme::FP8, e5m2];
        for scheme in schemes.into_iter().chain([Scheme::NF4, Scheme::NF4_DOUBLE, Scheme::Mxfp4, Scheme::Bf16]) {
            for [rows, columns] in [[64, 128], [10, 7], [3, 129]] {
                let stack = pack(&Tensor::randn([4, rows, columns], (Kind::Float, Device::Cpu)), scheme).unwrap();
                let whole = stack.dequantize(Kind::Float).unwrap();
                for index in 0..4 {
                    let one: Arc<dyn PackedWeight> = Arc::new(OfStack::new(&stack, index));
                    let expected = whole.select(0, index);
                    assert!(one.dequantize(Kind::Float).unwrap().equal(&expected), "{scheme}, {index}");
                    let mut some = Tensor::full([2, columns], f64::NAN, (Kind::Float, Device::Cpu));
                    one.unpack_rows(1, &mut some).unwrap();
                    assert!(some.equal(&expected.narrow(0, 1, 2)), "{scheme}, rows of {index}");
                    let turned = Tensor::from_slice(&[2i64, 0]);
                    one.unpack_index(&turned, &mut some).unwrap();
                    assert!(some.equal(&expected.index_select(0, &turned)), "{scheme}, an index into {index}");
                }
            }
        }
    }
}
