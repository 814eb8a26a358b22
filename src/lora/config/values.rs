//! The types of `LoraConfig`'s fields.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Which modules are meant: those adapted, or those left out.
///
/// ```
/// use tch_peft::TargetModules;
///
/// assert_eq!(TargetModules::from(["q_proj", "v_proj"]), TargetModules::List(vec!["q_proj".into(), "v_proj".into()]));
/// assert_eq!(TargetModules::from(r".*\.q_proj"), TargetModules::Regex(r".*\.q_proj".into()));
/// assert_eq!(TargetModules::from("all-linear"), TargetModules::AllLinear);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Whole module paths or their last segments: `q_proj` matches every
    /// `….q_proj`. An entry that matches nothing is an error.
    List(Vec<String>),
    /// A regular expression that must match the whole path.
    Regex(String),
    /// Every linear layer but the output layer (`lm_head`).
    AllLinear,
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(entries: [S; N]) -> Self {
        TargetModules::List(entries.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(entries: Vec<S>) -> Self {
        TargetModules::List(entries.into_iter().map(Into::into).collect())
    }
}

/// As PEFT reads a string: `all-linear`, or a regular expression.
impl From<&str> for TargetModules {
    fn from(pattern: &str) -> Self {
        if pattern.eq_ignore_ascii_case("all-linear") {
            TargetModules::AllLinear
        } else {
            TargetModules::Regex(pattern.into())
        }
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetModules::List(list) => f.write_str(&list.join(", ")),
            TargetModules::Regex(pattern) => f.write_str(pattern),
            TargetModules::AllLinear => f.write_str("all-linear"),
        }
    }
}

/// How A and B start. B is zero unless said, so that the model starts as it was.
///
/// ```
/// use tch_peft::InitLoraWeights;
///
/// assert_eq!(InitLoraWeights::from(true), InitLoraWeights::Default);
/// assert_eq!(InitLoraWeights::from(false), InitLoraWeights::Random);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitLoraWeights {
    /// PEFT's `true`: A uniform in ±1/√in (Kaiming uniform with a = √5).
    Default,
    /// `"gaussian"`: A normal with standard deviation 1/r.
    Gaussian,
    /// PEFT's `false`: A uniform in ±1/√in and B in ±1/√r. The model changes
    /// at once; meant for tests.
    Random,
    /// `"orthogonal"`: A and B from orthogonal halves, B·A = 0. The rank must
    /// be even.
    Orthogonal,
    /// `"pissa"` (arXiv:2404.02948): the principal singular vectors of W.
    Pissa,
    /// `"pissa_niter_N"`: the same by a randomised decomposition with so many
    /// subspace iterations.
    PissaNiter(u32),
    /// `"olora"` (arXiv:2406.01775): from the QR decomposition of W.
    Olora,
    /// `"loftq"` (arXiv:2310.08659): what quantising W lost.
    Loftq,
    /// `"eva"` (arXiv:2410.07170): the principal directions of the inputs.
    Eva,
    /// `"corda"` (arXiv:2406.05223): decomposition oriented by the inputs'
    /// covariance.
    Corda,
    /// `"lora_ga"` (arXiv:2407.05000): from the gradient of W.
    LoraGa,
    /// `"mica"`: B is the last left singular vectors of W, frozen.
    Mica,
}

/// `true` or `false`, as in PEFT.
impl From<bool> for InitLoraWeights {
    fn from(on: bool) -> Self {
        if on { InitLoraWeights::Default } else { InitLoraWeights::Random }
    }
}

/// The names that PEFT gives to initialisations.
const INITS: [(&str, InitLoraWeights); 9] = [
    ("gaussian", InitLoraWeights::Gaussian),
    ("orthogonal", InitLoraWeights::Orthogonal),
    ("pissa", InitLoraWeights::Pissa),
    ("olora", InitLoraWeights::Olora),
    ("loftq", InitLoraWeights::Loftq),
    ("eva", InitLoraWeights::Eva),
    ("corda", InitLoraWeights::Corda),
    ("lora_ga", InitLoraWeights::LoraGa),
    ("mica", InitLoraWeights::Mica),
];

impl InitLoraWeights {
    /// The initialisation that PEFT calls so.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        if let Some(n) = name.strip_prefix("pissa_niter_") {
            return n.parse().ok().map(InitLoraWeights::PissaNiter);
        }
        INITS.iter().find(|(known, _)| *known == name).map(|(_, init)| *init)
    }

    /// Whether A and B are taken out of the weight, so that the base changes.
    pub(crate) fn changes_base(self) -> bool {
        use InitLoraWeights::*;
        matches!(self, Pissa | PissaNiter(_) | Olora | Loftq | Corda | LoraGa)
    }

    /// Its name, or `None` for PEFT's `true` and `false`.
    pub(crate) fn name(self) -> Option<String> {
        match self {
            InitLoraWeights::PissaNiter(n) => Some(format!("pissa_niter_{n}")),
            _ => INITS.iter().find(|(_, init)| *init == self).map(|(name, _)| name.to_string()),
        }
    }
}

/// Which biases of the base are trained and saved with the adapter.
///
/// ```
/// use tch_peft::{Bias, LoraConfig};
///
/// let config = LoraConfig::builder().target_modules(["q_proj"]).bias(Bias::LoraOnly).build()?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every `….bias`.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

/// One value or a list, told apart because PEFT's files do.
///
/// ```
/// use tch_peft::OneOrMany;
///
/// let (one, many): (OneOrMany<i64>, OneOrMany<i64>) = (3.into(), [3, 5].into());
/// assert_eq!((one.as_slice(), many.as_slice()), (&[3][..], &[3, 5][..]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// A value by itself.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            OneOrMany::One(value) => std::slice::from_ref(value),
            OneOrMany::Many(list) => list,
        }
    }
}

impl<T> From<T> for OneOrMany<T> {
    fn from(value: T) -> Self {
        OneOrMany::One(value)
    }
}

impl From<&str> for OneOrMany<String> {
    fn from(value: &str) -> Self {
        OneOrMany::One(value.into())
    }
}

impl<T, const N: usize> From<[T; N]> for OneOrMany<T> {
    fn from(values: [T; N]) -> Self {
        OneOrMany::Many(values.into())
    }
}

impl<const N: usize> From<[&str; N]> for OneOrMany<String> {
    fn from(values: [&str; N]) -> Self {
        OneOrMany::Many(values.map(String::from).into())
    }
}

impl<T> From<Vec<T>> for OneOrMany<T> {
    fn from(values: Vec<T>) -> Self {
        OneOrMany::Many(values)
    }
}

/// Rows of embeddings that are trained as they are, beside the adapters.
///
/// ```
/// use tch_peft::TokenIndices;
///
/// assert_eq!(TokenIndices::from([100, 101]), TokenIndices::Input(vec![100, 101]));
/// let modules = TokenIndices::from([("wte", [100, 101])]);
/// assert!(matches!(modules, TokenIndices::Modules(rows) if rows["wte"] == [100, 101]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Rows of the input embedding.
    Input(Vec<i64>),
    /// Rows of each module named.
    Modules(BTreeMap<String, Vec<i64>>),
}

impl<const N: usize> From<[i64; N]> for TokenIndices {
    fn from(rows: [i64; N]) -> Self {
        TokenIndices::Input(rows.into())
    }
}

impl<S: Into<String>, const N: usize, const M: usize> From<[(S, [i64; M]); N]> for TokenIndices {
    fn from(modules: [(S, [i64; M]); N]) -> Self {
        TokenIndices::Modules(modules.into_iter().map(|(name, rows)| (name.into(), rows.into())).collect())
    }
}
