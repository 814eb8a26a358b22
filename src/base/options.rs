//! How a base is quantised.

use super::QuantizedWeight;
use std::fmt;
use tch::Device;

/// How far quantising a base, or loading a quantised one, has come.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_peft::{Base, QuantConfig, QuantizeOptions};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 64, 64, Default::default());
/// let mut seen = Vec::new();
/// let options = QuantizeOptions::new().progress(|p| seen.push((p.weight.name.clone(), p.done, p.total)));
/// let _base = Base::new(vs, net).quantize_with(&QuantConfig::int8().build()?, options)?;
/// assert_eq!(seen, [("proj.weight".to_string(), 1, 1)]);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The weight that was packed last.
    pub weight: &'a QuantizedWeight,
    /// How many of the weights are done.
    pub done: usize,
    /// How many there are.
    pub total: usize,
}

/// Who is told after each weight.
type OnProgress<'a> = Box<dyn FnMut(Progress<'_>) + 'a>;

/// Where a base is quantised, and who is told about it.
///
/// ```
/// use tch_peft::QuantizeOptions;
/// let mut options = QuantizeOptions::new().device(tch::Device::cuda_if_available());
/// options = options.progress(|p| eprintln!("{}/{} {}", p.done, p.total, p.weight.name));
/// ```
#[derive(Default)]
pub struct QuantizeOptions<'a> {
    pub(super) device: Option<Device>,
    pub(super) progress: Option<OnProgress<'a>>,
}

impl<'a> QuantizeOptions<'a> {
    /// On the device that each weight is on, telling nobody.
    pub fn new() -> Self {
        Self::default()
    }

    /// Packs each weight on this device; the packed weight goes back to where
    /// the dense one was.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// Calls `f` after each weight.
    #[must_use]
    pub fn progress(mut self, f: impl FnMut(Progress<'_>) + 'a) -> Self {
        self.progress = Some(Box::new(f));
        self
    }
}

impl fmt::Debug for QuantizeOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuantizeOptions").field("device", &self.device).finish_non_exhaustive()
    }
}
