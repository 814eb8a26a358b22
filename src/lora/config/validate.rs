//! Ranges and contradictions; the one place where they stand.

use super::{InitLoraWeights, LoraConfig, NO_LOOK_AROUND, TargetModules, TokenIndices};
use crate::error::{Error, Result};
use tch::Kind;

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
        if !self.lora_alpha.is_finite() {
            return Err(Error::config("lora_alpha", "a finite number", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::config("lora_dropout", "a probability in [0, 1)", self.lora_dropout));
        }
        let floats = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half];
        if let Some(kind) = self.dtype.filter(|kind| !floats.contains(kind)) {
            return Err(Error::config("dtype", "f32, f64, bf16 or f16", format!("{kind:?}")));
        }
        self.rank_pattern.validate("rank_pattern", "ranks of at least 1", |r| r >= 1)?;
        self.alpha_pattern.validate("alpha_pattern", "finite numbers", f64::is_finite)
    }

    fn check_modules(&self) -> Result<()> {
        if self.target_modules.is_none() && self.target_parameters().is_empty() {
            return Err(Error::config("target_modules", "names, a regular expression or \"all-linear\"", "not given"));
        }
        for (field, modules) in [("target_modules", &self.target_modules), ("exclude_modules", &self.exclude_modules)] {
            match modules {
                Some(TargetModules::List(list)) => {
                    // PEFT writes an empty list of exclusions, and means none; an
                    // empty target keeps its defaults away beside parameters.
                    names(field, list, field == "exclude_modules" || !self.target_parameters().is_empty())?;
                }
                Some(TargetModules::Regex(pattern)) => {
                    super::compile(&whole(pattern))
                        .map_err(|reason| Error::config(field, NO_LOOK_AROUND, format!("{pattern:?} ({reason})")))?;
                }
                Some(TargetModules::AllLinear) if field == "exclude_modules" => {
                    return Err(Error::config(field, "names or a regular expression", "all-linear"));
                }
                _ => {}
            }
        }
        names("modules_to_save", self.modules_to_save(), true)?;
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
        let by_string = matches!(self.target_modules, Some(TargetModules::Regex(_) | TargetModules::AllLinear));
        let given = [
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("layers_pattern", self.layers_pattern.is_some()),
        ];
        if let Some((field, _)) = given.into_iter().find(|(_, given)| by_string && *given) {
            return Err(Error::config(field, "nothing where `target_modules` is a string", "a filter of layers"));
        }
        let patterns = self.layers_pattern();
        if patterns.iter().any(|pattern| !pattern.is_empty()) && self.layers_to_transform.is_none() {
            return Err(Error::config("layers_pattern", "`layers_to_transform` beside it", "none"));
        }
        if let Some(layer) = self.layers_to_transform().iter().find(|layer| **layer < 0) {
            return Err(Error::config("layers_to_transform", "layer numbers from 0 on", layer));
        }
        for pattern in patterns {
            super::compile(&layer_number(pattern))
                .map_err(|reason| Error::config("layers_pattern", NO_LOOK_AROUND, format!("{pattern:?} ({reason})")))?;
        }
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

/// A list of names, none of them empty.
fn names(field: &str, list: &[String], may_be_empty: bool) -> Result<()> {
    if (list.is_empty() && !may_be_empty) || list.iter().any(String::is_empty) {
        return Err(Error::config(field, "at least one module name, none empty", format!("{list:?}")));
    }
    Ok(())
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
