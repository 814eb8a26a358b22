//! Ranges and contradictions; the one place where they stand.

use super::selection::names;
use super::{InitLoraWeights, LoraConfig, TokenIndices};
use crate::error::{Error, Result};
use tch::Kind;

/// What [`is_alpha`] wants.
pub(in crate::lora) const ALPHA: &str = "a finite number, in f32 too";

/// Whether a scale of this numerator can be multiplied with tensors.
pub(in crate::lora) fn is_alpha(alpha: f64) -> bool {
    (alpha as f32).is_finite()
}

impl LoraConfig {
    pub(crate) fn validate(self) -> Result<Self> {
        self.check_numbers()?;
        self.check_modules()?;
        self.check_layers()?;
        self.check_variants()?;
        Ok(self)
    }

    fn check_numbers(&self) -> Result<()> {
        if self.r < 1 {
            return Err(Error::config("r", "a rank of at least 1", self.r));
        }
        if !is_alpha(self.lora_alpha) {
            return Err(Error::config("lora_alpha", ALPHA, self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::config("lora_dropout", "a probability in [0, 1)", self.lora_dropout));
        }
        let floats = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half];
        if let Some(kind) = self.dtype.filter(|kind| !floats.contains(kind)) {
            return Err(Error::config("dtype", "f32, f64, bf16 or f16", format!("{kind:?}")));
        }
        self.rank_pattern.validate("rank_pattern", "ranks of at least 1", |r| r >= 1)?;
        self.alpha_pattern.validate("alpha_pattern", ALPHA, is_alpha)
    }

    fn check_modules(&self) -> Result<()> {
        if self.target_modules.is_none() && self.target_parameters().is_empty() {
            return Err(Error::config("target_modules", "names, a regular expression or \"all-linear\"", "not given"));
        }
        self.selection().validate()?;
        names("target_parameters", self.target_parameters(), true)?;
        let rows = |field: &str, rows: &[i64]| {
            let twice = rows.iter().enumerate().find(|(i, row)| rows.iter().take(*i).any(|earlier| earlier == *row));
            match rows.iter().find(|row| **row < 0).or(twice.map(|(_, row)| row)) {
                Some(row) => Err(Error::config(field, "row numbers from 0 on, none twice", row)),
                None => Ok(()),
            }
        };
        match &self.trainable_token_indices {
            Some(TokenIndices::Input(list)) => rows("trainable_token_indices", list),
            Some(TokenIndices::Modules(map)) => map.values().try_for_each(|list| rows("trainable_token_indices", list)),
            None => Ok(()),
        }
    }

    fn check_layers(&self) -> Result<()> {
        match self.layer_replication().iter().find(|(start, end)| *start < 0 || start >= end) {
            Some((start, end)) => Err(Error::config(
                "layer_replication",
                "ranges [start, end) that aren't empty",
                format!("[{start}, {end})"),
            )),
            None => Ok(()),
        }
    }

    fn check_variants(&self) -> Result<()> {
        let init = self.init_lora_weights;
        self.eva_config()?;
        self.corda_config()?;
        self.lora_ga_config()?;
        self.loftq_config()?;
        self.check_qalora()?;
        if self.use_dora && matches!(init, InitLoraWeights::Corda | InitLoraWeights::LoraGa) {
            let expected = "false with \"corda\" and \"lora_ga\", which are saved as plain LoRA";
            return Err(Error::config("use_dora", expected, true));
        }
        if self.lora_bias && !matches!(init, InitLoraWeights::Default | InitLoraWeights::Random) {
            let found = format!("true with init_lora_weights = {:?}", init.name().unwrap_or_default());
            return Err(Error::config("lora_bias", "false, or init_lora_weights true or false", found));
        }
        if self.lora_bias && self.use_dora {
            return Err(Error::config("lora_bias", "false where use_dora is true", "true"));
        }
        let ranks = self.rank_pattern.entries().map(|(_, r)| r).chain([self.r]);
        match ranks.into_iter().find(|r| init == InitLoraWeights::Orthogonal && r % 2 == 1) {
            Some(r) => Err(Error::config("r", "an even rank where init_lora_weights is \"orthogonal\"", r)),
            None => Ok(()),
        }
    }
}

impl LoraConfig {
    /// PEFT makes a new A for it, whatever the initialisation.
    fn check_qalora(&self) -> Result<()> {
        if self.qalora_group_size() < 1 {
            return Err(Error::config("qalora_group_size", "at least 1", self.qalora_group_size()));
        }
        let drawn = matches!(self.init_lora_weights, InitLoraWeights::Default | InitLoraWeights::Random);
        let meaningless = [
            ("use_dora", self.use_dora),
            ("lora_bias", self.lora_bias),
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("init_lora_weights", !drawn),
        ];
        match meaningless.into_iter().find(|(_, on)| self.use_qalora() && *on) {
            Some((field, _)) => Err(Error::config(field, "its default with use_qalora", "another value")),
            None => Ok(()),
        }
    }
}

/// A pattern that must match a path as a whole, as Python's `re.fullmatch`.
pub(in crate::lora) fn whole(pattern: &str) -> String {
    format!("^(?:{pattern})$")
}

/// PEFT's expression for the number of a layer, in a list of layers of this
/// name; with an empty name, of any name.
pub(in crate::lora) fn layer_number(name: &str) -> String {
    match name {
        "" => r"^.*?\.[^.]*\.(?P<idx>\d+)\.".into(),
        name => format!(r"^(?:(?:^|.*?\.){name}\.(?P<idx>\d+)\.)"),
    }
}
