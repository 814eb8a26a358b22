use super::*;
use crate::quant::Parts;
use std::sync::Arc;
use tch::Device;

/// Every scheme with a kernel.
pub(in crate::quant) fn schemes() -> Vec<Scheme> {
    let mut schemes = vec![Scheme::Int8];
    for (block_size, double_quant) in [(64, false), (64, true), (32, false), (256, true)] {
        schemes.push(Scheme::Nf4 { block_size, double_quant });
        schemes.push(Scheme::Fp4 { block_size, double_quant });
    }
    schemes.extend([Fp8Format::E4m3, Fp8Format::E5m2].map(|format| Scheme::Fp8 { format }));
    for group_size in [128, 32] {
        schemes.push(Scheme::Int4 { group_size, hqq: false });
        schemes.push(Scheme::Int2 { group_size, hqq: false });
    }
    schemes.extend([Scheme::LlmInt8, Scheme::Mxfp4]);
    schemes
}

pub(in crate::quant) fn weight(shape: [i64; 2], kind: Kind) -> Tensor {
    let values = Tensor::randn(shape, (Kind::Float, Device::Cpu));
    // Small values and zeros too, and a row of nothing else.
    let values = values.f_mul(&values.f_gt(-1.0).unwrap()).unwrap();
    let _ = values.get(0).fill_(0.0);
    (values.f_pow_tensor_scalar(3.0).unwrap()).to_kind(kind)
}

pub(in crate::quant) fn same(found: &Tensor, expected: &Tensor, what: &str) {
    let bytes = |t: &Tensor| crate::ffi::bytes::tensor_bytes(t).unwrap();
    assert!(bytes(found) == bytes(expected), "{what}: {found} instead of {expected}");
}

/// Random codes, scales and zeros of columns in these groups, as GPTQ's files hold them.
pub(in crate::quant) fn gptq([rows, columns]: [i64; 2], kind: Kind, group_size: i64, group: Tensor) -> Parts {
    let groups = (columns + group_size - 1) / group_size;
    let bytes = |top: i64, shape: [i64; 2]| Tensor::randint(top, shape, (Kind::Uint8, Device::Cpu));
    let tensors = [
        ("weight", bytes(256, [rows, (columns + 1) / 2])),
        ("weight.scale", Tensor::randn([rows, groups], (Kind::Float, Device::Cpu)).to_kind(kind)),
        ("weight.zero", bytes(17, [rows, groups])),
        ("weight.group", group),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_string(), tensor)).into();
    Parts { name: "w".into(), scheme: Scheme::Gptq { group_size }, sizes: vec![rows, columns], kind, tensors }
}

/// Every scheme with a kernel, as weights of this shape.
pub(in crate::quant) fn packed(shape: [i64; 2], kind: Kind) -> Vec<Arc<dyn PackedWeight>> {
    let weight = weight(shape, kind);
    let packed = schemes().into_iter().map(|scheme| crate::quant::quantize("w", &weight, scheme).unwrap());
    let group = [128, 64, 10].into_iter().find(|group| shape[1] % group == 0);
    let in_order = |size| {
        let columns = Tensor::arange(shape[1], (Kind::Int64, Device::Cpu));
        let group = columns.divide_scalar_mode(size, "floor");
        crate::quant::assemble(gptq(shape, kind, size, group)).unwrap()
    };
    packed.chain(group.map(in_order)).collect()
}

/// Every scheme, shape, pair of dtypes, range and index, into outputs full of NaN: `unpack` writes
/// the bits of the whole weight that `expected` gives.
pub(in crate::quant) fn unpacks_the_same_bits(
    expected: impl Fn(&dyn PackedWeight, Kind) -> Tensor,
    unpack: impl Fn(&dyn PackedWeight, Op) -> Result<bool>,
) {
    for (shape, kind) in [
        ([6, 256], Kind::Float),
        ([5, 37], Kind::Float),
        ([9, 192], Kind::BFloat16),
        ([3, 130], Kind::Half),
        ([40, 1024], Kind::BFloat16),
    ] {
        for packed in packed(shape, kind) {
            let ([rows, inn], scheme) = (shape, packed.scheme().unwrap());
            let indices = Tensor::from_slice(&[rows - 1, 0, 2, 0, 1, rows - 1]);
            for out_kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let expected = expected(packed.as_ref(), out_kind);
                for (row, columns) in [(0, 0..inn), (2, 0..inn), (0, inn / 3..inn), (1, 5..6), (0, 16..32)] {
                    let (height, width) = (rows - row, columns.end - columns.start);
                    let what = format!("{scheme} {kind:?} {shape:?} as {out_kind:?}, row {row}, {columns:?}");
                    let expected = expected.narrow(0, row, height).narrow(1, columns.start, width).contiguous();
                    let mut out = Tensor::full([height, width], f64::NAN, (out_kind, Device::Cpu));
                    let op = Op::Unpack { row, columns, out: &mut out };
                    assert!(unpack(packed.as_ref(), op).unwrap(), "{what}: no kernel");
                    same(&out, &expected, &what);
                }
                let what = format!("{scheme} {kind:?} {shape:?} as {out_kind:?}, by index");
                let expected = expected.index_select(0, &indices);
                let mut out = Tensor::full([6, inn], f64::NAN, (out_kind, Device::Cpu));
                let op = Op::UnpackIndex { index: &indices, out: &mut out };
                assert!(unpack(packed.as_ref(), op).unwrap(), "{what}: no kernel");
                same(&out, &expected, &what);
                packed.index_by_operators(&indices, &mut out).unwrap();
                same(&out, &expected, &what);
            }
        }
    }
}

// The schemes' own unpacking, with libtorch's operators, is a second
// implementation of the same definition.
#[test]
fn kernels_unpack_the_same_bits() {
    let by_operators = |packed: &dyn PackedWeight, kind| {
        let mut whole = Tensor::zeros(packed.shape(), (kind, Device::Cpu));
        packed.rows_by_operators(0, &mut whole).unwrap();
        whole
    };
    unpacks_the_same_bits(by_operators, run);
}

#[test]
fn few_rows_multiply() {
    for (shape, kind) in [([70, 256], Kind::Float), ([33, 512], Kind::BFloat16), ([5, 512], Kind::Half)] {
        let [out, inn] = shape;
        for packed in packed(shape, kind) {
            let scheme = packed.scheme().unwrap();
            let values = Values::new(packed.as_ref());
            for n in [1, 2, 3, 7, 8, 13, 16] {
                for x_kind in [Kind::Float, Kind::BFloat16] {
                    let what = format!("{scheme} {kind:?} {shape:?}, {n} rows of {x_kind:?}");
                    let random = |columns| Tensor::randn([n, columns], (Kind::Float, Device::Cpu)).to_kind(x_kind);
                    let (x, g) = (random(inn), random(out));
                    let mut y = Tensor::full([n, out], 7.0, (x_kind, Device::Cpu));
                    let mut dx = Tensor::full([n, inn], 7.0, (x_kind, Device::Cpu));
                    assert!(run(packed.as_ref(), Op::Product { x: &x, y: &mut y }).unwrap(), "{what}");
                    let op = Op::ProductTransposed { g: &g, dx: &mut dx };
                    assert!(run(packed.as_ref(), op).unwrap(), "{what}");
                    values.multiplied(&y, &x, false, &what);
                    values.multiplied(&dx, &g, true, &what);
                }
            }
        }
    }
}

/// What products with a weight may take for its values.
pub(in crate::quant) struct Values {
    /// (out, in): rounded to its dtype, as it unpacks them, and as its codes and scales mean them.
    choices: [Tensor; 2],
    /// Whether rows of the other side may become integers.
    integers: bool,
}

impl Values {
    pub(in crate::quant) fn new(packed: &dyn PackedWeight) -> Self {
        let rounded = packed.dequantize(Kind::Float).unwrap().to_kind(Kind::Double);
        let tensors = packed.tensors().unwrap();
        let tensor = |name: &str| tensors.iter().find(|(n, _)| n == name).unwrap().1.to_kind(Kind::Double);
        let scale = match packed.scheme() {
            Some(Scheme::Int8 | Scheme::Fp8 { .. }) => Some(tensor("weight.scale")),
            Some(Scheme::LlmInt8) => Some(tensor("SCB").unsqueeze(1) * f64::from(crate::quant::int8::STEP as f32)),
            _ => None,
        };
        let meant = scale.map_or_else(|| rounded.shallow_clone(), |s| tensor("weight").view(packed.shape()) * s);
        Values { choices: [rounded, meant], integers: multiplies_many(packed, Kind::Float) }
    }

    /// Asserts `|found − a · b| ≤ (inner + 4) · 2⁻²⁴ · |a| · |b|`, and the rounding of the result, of `b = W` if
    /// `transposed` and else `b = Wᵀ`; and what rows of a, times the scales of W's, lose as integers of 24 bits.
    pub(in crate::quant) fn multiplied(&self, found: &Tensor, a: &Tensor, transposed: bool, what: &str) {
        let is_product = |w: &Tensor| {
            let b = if transposed { w.shallow_clone() } else { w.tr() };
            let (kind, a) = (found.kind(), a.to_kind(Kind::Double));
            let (expected, magnitude) = (a.mm(&b), a.abs().mm(&b.abs()));
            let result = if kind == Kind::Float { 0.0 } else { 0.5f64.powi(8) };
            let mut bound = magnitude * ((b.size()[0] + 4) as f64 * 0.5f64.powi(24)) + expected.abs() * result + 1e-30;
            if self.integers {
                let scales = if transposed { w.abs().amax([1], false).clamp_min(1e-300) } else { Tensor::from(1.0) };
                let largest = (a.abs() * &scales).amax([1], true);
                let codes = b.abs() / scales.view([-1, 1]);
                bound += largest * codes.sum_dim_intlist([0i64].as_slice(), true, Kind::Double) * 0.5f64.powi(23);
            }
            let within = (found.to_kind(Kind::Double) - expected).abs().le_tensor(&bound).all();
            i64::try_from(within).unwrap() == 1
        };
        assert!(self.choices.iter().any(is_product), "{what}");
    }
}

/// Rows that are integers only by a scale of their own, and some that can't be.
#[test]
fn rows_of_any_magnitude_multiply() {
    let packed = crate::quant::quantize("w", &weight([70, 256], Kind::Float), Scheme::Int8).unwrap();
    let values = Values::new(packed.as_ref());
    for magnitudes in [[1.0, 1e20, 1e-20, 0.0, 3.0], [1e-44, 1.0, 1e33, 0.0, 1e-36]] {
        let magnitudes = Tensor::from_slice(&magnitudes).unsqueeze(1);
        let random =
            |columns| (Tensor::randn([5, columns], (Kind::Double, Device::Cpu)) * &magnitudes).to_kind(Kind::Float);
        let (x, g) = (random(256), random(70));
        let mut y = Tensor::full([5, 70], 7.0, (Kind::Float, Device::Cpu));
        let mut dx = Tensor::full([5, 256], 7.0, (Kind::Float, Device::Cpu));
        assert!(run(packed.as_ref(), Op::Product { x: &x, y: &mut y }).unwrap());
        assert!(run(packed.as_ref(), Op::ProductTransposed { g: &g, dx: &mut dx }).unwrap());
        values.multiplied(&y, &x, false, "x");
        values.multiplied(&dx, &g, true, "g");
    }
    // What is not finite stays so, and in its row.
    for bad in [f64::INFINITY, f64::NAN] {
        let x = Tensor::ones([5, 256], (Kind::Float, Device::Cpu));
        let _ = x.narrow(0, 2, 1).narrow(1, 100, 1).fill_(bad);
        let mut y = Tensor::full([5, 70], 7.0, (Kind::Float, Device::Cpu));
        assert!(run(packed.as_ref(), Op::Product { x: &x, y: &mut y }).unwrap());
        assert_eq!(y.isfinite(), x.to_kind(Kind::Double).mm(&values.choices[0].tr()).isfinite());
    }
}

// Tiles, strips, parts and rows that don't divide; libtorch's own products use the registers in between.
#[test]
fn many_rows_of_bf16_multiply() {
    let kind = Kind::BFloat16;
    let libtorch = weight([256, 256], kind);
    let square = libtorch.mm(&libtorch);
    for shape in [[70, 256], [33, 512], [301, 1152]] {
        let [out, inn] = shape;
        for packed in packed(shape, kind) {
            let scheme = packed.scheme().unwrap();
            let values = Values::new(packed.as_ref());
            for n in [9, 33, 530] {
                let what = format!("{scheme} {shape:?}, {n} rows");
                let random = |columns| Tensor::randn([n, columns], (Kind::Float, Device::Cpu)).to_kind(kind);
                let (x, g) = (random(inn), random(out));
                let mut y = Tensor::full([n, out], f64::NAN, (kind, Device::Cpu));
                let mut dx = Tensor::full([n, inn], f64::NAN, (kind, Device::Cpu));
                let served = run(packed.as_ref(), Op::Product { x: &x, y: &mut y }).unwrap();
                same(&libtorch.mm(&libtorch), &square, "libtorch's product");
                let op = Op::ProductTransposed { g: &g, dx: &mut dx };
                assert_eq!(run(packed.as_ref(), op).unwrap(), served, "{what}");
                let narrow = matches!(
                    scheme,
                    Scheme::Nf4 { block_size: 32, .. }
                        | Scheme::Fp4 { block_size: 32, .. }
                        | Scheme::Int4 { group_size: 32, .. }
                        | Scheme::Int2 { group_size: 32, .. }
                );
                let divides =
                    !matches!(scheme, Scheme::Nf4 { block_size: 256, .. } | Scheme::Fp4 { block_size: 256, .. })
                        || inn % 256 == 0;
                let any = multiplies_many(packed.as_ref(), kind) || multiplies_many(packed.as_ref(), Kind::Float);
                assert_eq!(served, n <= 64 && divides || any && divides && !narrow, "{what}");
                if served {
                    values.multiplied(&y, &x, false, &what);
                    values.multiplied(&dx, &g, true, &what);
                }
            }
        }
    }
}

#[test]
fn rows_of_broken_blocks_are_left_to_tiles() {
    let packed = crate::quant::quantize("w", &weight([4, 96], Kind::Float), schemes()[1]).unwrap();
    let (x, mut y) =
        (Tensor::ones([1, 96], (Kind::Float, Device::Cpu)), Tensor::zeros([1, 4], (Kind::Float, Device::Cpu)));
    assert!(!run(packed.as_ref(), Op::Product { x: &x, y: &mut y }).unwrap());
}
