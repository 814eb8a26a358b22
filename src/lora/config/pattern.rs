//! `rank_pattern` and `alpha_pattern`: values for some of the layers.

use crate::error::{Error, Result};
use regex::Regex;

/// Values by patterns of module paths; the first pattern that matches counts.
///
/// A pattern is a regular expression for the last segments of a path: `q_proj`
/// means every `….q_proj`, `h.[01].fc` those of the first two layers, and
/// `^fc` the one at the root.
///
/// PEFT sorts the patterns when it saves them, and thereby changes which one
/// is the first. An adapter's patterns are therefore put in that order when it
/// is made, and where the order matters they are replaced by one, `^path`, for
/// each layer.
///
/// ```
/// use tch_peft::LoraConfig;
///
/// let config = LoraConfig::builder().target_modules(["q_proj"]).rank_pattern([("q_proj", 4)]).build()?;
/// assert_eq!(config.rank_pattern().entries().collect::<Vec<_>>(), [("q_proj", 4)]);
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPattern<T>(Vec<(String, T)>);

impl<T> Default for LayerPattern<T> {
    fn default() -> Self {
        LayerPattern(Vec::new())
    }
}

impl<T: Copy + PartialEq> LayerPattern<T> {
    pub(crate) fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, T)>) -> Self {
        LayerPattern(entries.into_iter().map(|(pattern, value)| (pattern.into(), value)).collect())
    }

    /// The patterns and their values, in order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, T)> {
        self.0.iter().map(|(pattern, value)| (pattern.as_str(), *value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The patterns, compiled, for many lookups. Those that are no regular
    /// expressions, which `validate` refuses, match nothing.
    pub(crate) fn lookup(&self) -> Lookup<T> {
        Lookup(self.entries().filter_map(|(pattern, value)| Some((regex(pattern).ok()?, value))).collect())
    }

    /// The first pattern that matches none of the paths.
    pub(crate) fn unmatched(&self, paths: &[String]) -> Option<&str> {
        let matches = |pattern: &str| regex(pattern).is_ok_and(|regex| paths.iter().any(|path| regex.is_match(path)));
        self.entries().map(|(pattern, _)| pattern).find(|pattern| !matches(pattern))
    }

    /// The same meaning for `paths` in an order that survives a save.
    ///
    /// The patterns are sorted. If that changes the value of a path, they
    /// become one exact pattern, `^path`, for each path that has a value.
    pub(crate) fn settle(&self, paths: &[String]) -> Self {
        let mut sorted = self.clone();
        sorted.0.sort_by(|a, b| a.0.cmp(&b.0));
        let (as_sorted, as_given) = (sorted.lookup(), self.lookup());
        if paths.iter().all(|path| as_sorted.get(path) == as_given.get(path)) {
            return sorted;
        }
        let mut paths: Vec<&String> = paths.iter().collect();
        paths.sort();
        LayerPattern::of_paths(paths.into_iter().filter_map(|path| Some((path, as_given.get(path)?))))
    }

    /// One exact pattern, `^path`, for each path.
    pub(crate) fn of_paths<S: AsRef<str>>(values: impl IntoIterator<Item = (S, T)>) -> Self {
        let exact = |(path, value): (S, T)| (format!("^{}", regex::escape(path.as_ref())), value);
        LayerPattern::new(values.into_iter().map(exact))
    }

    /// Checks the patterns; `valid` tells which values are fit.
    pub(in crate::lora) fn validate(&self, field: &str, expected: &str, valid: impl Fn(T) -> bool) -> Result<()>
    where
        T: std::fmt::Debug,
    {
        for (i, (pattern, value)) in self.entries().enumerate() {
            if pattern.is_empty() || self.0.iter().take(i).any(|(earlier, _)| earlier == pattern) {
                return Err(Error::config(field, "patterns, none empty and none twice", format!("{pattern:?}")));
            }
            regex(pattern)
                .map_err(|reason| Error::config(field, super::NO_LOOK_AROUND, format!("{pattern:?} ({reason})")))?;
            if !valid(value) {
                return Err(Error::config(field, expected, format!("{value:?} for {pattern:?}")));
            }
        }
        Ok(())
    }
}

/// A [`LayerPattern`] made ready for lookups.
#[derive(Debug)]
pub(crate) struct Lookup<T>(Vec<(Regex, T)>);

impl<T: Copy> Lookup<T> {
    /// The value of the first pattern that matches the module at `path`.
    pub(crate) fn get(&self, path: &str) -> Option<T> {
        self.0.iter().find(|(regex, _)| regex.is_match(path)).map(|(_, value)| *value)
    }
}

/// Python's `re.match(rf"(.*\.)?({pattern})$", path)`.
fn regex(pattern: &str) -> std::result::Result<Regex, String> {
    super::compile(&format!(r"^(?:.*\.)?(?:{pattern})$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let pattern = LayerPattern::new([("^fc", 1), ("h.fc", 2), ("q|fc", 3)]);
        let pattern = pattern.lookup();
        for (path, value) in [("fc", Some(1)), ("h.fc", Some(2)), ("h.0.fc", Some(3)), ("a.q", Some(3)), ("xq", None)] {
            assert_eq!(pattern.get(path), value, "{path}");
        }
    }

    #[test]
    fn a_settled_pattern_means_the_same_in_sorted_order() {
        let layers = paths(&["h.0.q", "h.0.v", "h.1.q"]);
        let harmless = LayerPattern::new([("v", 2), ("q", 1)]).settle(&layers);
        assert_eq!(harmless.entries().collect::<Vec<_>>(), [("q", 1), ("v", 2)]);
        let ordered = LayerPattern::new([("q", 8), (".*", 4)]);
        let settled = ordered.settle(&layers);
        let exact: Vec<_> = settled.entries().collect();
        assert_eq!(exact, [(r"^h\.0\.q", 8), (r"^h\.0\.v", 4), (r"^h\.1\.q", 8)]);
        assert_eq!(settled.settle(&layers), settled);
    }

    #[test]
    fn what_matches_nothing_is_found() {
        let pattern = LayerPattern::new([("q", 1), ("k", 1)]);
        assert_eq!(pattern.unmatched(&paths(&["h.q"])), Some("k"));
        assert_eq!(pattern.unmatched(&paths(&["h.q", "k"])), None);
    }
}
