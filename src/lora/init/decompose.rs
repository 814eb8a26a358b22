//! Initialisations from the weight itself. With W (out, in) and the scale s:
//!
//! - PiSSA (arXiv:2404.02948): the r principal singular vectors, B = U·√(S/s)
//!   and A = √(S/s)·Vᵀ, taken out of the weight: W ← W − s·B·A. `pissa_niter_N`
//!   finds them by a randomised decomposition (Halko et al., arXiv:0909.4061).
//! - OLoRA (arXiv:2406.01775): B = Q and A = R of W = Q·R, the first r of each,
//!   taken out of the weight likewise.
//! - LoftQ (arXiv:2310.08659): Q ← quantise(W − L), L ← the rank-r part of
//!   W − Q, a few times over. The weight becomes Q and s·B·A = L.
//! - Orthogonal: A and B from the odd and the even rows of one orthogonal
//!   matrix, so that B·A = 0 and the weight stays.
//!
//! What changes a quantised weight unpacks it, and packs the rest again by its
//! own scheme.

use super::data::{LayerData, corda, lora_ga};
use super::{Start, no_data};
use crate::error::{Error, Result};
use crate::lora::InitLoraWeights;
use crate::lora::layer::LayerSpec;
use crate::quant::{self, Dense, PackedWeight};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// All arithmetic is in f32, or f64 for an adapter of f64.
pub(super) fn start(
    spec: &LayerSpec,
    weight: &Arc<dyn PackedWeight>,
    fan_in_fan_out: bool,
    kind: Kind,
) -> Result<Start> {
    let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let stored = weight.dequantize(wide)?;
    let w = if fan_in_fan_out { stored.f_tr()? } else { stored };
    let (r, s, [out, inn]) = (spec.r, spec.scaling, [w.size()[0], w.size()[1]]);
    if spec.init == InitLoraWeights::Orthogonal {
        let (a, b) = orthogonal([out, inn], r, (wide, weight.device()))?;
        return Ok(Start { a: a.f_to_kind(kind)?, b: b.f_to_kind(kind)?, bias: None, residual: None });
    }
    if r > out.min(inn) {
        let found = format!("{r} for a weight ({out}, {inn})");
        return Err(Error::config("r", format!("at most {} for this initialisation", out.min(inn)), found));
    }
    if spec.init == InitLoraWeights::Loftq {
        return loftq(spec, weight, &w, fan_in_fan_out, kind);
    }
    let (a, b) = match spec.init {
        InitLoraWeights::Pissa => balanced(principal(&w, r)?, s)?,
        InitLoraWeights::PissaNiter(n) => balanced(randomised(&w, r, n)?, s)?,
        InitLoraWeights::Olora => {
            let (q, rest) = Tensor::f_linalg_qr(&w, "reduced")?;
            (rest.f_narrow(0, 0, r)?.f_contiguous()?, q.f_narrow(1, 0, r)?.f_contiguous()?)
        }
        InitLoraWeights::Corda => match spec.data.as_deref() {
            Some(LayerData::Covariance(covariance, method)) => corda::factors(&w, &covariance.get(), *method, r, s)?,
            _ => return Err(no_data(spec.init)),
        },
        InitLoraWeights::LoraGa => match spec.data.as_deref() {
            Some(LayerData::Gradient(gradient, config)) => lora_ga::factors(&w, &gradient.get(), *config, r, s)?,
            _ => return Err(no_data(spec.init)),
        },
        init => {
            let name = init.name().unwrap_or_default();
            return Err(Error::Unsupported { fields: vec![format!("init_lora_weights = {name:?}")] });
        }
    };
    // What the adapter holds is taken out, whatever it was rounded to.
    let (a, b) = (a.f_to_kind(kind)?, b.f_to_kind(kind)?);
    let part = b.f_to_kind(wide)?.f_mm(&a.f_to_kind(wide)?)?.f_mul_scalar_(s)?;
    let residual = w.f_sub(&part)?;
    let residual = if fan_in_fan_out { residual.f_tr()? } else { residual };
    let residual = residual.f_to_kind(weight.kind())?.f_contiguous()?;
    let residual: Arc<dyn PackedWeight> = match weight.scheme() {
        Some(scheme) => quant::pack(&residual, scheme)?,
        None => Arc::new(Dense::new(residual)?),
    };
    Ok(Start { a, b, bias: None, residual: Some(residual) })
}

/// A (r, in) and B (out, r).
pub(super) type Pair = (Tensor, Tensor);

/// U (out, r), S (r) and V (in, r) of the largest singular values.
pub(super) type Singular = (Tensor, Tensor, Tensor);

fn principal(w: &Tensor, r: i64) -> Result<Singular> {
    let (u, s, v) = w.f_svd(true, true)?;
    Ok((u.f_narrow(1, 0, r)?, s.f_narrow(0, 0, r)?, v.f_narrow(1, 0, r)?))
}

/// The same from a random subspace that `n` iterations turn towards W's.
///
/// The random matrix is the same for every weight of a shape, so that loading
/// an adapter finds the same residual again.
pub(super) fn randomised(w: &Tensor, r: i64, n: u32) -> Result<Singular> {
    let orthonormal = |t: &Tensor| -> Result<Tensor> { Ok(Tensor::f_linalg_qr(t, "reduced")?.0) };
    let mut q =
        orthonormal(&w.f_mm(&fixed_normal([w.size()[1], r])?.f_to_kind(w.f_kind()?)?.f_to_device(w.device())?)?)?;
    for _ in 0..n {
        let p = orthonormal(&w.f_tr()?.f_mm(&q)?)?;
        q = orthonormal(&w.f_mm(&p)?)?;
    }
    let (u, s, v) = q.f_tr()?.f_mm(w)?.f_svd(true, true)?;
    Ok((q.f_mm(&u)?, s, v))
}

/// The largest singular value.
pub(super) fn spectral_norm(w: &Tensor) -> Result<f64> {
    Ok(f64::try_from(principal(w, 1)?.1)?)
}

/// Normal numbers that depend on nothing but the shape: splitmix64 and the
/// method of Box and Muller.
fn fixed_normal([rows, columns]: [i64; 2]) -> Result<Tensor> {
    let mut state = 0x5DEE_CE66_D1CE_4E5Bu64;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        // In (0, 1], so that its logarithm is finite.
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + f64::EPSILON / 2.0
    };
    let values: Vec<f64> = (0..rows * columns)
        .map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos())
        .collect();
    Ok(Tensor::f_from_slice(&values)?.f_view([rows, columns])?)
}

/// A (r, in) and B (out, r) with s·B·A = U·S·Vᵀ, √(S/s) to each. A negative
/// scale goes to B.
pub(super) fn balanced((u, singular, v): Singular, s: f64) -> Result<Pair> {
    let root = singular.f_div_scalar(s.abs())?.f_sqrt()?;
    let a = v.f_mul(&root)?.f_tr()?.f_contiguous()?;
    Ok((a, u.f_mul(&root)?.f_mul_scalar(s.signum())?.f_contiguous()?))
}

fn loftq(
    spec: &LayerSpec,
    weight: &Arc<dyn PackedWeight>,
    w: &Tensor,
    fan_in_fan_out: bool,
    kind: Kind,
) -> Result<Start> {
    if let Some(scheme) = weight.scheme() {
        let found = format!("\"loftq\" on a weight that is {scheme} already");
        return Err(Error::config("init_lora_weights", "a dense base, which \"loftq\" quantises itself", found));
    }
    let stored = |w: &Tensor| -> Result<Tensor> { Ok(if fan_in_fan_out { w.f_tr()? } else { w.shallow_clone() }) };
    let mut found = None;
    for _ in 0..spec.loftq.loftq_iter.max(1) {
        let rest = match &found {
            None => w.shallow_clone(),
            Some((_, a, b)) => w.f_sub(&Tensor::f_mm(b, a)?.f_mul_scalar_(spec.scaling)?)?,
        };
        let packed = quant::pack(&stored(&rest)?.f_to_kind(weight.kind())?.f_contiguous()?, spec.loftq.scheme)?;
        let lost = w.f_sub(&stored(&packed.dequantize(w.f_kind()?)?)?)?;
        let (a, b) = balanced(principal(&lost, spec.r)?, spec.scaling)?;
        found = Some((packed, a, b));
    }
    match found {
        Some((packed, a, b)) => {
            Ok(Start { a: a.f_to_kind(kind)?, b: b.f_to_kind(kind)?, bias: None, residual: Some(packed) })
        }
        None => Err(Error::config("loftq_config", "at least one iteration", 0)),
    }
}

/// A and B whose product is zero, after
/// <https://datta0.github.io/posts/rethink-lora-init/>.
fn orthogonal([out, inn]: [i64; 2], r: i64, options: (Kind, Device)) -> Result<(Tensor, Tensor)> {
    if r % 2 != 0 {
        return Err(Error::config("r", "an even rank where init_lora_weights is \"orthogonal\"", r));
    }
    let (q, _) = Tensor::f_linalg_qr(&Tensor::f_randn([r, r], options)?, "reduced")?;
    let rows = |first: i64| q.f_slice(0, first, None, 2);
    let a = Tensor::f_randn([inn, r / 2], options)?.f_mm(&rows(0)?)?.f_tr()?.f_div_scalar(10.0)?;
    let b = Tensor::f_randn([out, r / 2], options)?.f_mm(&rows(1)?)?.f_div_scalar(10.0)?;
    Ok((a.f_contiguous()?, b.f_contiguous()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LoftqConfig;
    use crate::lora::layer::LayerForm;
    use crate::quant::Scheme;

    fn spec(init: InitLoraWeights, r: i64) -> LayerSpec {
        let (form, loftq) =
            (LayerForm::Linear { fan_in_fan_out: false }, LoftqConfig { loftq_iter: 4, ..LoftqConfig::default() });
        LayerSpec {
            form,
            r,
            scaling: 2.0,
            dropout: 0.0,
            lora_bias: false,
            use_dora: false,
            qalora: None,
            init,
            loftq,
            data: None,
            kind: None,
        }
    }

    fn dense(w: &Tensor) -> Arc<dyn PackedWeight> {
        Arc::new(Dense::new(w.shallow_clone()).unwrap())
    }

    fn error(found: &Tensor, expected: &Tensor) -> f64 {
        f64::try_from((found - expected).norm() / expected.norm()).unwrap()
    }

    /// The effective weight of a start.
    fn effective(start: &Start, scaling: f64) -> Tensor {
        start.residual.as_ref().unwrap().dequantize(Kind::Float).unwrap() + start.b.mm(&start.a) * scaling
    }

    #[test]
    fn what_is_taken_out_is_in_the_adapter() {
        let w = Tensor::randn([40, 24], (Kind::Float, Device::Cpu));
        for init in [InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(4), InitLoraWeights::Olora] {
            let start = start(&spec(init, 6), &dense(&w), false, Kind::Float).unwrap();
            assert!(error(&effective(&start, 2.0), &w) < 1e-6, "{init:?}");
            assert!(error(&start.residual.as_ref().unwrap().dequantize(Kind::Float).unwrap(), &w) > 0.1, "{init:?}");
        }
    }

    #[test]
    fn a_randomised_decomposition_is_found_again_and_near_the_exact_one() {
        let w =
            Tensor::randn([64, 4], (Kind::Float, Device::Cpu)).mm(&Tensor::randn([4, 48], (Kind::Float, Device::Cpu)));
        let noise = Tensor::randn([64, 48], (Kind::Float, Device::Cpu)) * 0.01;
        let w = w + noise;
        let part = |init| {
            let start = start(&spec(init, 4), &dense(&w), false, Kind::Float).unwrap();
            start.b.mm(&start.a)
        };
        let first = part(InitLoraWeights::PissaNiter(8));
        tch::manual_seed(5);
        assert_eq!(error(&part(InitLoraWeights::PissaNiter(8)), &first), 0.0);
        assert!(error(&first, &part(InitLoraWeights::Pissa)) < 1e-4);
    }

    #[test]
    fn loftq_is_nearer_to_the_weight_than_quantising_alone() {
        let w = Tensor::randn([96, 64], (Kind::Float, Device::Cpu));
        let alone = quant::pack(&w, Scheme::NF4).unwrap().dequantize(Kind::Float).unwrap();
        let start = start(&spec(InitLoraWeights::Loftq, 8), &dense(&w), false, Kind::Float).unwrap();
        assert_eq!(start.residual.as_ref().unwrap().scheme(), Some(Scheme::NF4));
        let (with, alone) = (error(&effective(&start, 2.0), &w), error(&alone, &w));
        assert!(with < 0.9 * alone, "{with} against {alone}");
        let packed = quant::pack(&w, Scheme::Int8).unwrap();
        assert!(super::start(&spec(InitLoraWeights::Loftq, 8), &packed, false, Kind::Float).is_err());
    }

    #[test]
    fn orthogonal_factors_cancel() {
        let start = start(
            &spec(InitLoraWeights::Orthogonal, 8),
            &dense(&Tensor::randn([32, 64], (Kind::Float, Device::Cpu))),
            false,
            Kind::Float,
        );
        let start = start.unwrap();
        assert_eq!((start.a.size(), start.b.size()), (vec![8, 64], vec![32, 8]));
        assert!(f64::try_from(start.b.mm(&start.a).abs().max()).unwrap() < 1e-6);
        assert!(f64::try_from(start.a.std(true)).unwrap() > 0.03 && f64::try_from(start.b.std(true)).unwrap() > 0.03);
    }
}
