//! Combining the factors of several adapters into one.

use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// How several adapters become one, by PEFT's definitions.
///
/// With weights wᵢ, scales sᵢ and factors Aᵢ, Bᵢ, the adapters add
/// Σ wᵢ·Dᵢ with Dᵢ = sᵢ·Bᵢ·Aᵢ. The new adapter has the scale 1.
///
/// ```
/// use tch_peft::{Combination, MajoritySign, Merge};
///
/// // PEFT's `combination_type`: "cat", "linear", "ties_svd" with a rank of 16.
/// let exact = Combination::Cat;
/// let linear = Combination::Factors(Merge::Linear);
/// let merge = Merge::Ties { density: 0.2, sign: MajoritySign::Total };
/// let ties = Combination::Svd { merge, rank: Some(16), clamp: None };
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Combination {
    /// A = \[wᵢsᵢAᵢ\], B = \[Bᵢ\]: exact, of rank Σrᵢ.
    Cat,
    /// A from sgn(wᵢsᵢ)·√|wᵢsᵢ|·Aᵢ and B from √|wᵢsᵢ|·Bᵢ, each by itself. All
    /// ranks must be the same. Products of different adapters' factors come in
    /// as well, so even the linear sum is not exact.
    Factors(Merge),
    /// D from wᵢ·Dᵢ, and A, B from its singular value decomposition: A = Vₖᵀ,
    /// B = Uₖ·Sₖ.
    Svd {
        /// How the Dᵢ are summed.
        merge: Merge,
        /// The rank k; `None` for the largest of the adapters'.
        rank: Option<i64>,
        /// Limits A and B to ± this quantile, in (0, 1], of their values.
        clamp: Option<f64>,
    },
}

/// How tensors tᵢ with weights wᵢ are summed.
///
/// ```
/// use tch_peft::{Combination, Merge};
///
/// let dare = Combination::Svd { merge: Merge::DareLinear { density: 0.5 }, rank: None, clamp: None };
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Merge {
    /// Σ wᵢtᵢ.
    Linear,
    /// TIES (arXiv:2306.01708): of each tensor the largest values by magnitude
    /// are kept; for each element a sign is elected, and the mean of wᵢtᵢ is
    /// taken over those that have it.
    Ties {
        /// The share of values that is kept, in (0, 1].
        density: f64,
        /// How the sign is elected.
        sign: MajoritySign,
    },
    /// DARE (arXiv:2311.03099): values are kept at random and scaled by
    /// 1/density, then summed.
    DareLinear {
        /// The probability that a value is kept, in (0, 1].
        density: f64,
    },
    /// DARE's random choice, then TIES' election.
    DareTies {
        /// The probability that a value is kept, in (0, 1].
        density: f64,
        /// How the sign is elected.
        sign: MajoritySign,
    },
    /// The largest values by magnitude are kept, then summed.
    MagnitudePrune {
        /// The share of values that is kept, in (0, 1].
        density: f64,
    },
}

/// How TIES elects a sign.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of the sum; zero counts as positive.
    #[default]
    Total,
    /// The sign that more tensors have; a tie counts as positive.
    Frequency,
}

impl Combination {
    pub(crate) fn validate(&self) -> Result<()> {
        let share = |field: &str, value: f64| {
            if value > 0.0 && value <= 1.0 {
                return Ok(());
            }
            Err(Error::config(field, "a share in (0, 1]", value))
        };
        let (merge, rank, clamp) = match *self {
            Combination::Cat => return Ok(()),
            Combination::Factors(merge) => (merge, None, None),
            Combination::Svd { merge, rank, clamp } => (merge, rank, clamp),
        };
        if let Some(rank) = rank.filter(|rank| *rank < 1) {
            return Err(Error::config("svd_rank", "a rank of at least 1", rank));
        }
        clamp.map_or(Ok(()), |clamp| share("svd_clamp", clamp))?;
        match merge {
            Merge::Linear => Ok(()),
            Merge::Ties { density, .. }
            | Merge::DareLinear { density }
            | Merge::DareTies { density, .. }
            | Merge::MagnitudePrune { density } => share("density", density),
        }
    }
}

/// The adapter of one layer in a combination.
#[derive(Debug)]
pub(crate) struct Part {
    /// (r, in, …)
    pub(crate) a: Tensor,
    /// (out, r, …)
    pub(crate) b: Tensor,
    /// wᵢ
    pub(crate) weight: f64,
    /// sᵢ
    pub(crate) scaling: f64,
}

impl Part {
    fn rank(&self) -> i64 {
        self.a.size().first().copied().unwrap_or(0)
    }

    /// D flattened, (out, in · kernel).
    fn delta(&self) -> Result<Tensor> {
        let product = self.b.f_flatten(1, -1)?.f_mm(&self.a.f_flatten(1, -1)?)?;
        Ok(product.f_mul_scalar(self.scaling)?)
    }
}

/// The rank that the combination of `parts` has on the layer at `path`.
pub(crate) fn rank(path: &str, how: &Combination, parts: &[Part]) -> Result<i64> {
    let ranks: Vec<i64> = parts.iter().map(Part::rank).collect();
    let largest = ranks.iter().copied().max().unwrap_or(0);
    match how {
        Combination::Cat => Ok(ranks.iter().sum()),
        Combination::Svd { rank, .. } => Ok(rank.unwrap_or(largest)),
        Combination::Factors(_) if ranks.iter().any(|r| *r != largest) => {
            let found = format!("{ranks:?} at {path}");
            Err(Error::config("adapters", "the same rank of all, or Combination::Cat or ::Svd", found))
        }
        Combination::Factors(_) => Ok(largest),
    }
}

/// A and B of the combination, in the dtype of the first part.
pub(crate) fn combine(path: &str, how: &Combination, parts: &[Part]) -> Result<(Tensor, Tensor)> {
    let [first, ..] = parts else {
        return Err(Error::config("adapters", "at least one", "none"));
    };
    let _no_grad = tch::no_grad_guard();
    let kind = first.a.f_kind()?;
    let (a, b) = match *how {
        Combination::Cat => {
            let scaled = |part: &Part| part.a.f_mul_scalar(part.weight * part.scaling);
            let a: Vec<Tensor> = parts.iter().map(scaled).collect::<std::result::Result<_, _>>()?;
            let b: Vec<&Tensor> = parts.iter().map(|part| &part.b).collect();
            (Tensor::f_cat(&a, 0)?, Tensor::f_cat(&b, 1)?)
        }
        Combination::Factors(merge) => {
            let product = |part: &Part| part.weight * part.scaling;
            let root = |part: &Part| product(part).abs().sqrt();
            let sign = |part: &Part| if product(part) >= 0.0 { 1.0 } else { -1.0 };
            let a = parts.iter().map(|part| (part.a.shallow_clone(), sign(part) * root(part)));
            let a = merge.sum(a.collect())?;
            let b = parts.iter().map(|part| (part.b.shallow_clone(), root(part)));
            (a, merge.sum(b.collect())?)
        }
        Combination::Svd { merge, clamp, .. } => {
            let deltas = parts.iter().map(|part| Ok((part.delta()?, part.weight)));
            let delta = merge.sum(deltas.collect::<Result<_>>()?)?;
            let k = rank(path, how, parts)?;
            let (a, b) = decompose(path, &delta, k, clamp)?;
            let sized = |like: &Tensor, at: usize| {
                let mut size = like.size();
                if let Some(r) = size.get_mut(at) {
                    *r = k;
                }
                size
            };
            (a.f_view(sized(&first.a, 0).as_slice())?, b.f_view(sized(&first.b, 1).as_slice())?)
        }
    };
    Ok((a.f_to_kind(kind)?.f_contiguous()?, b.f_to_kind(kind)?.f_contiguous()?))
}

/// Vₖᵀ (k, in) and Uₖ·Sₖ (out, k).
fn decompose(path: &str, delta: &Tensor, k: i64, clamp: Option<f64>) -> Result<(Tensor, Tensor)> {
    let least = delta.size().into_iter().min().unwrap_or(0);
    if k > least {
        let found = format!("{k} at {path}, whose weight has rank {least} at most");
        return Err(Error::config("svd_rank", "at most the rank of the weight", found));
    }
    let (u, s, v) = delta.f_to_kind(Kind::Float)?.f_svd(true, true)?;
    let b = u.f_narrow(1, 0, k)?.f_mul(&s.f_narrow(0, 0, k)?)?;
    let a = v.f_narrow(1, 0, k)?.f_tr()?;
    let Some(quantile) = clamp else { return Ok((a.f_contiguous()?, b)) };
    let values = Tensor::f_cat(&[b.f_flatten(0, -1)?, a.f_flatten(0, -1)?], 0)?;
    let limit = f64::try_from(values.f_quantile_scalar(quantile, None::<i64>, false, "linear")?)?;
    Ok((a.f_clamp(-limit, limit)?.f_contiguous()?, b.f_clamp(-limit, limit)?))
}

impl Merge {
    /// The sum of the tensors with their weights.
    fn sum(&self, tensors: Vec<(Tensor, f64)>) -> Result<Tensor> {
        let (kept, election) = match *self {
            Merge::Linear => (tensors, None),
            Merge::MagnitudePrune { density } => (each(tensors, |t| largest(t, density))?, None),
            Merge::DareLinear { density } => (each(tensors, |t| random(t, density))?, None),
            Merge::Ties { density, sign } => (each(tensors, |t| largest(t, density))?, Some(sign)),
            Merge::DareTies { density, sign } => (each(tensors, |t| random(t, density))?, Some(sign)),
        };
        let plain: Vec<&Tensor> = kept.iter().map(|(tensor, _)| tensor).collect();
        let weighted = kept.iter().map(|(tensor, weight)| tensor.f_mul_scalar(*weight));
        let weighted = Tensor::f_stack(&weighted.collect::<std::result::Result<Vec<_>, _>>()?, 0)?;
        let kind = weighted.f_kind()?;
        let over = |t: &Tensor| t.f_sum_dim_intlist([0i64].as_slice(), false, kind);
        let Some(election) = election else { return Ok(over(&weighted)?) };
        let signs = Tensor::f_stack(&plain, 0)?.f_sign()?;
        let votes = match election {
            MajoritySign::Total => over(&Tensor::f_stack(&plain, 0)?)?,
            MajoritySign::Frequency => over(&signs)?,
        };
        // 1 where the sum is at least 0, else -1.
        let elected = votes.f_ge(0.0)?.f_to_kind(kind)?.f_mul_scalar(2.0)?.f_add_scalar(-1.0)?;
        let agrees = signs.f_eq_tensor(&elected)?.f_to_kind(kind)?;
        Ok(over(&weighted.f_mul(&agrees)?)?.f_div(&over(&agrees)?.f_clamp_min(1.0)?)?)
    }
}

fn each(tensors: Vec<(Tensor, f64)>, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<(Tensor, f64)>> {
    tensors.into_iter().map(|(tensor, weight)| Ok((f(&tensor)?, weight))).collect()
}

/// The share of values that are largest by magnitude; the others become 0.
fn largest(tensor: &Tensor, density: f64) -> Result<Tensor> {
    if density >= 1.0 {
        return Ok(tensor.shallow_clone());
    }
    let count = (density * tensor.numel() as f64) as i64;
    let flat = tensor.f_flatten(0, -1)?;
    let (_, kept) = flat.f_abs()?.f_topk(count, 0, true, true)?;
    let mask = flat.f_zeros_like()?.f_index_fill(0, &kept, 1.0)?;
    Ok(flat.f_mul(&mask)?.f_view(tensor.size().as_slice())?)
}

/// Values kept with probability `density` and scaled by its inverse; drawn
/// from libtorch's default generator as PEFT draws them.
fn random(tensor: &Tensor, density: f64) -> Result<Tensor> {
    if density >= 1.0 {
        return Ok(tensor.shallow_clone());
    }
    let mask = tensor.f_full_like(density)?.f_bernoulli()?;
    Ok(tensor.f_mul(&mask)?.f_div_scalar(density)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(values: &[f32], weight: f64) -> Part {
        let a = Tensor::from_slice(values).view([2, -1]);
        let b = Tensor::from_slice(&[1f32, 2., 3., 4., -1., 0.]).view([3, 2]);
        Part { a, b, weight, scaling: 2.0 }
    }

    #[test]
    fn cat_and_svd_are_exact() {
        let parts = [part(&[1., -2., 0.5, 3.], 0.7), part(&[-1., 0.25, 2., 1.], -0.4)];
        let exact = parts.iter().map(|p| p.delta().unwrap() * p.weight).reduce(|x, y| x + y).unwrap();
        for how in [Combination::Cat, Combination::Svd { merge: Merge::Linear, rank: None, clamp: None }] {
            let (a, b) = combine("x", &how, &parts).unwrap();
            assert_eq!(a.size()[0], rank("x", &how, &parts).unwrap());
            let error = f64::try_from((b.mm(&a) - &exact).norm() / exact.norm()).unwrap();
            assert!(error < 1e-6, "{how:?}: {error}");
        }
    }

    #[test]
    fn ties_elects_signs() {
        let tensor = |values: &[f32]| Tensor::from_slice(values);
        let all =
            || vec![(tensor(&[1., -3., 0.5]), 1.0), (tensor(&[2., 1., -0.5]), 1.0), (tensor(&[-1., 1., 0.]), 1.0)];
        let found = |sign| {
            let sum = Merge::Ties { density: 1.0, sign }.sum(all()).unwrap();
            Vec::<f32>::try_from(sum).unwrap()
        };
        assert_eq!(found(MajoritySign::Total), [1.5, -3.0, 0.5]);
        assert_eq!(found(MajoritySign::Frequency), [1.5, 1.0, 0.5]);
    }

    #[test]
    fn shares_and_ranks_are_checked() {
        for density in [0.0, -0.1, 1.1, f64::NAN] {
            assert!(Combination::Factors(Merge::DareLinear { density }).validate().is_err(), "{density}");
        }
        let svd = |rank, clamp| Combination::Svd { merge: Merge::Linear, rank, clamp };
        assert!(svd(Some(0), None).validate().is_err());
        assert!(svd(None, Some(0.0)).validate().is_err());
        assert!(svd(Some(2), Some(0.9)).validate().is_ok());
        let parts = [part(&[1.; 4], 1.0)];
        assert!(combine("x", &svd(Some(3), None), &parts).is_err(), "the weight has rank 2 at most");
    }
}
