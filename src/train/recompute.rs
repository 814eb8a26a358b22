//! Activation checkpointing: less memory for a second forward pass.

use super::RngState;
use crate::error::Result;
use crate::ffi::autograd::{Backward, needs_grad, record};
use crate::ffi::context::{AutocastMode, GradMode, NoAutocastCache, backward};
use crate::ffi::runtime::autocast_kind;
use std::sync::{Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Computes `f(inputs)` without keeping what lies between for the backward
/// pass, which runs `f` again instead (Chen et al., "Training deep nets with
/// sublinear memory cost", arXiv:1604.06174).
///
/// As with `torch.utils.checkpoint(use_reentrant=True)`, the second run sees
/// the random generators of the CPU and of the inputs' devices, and autocast,
/// as the first did, so that dropout comes out the same; and gradients also
/// reach the parameters used inside `f`. Unlike there, they do so even if none
/// of the inputs requires a gradient.
///
/// `f` must compute the same each time, and must be `Send`, since the backward
/// pass may run it on another thread. A network is shared with it through an
/// `Arc<Mutex<_>>`:
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_peft::checkpoint_activations;
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let block = Arc::new(Mutex::new(nn::linear(vs.root(), 4, 4, Default::default())));
/// let x = Tensor::randn([2, 4], (Kind::Float, Device::Cpu));
///
/// let inside = Arc::clone(&block);
/// let y = checkpoint_activations(move |x| Ok(inside.lock().unwrap().forward(&x[0]).gelu("none")), &[&x])?;
/// y.sum(Kind::Float).backward();
/// assert!(block.lock().unwrap().ws.grad().defined());
/// # Ok::<(), tch_peft::Error>(())
/// ```
///
/// # Errors
/// Those of `f`; from `backward`, those of its second run, and libtorch's for
/// a gradient of chosen inputs (`Tensor::run_backward`), which would miss the
/// parameters, and for gradients of gradients.
pub fn checkpoint_activations<F>(f: F, inputs: &[&Tensor]) -> Result<Tensor>
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Send + 'static,
{
    let handles: Vec<_> = inputs.iter().map(|input| input.shallow_clone()).collect();
    // Parameters inside want gradients though no input may.
    let anchor = Tensor::f_zeros([0], (Kind::Float, Device::Cpu))?.set_requires_grad(true);
    if !needs_grad(&[&anchor]) {
        return f(&handles);
    }
    let mut devices: Vec<Device> = Vec::new();
    for device in inputs.iter().map(|input| input.device()) {
        if !devices.contains(&device) {
            devices.push(device);
        }
    }
    let autocast = [Device::Cpu].iter().chain(&devices).map(|&device| (device, autocast_kind(device))).collect();
    let node = Recompute {
        random: RngState::capture(&devices)?,
        autocast,
        requires_grad: inputs.iter().map(|input| input.requires_grad()).collect(),
        devices,
        f: Mutex::new(f),
    };
    let output = {
        let _no_grad = tch::no_grad_guard();
        let _no_cache = NoAutocastCache::new();
        let f = node.f.lock().unwrap_or_else(PoisonError::into_inner);
        // A handle of its own, in case `f` answers one of its inputs.
        f(&handles)?.f_detach()?
    };
    record(&[inputs, &[&anchor]].concat(), inputs, &output, Box::new(node))?;
    Ok(output)
}

struct Recompute<F> {
    /// The generators before the first run.
    random: RngState,
    autocast: Vec<(Device, Option<Kind>)>,
    requires_grad: Vec<bool>,
    devices: Vec<Device>,
    f: Mutex<F>,
}

impl<F: Fn(&[Tensor]) -> Result<Tensor> + Send> Backward for Recompute<F> {
    fn backward(&self, grad: &Tensor, saved: &[Tensor], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        // Leaves of their own, in which the inner pass leaves the gradients.
        let leaf = |(input, &on): (&Tensor, &bool)| Ok(input.f_detach()?.set_requires_grad(on));
        let inputs = saved.iter().zip(&self.requires_grad).map(leaf).collect::<Result<Vec<_>>>()?;
        let output = self.again(&inputs)?;
        if output.requires_grad() {
            backward(&output, grad)?;
        }
        let gradient = |(input, &needed): (&Tensor, &bool)| {
            let grad = input.f_grad()?;
            Ok((needed && grad.defined()).then_some(grad))
        };
        let mut grads = inputs.iter().zip(needed).map(gradient).collect::<Result<Vec<_>>>()?;
        grads.push(None);
        Ok(grads)
    }
}

impl<F: Fn(&[Tensor]) -> Result<Tensor>> Recompute<F> {
    /// Runs `f` as it ran first, with gradients on.
    fn again(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let _grad = GradMode::on();
        let modes = self.autocast.iter().map(|&(device, kind)| AutocastMode::new(device, kind));
        let _autocast = modes.collect::<Result<Vec<_>>>()?;
        let around = RngState::capture(&self.devices)?;
        self.random.restore()?;
        let output = (self.f.lock().unwrap_or_else(PoisonError::into_inner))(inputs);
        around.restore()?;
        output
    }
}
