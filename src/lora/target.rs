//! From a configuration to the layers it means, by PEFT's rules.

use super::config::{NO_LOOK_AROUND, compile, layer_number, whole};
use super::{Selection, TargetModules};
use crate::error::{Error, Result};
use crate::names::{is_within, near, suffix_matches};
use regex::Regex;

/// The output layer, which PEFT's `all-linear` leaves out.
const OUTPUT_LAYER: &str = "lm_head";

/// Names of modules, or one expression for them.
enum Names<'a> {
    List(&'a [String]),
    Regex(Regex),
    AllLinear,
}

impl<'a> Names<'a> {
    fn new(field: &str, modules: &'a TargetModules) -> Result<Self> {
        Ok(match modules {
            TargetModules::List(list) => Names::List(list),
            TargetModules::Regex(pattern) => Names::Regex(regex(field, &whole(pattern))?),
            TargetModules::AllLinear => Names::AllLinear,
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Names::List(list) => list.iter().any(|entry| suffix_matches(path, entry)),
            Names::Regex(regex) => regex.is_match(path),
            Names::AllLinear => !suffix_matches(path, OUTPUT_LAYER),
        }
    }
}

/// A configuration's rules, made ready for many paths.
pub(super) struct Matcher<'a> {
    target: Option<Names<'a>>,
    excluded: Option<Names<'a>>,
    saved: &'a [String],
    layers: &'a [i64],
    numbers: Vec<Regex>,
}

impl<'a> Matcher<'a> {
    pub(super) fn new(selection: &Selection<'a>) -> Result<Self> {
        let names =
            |field, modules: Option<&'a TargetModules>| modules.map(|modules| Names::new(field, modules)).transpose();
        let any = [String::new()];
        let patterns = match selection.lists() {
            [] => &any,
            patterns => patterns,
        };
        let numbers = patterns.iter().map(|name| regex("layers_pattern", &layer_number(name)));
        Ok(Matcher {
            target: names("target_modules", selection.target_modules)?,
            excluded: names("exclude_modules", selection.exclude_modules)?,
            saved: selection.modules_to_save,
            layers: selection.layers(),
            numbers: numbers.collect::<Result<_>>()?,
        })
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        if self.excluded.as_ref().is_some_and(|names| names.matches(path)) {
            return false;
        }
        // What is trained as a whole is not adapted, nor is what lies in it.
        if self.saved.iter().any(|entry| is_within(path, entry)) {
            return false;
        }
        match &self.target {
            None => false,
            // A whole path counts in any layer.
            Some(Names::List(list)) if list.iter().any(|entry| entry == path) => true,
            Some(names) => names.matches(path) && self.in_layers(path),
        }
    }

    fn in_layers(&self, path: &str) -> bool {
        if self.layers.is_empty() {
            return true;
        }
        let number = self.numbers.iter().find_map(|regex| regex.captures(path)?.name("idx"));
        number.and_then(|digits| digits.as_str().parse().ok()).is_some_and(|layer: i64| self.layers.contains(&layer))
    }
}

fn regex(field: &str, pattern: &str) -> Result<Regex> {
    compile(pattern).map_err(|reason| Error::config(field, NO_LOOK_AROUND, format!("{pattern:?} ({reason})")))
}

/// The paths among `linears` that are meant, in their order.
///
/// # Errors
/// [`Error::NoTarget`] if nothing matches, or if one entry of a list doesn't;
/// [`Error::Config`] if the target matches and its filters leave nothing.
pub(crate) fn resolve(selection: &Selection, linears: &[&str]) -> Result<Vec<String>> {
    let none = |target: &str| Error::NoTarget { target: target.into(), near: near(target, linears.iter().copied()) };
    let wanted = || selection.target_modules.map_or(String::new(), ToString::to_string);
    if let Some(TargetModules::List(list)) = selection.target_modules {
        for entry in list {
            if !linears.iter().any(|path| suffix_matches(path, entry)) {
                return Err(none(entry));
            }
        }
    }
    let matcher = Matcher::new(selection)?;
    let found: Vec<String> = linears.iter().filter(|path| matcher.matches(path)).map(|s| s.to_string()).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    // Parameters alone may be targeted, and an empty list says so too.
    let no_modules = match selection.target_modules {
        None => true,
        Some(TargetModules::List(list)) => list.is_empty(),
        Some(_) => false,
    };
    if no_modules && !selection.target_parameters.is_empty() {
        return Ok(found);
    }
    let target = matcher.target.as_ref();
    if target.is_some_and(|target| linears.iter().any(|path| target.matches(path))) {
        return Err(Error::config(
            "target_modules",
            "modules that exclude_modules, modules_to_save and layers_to_transform leave over",
            wanted(),
        ));
    }
    Err(none(&wanted()))
}

/// The names among `names` that `target_parameters` means, in their order: an
/// entry is a parameter's whole name, or its last segments.
///
/// # Errors
/// [`Error::NoTarget`] if an entry matches nothing; [`Error::Config`] for a
/// parameter at the root, whose module can't be wrapped.
pub(crate) fn resolve_parameters(selection: &Selection, names: &[&str]) -> Result<Vec<String>> {
    let entries = selection.target_parameters;
    for entry in entries {
        let found: Vec<_> = names.iter().filter(|name| suffix_matches(name, entry)).collect();
        if found.is_empty() {
            return Err(Error::NoTarget { target: entry.clone(), near: near(entry, names.iter().copied()) });
        }
        if let Some(root) = found.iter().find(|name| !name.contains('.')) {
            return Err(Error::config("target_parameters", "parameters of a module in the model", root));
        }
    }
    let meant = |name: &&&str| entries.iter().any(|entry| suffix_matches(name, entry));
    Ok(names.iter().filter(meant).map(|name| name.to_string()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LoraConfig;

    const PATHS: [&str; 5] = ["h.0.q_proj", "h.0.v_proj", "h.1.q_proj", "h.1.xq_proj", "lm_head"];

    fn config(target: impl Into<TargetModules>) -> LoraConfig {
        LoraConfig::builder().target_modules(target).build().unwrap()
    }

    fn found(target: impl Into<TargetModules>) -> Vec<String> {
        resolve(&config(target).selection(), &PATHS).unwrap()
    }

    #[test]
    fn each_kind_of_target_selects() {
        assert_eq!(found(["q_proj"]), ["h.0.q_proj", "h.1.q_proj"]);
        assert_eq!(found(["h.0.q_proj", "lm_head"]), ["h.0.q_proj", "lm_head"]);
        assert_eq!(found(r"h\.\d\.[qv]_proj"), ["h.0.q_proj", "h.0.v_proj", "h.1.q_proj"]);
        assert_eq!(found("h.0.q_proj|lm_head"), ["h.0.q_proj", "lm_head"]);
        assert_eq!(found("All-Linear").len(), 4);
    }

    #[test]
    fn what_matches_nothing_is_named_with_near_names() {
        let error = resolve(&config(["q_proj", "k_proj"]).selection(), &PATHS).unwrap_err();
        let Error::NoTarget { target, near } = &error else { panic!("{error}") };
        assert_eq!(target, "k_proj");
        assert!(near.contains(&"h.0.q_proj".to_string()), "{near:?}");
        assert!(resolve(&config("q_proj").selection(), &PATHS).is_err(), "a pattern must match the whole path");
        let filtered = LoraConfig::builder().target_modules(["q_proj"]).exclude_modules(["q_proj"]).build().unwrap();
        let error = resolve(&filtered.selection(), &PATHS).unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == "target_modules"), "{error}");
        let look_around = LoraConfig::builder().target_modules("(?=x)").build().unwrap_err();
        assert!(look_around.to_string().contains("look-around"), "{look_around}");
    }
}
