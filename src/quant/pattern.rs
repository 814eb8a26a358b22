//! Patterns of module paths.

use crate::names::suffix_matches;

/// Whether `pattern` is the path or its last segments, where each `*` in it
/// stands for any characters, dots included.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    if !pattern.contains('*') {
        return suffix_matches(path, pattern);
    }
    let starts = std::iter::once(0).chain(path.match_indices('.').map(|(at, _)| at + 1));
    starts.map(|at| &path[at..]).any(|tail| glob(pattern, tail))
}

/// Whether the pieces of `pattern` between its stars occur in `text` in turn,
/// the first at its start and the last at its end.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for piece in middle.split('*') {
        match text.find(piece) {
            Some(at) => text = &text[at + piece.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, path) in [
            ("*", "a"),
            ("*", "a.b.c"),
            ("h.*", "model.h.0.q_proj"),
            ("h.*.q_proj", "model.h.0.attn.q_proj"),
            ("q_*", "h.0.q_proj"),
            ("*_proj", "h.0.q_proj"),
            ("h.*.attn.*_proj", "h.11.attn.q_proj"),
            ("q_proj", "h.0.q_proj"),
        ] {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("h.*.q_proj", "xh.0.q_proj"),
            ("h.*.q_proj", "h.0.q_proj.x"),
            ("h.*.q_proj", "h.q_proj"),
            ("aa*aa", "aaa"),
            ("q", "h.0.q_proj"),
        ] {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
    }
}
