//! The one error type of the crate.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, with the names involved, what was expected, what was
/// found, and what to do about it.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_peft::{Base, Error, LoraConfig, LoraModel};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "q_proj", 8, 8, Default::default());
/// # let base = Base::new(vs, net);
/// let config = LoraConfig::builder().target_modules(["q_prj"]).build()?;
/// match LoraModel::wrap(base, config) {
///     Err(Error::NoTarget { target, near }) => println!("no {target}; did you mean {near:?}?"),
///     other => drop(other?),
/// }
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value is out of range or contradicts another one.
    #[error("invalid configuration: `{field}` is {found}; expected {expected}")]
    Config {
        /// Name of the field, as Hugging Face PEFT names it.
        field: String,
        /// The values that are allowed.
        expected: String,
        /// The value given.
        found: String,
    },

    /// An adapter needs features that this version doesn't have.
    #[error(
        "unsupported configuration: {}; the adapter would not mean the same without it, so it is refused",
        fields.join(", ")
    )]
    Unsupported {
        /// `field = value` of each feature.
        fields: Vec<String>,
    },

    /// A target (or one entry of a list of targets) matches no weight.
    #[error(
        "no linear weight matches target `{target}`{}",
        if near.is_empty() { String::new() } else { format!("; near names: {}", near.join(", ")) }
    )]
    NoTarget {
        /// The entry or pattern.
        target: String,
        /// Module paths that are spelt alike.
        near: Vec<String>,
    },

    /// The weight carries an adapter already.
    #[error("{name} is adapted already; wrap a base once, and change the adapter through its `LoraModel`")]
    AlreadyAdapted {
        /// Name of the weight.
        name: String,
    },

    /// The weight is quantised already.
    #[error("{name} is quantised already as {scheme}; load the dense base again to quantise it differently")]
    AlreadyQuantized {
        /// Name of the weight.
        name: String,
        /// Its scheme.
        scheme: String,
    },

    /// A module without parameters, such as a frozen TorchScript module.
    #[error(
        "{path} has no parameters: a module saved after `torch.jit.freeze` holds its weights as constants, \
         which can't be adapted; export it again without freezing"
    )]
    NoParameters {
        /// The file.
        path: PathBuf,
    },

    /// A value that must be finite is NaN or infinite.
    #[error("{name} holds NaN or infinite values; {remedy}")]
    NotFinite {
        /// Name of the tensor.
        name: String,
        /// What to do.
        remedy: String,
    },

    /// A tensor has another shape or dtype than expected.
    #[error("{name}: expected {expected}, found {found}")]
    Mismatch {
        /// Name of the tensor or value.
        name: String,
        /// Expected shape or dtype.
        expected: String,
        /// Shape or dtype found.
        found: String,
    },

    /// A file lacks tensors or has ones that have no place in the model.
    #[error(
        "{path}: missing keys: [{}]; unexpected keys: [{}]; the file was made for another model or \
         another configuration",
        missing.join(", "),
        unexpected.join(", ")
    )]
    Keys {
        /// The file.
        path: PathBuf,
        /// Keys that the model needs and the file lacks.
        missing: Vec<String>,
        /// Keys of the file that have no place in the model.
        unexpected: Vec<String>,
    },

    /// A file is torn, truncated or not of the format it claims.
    #[error("{path}: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The base differs from the one that the checkpoint was trained on.
    #[error(
        "the base is not the one this checkpoint was trained on: {}{}. Either load and quantise the base as \
         recorded in base.json, or resume with `ResumePolicy::AllowDifferentBase` (recorded in the next \
         checkpoint), or start a new run from the adapter alone with `LoraModel::init_lora`",
        differences.iter().take(8).cloned().collect::<Vec<_>>().join("; "),
        if differences.len() > 8 { format!("; and {} more", differences.len() - 8) } else { String::new() }
    )]
    DifferentBase {
        /// One line for each weight that differs: name, expected, found.
        differences: Vec<String>,
    },

    /// The run was started with other settings than those in the checkpoint.
    #[error(
        "{what} differs from the checkpoint: {}; use the recorded values, or start a new run from the adapter \
         alone with `LoraModel::init_lora`",
        differences.join("; ")
    )]
    DifferentConfig {
        /// What differs: `LoRA configuration`, `optimizer`, …
        what: String,
        /// `field: recorded …, given …` for each field.
        differences: Vec<String>,
    },

    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },

    /// A CUDA kernel could not be compiled, loaded or started.
    #[error("CUDA kernel `{kernel}`: {reason}; {remedy}")]
    Kernel {
        /// Name of the kernel or of its program.
        kernel: String,
        /// What was expected and found.
        reason: String,
        /// What to do.
        remedy: String,
    },

    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] tch::TchError),

    /// A checkpoint was written by a newer version of this crate.
    #[error(
        "{path}: format version {found}, but this version of tch-peft reads up to {supported}; \
         use the version that wrote it"
    )]
    NewerFormat {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },

    /// A run has checkpoints, and none of them can be used.
    #[error(
        "{path}: none of the checkpoints is whole: {}; restore one from a backup, or move them away to start anew",
        reasons.join("; ")
    )]
    NoCheckpoint {
        /// The run's folder.
        path: PathBuf,
        /// What is wrong with each.
        reasons: Vec<String>,
    },

    /// A checkpoint could not be written. Those from before are as they were,
    /// and so is the run: training can go on, and the next checkpoint may work.
    #[error("the checkpoint of step {step} was not saved: {source}")]
    NotSaved {
        /// The step whose state is not on disk.
        step: u64,
        /// The cause, mostly an [`Error::Io`].
        source: Box<Error>,
    },

    /// Another run, in this process or another, writes into the folder.
    #[error("{path}: another run is using this folder; wait until it ends, or choose another folder")]
    RunInUse {
        /// The run's folder.
        path: PathBuf,
    },
}

impl Error {
    /// Wraps an I/O error with the path it happened at; for `map_err`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// A value out of range.
    pub(crate) fn config(field: &str, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    /// A damaged or foreign file.
    pub(crate) fn corrupt(path: impl Into<PathBuf>, reason: impl ToString) -> Error {
        Error::Corrupt { path: path.into(), reason: reason.to_string() }
    }
}
