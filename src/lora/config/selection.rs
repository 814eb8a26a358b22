//! Which modules a configuration means, whatever kind of adapter it makes.

use super::{NO_LOOK_AROUND, OneOrMany, TargetModules, compile, layer_number, whole};
use crate::error::{Error, Result};
use crate::lora::target::Matcher;

/// The fields that choose modules.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Selection<'a> {
    pub(crate) target_modules: Option<&'a TargetModules>,
    pub(crate) exclude_modules: Option<&'a TargetModules>,
    pub(crate) layers_to_transform: Option<&'a OneOrMany<i64>>,
    pub(crate) layers_pattern: Option<&'a OneOrMany<String>>,
    pub(crate) modules_to_save: &'a [String],
    pub(crate) target_parameters: &'a [String],
}

impl<'a> Selection<'a> {
    /// The numbers of the layers in which targets count; empty for all.
    pub(crate) fn layers(&self) -> &'a [i64] {
        self.layers_to_transform.map_or(&[], OneOrMany::as_slice)
    }

    /// The names of the lists that `layers` counts.
    pub(crate) fn lists(&self) -> &'a [String] {
        self.layers_pattern.map_or(&[], OneOrMany::as_slice)
    }

    /// The paths that PEFT's rules mean, in their order.
    ///
    /// # Errors
    /// [`Error::Config`] for a regular expression that can't be compiled.
    pub(crate) fn matched<'p>(&self, paths: impl IntoIterator<Item = &'p str>) -> Result<Vec<&'p str>> {
        let matcher = Matcher::new(self)?;
        Ok(paths.into_iter().filter(|path| matcher.matches(path)).collect())
    }

    /// Each field in a form to compare and to read. Targets are sets.
    pub(crate) fn fields(&self) -> Vec<(&'static str, String)> {
        let sorted = |target: Option<&TargetModules>| {
            let mut target = target.cloned();
            if let Some(TargetModules::List(list)) = &mut target {
                list.sort();
            }
            target.map_or("none".to_string(), |target| format!("{target:?}"))
        };
        vec![
            ("target_modules", sorted(self.target_modules)),
            ("exclude_modules", sorted(self.exclude_modules)),
            ("layers_to_transform", format!("{:?}", self.layers())),
            ("layers_pattern", format!("{:?}", self.lists())),
            ("modules_to_save", format!("{:?}", self.modules_to_save)),
        ]
    }

    /// Refuses what contradicts itself. Whether a target must be given is the
    /// configuration's to say.
    pub(crate) fn validate(&self) -> Result<()> {
        for (field, modules) in [("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)] {
            match modules {
                Some(TargetModules::List(list)) => {
                    // PEFT writes an empty list of exclusions, and means none; an
                    // empty target keeps its defaults away beside parameters.
                    names(field, list, field == "exclude_modules" || !self.target_parameters.is_empty())?;
                }
                Some(TargetModules::Regex(pattern)) => {
                    compile(&whole(pattern))
                        .map_err(|reason| Error::config(field, NO_LOOK_AROUND, format!("{pattern:?} ({reason})")))?;
                }
                Some(TargetModules::AllLinear) if field == "exclude_modules" => {
                    return Err(Error::config(field, "names or a regular expression", "all-linear"));
                }
                _ => {}
            }
        }
        names("modules_to_save", self.modules_to_save, true)?;
        self.validate_layers()
    }

    fn validate_layers(&self) -> Result<()> {
        let by_string = matches!(self.target_modules, Some(TargetModules::Regex(_) | TargetModules::AllLinear));
        let given = [
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("layers_pattern", self.layers_pattern.is_some()),
        ];
        if let Some((field, _)) = given.into_iter().find(|(_, given)| by_string && *given) {
            return Err(Error::config(field, "nothing where `target_modules` is a string", "a filter of layers"));
        }
        if self.lists().iter().any(|pattern| !pattern.is_empty()) && self.layers_to_transform.is_none() {
            return Err(Error::config("layers_pattern", "`layers_to_transform` beside it", "none"));
        }
        if let Some(layer) = self.layers().iter().find(|layer| **layer < 0) {
            return Err(Error::config("layers_to_transform", "layer numbers from 0 on", layer));
        }
        for pattern in self.lists() {
            compile(&layer_number(pattern))
                .map_err(|reason| Error::config("layers_pattern", NO_LOOK_AROUND, format!("{pattern:?} ({reason})")))?;
        }
        Ok(())
    }
}

/// A list of names, none of them empty.
pub(super) fn names(field: &str, list: &[String], may_be_empty: bool) -> Result<()> {
    if (list.is_empty() && !may_be_empty) || list.iter().any(String::is_empty) {
        return Err(Error::config(field, "at least one module name, none empty", format!("{list:?}")));
    }
    Ok(())
}
