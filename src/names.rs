//! Names of modules and weights: how patterns match them, and near misses.

/// PEFT's rule for an entry of a list: the whole path, or its last segments.
///
/// `q_proj` matches `h.0.q_proj` and `q_proj`, but not `h.0.xq_proj`.
pub(crate) fn suffix_matches(path: &str, entry: &str) -> bool {
    path == entry || path.strip_suffix(entry).is_some_and(|head| head.ends_with('.'))
}

/// Whether the module at `path` is the one that `entry` names by its last
/// segments, or lies within it.
///
/// `head` contains `head`, `net.head` and `net.head.proj`, but not `bighead`.
pub(crate) fn is_within(path: &str, entry: &str) -> bool {
    format!(".{path}.").contains(&format!(".{entry}."))
}

/// The module that a weight belongs to: `h.0.q_proj` for `h.0.q_proj.weight`.
///
/// `None` for tensors that are not called `weight`, and for a weight at the
/// root, which has no path to be targeted by.
pub(crate) fn module_path(weight: &str) -> Option<&str> {
    weight.strip_suffix(".weight")
}

/// Up to five of the names that are spelt most like `wanted`, comparing its
/// last segment with theirs.
pub(crate) fn near<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let last = |s: &'a str| s.rsplit('.').next().unwrap_or(s);
    let mut scored: Vec<(f64, &str)> = Vec::new();
    for name in names {
        let score = strsim::jaro_winkler(wanted, last(name)).max(strsim::jaro_winkler(wanted, name));
        // One of each kind of layer is enough: `h.0.q_proj` stands for all.
        match scored.iter_mut().find(|(_, seen)| last(seen) == last(name)) {
            Some(best) if best.0 < score => *best = (score, name),
            Some(_) => {}
            None => scored.push((score, name)),
        }
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    scored.into_iter().filter(|(score, _)| *score > 0.6).take(5).map(|(_, n)| n.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suffix_ends_at_a_dot() {
        assert!(suffix_matches("h.0.q_proj", "q_proj"));
        assert!(suffix_matches("q_proj", "q_proj"));
        assert!(suffix_matches("h.0.q_proj", "0.q_proj"));
        assert!(!suffix_matches("h.0.xq_proj", "q_proj"));
        assert!(!suffix_matches("q_proj", "h.q_proj"));
    }

    #[test]
    fn modules_contain_their_children() {
        for path in ["head", "net.head", "net.head.proj", "head.0"] {
            assert!(is_within(path, "head"), "{path}");
        }
        for path in ["bighead", "header", "net.heads.proj"] {
            assert!(!is_within(path, "head"), "{path}");
        }
        assert!(is_within("h.0.mlp.fc", "0.mlp"));
        assert!(!is_within("h.0.mlpx.fc", "0.mlp"));
    }

    #[test]
    fn near_names_are_one_per_layer_kind() {
        let names = ["h.0.q_proj", "h.1.q_proj", "h.0.v_proj", "h.0.norm"];
        assert_eq!(near("q_prj", names)[0], "h.0.q_proj");
        assert_eq!(near("q_prj", names).len(), 2);
    }
}
