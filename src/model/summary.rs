//! How much of a model is trained.

use std::fmt;

/// Parameter counts; displays as PEFT's `print_trainable_parameters`.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_peft::*;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let model = LoraModel::wrap(Base::new(vs, net), config)?;
/// let summary = model.summary();
/// assert!((summary.percent() - 100.0 * 32.0 / 104.0).abs() < 1e-9);
/// println!("{summary}"); // as PEFT prints it
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Parameters that require gradients.
    pub trainable: u64,
    /// All parameters, the base's (as if dense) and the adapters'.
    pub total: u64,
}

impl Summary {
    /// Trainable parameters in percent of all.
    pub fn percent(&self) -> f64 {
        100.0 * self.trainable as f64 / self.total.max(1) as f64
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { trainable, total } = self;
        write!(
            f,
            "trainable params: {} || all params: {} || trainable%: {:.4}",
            grouped(*trainable),
            grouped(*total),
            self.percent()
        )
    }
}

/// 1234567 as 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_pefts() {
        let summary = Summary { trainable: 116, total: 1_234_567 };
        assert_eq!(summary.to_string(), "trainable params: 116 || all params: 1,234,567 || trainable%: 0.0094");
    }
}
