//! Random numbers whose stream never changes.

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
/// (2014). Written out here since what comes of it must never change.
#[derive(Debug, Clone, Copy)]
pub(super) struct SplitMix64(pub(super) u64);

impl SplitMix64 {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

    /// A stream of its own for each pair: the second number is mixed first, so
    /// that neighbouring pairs don't give neighbouring streams.
    pub(super) fn of(seed: u64, stream: u64) -> Self {
        SplitMix64(seed ^ SplitMix64(stream).next())
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::GAMMA);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The stream from its `n`-th number on.
    pub(super) fn skip(self, n: u64) -> Self {
        SplitMix64(self.0.wrapping_add(Self::GAMMA.wrapping_mul(n)))
    }

    /// A number below `n` (not 0), each equally likely: Lemire, "Fast random
    /// integer generation in an interval" (2019).
    pub(super) fn below(&mut self, n: u64) -> u64 {
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_follows_its_reference() {
        // First outputs of the reference C code (prng.di.unimi.it/splitmix64.c)
        // for state 1234567.
        let mut random = SplitMix64(1_234_567);
        let first = [random.next(), random.next(), random.next()];
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
        assert_eq!(SplitMix64(1_234_567).skip(2).next(), first[2]);
    }

    #[test]
    fn bounded_numbers_are_even() {
        let mut random = SplitMix64(7);
        let mut counts = [0u32; 3];
        (0..30_000).for_each(|_| counts[random.below(3) as usize] += 1);
        assert!(counts.iter().all(|c| (9_700..10_300).contains(c)), "{counts:?}");
    }
}
