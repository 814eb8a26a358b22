//! The inverse of the normal distribution, the same bits on every machine.

/// The x below which a standard normal value lies with probability `p`, in
/// `0 < p < 1`, to about 16 digits.
///
/// Wichura, "Algorithm AS 241: The percentage points of the normal
/// distribution" (1988), PPND16. Only operations that IEEE 754 rounds in one
/// way are used, so the bits don't depend on the machine's mathematics library.
pub(super) fn inverse_normal(p: f64) -> f64 {
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        return q * ratio(&CENTRE, 0.180625 - q * q);
    }
    let r = (-ln(if q < 0.0 { p } else { 1.0 - p })).sqrt();
    let x = if r <= 5.0 { ratio(&MIDDLE, r - 1.6) } else { ratio(&TAIL, r - 5.0) };
    if q < 0.0 { -x } else { x }
}

/// The natural logarithm of a normal number above 0, to the last digit or two.
fn ln(x: f64) -> f64 {
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) as i32) - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        exponent += 1;
    }
    // ln m = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + …), |s| below 0.172.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let sum = (0..12).rev().fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    f64::from(exponent) * std::f64::consts::LN_2 + 2.0 * s * sum
}

/// The quotient of two polynomials, from the constant term up.
fn ratio([above, below]: &[[f64; 8]; 2], x: f64) -> f64 {
    let value = |terms: &[f64; 8]| terms.iter().rev().fold(0.0, |sum, term| sum * x + term);
    value(above) / value(below)
}

type Quotient = [[f64; 8]; 2];

const CENTRE: Quotient = [
    [
        3.387_132_872_796_366_6,
        133.141_667_891_784_38,
        1_971.590_950_306_551_3,
        13_731.693_765_509_46,
        45_921.953_931_549_87,
        67_265.770_927_008_7,
        33_430.575_583_588_13,
        2_509.080_928_730_122_7,
    ],
    [
        1.0,
        42.313_330_701_600_91,
        687.187_007_492_057_9,
        5_394.196_021_424_751,
        21_213.794_301_586_597,
        39_307.895_800_092_71,
        28_729.085_735_721_943,
        5_226.495_278_852_854,
    ],
];

const MIDDLE: Quotient = [
    [
        1.423_437_110_749_683_5,
        4.630_337_846_156_546,
        5.769_497_221_460_691,
        3.647_848_324_763_204_5,
        1.270_458_252_452_368_4,
        0.241_780_725_177_450_6,
        0.022_723_844_989_269_184,
        7.745_450_142_783_414e-4,
    ],
    [
        1.0,
        2.053_191_626_637_759,
        1.676_384_830_183_803_8,
        0.689_767_334_985_1,
        0.148_103_976_427_480_08,
        0.015_198_666_563_616_457,
        5.475_938_084_995_345e-4,
        1.050_750_071_644_416_9e-9,
    ],
];

const TAIL: Quotient = [
    [
        6.657_904_643_501_103,
        5.463_784_911_164_114,
        1.784_826_539_917_291_3,
        0.296_560_571_828_504_87,
        0.026_532_189_526_576_124,
        0.001_242_660_947_388_078_4,
        2.711_555_568_743_487_6e-5,
        2.010_334_399_292_288_1e-7,
    ],
    [
        1.0,
        0.599_832_206_555_888,
        0.136_929_880_922_735_8,
        0.014_875_361_290_850_615,
        7.868_691_311_456_133e-4,
        1.846_318_317_510_054_7e-5,
        1.421_511_758_316_446e-7,
        2.044_263_103_389_939_8e-15,
    ],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_that_of_the_library() {
        for i in 0..2000 {
            let x = (f64::from(i) * 0.37 - 370.0).exp2();
            let (found, expected) = (ln(x), x.ln());
            assert!(
                (found - expected).abs() <= 4.0 * f64::EPSILON * expected.abs().max(0.1),
                "{x}: {found} {expected}"
            );
        }
    }

    #[test]
    fn the_inverse_has_its_known_values() {
        // From tables of the normal distribution, to the digits printed there.
        for (p, x) in [(0.5, 0.0), (0.975, 1.959_963_984_540), (0.001, -3.090_232_306_168), (1e-9, -5.997_807_015_008)]
        {
            assert!((inverse_normal(p) - x).abs() < 1e-12, "{p}: {}", inverse_normal(p));
        }
    }
}
