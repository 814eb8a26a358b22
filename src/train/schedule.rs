//! Learning-rate schedules as pure functions of the step.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// How the learning rate changes over the steps.
///
/// The factors are those of transformers' `get_constant_schedule_with_warmup`,
/// `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`
/// (half a cycle). As there, a total below the warm-up is not an error, and
/// the cosine rises again after `total` steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Schedule {
    /// A linear warm-up, then factor 1.
    Constant {
        /// Steps until factor 1; 0 for none.
        warmup: u64,
    },
    /// A linear warm-up, then a line down to 0.
    Linear {
        /// Steps until factor 1.
        warmup: u64,
        /// Steps, warm-up included, until factor 0.
        total: u64,
    },
    /// A linear warm-up, then half a cosine down to 0.
    Cosine {
        /// Steps until factor 1.
        warmup: u64,
        /// Steps, warm-up included, until factor 0.
        total: u64,
    },
}

impl Schedule {
    /// Factor 1 throughout.
    pub fn constant() -> Self {
        Schedule::Constant { warmup: 0 }
    }

    /// `warmup` steps up from 0, then factor 1.
    pub fn constant_with_warmup(warmup: u64) -> Self {
        Schedule::Constant { warmup }
    }

    /// `warmup` steps up from 0, then a line that reaches 0 at step `total`.
    pub fn linear(warmup: u64, total: u64) -> Self {
        Schedule::Linear { warmup, total }
    }

    /// `warmup` steps up from 0, then half a cosine that reaches 0 at step `total`.
    pub fn cosine(warmup: u64, total: u64) -> Self {
        Schedule::Cosine { warmup, total }
    }

    /// What the base learning rates are multiplied by, from 0 to 1, after
    /// `step` steps have been taken (0 before the first).
    pub fn factor(&self, step: u64) -> f64 {
        let (Self::Constant { warmup } | Self::Linear { warmup, .. } | Self::Cosine { warmup, .. }) = *self;
        if step < warmup {
            return ratio(step, warmup);
        }
        match *self {
            Schedule::Constant { .. } => 1.0,
            Schedule::Linear { total, .. } => ratio(total.saturating_sub(step), total.saturating_sub(warmup)),
            Schedule::Cosine { total, .. } => {
                let progress = ratio(step - warmup, total.saturating_sub(warmup));
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        }
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners() {
        assert_eq!(Schedule::constant().factor(0), 1.0);
        assert_eq!(Schedule::constant_with_warmup(4).factor(1), 0.25);
        let linear = Schedule::linear(2, 10);
        assert_eq!([0, 1, 2, 6, 10, 11].map(|s| linear.factor(s)), [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]);
        let cosine = Schedule::cosine(2, 10);
        assert_eq!([0, 2, 10].map(|s| cosine.factor(s)), [0.0, 1.0, 0.0]);
        assert_eq!(cosine.factor(6), 0.5 * (1.0 + (PI * 0.5).cos()));
        // A total below the warm-up.
        assert_eq!(Schedule::linear(5, 3).factor(5), 0.0);
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = serde_json::to_string(&Schedule::linear(1, 2)).unwrap();
        assert_eq!(text, r#"{"kind":"linear","warmup":1,"total":2}"#);
        assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), Schedule::linear(1, 2));
        assert!(serde_json::from_str::<Schedule>(r#"{"kind":"linear","warmup":1,"total":2,"cycles":3}"#).is_err());
    }
}
