//! What all kinds of adapters have in common, and how one is made.

use super::InitLoraWeights;
use super::config::LoftqConfig;
use super::conv::LoraConv;
use super::dora::Dora;
use super::embedding::LoraEmbedding;
use super::factors::Factors;
use super::init::data::LayerData;
use super::linear::LoraLinear;
use super::parameter::LoraParameter;
use super::qalora::QaLora;
use crate::base::Adapter;
use crate::error::{Error, Result};
use crate::ffi::hook::Operator;
use crate::quant::PackedWeight;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tch::{Kind, Tensor};

/// What all layers of one model share.
#[derive(Debug)]
pub(crate) struct Switches {
    /// Whether dropout is live.
    pub(crate) training: AtomicBool,
    /// Whether adapters take part.
    pub(crate) enabled: AtomicBool,
}

impl Default for Switches {
    fn default() -> Self {
        Switches { training: AtomicBool::new(true), enabled: AtomicBool::new(true) }
    }
}

/// The dtype of what is trained on a weight of this dtype: the one asked for,
/// else f32, as in PEFT also on a weight of bf16 or f16.
pub(super) fn parameter_kind(asked: Option<Kind>, weight: Kind) -> Kind {
    asked.unwrap_or(if weight == Kind::Double { Kind::Double } else { Kind::Float })
}

/// An adapter on one weight, as a model sees it.
pub(crate) trait LoraLayer: Adapter {
    /// Its tensors with the ends of PEFT's keys, such as `lora_A.weight`.
    fn tensors(&self) -> Vec<(&'static str, Tensor)>;

    /// The factor s of ΔW.
    fn scaling(&self) -> f64;

    /// Changes the factor s, from the next forward pass on.
    fn set_scaling(&self, scaling: f64);

    /// What it adds to the layer's bias: s · b (out), if `lora_B` has a bias.
    fn bias_delta(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// LoRA by two factors, which DoRA builds on.
pub(super) trait Factored: Adapter {
    fn factors(&self) -> &Factors;

    /// The ends of PEFT's keys for A and B.
    fn keys(&self) -> [&'static str; 2] {
        ["lora_A.weight", "lora_B.weight"]
    }

    /// Whether the output features are the weight's columns.
    fn transposed(&self) -> bool;

    /// Where the operator's result has them.
    fn output_channels(&self) -> OutputChannels;

    /// Whether the operator is the one of this layer. Errors for one that uses
    /// the weight in a way that the adapter can't follow.
    fn takes_part(&self, operator: &Operator) -> Result<bool>;

    /// s · B·A·x for an operator that it takes part in, by autograd's own
    /// operators and without dropout.
    fn product(&self, operator: &Operator) -> Result<Tensor>;

    /// [`Factored::product`] of the dropped x.
    fn dropped_product(&self, operator: &Operator) -> Result<Option<Tensor>> {
        if !self.takes_part(operator)? {
            return Ok(None);
        }
        let dropped = self.factors().dropped(operator)?;
        Ok(Some(match &dropped {
            Some(x) => self.product(&operator.with_input(x))?,
            None => self.product(operator)?,
        }))
    }
}

impl<L: Factored> LoraLayer for L {
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let [a, b] = self.keys();
        self.factors().tensors(a, b)
    }

    fn scaling(&self) -> f64 {
        self.factors().scaling()
    }

    fn set_scaling(&self, scaling: f64) {
        self.factors().set_scaling(scaling);
    }

    fn bias_delta(&self) -> Result<Option<Tensor>> {
        self.factors().bias_delta()
    }
}

/// For an operator of another layer, which `takes_part` keeps away.
pub(super) fn foreign(layer: &str) -> Error {
    Error::Mismatch { name: "operator".into(), expected: format!("that of {layer}"), found: "another".into() }
}

/// Whether a convolution runs in the groups that its adapter was made for.
pub(super) fn same_groups(expected: i64, found: i64) -> Result<bool> {
    if found == expected {
        return Ok(true);
    }
    Err(Error::Mismatch {
        name: "groups of an adapted convolution".into(),
        expected: format!("{expected}, as the base was told"),
        found: format!("{found}; state it with `Base::declare` and `WeightRole::Conv`"),
    })
}

/// The dimension of a result that counts output features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutputChannels {
    Last,
    Second,
}

impl OutputChannels {
    /// That dimension in a result of `dims` dimensions.
    pub(super) fn dim(self, dims: usize) -> i64 {
        match self {
            OutputChannels::Last => dims as i64 - 1,
            OutputChannels::Second => 1,
        }
    }

    /// One value per feature in a shape that multiplies a result of `dims` dimensions.
    pub(super) fn broadcast(self, values: &Tensor, dims: usize) -> Result<Tensor> {
        match self {
            OutputChannels::Last => Ok(values.shallow_clone()),
            OutputChannels::Second => {
                let mut shape = vec![1; dims];
                shape[1] = -1;
                Ok(values.f_view(shape.as_slice())?)
            }
        }
    }
}

/// The layer that a weight belongs to, hence the shapes of its adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerForm {
    /// A weight (out, in), or (in, out) where `fan_in_fan_out`.
    Linear { fan_in_fan_out: bool },
    /// A table (rows, dim).
    Embedding,
    /// A weight (out, in / groups, kernel…).
    Conv { groups: i64 },
    /// A parameter that is targeted by its own name: (out, in), or a stack
    /// (n, out, in), which is (n, in, out) where `is_transposed`.
    Parameter { is_transposed: bool },
}

/// A new adapter, and what its start did to the weight.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) layer: Arc<dyn LoraLayer>,
    /// Takes the weight's place when the adapter is attached.
    pub(crate) residual: Option<Arc<dyn PackedWeight>>,
}

/// What the adapter of one layer is made from, all patterns resolved.
#[derive(Debug, Clone)]
pub(crate) struct LayerSpec {
    pub(crate) form: LayerForm,
    pub(crate) r: i64,
    /// The factor s of ΔW.
    pub(crate) scaling: f64,
    pub(crate) dropout: f64,
    /// Whether `lora_B` has a bias.
    pub(crate) lora_bias: bool,
    /// Whether magnitude and direction are trained apart.
    pub(crate) use_dora: bool,
    /// Features in a group of QALoRA's, where it is used.
    pub(crate) qalora: Option<i64>,
    pub(crate) init: InitLoraWeights,
    /// What `loftq` quantises to.
    pub(crate) loftq: LoftqConfig,
    /// What `eva`, `corda` and `lora_ga` start from.
    pub(crate) data: Option<Arc<LayerData>>,
    /// The adapter's dtype; by default f32, as PEFT's is, also on a weight of
    /// bf16 or f16.
    pub(crate) kind: Option<Kind>,
}

impl LayerSpec {
    /// A new, trainable adapter for the weight, which isn't changed yet.
    ///
    /// # Errors
    /// [`Error::Config`] for a combination that makes no sense.
    pub(crate) fn build(&self, weight: &Arc<dyn PackedWeight>, switches: &Arc<Switches>) -> Result<Built> {
        self.check(weight.as_ref())?;
        let kind = parameter_kind(self.kind, weight.kind());
        let mut start = super::init::start(self, weight, kind)?;
        let residual = start.residual.take();
        let weight = residual.as_ref().unwrap_or(weight);
        let factors = Factors::new(start, self, Arc::clone(switches))?;
        let layer = match (self.form, self.qalora) {
            (_, Some(group_size)) => Ok(Arc::new(QaLora::new(factors, group_size)) as Arc<dyn LoraLayer>),
            (LayerForm::Linear { fan_in_fan_out }, None) => {
                self.finish(LoraLinear::new(factors, fan_in_fan_out), weight)
            }
            (LayerForm::Embedding, None) => self.finish(LoraEmbedding::new(factors), weight),
            (LayerForm::Conv { groups }, None) => self.finish(LoraConv::new(factors, groups), weight),
            (LayerForm::Parameter { is_transposed }, None) => {
                Ok(Arc::new(LoraParameter::new(factors, weight.sizes(), is_transposed)) as Arc<dyn LoraLayer>)
            }
        }?;
        Ok(Built { layer, residual })
    }

    fn finish<L: Factored + 'static>(&self, layer: L, weight: &Arc<dyn PackedWeight>) -> Result<Arc<dyn LoraLayer>> {
        Ok(if self.use_dora { Arc::new(Dora::new(layer, weight)?) } else { Arc::new(layer) })
    }

    /// Combinations that make no sense.
    fn check(&self, weight: &dyn PackedWeight) -> Result<()> {
        let embedding = self.form == LayerForm::Embedding;
        if self.lora_bias && (self.use_dora || embedding) {
            return Err(Error::config("lora_bias", "false with use_dora, and on embeddings", true));
        }
        if self.qalora.is_some() && self.form != (LayerForm::Linear { fan_in_fan_out: false }) {
            return Err(Error::config("use_qalora", "weights (out, in) of linear layers", format!("{:?}", self.form)));
        }
        if self.qalora.is_some() {
            super::qalora::check_scheme(weight.scheme())?;
        }
        if matches!(self.form, LayerForm::Parameter { .. }) {
            let meaningless = [
                // x has no place before A in a sum of weights.
                ("lora_dropout", self.dropout > 0.0),
                ("lora_bias", self.lora_bias),
                ("use_dora", self.use_dora),
            ];
            if let Some((field, _)) = meaningless.into_iter().find(|(_, on)| *on) {
                return Err(Error::config(field, "off with target_parameters", "on"));
            }
        }
        match self.form {
            LayerForm::Conv { groups } if groups != 1 && self.use_dora => {
                let found = format!("a convolution in {groups} groups, whose weight can't hold its ΔW");
                Err(Error::config("use_dora", "layers without groups", found))
            }
            _ => Ok(()),
        }
    }

    /// The sizes of A and B on a weight of these sizes.
    pub(super) fn factor_sizes(&self, weight: &[i64]) -> Result<(Vec<i64>, Vec<i64>)> {
        let r = self.r;
        if let (Some(group_size), [out, inn]) = (self.qalora, weight) {
            if inn % group_size != 0 {
                return Err(Error::config("qalora_group_size", format!("a divisor of the {inn} features"), group_size));
            }
            return Ok((vec![r, inn / group_size], vec![*out, r]));
        }
        match (self.form, weight) {
            (LayerForm::Linear { fan_in_fan_out: false }, [out, inn]) => Ok((vec![r, *inn], vec![*out, r])),
            (LayerForm::Linear { fan_in_fan_out: true }, [inn, out]) => Ok((vec![r, *inn], vec![*out, r])),
            (LayerForm::Embedding, [rows, dim]) => Ok((vec![r, *rows], vec![*dim, r])),
            (LayerForm::Conv { groups }, [out, inn, kernel @ ..]) => {
                if r % groups != 0 {
                    return Err(Error::config("r", format!("a multiple of the convolution's {groups} groups"), r));
                }
                let mut a = vec![r, inn * groups];
                a.extend(kernel);
                let mut b = vec![*out, r / groups];
                b.extend(kernel.iter().map(|_| 1));
                Ok((a, b))
            }
            (LayerForm::Parameter { .. }, [out, inn]) => Ok((vec![r, *inn], vec![*out, r])),
            (LayerForm::Parameter { is_transposed }, [n, rows, columns]) => {
                let (out, inn) = if is_transposed { (columns, rows) } else { (rows, columns) };
                Ok((vec![n * r, *inn], vec![*out, r * n]))
            }
            (form, sizes) => Err(Error::Mismatch {
                name: "weight to adapt".into(),
                expected: format!("one that fits {form:?}"),
                found: format!("{sizes:?}"),
            }),
        }
    }
}
