//! Kernels of our own on CUDA devices.
//!
//! A [`Program`] is CUDA C++ of `csrc/kernels` and the macros that choose what
//! it is compiled for. [`nvrtc`] compiles it for the very architecture of the
//! device, [`cache`] keeps the result on disk, and [`launch`] starts a kernel
//! of it on the stream and in the context that libtorch's own operators use. Memory
//! is that of tensors. Nothing here waits for the device, and nothing is linked:
//! driver and compiler are opened when the first kernel is started.
//!
//! To add a kernel: write `csrc/kernels/NAME.cu`, with its parameters in a
//! struct of fields of eight bytes and its body under `KERNEL` (see
//! `common.cuh`); make a `Program` of it; start it with a [`Launch`] whose
//! arguments are those fields in order. `emulation` runs the same source on the
//! CPU, for tests of indices and numbers, and `nvrtc`'s tests compile it for
//! several architectures.

mod cache;
mod driver;
#[cfg(test)]
pub(crate) mod emulation;
mod fallback;
mod launch;
pub(crate) mod nvrtc;
mod streams;

pub(crate) use fallback::by_kernel;
#[cfg(test)]
pub(crate) use fallback::{Failed, or_operators};
pub(crate) use streams::{CudaStreams, Stream, Streams};

use crate::error::{Error, Result};
use std::hash::{Hash, Hasher};
use tch::Tensor;

/// A file of CUDA C++ and how to compile it; known by name and macros.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// The file's name in `csrc/kernels`, without its ending.
    pub(crate) name: &'static str,
    pub(crate) source: &'static str,
    /// Names and values.
    pub(crate) macros: Vec<(&'static str, &'static str)>,
}

/// The files that programs may include, by name.
const HEADERS: [(&str, &str); 3] = [
    ("common.cuh", include_str!("../../../csrc/kernels/common.cuh")),
    ("formats.cuh", include_str!("../../../csrc/kernels/formats.cuh")),
    ("products.cuh", include_str!("../../../csrc/kernels/products.cuh")),
];

impl PartialEq for Program {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.macros == other.macros
    }
}

impl Eq for Program {}

impl Hash for Program {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.name, &self.macros).hash(state);
    }
}

impl Program {
    /// The compiler's options for these macros.
    fn defines(&self) -> impl Iterator<Item = String> + '_ {
        self.macros.iter().map(|(name, value)| format!("-D{name}={value}"))
    }
}

/// One field of a kernel's parameters: eight bytes.
#[derive(Debug)]
pub(crate) enum Argument<'a> {
    /// The elements of a contiguous tensor on the device.
    Read(&'a Tensor),
    /// The same, to be written. The kernel writes all of them, or as its caller
    /// says.
    Write(&'a mut Tensor),
    /// A null pointer.
    Absent,
    Int(i64),
    /// A `double`.
    Real(f64),
}

/// Words that the parameters of a kernel may have; `KERNEL` checks the struct.
const WORDS: usize = 64;

impl Argument<'_> {
    fn word(&self) -> u64 {
        match self {
            Argument::Read(tensor) => tensor.data_ptr().expose_provenance() as u64,
            Argument::Write(tensor) => tensor.data_ptr().expose_provenance() as u64,
            Argument::Absent => 0,
            Argument::Int(value) => value.cast_unsigned(),
            Argument::Real(value) => value.to_bits(),
        }
    }

    fn tensor(&self) -> Option<&Tensor> {
        match self {
            Argument::Read(tensor) => Some(tensor),
            Argument::Write(tensor) => Some(tensor),
            _ => None,
        }
    }
}

/// One start of a kernel.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) program: &'a Program,
    pub(crate) kernel: &'static str,
    /// Blocks in each direction.
    pub(crate) blocks: [u32; 2],
    /// Threads of a block, as many as `KERNEL` says.
    pub(crate) threads: u32,
    pub(crate) arguments: &'a [Argument<'a>],
}

impl Launch<'_> {
    /// The parameters as the kernel's struct, with zeros after them.
    ///
    /// The tensors must be contiguous and on the device `home`.
    fn words(&self, home: tch::Device) -> Result<[u64; WORDS]> {
        for tensor in self.arguments.iter().filter_map(Argument::tensor) {
            if tensor.device() != home || !tensor.is_contiguous() {
                let found = format!("one on {:?}, contiguous {}", tensor.device(), tensor.is_contiguous());
                return Err(self.error(format!("expected a contiguous tensor on {home:?}, found {found}")));
            }
        }
        let mut words = [0; WORDS];
        if self.arguments.len() > WORDS {
            return Err(self.error(format!("expected at most {WORDS} arguments, found {}", self.arguments.len())));
        }
        words.iter_mut().zip(self.arguments).for_each(|(word, argument)| *word = argument.word());
        Ok(words)
    }

    fn error(&self, reason: String) -> Error {
        let remedy = "please report it: the kernel's caller must see to that".into();
        Error::Kernel { kernel: format!("{}::{}", self.program.name, self.kernel), reason, remedy }
    }
}

/// Where kernels run: a card, or in tests the emulation.
pub(crate) trait Launcher {
    /// Starts a kernel after all that was started before.
    fn launch(&self, launch: &Launch) -> Result<()>;

    /// The device's compute capability: 90 is 9.0.
    fn capability(&self) -> u32;

    /// The multiprocessors of the device: work for a few blocks each fills it.
    fn processors(&self) -> u32;
}

/// Why a library can't be opened; the loader's own words are the error's source.
fn told(error: libloading::Error) -> String {
    let source = std::error::Error::source(&error).map(ToString::to_string);
    source.unwrap_or_else(|| error.to_string())
}

/// Whether the elements of a tensor begin at a multiple of 16 bytes, as vector
/// loads need it.
pub(crate) fn aligned(tensor: &Tensor) -> bool {
    tensor.data_ptr().addr().is_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn launch<'a>(program: &'a Program, arguments: &'a [Argument<'a>]) -> Launch<'a> {
        Launch { program, kernel: "k", blocks: [1, 1], threads: 32, arguments }
    }

    #[test]
    fn arguments_are_words_of_their_struct() {
        let program = Program { name: "none", source: "", macros: vec![] };
        let (a, mut b) =
            (Tensor::zeros([2], (Kind::Float, Device::Cpu)), Tensor::zeros([3], (Kind::Half, Device::Cpu)));
        let (at_a, at_b) = (a.data_ptr().addr() as u64, b.data_ptr().addr() as u64);
        let arguments =
            [Argument::Read(&a), Argument::Write(&mut b), Argument::Absent, Argument::Int(-2), Argument::Real(0.5)];
        let words = launch(&program, &arguments).words(Device::Cpu).unwrap();
        assert_eq!(words[..6], [at_a, at_b, 0, u64::MAX - 1, 0.5f64.to_bits(), 0]);

        let many: Vec<Argument> = (0..65).map(Argument::Int).collect();
        let slanted = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).tr();
        for (arguments, home, told) in [
            (&many[..], Device::Cpu, "at most 64 arguments, found 65"),
            (&[Argument::Read(&slanted)], Device::Cpu, "contiguous false"),
            (&arguments[..1], Device::Cuda(1), "contiguous tensor on Cuda(1), found one on Cpu"),
        ] {
            let error = launch(&program, arguments).words(home).unwrap_err().to_string();
            assert!(error.contains(told) && error.contains("none::k"), "{error}");
        }
    }

    #[test]
    fn without_a_driver_there_is_no_card() {
        if !crate::cuda_status().starts_with("no CUDA driver") {
            return eprintln!("with a CUDA driver: this test checks nothing");
        }
        let error = launch::Card::get(0).unwrap_err();
        assert!(matches!(&error, Error::Kernel { reason, .. } if reason.contains("libcuda.so.1")), "{error}");
        assert!(!tch::Cuda::is_available());
    }
}
