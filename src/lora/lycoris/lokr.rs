//! LoKr: ΔW = s · W₁ ⊗ W₂ (KronA, arXiv:2212.10650, as LyCORIS,
//! arXiv:2309.14859, uses it).
//!
//! With out = a·b and in = c·d, W₁ is (a, c) and W₂ (b, d, kernel…). Either is
//! whole or of rank r, and W₂ of a convolution may be a Tucker decomposition.
//! A linear layer needs no ΔW: with x as (n, c, d),
//!
//! ```text
//! x · (W₁ ⊗ W₂)ᵀ = W₁ · (x · W₂ᵀ), (n, a, b)
//! ```

use super::config::{Lokr, LokrInit};
use super::formula::{Formula, Method, Place, Start, tucker};
use crate::error::{Error, Result};
use std::sync::Arc;
use tch::Tensor;

#[derive(Debug)]
struct Kronecker {
    sizes: Vec<i64>,
    /// Whether W₁ is one tensor, and not two.
    left_whole: bool,
}

/// What W₂ is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    Whole,
    LowRank,
    Tucker,
}

/// A matrix, or two factors of it.
enum Part<'a> {
    Whole(&'a Tensor),
    Factors(&'a Tensor, &'a Tensor),
}

impl Part<'_> {
    fn value(&self) -> Result<Tensor> {
        Ok(match self {
            Part::Whole(whole) => whole.shallow_clone(),
            Part::Factors(a, b) => a.f_mm(b)?,
        })
    }
}

impl Kronecker {
    /// W₁, and the tensors of W₂.
    fn split<'a>(&self, tensors: &'a [Tensor]) -> Result<(Part<'a>, &'a [Tensor])> {
        match tensors {
            [w1, rest @ ..] if self.left_whole => Ok((Part::Whole(w1), rest)),
            [a, b, rest @ ..] if !self.left_whole => Ok((Part::Factors(a, b), rest)),
            _ => Err(wrong(tensors)),
        }
    }
}

fn wrong(tensors: &[Tensor]) -> Error {
    let found = tensors.len().to_string();
    Error::Mismatch { name: "tensors of LoKr".into(), expected: "those of its two factors".into(), found }
}

impl Formula for Kronecker {
    fn weight(&self, tensors: &[Tensor], s: f64) -> Result<Tensor> {
        let (left, right) = self.split(tensors)?;
        let mut left = left.value()?.f_mul_scalar(s)?;
        let right = match right {
            [w2] => w2.shallow_clone(),
            [a, b] => a.f_mm(b)?,
            [a, b, core] => tucker(core, a, b)?,
            _ => return Err(wrong(tensors)),
        };
        if right.dim() == 4 {
            left = left.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
        } else if right.dim() == 3 {
            // A whole W₂ of a convolution over one dimension: PEFT pads W₁ on
            // the other side, as `torch.kron` does, and its files mean that.
            left = left.f_unsqueeze(0)?;
        }
        Ok(kronecker(&left, &right)?.f_reshape(self.sizes.as_slice())?)
    }

    fn does_without_weight(&self) -> bool {
        true
    }

    fn product(&self, x: &Tensor, tensors: &[Tensor], s: f64) -> Result<Tensor> {
        let kind = x.f_kind()?;
        let tensors = tensors.iter().map(|t| t.f_to_kind(kind)).collect::<std::result::Result<Vec<_>, _>>()?;
        let (left, right) = self.split(&tensors)?;
        let left = left.value()?.f_mul_scalar(s)?;
        let right = match right {
            [w2] => Part::Whole(w2),
            [a, b] => Part::Factors(a, b),
            _ => return Err(wrong(&tensors)),
        };
        let (n, [a, c]) = (x.size()[0], [left.size()[0], left.size()[1]]);
        let rows = x.f_reshape([n * c, -1])?;
        let rows = match right {
            Part::Factors(w2a, w2b) if w2a.numel() + w2b.numel() < (w2a.size()[0] * w2b.size()[1]) as usize => {
                rows.f_mm(&w2b.f_tr()?)?.f_mm(&w2a.f_tr()?)?
            }
            right => rows.f_mm(&right.value()?.f_tr()?)?,
        };
        let b = rows.size()[1];
        Ok(left.f_matmul(&rows.f_view([n, c, b])?)?.f_reshape([n, a * b])?)
    }
}

/// The products of all pairs of values, the dimensions of both in turn: with
/// each pair of dimensions made one, the Kronecker product.
fn kronecker(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let turns = |sizes: Vec<i64>, first: bool| -> Vec<i64> {
        sizes.into_iter().flat_map(|size| if first { [size, 1] } else { [1, size] }).collect()
    };
    let left = left.f_reshape(turns(left.size(), true).as_slice())?;
    Ok(left.f_mul(&right.f_reshape(turns(right.size(), false).as_slice())?)?)
}

impl Method for Lokr {
    fn start(&self, place: &Place) -> Result<Start> {
        let (r, kernel) = (place.r, place.kernel());
        let (out, inn) = (place.sizes[0], place.sizes[1]);
        let [a, c] = place.w1.unwrap_or_else(|| left_sizes(out, inn, self.decompose_factor));
        let [b, d] = [out / a, inn / c];
        let left_whole = !(self.decompose_both && is_low(r, a, c));
        let right = if !is_low(r, b, d) {
            Right::Whole
        } else if place.effective && kernel.iter().any(|&size| size != 1) {
            Right::Tucker
        } else {
            Right::LowRank
        };

        let zero_left = self.init_weights == LokrInit::Default;
        let zero_right = self.init_weights == LokrInit::Lycoris;
        let mut tensors = Vec::new();
        if left_whole {
            tensors.push(("lokr_w1", place.start(&[a, c], zero_left)?));
        } else {
            tensors.push(("lokr_w1_a", place.start(&[a, r], zero_left)?));
            tensors.push(("lokr_w1_b", place.start(&[r, c], false)?));
        }
        match right {
            Right::Whole => {
                let sizes = [&[b, d], kernel].concat();
                tensors.push(("lokr_w2", place.start(&sizes, zero_right)?));
            }
            Right::LowRank => {
                tensors.push(("lokr_w2_a", place.start(&[b, r], false)?));
                let columns = d * kernel.iter().product::<i64>();
                tensors.push(("lokr_w2_b", place.start(&[r, columns], zero_right)?));
            }
            Right::Tucker => {
                tensors.push(("lokr_w2_a", place.start(&[r, b], false)?));
                tensors.push(("lokr_w2_b", place.start(&[r, d], zero_right)?));
                tensors.push(("lokr_t2", place.start(&place.core(), false)?));
            }
        }
        let formula = Kronecker { sizes: place.sizes.to_vec(), left_whole };
        Ok(Start { formula: Arc::new(formula), tensors })
    }

    fn rescale(&self) -> bool {
        self.rank_dropout_scale
    }
}

/// Whether a factor of these sizes is of rank r, and not whole.
pub(crate) fn is_low(r: i64, rows: i64, columns: i64) -> bool {
    r < (rows.max(columns) + 1) / 2
}

/// The sizes of W₁ for a weight (out, in), by `decompose_factor`.
pub(crate) fn left_sizes(out: i64, inn: i64, factor: i64) -> [i64; 2] {
    [factorization(out, factor)[0], factorization(inn, factor)[0]]
}

/// `dimension` as a product of two: `factor` and the rest where it divides it,
/// else the two divisors that are next to each other, the smaller one first and
/// at most `factor` if that isn't -1.
fn factorization(dimension: i64, factor: i64) -> [i64; 2] {
    if factor > 0 && dimension % factor == 0 {
        return [factor, dimension / factor];
    }
    let limit = if factor > 0 { factor } else { dimension };
    let smaller = (1..=limit).take_while(|m| m * m <= dimension).filter(|m| dimension % m == 0).last().unwrap_or(1);
    [smaller, dimension / smaller]
}

#[cfg(test)]
mod tests {
    use super::factorization;

    #[test]
    fn sizes_are_split_as_in_pefts_table() {
        for (dimension, factor, expected) in [
            (256, -1, [16, 16]),
            (128, -1, [8, 16]),
            (127, -1, [1, 127]),
            (128, 4, [4, 32]),
            (128, 64, [64, 2]),
            (96, 5, [4, 24]),
            (1, -1, [1, 1]),
        ] {
            assert_eq!(factorization(dimension, factor), expected, "{dimension} by {factor}");
        }
    }
}
