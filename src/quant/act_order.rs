//! A weight whose columns lie in another order than the model's, so that those
//! that share a scale are next to each other: GPTQ's with `act_order`, also
//! called `desc_act`.
//!
//! A product takes the columns of x, or gives those of dX, in the order in which
//! W's lie, and W is multiplied as any other.

use super::{Meta, PackedWeight, Parts, Reordered, Scheme, tiles};
use crate::error::Result;
use crate::ffi::shared::SharedTensor;
use tch::{Device, Kind, Tensor};

/// The name of [`ColumnOrder`] among the tensors of a weight.
pub(super) const ORDER: &str = "weight.order";

/// Which of the model's columns lies where.
#[derive(Debug)]
pub(super) struct ColumnOrder {
    /// i64: the column at each place.
    columns: SharedTensor,
    /// i64: the place of each column.
    places: SharedTensor,
}

impl ColumnOrder {
    /// `columns` has each number below its length once.
    pub(super) fn new(columns: &[i64], device: Device) -> Result<Self> {
        let mut places = vec![0i64; columns.len()];
        (0..).zip(columns).for_each(|(place, column)| places[*column as usize] = place);
        let shared = |numbers: &[i64]| Tensor::from_slice(numbers).f_to_device(device).map(SharedTensor::new);
        Ok(ColumnOrder { columns: shared(columns)?, places: shared(&places)? })
    }

    /// That of a weight of so many columns, if it has one.
    pub(super) fn take(parts: &mut Parts, len: i64) -> Result<Option<Self>> {
        if !parts.tensors.contains_key(ORDER) {
            return Ok(None);
        }
        let columns = parts.take(ORDER, Kind::Int64, &[len])?.get();
        let (device, columns) = (columns.device(), Vec::<i64>::try_from(columns)?);
        let mut sorted = columns.clone();
        sorted.sort_unstable();
        match sorted.into_iter().zip(0..).find(|(found, expected)| found != expected) {
            None => ColumnOrder::new(&columns, device).map(Some),
            Some((found, expected)) => {
                let expected = format!("each number from 0 to {} once, so {expected} too", len - 1);
                Err(parts.wrong(ORDER, expected, format!("{found} in its place")))
            }
        }
    }

    /// The columns of a matrix in the model's order as they lie.
    pub(super) fn lay(&self, matrix: &Tensor) -> Result<Tensor> {
        gathered(matrix, &self.columns.get())
    }
}

/// The columns of a matrix that `numbers`, i64 (columns), list.
pub(super) fn gathered(matrix: &Tensor, numbers: &Tensor) -> Result<Tensor> {
    // libtorch selects columns of 16 bits one after the other, and gathers them by several threads.
    Ok(matrix.f_gather(1, &numbers.f_expand([matrix.size2()?.0, -1], false)?, false)?)
}

/// See the module.
#[derive(Debug)]
pub(super) struct ActOrder<W> {
    /// As it lies.
    weight: W,
    order: ColumnOrder,
}

impl<W: PackedWeight> ActOrder<W> {
    pub(super) fn new(weight: W, order: ColumnOrder) -> Self {
        ActOrder { weight, order }
    }

    /// Writes columns as they lie into `out` in the model's order.
    fn restore(&self, lying: &Tensor, out: &mut Tensor) -> Result<()> {
        out.f_copy_(&gathered(lying, &self.order.places.get())?)?;
        Ok(())
    }
}

impl<W: PackedWeight> PackedWeight for ActOrder<W> {
    fn scheme(&self) -> Option<Scheme> {
        self.weight.scheme()
    }

    fn meta(&self) -> &Meta {
        self.weight.meta()
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = self.weight.tensors()?;
        tensors.push((ORDER.into(), self.order.columns.get()));
        Ok(tensors)
    }

    fn in_order(&self) -> bool {
        false
    }

    fn reordered(&self) -> Option<Reordered<'_>> {
        let ColumnOrder { columns, places } = &self.order;
        Some(Reordered { weight: &self.weight, columns: columns.get(), places: places.get() })
    }

    /// By the kernels where there are any; the columns are put in order by libtorch's operators.
    fn rows_by_operators(&self, start: i64, out: &mut Tensor) -> Result<()> {
        let ((rows, inn), weight) = (out.size2()?, &self.weight as &dyn PackedWeight);
        tiles::for_each(rows, inn, |row, count| {
            tiles::with_scratch(count, inn, out.f_kind()?, out.device(), |lying| {
                weight.unpack_rows(start + row, lying)?;
                self.restore(lying, &mut out.f_narrow(0, row, count)?)
            })
        })
    }

    fn index_by_operators(&self, index: &Tensor, out: &mut Tensor) -> Result<()> {
        let mut lying = out.f_empty_like()?;
        (&self.weight as &dyn PackedWeight).unpack_index(index, &mut lying)?;
        self.restore(&lying, out)
    }
}

#[cfg(test)]
mod tests {
    use crate::quant::cpu::tests::{Values, gptq, same};
    use crate::quant::linear::{product, product_transposed};
    use crate::quant::{PackedWeight, Parts, assemble};
    use std::sync::Arc;
    use tch::{Device, Kind, Tensor};

    const SHAPE: [i64; 2] = [70, 256];
    const GROUP: i64 = 64;

    /// A weight whose columns, in the model's order, are in these groups.
    fn parts(group: &[i64], kind: Kind) -> Parts {
        gptq(SHAPE, kind, GROUP, Tensor::from_slice(group))
    }

    /// `scale · (q − zero)`, element by element.
    fn definition(parts: &Parts) -> Tensor {
        let tensor = |name: &str| &parts.tensors[name];
        let (data, group) = (tensor("weight"), tensor("weight.group"));
        let codes = Tensor::stack(&[data.remainder(16), data.divide_scalar_mode(16, "floor")], 2).view(SHAPE);
        let of_columns = |name| tensor(name).index_select(1, group).to_kind(Kind::Double);
        let values = (codes.to_kind(Kind::Double) - of_columns("weight.zero")) * of_columns("weight.scale");
        values.to_kind(parts.kind)
    }

    /// Numbers in an order of chance.
    fn shuffled(numbers: impl Iterator<Item = i64>) -> Vec<i64> {
        let numbers: Vec<i64> = numbers.collect();
        let order = Tensor::randperm(numbers.len() as i64, (Kind::Int64, Device::Cpu));
        Vec::<i64>::try_from(order).unwrap().into_iter().map(|i| numbers[i as usize]).collect()
    }

    fn again(packed: &Arc<dyn PackedWeight>) -> Parts {
        Parts::of("w", packed.as_ref(), Device::Cpu).unwrap().unwrap()
    }

    #[test]
    fn columns_are_the_models() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let whole_groups = shuffled((0..SHAPE[1]).map(|column| column / GROUP));
            let others = shuffled((0..SHAPE[1]).map(|column| column * column % 4));
            for (group, reordered) in [(whole_groups, true), (others, false)] {
                let parts = parts(&group, kind);
                let expected = definition(&parts);
                let packed = assemble(parts).unwrap();
                assert_eq!(packed.reordered().is_some(), reordered);
                let what = format!("{kind:?}, laid in order: {reordered}");
                same(&packed.dequantize(kind).unwrap(), &expected, &what);

                let index = Tensor::from_slice(&[69i64, 0, 3, 0]);
                let mut some = Tensor::full([4, SHAPE[1]], f64::NAN, (kind, Device::Cpu));
                packed.unpack_index(&index, &mut some).unwrap();
                same(&some, &expected.index_select(0, &index), &what);
                let mut rows = Tensor::full([5, SHAPE[1]], f64::NAN, (kind, Device::Cpu));
                packed.unpack_rows(60, &mut rows).unwrap();
                same(&rows, &expected.narrow(0, 60, 5), &what);

                let values = Values::new(packed.as_ref());
                for n in [1, 3, 16, 70] {
                    let random = |columns| Tensor::randn([n, columns], (Kind::Float, Device::Cpu)).to_kind(kind);
                    let (x, g) = (random(SHAPE[1]), random(SHAPE[0]));
                    values.multiplied(&product(packed.as_ref(), &x, None).unwrap(), &x, false, &what);
                    values.multiplied(&product_transposed(packed.as_ref(), &g).unwrap(), &g, true, &what);
                }

                let reread = assemble(again(&packed)).unwrap();
                same(&reread.dequantize(kind).unwrap(), &expected, &what);
                assert_eq!(reread.nbytes().unwrap(), packed.nbytes().unwrap());
            }
        }
    }

    #[test]
    fn an_order_has_each_column_once() {
        let packed = assemble(parts(&shuffled((0..SHAPE[1]).map(|column| column / GROUP)), Kind::Float)).unwrap();
        for (wrong, said) in [
            (Tensor::zeros(SHAPE[1], (Kind::Int64, Device::Cpu)), "each number from 0 to 255 once"),
            (Tensor::arange(SHAPE[1], (Kind::Int64, Device::Cpu)) + 1, "each number from 0 to 255 once"),
            (Tensor::arange(SHAPE[1] - 1, (Kind::Int64, Device::Cpu)), "Int64 [256]"),
            (Tensor::arange(SHAPE[1], (Kind::Int, Device::Cpu)), "Int64 [256]"),
        ] {
            let mut parts = again(&packed);
            parts.tensors.insert(super::ORDER.into(), wrong);
            let error = assemble(parts).unwrap_err().to_string();
            assert!(error.contains("weight.order") && error.contains(said), "{error}");
        }
    }
}
