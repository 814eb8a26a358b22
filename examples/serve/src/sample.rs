//! The next token from its logits.

/// The likeliest token at temperature 0, else one drawn from
/// softmax(logits / temperature). The draw takes one number of `rng`, so that
/// an answer depends on its own seed only.
pub fn choose(logits: &[f32], temperature: f64, rng: &mut fastrand::Rng) -> i64 {
    let (best, top) = logits
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |(best, top), (id, logit)| if *logit > top { (id, *logit) } else { (best, top) });
    if temperature == 0.0 {
        return best as i64;
    }
    let weight = |logit: &f32| (f64::from(logit - top) / temperature).exp();
    let mut left = rng.f64() * logits.iter().map(weight).sum::<f64>();
    let drawn = logits.iter().position(|logit| {
        left -= weight(logit);
        left < 0.0
    });
    // Rounding may leave a crumb behind the last token.
    drawn.unwrap_or(best) as i64
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        // Probabilities 0.6, 0.3 and 0.1 at temperature 1.
        let logits = [0.6_f32, 0.3, 0.1].map(|p: f32| p.ln() + 50.0);
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(choose(&logits, 0.0, &mut rng), 0);
        for (temperature, expected) in [(1.0, [0.6, 0.3, 0.1]), (0.5, [0.7826, 0.1957, 0.0217])] {
            let mut counts = [0; 3];
            (0..20_000).for_each(|_| counts[choose(&logits, temperature, &mut rng) as usize] += 1);
            for (count, expected) in counts.into_iter().zip(expected) {
                let share = f64::from(count) / 20_000.0;
                assert!((share - expected).abs() < 0.015, "{temperature}: {share} instead of {expected}");
            }
        }
    }
}
