//! Starting kernels on a card.

use super::cache::Cache;
use super::driver::{Context, Driver, Function, Module};
use super::fallback::Failed;
use super::nvrtc::Nvrtc;
use super::{Launch, Launcher, Program};
use crate::error::{Error, Result};
use crate::ffi::check;
use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex, MutexGuard};
use tch::Device;

unsafe extern "C" {
    fn tp_cuda_stream(device: i32, stream: *mut *mut c_void) -> *mut c_char;
}

/// Why a program or kernel can't be had; asked for again, it can't either.
type Outcome<T> = std::result::Result<T, String>;

/// A device, and what was loaded on it.
#[derive(Debug)]
pub(crate) struct Card {
    index: usize,
    context: Context,
    modules: Mutex<HashMap<Program, Outcome<Module>>>,
    functions: Mutex<HashMap<(Program, &'static str), Function>>,
    failed: Failed,
}

/// A mutex whose holders never leave it half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Card {
    /// The card of a CUDA device.
    pub(crate) fn get(index: usize) -> Result<Arc<Card>> {
        static CARDS: Mutex<Vec<Arc<Card>>> = Mutex::new(Vec::new());
        let mut cards = lock(&CARDS);
        if let Some(card) = cards.iter().find(|card| card.index == index) {
            return Ok(Arc::clone(card));
        }
        let context = Driver::get()?.context(index).map_err(|reason| Error::Kernel {
            kernel: "(any)".into(),
            reason,
            remedy: "check the device's index and `nvidia-smi`".into(),
        })?;
        let (modules, functions, failed) = (Mutex::default(), Mutex::default(), Failed::default());
        let card = Arc::new(Card { index, context, modules, functions, failed });
        cards.push(Arc::clone(&card));
        Ok(card)
    }

    fn function(&self, program: &Program, kernel: &'static str) -> Outcome<Function> {
        let key = (program.clone(), kernel);
        if let Some(function) = lock(&self.functions).get(&key) {
            return Ok(*function);
        }
        let driver = Driver::get().map_err(|e| e.to_string())?;
        let module =
            lock(&self.modules).entry(program.clone()).or_insert_with(|| self.module(driver, program)).clone()?;
        let function = driver.function(&self.context, module, kernel)?;
        lock(&self.functions).insert(key, function);
        Ok(function)
    }

    /// Compiles and loads a program, or loads it from the disk's cache.
    fn module(&self, driver: &Driver, program: &Program) -> Outcome<Module> {
        let (nvrtc, architecture) = (Nvrtc::get()?, super::nvrtc::architecture(self.context.capability));
        let key = nvrtc.key(program, &architecture);
        let compile = || nvrtc.compile(program, &architecture, &[]).map(|compiled| compiled.cubin);
        driver.load(&self.context, &Cache::of_environment().get_or_make(key, compile)?)
    }
}

/// The stream that libtorch's operators run on, on a device and this thread.
fn stream(index: usize) -> Result<*mut c_void> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: `stream` is a cell of ours.
    check(unsafe { tp_cuda_stream(index as i32, &mut stream) })?;
    Ok(stream)
}

impl Launcher for Card {
    fn launch(&self, launch: &Launch) -> Result<()> {
        let words = launch.words(Device::Cuda(self.index))?;
        let (driver, stream) = (Driver::get()?, stream(self.index)?);
        self.failed.or_start(launch, || {
            let function = self.function(launch.program, launch.kernel)?;
            // SAFETY: the tensors are lent, contiguous and on this device, and freed
            // no earlier than what runs on their stream; each kernel of `csrc/kernels`
            // keeps to the sizes that are passed beside them, which the emulation
            // tests. The struct is no larger than the words, by `KERNEL`.
            unsafe { driver.launch(&self.context, function, launch.blocks, launch.threads, stream, &words) }
        })
    }

    fn capability(&self) -> u32 {
        self.context.capability
    }

    fn processors(&self) -> u32 {
        self.context.processors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_there_is_no_stream() {
        if !crate::cuda_status().starts_with("loaded") {
            assert!(matches!(stream(0), Err(Error::Torch(_))));
        }
    }
}
