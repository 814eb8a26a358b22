//! The named weights of a base.

use super::{Progress, QuantizationReport, QuantizeOptions, QuantizedWeight, Site};
use crate::error::{Error, Result};
use crate::ffi::{bytes::element_size, hook, runtime::trim_heap};
use crate::names;
use crate::quant::{self, Dense, QuantConfig, Scheme};
use std::collections::HashMap;
use std::sync::Arc;
use tch::{Kind, Tensor, nn};

/// What a weight is for, hence what may be done to it.
///
/// ```
/// use tch::{Device, nn};
/// use tch_peft::{Base, WeightRole};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let _weight = vs.root().sub("c_attn").zeros("weight", &[8, 24]);
/// let base = Base::from(vs).declare("c_attn", WeightRole::Conv1D);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightRole {
    /// The (out, in) weight of a linear layer: it can be quantised and adapted.
    Linear,
    /// A table (rows, dim) of which rows are looked up.
    Embedding,
    /// The (in, out) weight of a layer that computes x · W, such as the
    /// `Conv1D` of GPT-2 in `transformers`.
    Conv1D,
    /// The (out, in / groups, kernel…) weight of a convolution over one to
    /// three dimensions.
    Conv {
        /// Groups that input and output channels are split into; a weight
        /// doesn't show it.
        groups: i64,
    },
    /// A stack (experts, out, in) of one matrix for each expert, or
    /// (experts, in, out) where `is_transposed`: what `target_parameters`
    /// names. Stacks count as (experts, out, in) unless declared otherwise.
    Experts {
        /// PEFT's, and transformers', attribute of the module.
        is_transposed: bool,
    },
    /// Everything else: biases, norms, buffers. Left as it is.
    Other,
}

/// One tensor of the base: a handle on the very tensor that the module uses.
#[derive(Debug)]
pub(crate) struct Weight {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
    pub(crate) role: WeightRole,
    /// Its place in the order in which the parameters were made.
    pub(crate) place: usize,
    /// Which weight it is, if that has several names.
    pub(crate) tied: Option<usize>,
    /// Whether files may lack it.
    pub(crate) optional: bool,
}

impl Weight {
    /// The path of the module that it belongs to, if it is a `….weight`.
    pub(crate) fn module_path(&self) -> Option<&str> {
        names::module_path(&self.name)
    }

    /// The site that the tensor carries, if it is quantised or adapted.
    pub(crate) fn site(&self) -> Option<Arc<Site>> {
        hook::site_of::<Site>(&self.tensor)
    }

    /// The site, made on a dense weight if there is none yet.
    pub(crate) fn site_or_attach(&self) -> Result<Arc<Site>> {
        if let Some(site) = self.site() {
            return Ok(site);
        }
        let dense = Dense::new(self.tensor.f_detach()?.f_contiguous()?)?;
        let site = Arc::new(Site::new(&self.name, Arc::new(dense)));
        let _ = self.tensor.f_set_requires_grad(false)?;
        hook::attach(&self.tensor, &self.name, Arc::clone(&site))?;
        Ok(site)
    }
}

/// All tensors of a base, sorted by name.
#[derive(Debug)]
pub(crate) struct Weights(Vec<Weight>);

impl Weights {
    /// The tensors in the order in which they were made.
    ///
    /// `role` answers for float tensors called `….weight` of two to five
    /// dimensions, from the module's path and the number of dimensions.
    pub(crate) fn new(
        tensors: impl IntoIterator<Item = (String, Tensor)>,
        role: impl Fn(&str, usize) -> WeightRole,
    ) -> Self {
        let mut weights: Vec<Weight> = tensors
            .into_iter()
            .enumerate()
            .map(|(place, (name, tensor))| {
                let dims = tensor.dim();
                let role = match names::module_path(&name) {
                    Some(path) if (2..=5).contains(&dims) && tensor.is_floating_point() => role(path, dims),
                    _ => WeightRole::Other,
                };
                Weight { name, tensor, role, place, tied: None, optional: false }
            })
            .collect();
        mark_tied(&mut weights);
        weights.sort_by(|a, b| a.name.cmp(&b.name));
        Weights(weights)
    }

    pub(crate) fn of_var_store(vs: &nn::VarStore) -> Self {
        // A store keeps the order of its trainable variables only.
        let made: HashMap<_, _> = vs.trainable_variables().iter().map(address).zip(0..).collect();
        let mut tensors: Vec<_> = vs.variables().into_iter().collect();
        let place = |tensor: &Tensor| made.get(&address(tensor)).copied().unwrap_or(made.len());
        tensors.sort_by_cached_key(|(name, tensor)| (place(tensor), name.clone()));
        Weights::new(tensors, role_by_name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Weight> {
        self.0.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Weight> {
        self.0.iter_mut()
    }

    /// The linear weights with their modules' paths.
    pub(crate) fn linears(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.layers().filter(|(_, w)| matches!(w.role, WeightRole::Linear | WeightRole::Conv1D))
    }

    /// The weights of linear layers, embeddings and convolutions with their
    /// modules' paths: those that can be quantised and adapted.
    pub(crate) fn layers(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.0.iter().filter(|w| w.role != WeightRole::Other).filter_map(|w| Some((w.module_path()?, w)))
    }

    /// Turns gradients off everywhere.
    pub(crate) fn freeze(&self) -> Result<()> {
        for weight in self.0.iter().filter(|w| w.tensor.requires_grad()) {
            let _ = weight.tensor.f_set_requires_grad(false)?;
        }
        Ok(())
    }

    /// Packs the weights that `config` means; see `Base::quantize`.
    pub(crate) fn quantize(
        &self,
        config: &QuantConfig,
        options: &mut QuantizeOptions<'_>,
    ) -> Result<QuantizationReport> {
        let chosen = self.to_quantize(config)?;
        self.freeze()?;
        let mut report = QuantizationReport::default();
        let total = chosen.len();
        for (at, (weight, scheme)) in chosen.into_iter().enumerate() {
            // A tied weight was packed under its first name.
            if weight.site().is_some_and(|site| site.frozen().scheme().is_some()) {
                continue;
            }
            let site = weight.site_or_attach()?;
            let dense = site.frozen();
            let Some(values) = dense.as_dense() else { continue };
            let packed = quant::pack_on(&weight.name, &values, scheme, options.device)?;
            report.push(QuantizedWeight {
                name: weight.name.clone(),
                shape: packed.sizes().to_vec(),
                scheme,
                bytes_before: dense.sizes().iter().product::<i64>() as usize * element_size(dense.kind()),
                bytes_after: packed.nbytes()?,
            });
            site.replace_frozen(packed);
            if let (Some(progress), Some(weight)) = (&mut options.progress, report.weights().last()) {
                progress(Progress { weight, done: at + 1, total });
            }
        }
        trim_heap();
        tracing::info!(
            scheme = %config.scheme(),
            weights = report.weights().len(),
            bytes_before = report.bytes_before(),
            bytes_after = report.bytes_after(),
            "quantised the base"
        );
        Ok(report)
    }

    /// The weights that `config` means with their schemes.
    pub(super) fn chosen(&self, config: &QuantConfig) -> Result<Vec<(&Weight, Scheme)>> {
        let paths: Vec<&str> = self.layers().map(|(path, _)| path).collect();
        for pattern in config.patterns() {
            if !paths.iter().any(|path| quant::matches(pattern, path)) {
                return Err(Error::NoTarget { target: pattern.into(), near: names::near(pattern, paths) });
            }
        }
        let by_default = |role| match role {
            WeightRole::Linear | WeightRole::Conv1D => true,
            WeightRole::Embedding => config.embeddings(),
            WeightRole::Conv { .. } => config.convolutions(),
            WeightRole::Experts { .. } | WeightRole::Other => false,
        };
        let chosen: Vec<(&Weight, Scheme)> =
            self.layers().filter_map(|(path, w)| Some((w, config.choose(path, by_default(w.role))?))).collect();
        if chosen.is_empty() {
            return Err(Error::NoTarget { target: "weights to quantise".into(), near: vec![] });
        }
        Ok(chosen)
    }

    /// [`Weights::chosen`], all found fit before one is touched.
    fn to_quantize(&self, config: &QuantConfig) -> Result<Vec<(&Weight, Scheme)>> {
        let chosen = self.chosen(config)?;
        for (weight, scheme) in &chosen {
            let frozen = weight.site().map(|site| site.frozen());
            if let Some(scheme) = frozen.as_ref().and_then(|f| f.scheme()) {
                let (name, scheme) = (weight.name.clone(), scheme.to_string());
                return Err(Error::AlreadyQuantized { name, scheme });
            }
            match frozen.and_then(|f| f.as_dense()) {
                Some(dense) => quant::check(&weight.name, &dense, *scheme)?,
                None => quant::check(&weight.name, &weight.tensor, *scheme)?,
            }
        }
        Ok(chosen)
    }
}

/// Where a tensor's values are, if it has a storage of its own.
fn address(tensor: &Tensor) -> Option<usize> {
    (hook::site_of::<Site>(tensor).is_none() && tensor.numel() > 0).then(|| tensor.data_ptr() as usize)
}

/// Numbers the groups of names that stand for the same values.
fn mark_tied(weights: &mut [Weight]) {
    let mut groups: HashMap<(usize, Vec<i64>), Vec<usize>> = HashMap::new();
    for (i, weight) in weights.iter().enumerate() {
        if let Some(address) = address(&weight.tensor) {
            groups.entry((address, weight.tensor.size())).or_default().push(i);
        }
    }
    for names in groups.into_values().filter(|names| names.len() > 1) {
        for &i in &names {
            weights[i].tied = names.first().copied();
        }
    }
}

/// tch keeps no layer types, so that names must tell embeddings, and the
/// number of dimensions convolutions.
fn role_by_name(path: &str, dims: usize) -> WeightRole {
    if dims > 2 {
        return WeightRole::Conv { groups: 1 };
    }
    let embedding = path.split('.').any(|segment| {
        let segment = segment.to_ascii_lowercase();
        segment.contains("embed") || ["emb", "wte", "wpe"].contains(&segment.as_str())
    });
    if embedding { WeightRole::Embedding } else { WeightRole::Linear }
}

/// The dtype name as safetensors writes it.
pub(crate) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Uint8 | Kind::QUInt8 => "U8",
        Kind::Int8 | Kind::QInt8 => "I8",
        Kind::Int16 => "I16",
        Kind::Int | Kind::QInt32 => "I32",
        Kind::Int64 => "I64",
        Kind::Half => "F16",
        Kind::Float => "F32",
        Kind::Double => "F64",
        Kind::Bool => "BOOL",
        Kind::BFloat16 => "BF16",
        Kind::Float8e5m2 => "F8_E5M2",
        Kind::Float8e4m3fn => "F8_E4M3",
        Kind::Float8e5m2fnuz => "F8_E5M2FNUZ",
        Kind::Float8e4m3fnuz => "F8_E4M3FNUZ",
        Kind::ComplexHalf => "C32",
        Kind::ComplexFloat => "C64",
        Kind::ComplexDouble => "C128",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_embeddings() {
        for path in ["model.embed_tokens", "wte", "h.0.wpe", "emb", "patch_embed.proj"] {
            assert_eq!(role_by_name(path, 2), WeightRole::Embedding, "{path}");
        }
        assert_eq!(role_by_name("patch_embed.proj", 4), WeightRole::Conv { groups: 1 });
        for path in ["lm_head", "h.0.member", "q_proj"] {
            assert_eq!(role_by_name(path, 2), WeightRole::Linear, "{path}");
        }
    }
}
