//! PEFT for libtorch: LoRA on quantised bases, for any model, with resume that
//! is exact to the bit.
//!
//! Three ideas carry the crate:
//!
//! - **The weight carries the adapter.** A `tch` model, or a TorchScript module
//!   exported from PyTorch, is adapted without a change in it: the weight tensor
//!   itself answers `linear` with the packed base and the adapter on it. See
//!   [`Base`] and [`LoraModel::wrap`].
//! - **One autograd node per adapted linear.** It keeps the frozen weight packed
//!   and unpacks it again, tile by tile, in the backward pass.
//! - **Resume is exact.** A run killed at any instant and resumed any number of
//!   times gives the same bytes as one that was never killed. See [`Run`].
//!
//! Names are those of Hugging Face PEFT, and adapters are exchanged with it in
//! both directions.
//!
//! ```no_run
//! use tch::{Device, Kind, nn};
//! use tch_peft::{AdamW, Base, LoraConfig, LoraModel, Optimizer, Parts, QuantConfig, Run, Sampler, Schedule};
//! # fn batch(rows: &[usize]) -> tch::Tensor { unimplemented!() }
//!
//! // Any tch model, unchanged.
//! let mut vs = nn::VarStore::new(Device::cuda_if_available());
//! let net = nn::seq()
//!     .add(nn::linear(vs.root() / "up", 64, 256, Default::default()))
//!     .add_fn(|x| x.gelu("none"))
//!     .add(nn::linear(vs.root() / "down", 256, 64, Default::default()));
//! vs.load("base.safetensors")?;
//!
//! let base = Base::new(vs, net).quantize(&QuantConfig::nf4().double_quant(true).build()?)?;
//! let config = LoraConfig::builder().r(16).lora_alpha(32.0).target_modules(["up", "down"]).build()?;
//! let mut model = LoraModel::wrap(base, config)?;
//!
//! let mut optimizer = AdamW::builder().lr(1e-4).build(model.trainable_parameters())?;
//! let schedule = Schedule::cosine(10, 1000);
//! let mut sampler = Sampler::new(10_000, 8, 42)?;
//! let mut run = Run::builder("runs/a").every(50).keep(2).build()?;
//!
//! // The same command starts the run and goes on with it.
//! run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
//! while run.current_step() < 1000 {
//!     let loss = model.forward(&batch(&sampler.next_batch()))?.mean(Kind::Float);
//!     loss.f_backward()?;
//!     optimizer.step()?;
//!     optimizer.zero_grad()?;
//!     run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
//! }
//! model.save_pretrained("adapter")?; // loads in HF PEFT, and in other programs
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Linking
//!
//! The crate builds wherever `tch` builds, by the same environment variables
//! (`LIBTORCH`, `LIBTORCH_USE_PYTORCH`, …), and needs a C++17 compiler. On a
//! machine with a CUDA driver it loads libtorch's CUDA half when the program
//! starts; [`cuda_status`] tells what came of it.
//!
//! The guides are in the repository's `docs/`.

mod base;
pub mod checkpoint;
mod error;
pub(crate) mod ffi;
mod format;
mod lora;
mod model;
mod names;
pub mod quant;
mod train;

pub use base::{
    Base, Fingerprint, Progress, QuantizationReport, QuantizeOptions, QuantizedWeight, TorchScript, WeightPrint,
    WeightRole,
};
pub use checkpoint::{
    Best, Checkpointable, Parts, ResumePolicy, Run, RunBuilder, SkippedCheckpoint, Start, StepReport,
};
pub use error::{Error, Result};
pub use ffi::runtime::{
    Float32MatmulPrecision, cuda_status, peak_memory, reset_peak_memory, set_deterministic,
    set_float32_matmul_precision,
};
pub use format::{AdapterFile, AdapterFormat, DetectedFormat, KeyMapping, KeyMappingBuilder, LoadReport};
pub use lora::{
    AdapterConfig, Bias, Combination, CordaConfig, CordaMethod, EvaConfig, InitLoraWeights, LayerPattern,
    LayerSettings, LoftqConfig, Loha, LohaConfig, LohaConfigBuilder, Lokr, LokrConfig, LokrConfigBuilder, LokrInit,
    LoraConfig, LoraConfigBuilder, LoraGaConfig, LoraGaDirection, LoraGaScale, LycorisConfig, LycorisConfigBuilder,
    MajoritySign, Merge, OneOrMany, TargetModules, TokenIndices,
};
pub use model::{
    BASE_ROW, DisabledAdapters, ForwardModule, LayerStatus, LoraModel, MergeOptions, MergeReport, MergedLayer,
    MixedBatch, ModelStatus, NamedParameter, Summary,
};
pub use quant::{Fp8Format, QuantConfig, QuantConfigBuilder, QuantRule, Scheme, Treatment};
pub use train::{
    Adafactor, AdafactorRule, AdamW, AdamW8bit, AdamW8bitRule, AdamWBuilder, AdamWRule, Anneal, Autocast, Ema,
    EmaBuilder, EmaSwap, Generator, GradientAccumulation, GroupedOptimizer, Lion, LionRule, LossScaler, Optimizer,
    OptimizerBuilder, OptimizerState, OwnState, ParameterGroup, RngState, Sampler, SamplerState, Schedule, Sgd,
    SgdRule, State, Stateful, Update, UpdateRule, checkpoint_activations, clip_grad_norm, clip_grad_value,
};

/// Compiles, and runs where it can, the code in the texts beside the crate.
#[cfg(doctest)]
mod texts {
    macro_rules! texts {
        ($($name:ident: $file:literal,)*) => {
            $(
                #[doc = include_str!($file)]
                #[derive(Debug)]
                pub struct $name;
            )*
        };
    }

    texts! {
        Readme: "../README.md",
        Faq: "../docs/faq.md",
        Formats: "../docs/formats.md",
        Migrating: "../docs/migrating.md",
        Quantization: "../docs/quantization.md",
        Resume: "../docs/resume.md",
    }
}
