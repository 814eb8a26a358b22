//! Half-quadratic quantisation: a search for better scales and shifts.
//!
//! Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
//! Models" (2023): minimise |w − W|^p for p < 1 over the shift by splitting the
//! error into a sparse part e, for outliers, and a quadratic one. In turns,
//! e = shrink(w − W), and the shift is fitted to w − e. Here the scale is
//! fitted along with it, by linear regression, errors are measured in steps of
//! the first scale, so that small weights and large ones are treated alike, and
//! each group keeps the best pair that it saw.

use crate::error::Result;
use tch::{Kind, Tensor};

pub(super) const ROUNDS: usize = 20;
/// The paper's norm, first weight of the quadratic part, and its growth.
const P: f64 = 0.7;
pub(super) const BETA: f64 = 10.0;
pub(super) const KAPPA: f64 = 1.01;

/// Scales and shifts (groups, 1), in the dtype of the weight, that give a
/// (groups, size) weight at most the squared error of those given.
pub(super) fn search(weight: &Tensor, scale: &Tensor, shift: &Tensor, top: i64) -> Result<(Tensor, Tensor)> {
    let kind = weight.f_kind()?;
    let [wide, scale, shift] = [weight, scale, shift].map(|t| t.f_to_kind(Kind::Float));
    let (wide, scale, shift) = (wide?, scale?, shift?);
    let unit = scale.f_where_self(&scale.f_ne(0.0)?, &scale.f_ones_like()?)?;
    // In units of the scale and from the lowest value on, the first guess has
    // scale 1 and shift 0.
    let w = wide.f_add(&shift)?.f_div_(&unit)?;
    let (mut s, mut z) = (unit.f_ones_like()?, unit.f_zeros_like()?);
    let mut best: Option<[Tensor; 3]> = None;
    let mut beta = BETA;
    for _ in 0..=ROUNDS {
        let q = w.f_add(&z)?.f_div_(&s)?.f_round_()?.f_clamp_(0, top)?;
        let error = w.f_sub(&q.f_mul(&s)?)?.f_add_(&z)?;
        let found = [error.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?, s, z];
        best = Some(match best {
            None => found,
            Some(best) => better(found, best)?,
        });
        let target = w.f_sub(&shrink(error, beta)?)?;
        (s, z) = fit(&q, &target)?;
        beta *= KAPPA;
    }
    let [_, s, z] = best.unwrap_or([unit.shallow_clone(), s, z]);
    let shift = z.f_mul(&unit)?.f_add_(&shift)?;
    // Where the scale was 0, the first guess is exact.
    let scale = scale.f_mul(&s)?;
    Ok((scale.f_to_kind(kind)?, shift.f_to_kind(kind)?))
}

/// Of two triples of error, scale and shift, for each group the better one.
fn better(found: [Tensor; 3], best: [Tensor; 3]) -> Result<[Tensor; 3]> {
    // A NaN, from a scale of 0, is never better.
    let wins = found[0].f_lt_tensor(&best[0])?;
    let [e, s, z] = [0, 1, 2].map(|i| found[i].f_where_self(&wins, &best[i]));
    Ok([e?, s?, z?])
}

/// sign(x) · max(|x| − |x|^(p−1) / β, 0), the solution for the sparse part.
fn shrink(x: Tensor, beta: f64) -> Result<Tensor> {
    let size = x.f_abs()?;
    let cut = size.f_pow_tensor_scalar(P - 1.0)?.f_mul_scalar_(1.0 / beta)?;
    Ok(size.f_sub(&cut)?.f_clamp_min_(0.0)?.f_mul_(&x.f_sign()?)?)
}

/// Scale and shift with the least Σ (scale · q − shift − target)².
fn fit(q: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
    let mean = |t: &Tensor| t.f_mean_dim([1i64].as_slice(), true, Kind::Float);
    let (of_q, of_target) = (mean(q)?, mean(target)?);
    let centred = q.f_sub(&of_q)?;
    let scale = mean(&centred.f_mul(target)?)?.f_div_(&mean(&centred.f_square()?)?)?;
    let shift = scale.f_mul(&of_q)?.f_sub_(&of_target)?;
    Ok((scale, shift))
}
