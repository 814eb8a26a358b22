//! A TorchScript module as a base.

use super::{Base, WeightRole, Weights};
use crate::error::{Error, Result};
use crate::ffi::runtime::{self, ModuleType, PlainGraphs};
use std::borrow::Borrow;
use std::collections::HashMap;
use std::path::Path;
use tch::{CModule, Device, IValue, Kind, Tensor};

/// A module exported from PyTorch.
///
/// Its forward passes run with TorchScript's own graph optimiser off, on the
/// calling thread and for the length of the call: the optimiser cuts parts out
/// of the graph, detaches their inputs and differentiates them by formulas of
/// its own, in which adapters don't occur.
///
/// ```no_run
/// use tch::{IValue, Tensor};
/// use tch_peft::Base;
///
/// let base = Base::torchscript("model.pt")?;
/// let (x, t) = (Tensor::from(1.0), Tensor::from(0.5));
/// let one = base.module().forward_ts(&[&x, &t])?;
/// let any = base.module().forward_is(&[IValue::Tensor(x), IValue::Double(0.5)])?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug)]
pub struct TorchScript {
    module: CModule,
}

impl Base<TorchScript> {
    /// A module that PyTorch exported with `torch.jit.script` or
    /// `torch.jit.trace`, loaded on the CPU.
    ///
    /// Names are PyTorch's, with dots: `model.layers.0.self_attn.q_proj.weight`.
    ///
    /// ```no_run
    /// use tch::{Kind, Tensor};
    /// use tch_peft::{Base, LoraConfig, LoraModel};
    ///
    /// // python python/export.py --from path/to/gpt2 --out exported/gpt2
    /// let base = Base::torchscript("exported/gpt2/model.pt")?;
    /// let config = LoraConfig::builder().target_modules(["c_attn"]).fan_in_fan_out(true).build()?;
    /// let model = LoraModel::wrap(base, config)?;
    /// // One input through `forward`, several through the module itself.
    /// let ids = Tensor::from_slice(&[50256i64, 11]).unsqueeze(0);
    /// let mask = Tensor::ones([1, 2], (Kind::Int64, ids.device()));
    /// let logits = model.module().forward_ts(&[ids, mask])?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NoParameters`](crate::Error::NoParameters) for a module saved
    /// after `torch.jit.freeze`; libtorch's for a file that it can't read.
    pub fn torchscript(path: impl AsRef<Path>) -> Result<Self> {
        Self::torchscript_on_device(path, Device::Cpu)
    }

    /// As [`Base::torchscript`], on a device.
    ///
    /// # Errors
    /// As [`Base::torchscript`].
    pub fn torchscript_on_device(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        Self::load_torchscript(path.as_ref(), device, None)
    }

    /// As [`Base::torchscript`], on a device, with all parameters and buffers of
    /// floats cast to a dtype, as `module.to(device, dtype)` does in PyTorch.
    ///
    /// What `python/export.py` writes follows both. A plain trace may have made
    /// constants of its own device and dtype.
    ///
    /// ```no_run
    /// use tch::{Device, Kind};
    /// use tch_peft::Base;
    ///
    /// let device = Device::cuda_if_available();
    /// let base = Base::torchscript_to("exported/gpt2/model.pt", device, Kind::BFloat16)?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Base::torchscript`]; [`Error::Config`](crate::Error::Config) for a
    /// dtype other than `Float`, `Double`, `Half` and `BFloat16`.
    pub fn torchscript_to(path: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        if !matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
            return Err(Error::config("kind", "Float, Double, Half or BFloat16", format!("{kind:?}")));
        }
        Self::load_torchscript(path.as_ref(), device, Some(kind))
    }

    fn load_torchscript(path: &Path, device: Device, kind: Option<Kind>) -> Result<Self> {
        let module = TorchScript::load(path, device, kind)?;
        let weights = module.weights(path)?;
        Ok(Base::from_parts(module, weights))
    }
}

impl TorchScript {
    fn load(path: &Path, device: Device, kind: Option<Kind>) -> Result<Self> {
        if !path.is_file() {
            let missing = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
            return Err(Error::Io { path: path.into(), source: missing });
        }
        let script = TorchScript { module: CModule::load_on_device(path, device)? };
        if let Some(kind) = kind {
            script.cast(kind)?;
        }
        Ok(script)
    }

    /// Casts the parameters and buffers of floats, and no others.
    fn cast(&self, kind: Kind) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (_, mut tensor) in self.tensors()? {
            if tensor.is_floating_point() && tensor.f_kind()? != kind {
                let cast = tensor.f_to_kind(kind)?;
                tensor.f_set_data(&cast)?;
            }
        }
        Ok(())
    }

    /// (name, tensor) of each parameter and buffer.
    fn tensors(&self) -> Result<impl Iterator<Item = (String, Tensor)>> {
        Ok(self.module.named_parameters()?.into_iter().chain(runtime::module_buffers(&self.module)?))
    }

    /// The parameters and buffers; the classes of the modules tell what each
    /// weight is for.
    fn weights(&self, path: &Path) -> Result<Weights> {
        if self.module.named_parameters()?.is_empty() {
            return Err(Error::NoParameters { path: path.into() });
        }
        let modules: HashMap<String, ModuleType> =
            runtime::module_types(&self.module)?.into_iter().map(|found| (found.path.clone(), found)).collect();
        Ok(Weights::new(self.tensors()?, |path, dims| {
            modules.get(path).map_or(WeightRole::Other, |module| role_by_class(module, dims))
        }))
    }

    /// The forward pass on one tensor.
    ///
    /// # Errors
    /// libtorch's, such as for a shape that doesn't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_ts(&[x])
    }

    /// The forward pass on tensors, answering one tensor.
    ///
    /// # Errors
    /// libtorch's; also if the module answers something else.
    pub fn forward_ts<T: Borrow<Tensor>>(&self, inputs: &[T]) -> Result<Tensor> {
        let _plain = PlainGraphs::new();
        Ok(self.module.forward_ts(inputs)?)
    }

    /// The forward pass on any values, answering any value.
    ///
    /// # Errors
    /// libtorch's.
    pub fn forward_is<T: Borrow<IValue>>(&self, inputs: &[T]) -> Result<IValue> {
        let _plain = PlainGraphs::new();
        Ok(self.module.forward_is(inputs)?)
    }

    /// Training mode (dropout live) or evaluation, for the module and all its
    /// children. A traced module keeps the mode it was traced in.
    pub(crate) fn set_training(&mut self, on: bool) -> Result<()> {
        runtime::set_training(&mut self.module, on)
    }
}

/// A transposed convolution has its output channels in the second dimension,
/// so it isn't taken for a convolution.
fn role_by_class(module: &ModuleType, dims: usize) -> WeightRole {
    let class = module.class.as_str();
    match dims {
        2 if class.ends_with("Linear") => WeightRole::Linear,
        2 if class == "Conv1D" => WeightRole::Conv1D,
        2 if class.ends_with("Embedding") => WeightRole::Embedding,
        // A traced module doesn't keep its number of groups.
        3..=5 if class.contains("Conv") && !class.contains("Transpose") => {
            WeightRole::Conv { groups: module.groups.unwrap_or(1) }
        }
        _ => WeightRole::Other,
    }
}
