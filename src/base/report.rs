//! What quantising a base did.

use crate::quant::Scheme;
use std::fmt;

/// One weight that was packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizedWeight {
    /// Name of the weight.
    pub name: String,
    /// Its dense shape.
    pub shape: Vec<i64>,
    /// How it was packed.
    pub scheme: Scheme,
    /// Bytes of the dense weight.
    pub bytes_before: usize,
    /// Bytes of the packed weight, scales included.
    pub bytes_after: usize,
}

/// The weights that were packed; displays as a table.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_peft::{Base, QuantConfig};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
/// let base = Base::new(vs, net).quantize(&QuantConfig::nf4().build()?)?;
/// for weight in base.quantization_report().weights() {
///     println!("{} {:?}: {} of {} bytes", weight.name, weight.scheme, weight.bytes_after, weight.bytes_before);
/// }
/// println!("{}", base.quantization_report()); // as a table
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuantizationReport {
    weights: Vec<QuantizedWeight>,
}

impl QuantizationReport {
    pub(super) fn push(&mut self, weight: QuantizedWeight) {
        self.weights.push(weight);
    }

    pub(super) fn retain(&mut self, still: impl Fn(&str) -> bool) {
        self.weights.retain(|weight| still(&weight.name));
    }

    /// The weights, in the order of their names.
    pub fn weights(&self) -> &[QuantizedWeight] {
        &self.weights
    }

    /// Bytes of all of them while they were dense.
    pub fn bytes_before(&self) -> usize {
        self.weights.iter().map(|w| w.bytes_before).sum()
    }

    /// Bytes of all of them now.
    pub fn bytes_after(&self) -> usize {
        self.weights.iter().map(|w| w.bytes_after).sum()
    }
}

impl fmt::Display for QuantizationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.weights.iter().map(|w| w.name.len()).max().unwrap_or(0).max(6);
        writeln!(f, "{:width$}  {:>14}  {:7}  {:>12}  {:>12}", "weight", "shape", "scheme", "bytes before", "after")?;
        for w in &self.weights {
            let shape = w.shape.iter().map(i64::to_string).collect::<Vec<_>>().join(" x ");
            let scheme = w.scheme.to_string();
            writeln!(f, "{:width$}  {shape:>14}  {scheme:7}  {:>12}  {:>12}", w.name, w.bytes_before, w.bytes_after)?;
        }
        write!(f, "{:width$}  {:>14}  {:7}  {:>12}  {:>12}", "total", "", "", self.bytes_before(), self.bytes_after())
    }
}
