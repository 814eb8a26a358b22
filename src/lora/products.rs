//! The products of A and B in an adapted linear: u = x·Aᵀ, y += s·u·Bᵀ,
//! w = dY·B, dX += s·w·A, dA = s·wᵀ·x and dB = s·dYᵀ·u.
//!
//! By libtorch, in the dtype of x; or by hand where x has few rows, for then
//! libtorch takes longer to start six products than these take to be done. The
//! latter are in f32 whatever the dtype of x is, as in PEFT, whose A and B are
//! f32. Each of their sums runs in one thread, in an order that depends on the
//! shapes and the instruction set only.

use crate::error::Result;
use crate::ffi::bytes::{read, write};
use crate::ffi::compute::add_product;
use crate::ffi::simd::{Kernel, LANES, Simd, dispatch};
use crate::quant::{Float, LinearMap};
use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// Rows of x up to which the products by hand are the faster ones.
const ROWS: i64 = 4;
/// Multiplications of one product that a single thread is worth.
const WORK: i64 = 1 << 20;

/// Who multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Products {
    Libtorch,
    ByHand,
}

impl Products {
    /// For x (n, in), A (r, in) and B (out, r).
    pub(super) fn of(x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Self> {
        let ((n, inn), (out, r)) = (x.size2()?, b.size2()?);
        let floats = matches!(x.f_kind()?, Kind::Float | Kind::BFloat16 | Kind::Half);
        let factors = [a, b].into_iter().all(|t| t.kind() == Kind::Float && t.is_contiguous());
        let small = (1..=ROWS).contains(&n) && r > 0 && n * r * inn.max(out) <= WORK;
        Ok(if x.device() == Device::Cpu && floats && factors && small { Products::ByHand } else { Products::Libtorch })
    }

    /// The dtype to multiply such x in, by W too.
    pub(super) fn kind(self, map: &LinearMap, x: &Tensor) -> Result<Kind> {
        if self == Products::Libtorch { map.product_kind(x) } else { Ok(x.f_kind()?) }
    }

    /// x · Aᵀ (n, r).
    pub(super) fn down(self, x: &Tensor, a: &Tensor) -> Result<Tensor> {
        if self == Products::Libtorch {
            return Ok(x.f_mm(&a.f_to_kind(x.f_kind()?)?.f_tr()?)?);
        }
        let ((n, width), x) = (x.size2()?, floats(x)?);
        matrix([n, a.size2()?.0], |to| {
            read(a, |rows| dispatch(Dots { x: &x, rows, width: width as usize, scale: 1.0, to }))
        })
    }

    /// y += s · u · Bᵀ (n, out).
    pub(super) fn add_up(self, y: &mut Tensor, u: &Tensor, b: &Tensor, s: f64) -> Result<()> {
        if self == Products::Libtorch {
            return add_product(y, u, &b.f_to_kind(y.f_kind()?)?.f_tr()?, 1.0, s);
        }
        let (width, scale) = (b.size2()?.1 as usize, s as f32);
        let mut delta = vec![0.0; y.numel()];
        read(u, |x| read(b, |rows| dispatch(Dots { x, rows, width, scale, to: &mut delta })))??;
        add(y, &delta)
    }

    /// w = g · B (n, r).
    pub(super) fn up_transposed(self, g: &Tensor, b: &Tensor) -> Result<Tensor> {
        if self == Products::Libtorch {
            return Ok(g.f_mm(&b.f_to_kind(g.f_kind()?)?)?);
        }
        let (n, r, x) = (g.size2()?.0, b.size2()?.1, floats(g)?);
        matrix([n, r], |to| read(b, |rows| dispatch(Sums { x: &x, rows, width: r as usize, scale: 1.0, to })))
    }

    /// dX += s · w · A (n, in).
    pub(super) fn add_down_transposed(self, dx: &mut Tensor, w: &Tensor, a: &Tensor, s: f64) -> Result<()> {
        if self == Products::Libtorch {
            return add_product(dx, w, &a.f_to_kind(dx.f_kind()?)?, 1.0, s);
        }
        let (width, scale) = (a.size2()?.1 as usize, s as f32);
        let mut delta = vec![0.0; dx.numel()];
        read(w, |x| read(a, |rows| dispatch(Sums { x, rows, width, scale, to: &mut delta })))??;
        add(dx, &delta)
    }

    /// s · lᵀ · r: l (n, p), r (n, q), of the same dtype unless by hand; (p, q).
    pub(super) fn scaled(self, l: &Tensor, r: &Tensor, s: f64) -> Result<Tensor> {
        let (p, q) = (l.size2()?.1, r.size2()?.1);
        if self == Products::Libtorch {
            let mut product = Tensor::f_empty([p, q], (l.f_kind()?, l.device()))?;
            add_product(&mut product, &l.f_tr()?, r, 0.0, s)?;
            return Ok(product);
        }
        let (l, r) = (floats(l)?, floats(r)?);
        matrix([p, q], |to| {
            dispatch(Outer { l: &l, r: &r, width: q as usize, scale: s as f32, to });
            Ok(())
        })
    }
}

/// The elements of a matrix with few rows.
fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    fn of<T: Float>(tensor: &Tensor) -> Result<Vec<f32>> {
        read(tensor, |values: &[T]| values.iter().map(|value| value.to_f32()).collect())
    }
    let tensor = tensor.f_contiguous()?;
    match tensor.f_kind()? {
        Kind::BFloat16 => of::<bf16>(&tensor),
        Kind::Half => of::<f16>(&tensor),
        _ => of::<f32>(&tensor),
    }
}

/// Adds to a fresh tensor, rounding once.
fn add(tensor: &mut Tensor, delta: &[f32]) -> Result<()> {
    fn to<T: Float>(tensor: &mut Tensor, delta: &[f32]) -> Result<()> {
        write(tensor, |values: &mut [T]| {
            values.iter_mut().zip(delta).for_each(|(value, delta)| *value = T::from_f32(value.to_f32() + delta));
        })
    }
    match tensor.f_kind()? {
        Kind::BFloat16 => to::<bf16>(tensor, delta),
        Kind::Half => to::<f16>(tensor, delta),
        _ => to::<f32>(tensor, delta),
    }
}

/// A new f32 matrix, zeros that `fill` adds to.
fn matrix(shape: [i64; 2], fill: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<Tensor> {
    let mut tensor = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?;
    write(&mut tensor, fill)??;
    Ok(tensor)
}

/// to += s · x · rowsᵀ: x (n, width), rows (m, width), to (n, m).
struct Dots<'a> {
    x: &'a [f32],
    rows: &'a [f32],
    width: usize,
    scale: f32,
    to: &'a mut [f32],
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let m = self.rows.len() / self.width;
        for (x, to) in self.x.chunks_exact(self.width).zip(self.to.chunks_exact_mut(m)) {
            for (row, to) in self.rows.chunks_exact(self.width).zip(to) {
                *to += self.scale * dot(s, x, row);
            }
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    const CHAINS: usize = 4;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [s.splat(0.0); CHAINS];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        sums[i % CHAINS] = s.mul_add(s.load(a), s.load(b), sums[i % CHAINS]);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.map(|sum| s.sum(sum)).iter().sum::<f32>() + rest
}

/// to += s · x · rows: x (n, m), rows (m, width), to (n, width).
struct Sums<'a> {
    x: &'a [f32],
    rows: &'a [f32],
    width: usize,
    scale: f32,
    to: &'a mut [f32],
}

impl Kernel for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // Four rows for each time that a sum is read and written.
        const ROWS: usize = 4;
        let m = self.rows.len() / self.width;
        for (x, to) in self.x.chunks_exact(m).zip(self.to.chunks_exact_mut(self.width)) {
            let (groups, rest) = x.as_chunks::<ROWS>();
            let mut rows = self.rows;
            for x in groups {
                let x = x.map(|x| x * self.scale);
                let (group, after) = rows.split_at(ROWS * self.width);
                let (first, second) = group.split_at(2 * self.width);
                let ((a, b), (c, d)) = (first.split_at(self.width), second.split_at(self.width));
                for ((((to, a), b), c), d) in to.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                    *to += (x[0] * a + x[1] * b) + (x[2] * c + x[3] * d);
                }
                rows = after;
            }
            for (x, row) in rest.iter().zip(rows.chunks_exact(self.width)) {
                let x = x * self.scale;
                to.iter_mut().zip(row).for_each(|(to, value)| *to += x * value);
            }
        }
    }
}

/// to += s · lᵀ · r: l (n, m), r (n, width), to (m, width).
struct Outer<'a> {
    l: &'a [f32],
    r: &'a [f32],
    width: usize,
    scale: f32,
    to: &'a mut [f32],
}

impl Kernel for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let m = self.to.len() / self.width;
        for (l, r) in self.l.chunks_exact(m).zip(self.r.chunks_exact(self.width)) {
            for (l, to) in l.iter().zip(self.to.chunks_exact_mut(self.width)) {
                let l = l * self.scale;
                to.iter_mut().zip(r).for_each(|(to, r)| *to += l * r);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against f64: each sum within the rounding of f32, and of the dtype that it is added to.
    #[test]
    fn products_by_hand_are_right() {
        for (n, inn, out, r, kind) in [
            (1, 64, 48, 16, Kind::Float),
            (3, 33, 21, 5, Kind::Float),
            (4, 130, 67, 8, Kind::BFloat16),
            (2, 17, 96, 40, Kind::Half),
        ] {
            let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let (a, b) = (random([r, inn]), random([out, r]));
            let (x, g) = (random([n, inn]).to_kind(kind), random([n, out]).to_kind(kind));
            assert_eq!(Products::of(&x, &a, &b).unwrap(), Products::ByHand);
            let [x64, g64, a64, b64] = [&x, &g, &a, &b].map(|t| t.to_kind(Kind::Double));
            let close = |found: &Tensor, expected: Tensor, what: &str| {
                let bound = if found.kind() == Kind::Float { 2e-6 } else { 8e-3 };
                let error = (found.to_kind(Kind::Double) - &expected).abs().max() / (expected.abs().max() + 1e-9);
                assert!(f64::try_from(&error).unwrap() < bound, "{what}: {error:?}");
            };
            let hand = Products::ByHand;
            let (u, w) = (hand.down(&x, &a).unwrap(), hand.up_transposed(&g, &b).unwrap());
            close(&u, x64.mm(&a64.tr()), "u");
            close(&w, g64.mm(&b64), "w");
            let (mut y, mut dx) = (g.copy(), x.copy());
            hand.add_up(&mut y, &u, &b, 0.5).unwrap();
            close(&y, &g64 + u.to_kind(Kind::Double).mm(&b64.tr()) * 0.5, "y");
            hand.add_down_transposed(&mut dx, &w, &a, 0.5).unwrap();
            close(&dx, &x64 + w.to_kind(Kind::Double).mm(&a64) * 0.5, "dX");
            let da = hand.scaled(&w, &x, 2.0).unwrap();
            close(&da, w.to_kind(Kind::Double).tr().mm(&x64) * 2.0, "dA");
            let db = hand.scaled(&g, &u, 2.0).unwrap();
            close(&db, g64.tr().mm(&u.to_kind(Kind::Double)) * 2.0, "dB");
        }
    }

    #[test]
    fn other_products_are_libtorchs() {
        let zeros = |shape: [i64; 2], kind| Tensor::zeros(shape, (kind, Device::Cpu));
        let (a, b) = (zeros([4, 8], Kind::Float), zeros([8, 4], Kind::Float));
        let of = |x: &Tensor, a: &Tensor, b: &Tensor| Products::of(x, a, b).unwrap();
        assert_eq!(of(&zeros([1, 8], Kind::Float), &a, &b), Products::ByHand);
        assert_eq!(of(&zeros([0, 8], Kind::Float), &a, &b), Products::Libtorch);
        assert_eq!(of(&zeros([5, 8], Kind::Float), &a, &b), Products::Libtorch);
        assert_eq!(of(&zeros([1, 8], Kind::Double), &a, &b), Products::Libtorch);
        assert_eq!(of(&zeros([1, 8], Kind::BFloat16), &a.to_kind(Kind::BFloat16), &b), Products::Libtorch);
        assert_eq!(of(&zeros([1, 8], Kind::Float), &b.tr(), &a.tr()), Products::Libtorch);
    }
}
