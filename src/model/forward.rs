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
