//! Running the module, and its training mode.

use super::LoraModel;
use crate::base::TorchScript;
use crate::error::Result;
use std::sync::atomic::Ordering;
use tch::{Tensor, nn};

/// A module that can be run on one tensor.
///
/// Every [`tch::nn::ModuleT`] (hence every [`tch::nn::Module`]) is one, and so
/// is [`TorchScript`]. For another signature, call the module itself.
///
/// ```
/// use tch::{Device, Tensor, nn};
/// use tch_peft::{ForwardModule, Result};
///
/// /// Token ids in, logits out: not a `tch::nn::Module`, as it may fail.
/// struct Net {
///     table: nn::Embedding,
///     head: nn::Linear,
/// }
///
/// impl ForwardModule for Net {
///     fn forward(&self, ids: &Tensor, _train: bool) -> Result<Tensor> {
///         let hidden = Tensor::f_embedding(&self.table.ws, ids, -1, false, false)?;
///         Ok(hidden.f_linear(&self.head.ws, self.head.bs.as_ref())?)
///     }
///
///     fn set_training(&mut self, _train: bool) -> Result<()> {
///         Ok(())
///     }
/// }
/// # use tch_peft::{Base, LoraConfig, LoraModel};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = Net {
/// #     table: nn::embedding(vs.root() / "embed", 10, 4, Default::default()),
/// #     head: nn::linear(vs.root() / "head", 4, 10, Default::default()),
/// # };
/// # let config = LoraConfig::builder().r(2).target_modules(["head", "embed"]).build()?;
/// # let model = LoraModel::wrap(Base::new(vs, net), config)?;
/// # assert_eq!(model.forward(&Tensor::from_slice(&[1i64, 2]))?.size(), [2, 10]);
/// # Ok::<(), tch_peft::Error>(())
/// ```
pub trait ForwardModule {
    /// The forward pass; `train` as in [`tch::nn::ModuleT`].
    ///
    /// # Errors
    /// Where the module reports any.
    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor>;

    /// Tells modules that keep a mode of their own.
    ///
    /// # Errors
    /// libtorch's.
    fn set_training(&mut self, train: bool) -> Result<()>;
}

impl<M: nn::ModuleT> ForwardModule for M {
    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.forward_t(x, train))
    }

    fn set_training(&mut self, _train: bool) -> Result<()> {
        Ok(())
    }
}

impl ForwardModule for TorchScript {
    fn forward(&self, x: &Tensor, _train: bool) -> Result<Tensor> {
        TorchScript::forward(self, x)
    }

    fn set_training(&mut self, train: bool) -> Result<()> {
        TorchScript::set_training(self, train)
    }
}

impl<M: ForwardModule> LoraModel<M> {
    /// The adapted forward pass.
    ///
    /// # Errors
    /// Where the module reports any. A `tch::nn` module has no way to report
    /// and panics, as it does without adapters.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.module().forward(x, self.is_training())
    }

    /// Training mode: dropout is live, here and in the module.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor, nn};
    /// # use tch_peft::*;
    /// # tch::manual_seed(0);
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
    /// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).init_lora_weights(false).build()?;
    /// # let mut model = LoraModel::wrap(Base::new(vs, net), config.clone())?;
    /// # let x = Tensor::randn([3, 8], (Kind::Float, Device::Cpu));
    /// model.eval()?;
    /// assert!(!model.is_training());
    /// model.train()?;
    /// assert!(model.is_training()); // as after `wrap`
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// libtorch's.
    pub fn train(&mut self) -> Result<()> {
        self.set_training(true)
    }

    /// Evaluation: no dropout.
    ///
    /// # Errors
    /// libtorch's.
    pub fn eval(&mut self) -> Result<()> {
        self.set_training(false)
    }

    fn set_training(&mut self, train: bool) -> Result<()> {
        self.base.module_mut().set_training(train)?;
        self.switches.training.store(train, Ordering::Relaxed);
        Ok(())
    }
}
