//! Learning-rate schedules as pure functions of the step.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// How the learning rate changes over the steps.
///
/// The factors are those of transformers' `get_…_schedule_with_warmup`
/// functions (the cosine with half a cycle), and of
/// `torch.optim.lr_scheduler.OneCycleLR`. As there, a total below the warm-up
/// is not an error, and the cosine rises again after `total` steps.
///
/// ```
/// use tch_peft::Schedule;
///
/// let schedule = Schedule::cosine(100, 1000); // 100 steps up, 900 down
/// assert_eq!((schedule.factor(50), schedule.factor(100), schedule.factor(1000)), (0.5, 1.0, 0.0));
///
/// // Any other numbers, field by field; `check` finds what is out of range.
/// let schedule = Schedule::Polynomial { warmup: 0, total: 10, end: 0.5, power: 1.0 };
/// schedule.check()?;
/// assert_eq!(schedule.factor(5), 0.75);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
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
    /// A linear warm-up, then half a cosine down to 0, several times.
    CosineWithRestarts {
        /// Steps until factor 1.
        warmup: u64,
        /// Steps, warm-up included, until factor 0 for good.
        total: u64,
        /// How often the cosine begins.
        cycles: u64,
    },
    /// A linear warm-up, then a power of the steps left down to `end`.
    Polynomial {
        /// Steps until factor 1.
        warmup: u64,
        /// Steps, warm-up included, until factor `end`.
        total: u64,
        /// The factor at the end: transformers' `lr_end` over the learning rate.
        end: f64,
        /// The exponent.
        power: f64,
    },
    /// A linear warm-up, then falling with the square root of the step.
    InverseSqrt {
        /// Steps until factor 1.
        warmup: u64,
        /// Steps after the warm-up until the factor is 1 / sqrt(2).
        timescale: u64,
    },
    /// Up to factor 1, and down below where it began.
    OneCycle {
        /// Steps until the end.
        total: u64,
        /// The part of the steps that goes up, 0 to 1.
        pct_start: f64,
        /// The factor at the start is 1 over this.
        div_factor: f64,
        /// The factor at the end is that at the start over this.
        final_div_factor: f64,
        /// The shape of the ways up and down.
        anneal: Anneal,
        /// Whether it comes down in two parts: as far as it began, as fast as
        /// it went up, and from there.
        three_phase: bool,
    },
}

/// A way from one learning rate to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Anneal {
    /// Half a cosine.
    Cos,
    /// A line.
    Linear,
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

    /// `warmup` steps up from 0, then half a cosine, begun `cycles` times, that
    /// stays at 0 from step `total` on.
    pub fn cosine_with_restarts(warmup: u64, total: u64, cycles: u64) -> Self {
        Schedule::CosineWithRestarts { warmup, total, cycles }
    }

    /// `warmup` steps up from 0, then down to the factor `end` at step `total`:
    /// `end + (1 - end) * (part of the steps left) ^ power`.
    ///
    /// # Errors
    /// [`Error::Config`] unless `end` is in `0..1` and `power` finite and above 0.
    pub fn polynomial(warmup: u64, total: u64, end: f64, power: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&end) {
            return Err(Error::config("end", "at least 0 and below 1", end));
        }
        above_0("power", power)?;
        Ok(Schedule::Polynomial { warmup, total, end, power })
    }

    /// `warmup` steps up from 0, then `sqrt(t / (step - warmup + t))`, where t
    /// is `warmup`, or 10,000 without one.
    pub fn inverse_sqrt(warmup: u64) -> Self {
        Schedule::InverseSqrt { warmup, timescale: if warmup == 0 { 10_000 } else { warmup } }
    }

    /// Smith and Topin's one-cycle policy (arXiv:1708.07120) with torch's
    /// defaults: half a cosine from 1/25 up to 1 in 0.3 of the steps, and half
    /// a cosine down to 1/250,000. The optimizer's learning rate is torch's
    /// `max_lr`; momentum isn't cycled.
    ///
    /// ```
    /// use tch_peft::{Anneal, Schedule};
    ///
    /// let schedule = Schedule::one_cycle(1000);
    /// assert!(schedule.factor(0) < 0.05 && schedule.factor(299) == 1.0 && schedule.factor(999) < 1e-5);
    /// // Other shapes: the same enum, field by field.
    /// let Schedule::OneCycle { anneal, .. } = schedule else { panic!("another schedule") };
    /// assert_eq!(anneal, Anneal::Cos);
    /// ```
    pub fn one_cycle(total: u64) -> Self {
        Schedule::OneCycle {
            total,
            pct_start: 0.3,
            div_factor: 25.0,
            final_div_factor: 1e4,
            anneal: Anneal::Cos,
            three_phase: false,
        }
    }

    /// Refuses numbers out of range in a schedule that was made field by field.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn check(&self) -> Result<()> {
        match *self {
            Schedule::Polynomial { warmup, total, end, power } => {
                Schedule::polynomial(warmup, total, end, power).map(drop)
            }
            Schedule::OneCycle { pct_start, div_factor, final_div_factor, .. } => {
                if !(0.0..=1.0).contains(&pct_start) {
                    return Err(Error::config("pct_start", "0 to 1", pct_start));
                }
                above_0("div_factor", div_factor)?;
                above_0("final_div_factor", final_div_factor)
            }
            _ => Ok(()),
        }
    }

    /// What the base learning rates are multiplied by, from 0 to 1, after
    /// `step` steps have been taken (0 before the first).
    pub fn factor(&self, step: u64) -> f64 {
        let warmup = match *self {
            Schedule::Constant { warmup }
            | Schedule::Linear { warmup, .. }
            | Schedule::Cosine { warmup, .. }
            | Schedule::CosineWithRestarts { warmup, .. }
            | Schedule::Polynomial { warmup, .. }
            | Schedule::InverseSqrt { warmup, .. } => warmup,
            Schedule::OneCycle { .. } => 0,
        };
        if step < warmup {
            return ratio(step, warmup);
        }
        let progress = |total: u64| ratio(step - warmup, total.saturating_sub(warmup));
        match *self {
            Schedule::Constant { .. } => 1.0,
            Schedule::Linear { total, .. } => ratio(total.saturating_sub(step), total.saturating_sub(warmup)),
            Schedule::Cosine { total, .. } => half_cosine(progress(total)),
            Schedule::CosineWithRestarts { total, cycles, .. } => match progress(total) {
                done if done >= 1.0 => 0.0,
                progress => half_cosine((cycles as f64 * progress) % 1.0),
            },
            Schedule::Polynomial { total, end, .. } if step > total => end,
            Schedule::Polynomial { total, end, power, .. } => (1.0 - end) * (1.0 - progress(total)).powf(power) + end,
            Schedule::InverseSqrt { timescale, .. } => {
                let t = timescale.max(1) as f64;
                1.0 / (((step - warmup) as f64 + t) / t).sqrt()
            }
            Schedule::OneCycle { total, pct_start, div_factor, final_div_factor, anneal, three_phase } => {
                let start = 1.0 / div_factor;
                let up = pct_start * total as f64;
                let end = start / final_div_factor;
                let (rise, last) = ((up - 1.0, start, 1.0), total.saturating_sub(1) as f64);
                let phases = match three_phase {
                    true => &[rise, (2.0 * pct_start * total as f64 - 2.0, 1.0, start), (last, start, end)][..],
                    false => &[rise, (last, 1.0, end)][..],
                };
                one_cycle((step as f64).min(last), phases, anneal)
            }
        }
    }
}

/// The factor at a step, given where each phase ends and between which factors
/// it goes.
fn one_cycle(step: f64, phases: &[(f64, f64, f64)], anneal: Anneal) -> f64 {
    let mut begin = 0.0;
    for (i, &(end, from, to)) in phases.iter().enumerate() {
        if step <= end || i + 1 == phases.len() {
            let part = if end > begin { (step - begin) / (end - begin) } else { 1.0 };
            return match anneal {
                Anneal::Cos => to + (from - to) / 2.0 * ((PI * part).cos() + 1.0),
                Anneal::Linear => (to - from) * part + from,
            };
        }
        begin = end;
    }
    1.0
}

fn half_cosine(progress: f64) -> f64 {
    (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
}

fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn above_0(field: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(field, "a finite number above 0", value))
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
        // Nothing to divide by.
        for total in [0, 1, 2] {
            assert!(Schedule::one_cycle(total).factor(total).is_finite());
        }
        assert_eq!(Schedule::one_cycle(10).factor(9), Schedule::one_cycle(10).factor(99));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = serde_json::to_string(&Schedule::linear(1, 2)).unwrap();
        assert_eq!(text, r#"{"kind":"linear","warmup":1,"total":2}"#);
        assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), Schedule::linear(1, 2));
        assert!(serde_json::from_str::<Schedule>(r#"{"kind":"linear","warmup":1,"total":2,"cycles":3}"#).is_err());
        let cycle = Schedule::one_cycle(7);
        assert_eq!(serde_json::from_str::<Schedule>(&serde_json::to_string(&cycle).unwrap()).unwrap(), cycle);
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert!(matches!(Schedule::polynomial(0, 9, 1.0, 1.0), Err(Error::Config { field, .. }) if field == "end"));
        assert!(
            matches!(Schedule::polynomial(0, 9, 0.0, f64::NAN), Err(Error::Config { field, .. }) if field == "power")
        );
        let Schedule::OneCycle { total, pct_start, final_div_factor, anneal, three_phase, .. } = Schedule::one_cycle(9)
        else {
            panic!()
        };
        let zero = Schedule::OneCycle { total, pct_start, div_factor: 0.0, final_div_factor, anneal, three_phase };
        assert!(matches!(zero.check(), Err(Error::Config { field, .. }) if field == "div_factor"));
        assert!(Schedule::one_cycle(9).check().is_ok());
    }
}
