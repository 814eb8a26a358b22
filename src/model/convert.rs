//! An adapter whose initialisation changed the base, as plain LoRA.

use super::LoraModel;
use super::adapter::NamedAdapter;
use crate::error::{Error, Result};
use crate::format::{peft, safetensors, write_files};
use crate::lora::{AdapterConfig, InitLoraWeights, LayerPattern, LoraConfig};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

impl<M> LoraModel<M> {
    /// Writes an adapter as plain LoRA for the base before its initialisation
    /// changed it, as PEFT's `path_initial_model_for_weight_conversion` does.
    ///
    /// PiSSA, OLoRA and their like take s·B₀·A₀ out of the weight and train
    /// from there, so what was learnt is s·(B·A − B₀·A₀): the factors
    /// A' = \[A; A₀\] and B' = \[B, −B₀\] of twice the rank, exactly. `initial` is
    /// the adapter's folder as it was saved before training.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_peft::{Base, InitLoraWeights, LoraConfig, LoraModel};
    ///
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let (initial, plain) = (dir.path().join("initial"), dir.path().join("plain"));
    /// let config = LoraConfig::builder().r(2).target_modules(["proj"]).init_lora_weights(InitLoraWeights::Pissa);
    /// let model = LoraModel::wrap(Base::new(vs, net), config.build()?)?;
    /// model.save_pretrained(&initial)?; // before training
    /// // … training …
    /// model.save_as_lora("default", &plain, &initial)?;
    /// assert_eq!(LoraConfig::from_pretrained(&plain)?.r(), 4);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model doesn't have, and for DoRA,
    /// a bias of `lora_B`, `target_parameters` and `ensure_weight_tying`, of which
    /// there is no such sum; [`Error::Keys`]
    /// and [`Error::Mismatch`] if `initial` is another adapter's;
    /// [`Error::Io`].
    pub fn save_as_lora(&self, name: &str, folder: impl AsRef<Path>, initial: impl AsRef<Path>) -> Result<()> {
        let adapter = self.named(name)?;
        adapter.convertible()?;
        let path = initial.as_ref().join(peft::WEIGHTS_FILE);
        let initial = safetensors::read(&path)?;
        adapter.check_tensors(&path, &initial)?;
        let (tensors, config) = adapter.as_lora(&initial)?;
        let files = [
            (peft::WEIGHTS_FILE.to_string(), safetensors::serialize(&tensors)?),
            (peft::CONFIG_FILE.to_string(), peft::config_to_json(&config)?),
        ];
        write_files(folder.as_ref(), &files)
    }
}

/// Whether a key is that of the factor `A` or `B`.
fn is_factor(key: &str, half: &str) -> bool {
    key.ends_with(&format!(".lora_{half}.weight")) || key.ends_with(&format!(".lora_embedding_{half}"))
}

impl NamedAdapter {
    /// Its configuration, if what it learns can be plain LoRA.
    fn convertible(&self) -> Result<&LoraConfig> {
        let config = self.lora_config("a conversion to LoRA")?;
        let stacks = !config.target_parameters().is_empty();
        let refused = [
            ("use_dora", config.use_dora),
            ("lora_bias", config.lora_bias),
            ("target_parameters", stacks),
            ("ensure_weight_tying", config.ensure_weight_tying),
        ];
        for (field, on) in refused {
            if on {
                return Err(Error::config(field, "none where an adapter is converted", on));
            }
        }
        Ok(config)
    }

    /// What it learnt since it was `initial`, as plain LoRA.
    pub(super) fn as_lora(
        &self,
        initial: &BTreeMap<String, Tensor>,
    ) -> Result<(BTreeMap<String, Tensor>, AdapterConfig)> {
        let mut config = self.convertible()?.clone();
        let mut tensors = BTreeMap::new();
        for parameter in self.tensors() {
            let (key, now) = (parameter.name, parameter.tensor.f_detach()?);
            let like_now = |tensor: &Tensor| tensor.f_to_device(now.device())?.f_to_kind(now.f_kind()?);
            let before = initial.get(&key).map(like_now).transpose()?;
            let value = match before {
                Some(before) if is_factor(&key, "A") => Tensor::f_cat(&[now, before], 0)?,
                Some(before) if is_factor(&key, "B") => Tensor::f_cat(&[now, before.f_neg()?], 1)?,
                _ => now,
            };
            tensors.insert(key, value);
        }
        // s stays: alpha/r with both doubled, alpha/√r with alpha·√2.
        let factor = if config.use_rslora { 2f64.sqrt() } else { 2.0 };
        config.r *= 2;
        config.lora_alpha *= factor;
        config.rank_pattern = LayerPattern::new(config.rank_pattern.entries().map(|(p, r)| (p.to_string(), 2 * r)));
        config.alpha_pattern =
            LayerPattern::new(config.alpha_pattern.entries().map(|(p, alpha)| (p.to_string(), alpha * factor)));
        config.init_lora_weights = InitLoraWeights::Default;
        config.other.insert("inference_mode".into(), true.into());
        Ok((tensors, config.into()))
    }

    /// Whether `tensors` are this adapter's, in name, shape and sanity.
    pub(super) fn check_tensors(&self, path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        super::files::check_tensors(&self.tensors(), path, tensors)
    }
}
