//! From `target_modules` to the layers it means.

use super::TargetModules;
use crate::error::{Error, Result};
use crate::names::{near, suffix_matches};
use regex::Regex;

/// The output layer, which PEFT's `all-linear` leaves out.
const OUTPUT_LAYER: &str = "lm_head";

/// The paths among `linears` that the target means, in their order.
///
/// # Errors
/// [`Error::NoTarget`] if nothing matches, or if one entry of a list doesn't.
pub(crate) fn resolve(target: &TargetModules, linears: &[&str]) -> Result<Vec<String>> {
    let none = |target: &str| Error::NoTarget { target: target.into(), near: near(target, linears.iter().copied()) };
    let matches: Box<dyn Fn(&str) -> bool> = match target {
        TargetModules::List(list) => {
            for entry in list {
                if !linears.iter().any(|path| suffix_matches(path, entry)) {
                    return Err(none(entry));
                }
            }
            Box::new(|path| list.iter().any(|entry| suffix_matches(path, entry)))
        }
        TargetModules::Regex(pattern) => {
            let regex = whole(pattern)?;
            Box::new(move |path| regex.is_match(path))
        }
        TargetModules::AllLinear => Box::new(|path| !suffix_matches(path, OUTPUT_LAYER)),
    };
    let found: Vec<String> = linears.iter().filter(|path| matches(path)).map(|s| s.to_string()).collect();
    if found.is_empty() { Err(none(&target.to_string())) } else { Ok(found) }
}

/// A pattern that must match a path as a whole, as Python's `re.fullmatch`.
pub(super) fn whole(pattern: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{pattern})$")).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim().to_string();
        Error::config("target_modules", "a regular expression without look-around", format!("{pattern:?} ({reason})"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 5] = ["h.0.q_proj", "h.0.v_proj", "h.1.q_proj", "h.1.xq_proj", "lm_head"];

    fn found(target: impl Into<TargetModules>) -> Vec<String> {
        resolve(&target.into(), &PATHS).unwrap()
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
        let error = resolve(&["q_proj", "k_proj"].into(), &PATHS).unwrap_err();
        let Error::NoTarget { target, near } = &error else { panic!("{error}") };
        assert_eq!(target, "k_proj");
        assert!(near.contains(&"h.0.q_proj".to_string()), "{near:?}");
        assert!(resolve(&"q_proj".into(), &PATHS).is_err(), "a pattern must match the whole path");
        assert!(matches!(resolve(&"(?=x)".into(), &PATHS), Err(Error::Config { .. })));
    }
}
