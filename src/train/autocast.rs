//! Mixed precision: products in bf16 or f16, the rest in f32.

use crate::error::Result;
use crate::ffi::context::AutocastMode;
use tch::{Device, Kind};

/// Turns libtorch's autocast on or off for one type of device, on this thread,
/// until it is dropped; then the setting is what it was before.
///
/// Regions nest, and the inner one counts, as with `torch.autocast`. Adapted
/// weights follow it too. The backward pass runs outside of the region: drop
/// the guard first. f16 needs a [`LossScaler`](crate::LossScaler); bf16 doesn't.
///
/// ```no_run
/// use tch::{Device, Kind};
/// use tch_peft::Autocast;
/// # let (net, x): (fn(&tch::Tensor) -> tch::Tensor, tch::Tensor) = todo!();
/// let loss = {
///     let _autocast = Autocast::new(Device::Cuda(0), Kind::BFloat16)?;
///     net(&x)
/// };
/// loss.f_backward()?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[must_use = "autocast is as before once the guard is dropped"]
#[derive(Debug)]
pub struct Autocast(#[allow(dead_code)] AutocastMode);

impl Autocast {
    /// On, for the CPU or all CUDA devices, with `BFloat16` or `Half`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for another device or dtype.
    pub fn new(device: Device, kind: Kind) -> Result<Self> {
        Ok(Autocast(AutocastMode::new(device, Some(kind))?))
    }

    /// Off, for a part that needs full precision.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_peft::Autocast;
    ///
    /// let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
    /// let _on = Autocast::new(Device::Cpu, Kind::BFloat16)?;
    /// let precise = {
    ///     let _off = Autocast::disabled(Device::Cpu)?;
    ///     x.matmul(&x)
    /// };
    /// assert_eq!((precise.kind(), x.matmul(&x).kind()), (Kind::Float, Kind::BFloat16));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a device that is neither CPU
    /// nor CUDA.
    pub fn disabled(device: Device) -> Result<Self> {
        Ok(Autocast(AutocastMode::new(device, None)?))
    }
}
