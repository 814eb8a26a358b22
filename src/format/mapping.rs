//! Rules for modules that are called otherwise in a file than in the base.

use crate::error::{Error, Result};
use crate::names;
use regex::Regex;
use std::collections::HashMap;

/// What the modules of the base are called in a file, where their names differ
/// from PEFT's paths.
///
/// A rule is a pair of names, or a regular expression for the whole path of a
/// module with a replacement. Rules are written from the base to the file, and
/// used in both directions: what a name in a file means is found among the
/// base's modules. So rules that can't be turned back are refused, with the
/// modules that would share one name.
///
/// ```
/// use tch_peft::KeyMapping;
/// let mapping = KeyMapping::builder()
///     .pattern(r"h\.(\d+)\.(.+)", "model.layers.$1.$2")
///     .exact("head", "lm_head")
///     .build()?;
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct KeyMapping {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
enum Rule {
    Exact { module: String, name: String },
    Pattern { pattern: String, regex: Regex, replacement: String },
}

impl Rule {
    /// What the rule applies to, as the caller wrote it.
    fn text(&self) -> &str {
        match self {
            Rule::Exact { module, .. } => module,
            Rule::Pattern { pattern, .. } => pattern,
        }
    }

    fn apply(&self, path: &str) -> Option<String> {
        match self {
            Rule::Exact { module, name } => (module == path).then(|| name.clone()),
            Rule::Pattern { regex, replacement, .. } => {
                let captures = regex.captures(path)?;
                let mut name = String::new();
                captures.expand(replacement, &mut name);
                Some(name)
            }
        }
    }
}

/// Makes a [`KeyMapping`].
#[derive(Debug, Clone, Default)]
#[must_use = "call build()"]
pub struct KeyMappingBuilder {
    rules: Vec<(String, String, bool)>,
}

impl KeyMappingBuilder {
    /// The module of the base at `path` is called `name` in the file.
    pub fn exact(mut self, path: impl Into<String>, name: impl Into<String>) -> Self {
        self.rules.push((path.into(), name.into(), false));
        self
    }

    /// Modules of the base whose whole path matches `pattern` are called
    /// `replacement` in the file, where `$1` or `${1}` is the first group of
    /// the pattern, and `$$` a dollar sign.
    pub fn pattern(mut self, pattern: impl Into<String>, replacement: impl Into<String>) -> Self {
        self.rules.push((pattern.into(), replacement.into(), true));
        self
    }

    /// Checks the rules.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty name, a pattern that can't be compiled,
    /// and a replacement that names a group which the pattern doesn't have.
    pub fn build(self) -> Result<KeyMapping> {
        let rule = |(from, to, is_pattern): (String, String, bool)| {
            if from.is_empty() || to.is_empty() {
                return Err(refused("rules without empty names", format!("{from:?} to {to:?}")));
            }
            if !is_pattern {
                return Ok(Rule::Exact { module: from, name: to });
            }
            let regex = Regex::new(&format!("^(?:{from})$"))
                .map_err(|error| refused("regular expressions", format!("{from:?} ({error})")))?;
            if let Some(group) = unknown_group(&regex, &to) {
                let found = format!("{to:?} for {from:?}, which has no group {group}");
                return Err(refused("replacements by groups of their pattern (write ${1}x, not $1x)", found));
            }
            Ok(Rule::Pattern { pattern: from, regex, replacement: to })
        };
        Ok(KeyMapping { rules: self.rules.into_iter().map(rule).collect::<Result<_>>()? })
    }
}

fn refused(expected: &str, found: impl ToString) -> Error {
    Error::config("key_mapping", expected, found)
}

/// A group that a replacement names and the expression doesn't have.
fn unknown_group(regex: &Regex, replacement: &str) -> Option<String> {
    let known = |name: &str| match name.parse::<usize>() {
        Ok(number) => number < regex.captures_len(),
        Err(_) => regex.capture_names().flatten().any(|group| group == name),
    };
    let mut rest = replacement;
    while let Some((_, after)) = rest.split_once('$') {
        if let Some(literal) = after.strip_prefix('$') {
            rest = literal;
            continue;
        }
        let (name, behind) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        if !known(name) {
            return Some(format!("{name:?}"));
        }
        rest = behind;
    }
    None
}

impl KeyMapping {
    /// A builder without rules.
    pub fn builder() -> KeyMappingBuilder {
        KeyMappingBuilder::default()
    }

    /// Whether there are no rules: names are PEFT's paths.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The name of each module of the base, in their order.
    ///
    /// # Errors
    /// [`Error::NoTarget`] for a rule that applies to no module;
    /// [`Error::Config`] for a module that two rules apply to, and for two
    /// modules with one name.
    pub(super) fn apply(&self, paths: &[&str]) -> Result<Vec<String>> {
        let mut used = vec![false; self.rules.len()];
        let mut names = Vec::with_capacity(paths.len());
        for path in paths {
            let mut fits = self.rules.iter().enumerate().filter_map(|(i, rule)| Some((i, rule.apply(path)?)));
            let first = fits.next();
            if let (Some((first, _)), Some((second, _))) = (&first, fits.next()) {
                let [first, second] = [*first, second].map(|i| self.rules.get(i).map_or("", Rule::text));
                return Err(refused("one rule for each module", format!("{first:?} and {second:?}, both for {path}")));
            }
            if let Some(used) = first.as_ref().and_then(|(i, _)| used.get_mut(*i)) {
                *used = true;
            }
            names.push(first.map_or_else(|| path.to_string(), |(_, name)| name));
        }
        if let Some((rule, _)) = self.rules.iter().zip(&used).find(|(_, used)| !**used) {
            let near = names::near(rule.text(), paths.iter().copied());
            return Err(Error::NoTarget { target: rule.text().into(), near });
        }
        let mut by_name: HashMap<&str, &str> = HashMap::new();
        for (name, path) in names.iter().zip(paths) {
            if let Some(other) = by_name.insert(name, path) {
                let found = format!("{name:?} for both {other} and {path}");
                return Err(refused("rules that can be turned back: a name of its own for each module", found));
            }
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 4] = ["h.0.q", "h.0.v", "h.1.q", "head"];

    fn apply(builder: KeyMappingBuilder) -> Result<Vec<String>> {
        builder.build()?.apply(&PATHS)
    }

    #[test]
    fn names_are_replaced_whole() {
        let mapping =
            KeyMapping::builder().pattern(r"h\.(\d+)\.(?<rest>.+)", "layers.${1}_x.$rest").exact("head", "out");
        assert_eq!(apply(mapping).unwrap(), ["layers.0_x.q", "layers.0_x.v", "layers.1_x.q", "out"]);
        assert_eq!(apply(KeyMapping::builder()).unwrap(), PATHS);
        // Not a part of a path: `h` alone is no module.
        assert!(matches!(apply(KeyMapping::builder().pattern("h", "x")), Err(Error::NoTarget { .. })));
    }

    #[test]
    fn rules_that_cannot_be_turned_back_are_refused() {
        let cases = [
            (KeyMapping::builder().pattern(r"h\.\d\.q", "q"), "h.0.q and h.1.q"),
            (KeyMapping::builder().exact("head", "h.0.q"), "h.0.q and head"),
            (KeyMapping::builder().exact("head", "x").pattern("he.d", "y"), "\"head\" and \"he.d\""),
            (KeyMapping::builder().pattern(r"h\.(\d)\.q", "$1_q"), "no group \"1_q\""),
            (KeyMapping::builder().pattern("head", "$2"), "no group \"2\""),
            (KeyMapping::builder().pattern("(?=h)", "x"), "(?=h)"),
            (KeyMapping::builder().exact("head", ""), "\"\""),
        ];
        for (mapping, told) in cases {
            let error = apply(mapping).unwrap_err();
            assert!(matches!(&error, Error::Config { field, .. } if field == "key_mapping"), "{error}");
            assert!(error.to_string().contains(told), "{error}");
        }
        let error = apply(KeyMapping::builder().exact("haed", "x")).unwrap_err();
        assert!(error.to_string().contains("head"), "{error}");
    }
}
