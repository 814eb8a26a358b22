//! What a key of an adapter's file says: which module, and which part of it.

use super::{AdapterFormat, comfyui, diffusers, kohya, peft};

/// What a tensor of an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// (r, in), or (r, in, kernel…).
    A,
    /// (out, r), or (out, r / groups, 1…).
    B,
    /// (out).
    BBias,
    /// DoRA's m.
    Magnitude,
    /// (r, rows) of a table.
    EmbeddingA,
    /// (dim, r) of a table.
    EmbeddingB,
    /// One number: the scale is alpha / r.
    Alpha,
}

/// The ends of PEFT's keys, which other layouts of its time share.
pub(super) const PEFT_ENDS: [(&str, Part); 6] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::BBias),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
];

impl Part {
    /// The end of PEFT's key, without its dot; none for alpha, which stands in
    /// the configuration there.
    pub(super) fn peft_end(self) -> Option<&'static str> {
        PEFT_ENDS.iter().find(|(_, part)| *part == self).map(|(end, _)| end.trim_start_matches('.'))
    }

    pub(super) fn of_peft_end(end: &str) -> Option<Self> {
        PEFT_ENDS.iter().find(|(known, _)| known.trim_start_matches('.') == end).map(|(_, part)| *part)
    }
}

/// How one layout spells its keys: component, module, part.
pub(super) trait KeyLayout: Sync {
    /// The component that a key belongs to, `""` for a key that names none,
    /// and the rest of it. `None` for a key of another layout.
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)>;

    /// What stands before a module's name in a key of the component.
    fn prefix(&self, component: &str) -> String;

    /// The names that the module at `path` may have in a key, the one that is
    /// written first.
    fn names(&self, component: &str, path: &str) -> Vec<String>;

    /// The ends of keys. Of two that fit, the longer one counts.
    fn ends(&self) -> &'static [(&'static str, Part)];
}

impl AdapterFormat {
    pub(super) fn keys(self) -> &'static dyn KeyLayout {
        match self {
            AdapterFormat::Peft => &peft::Keys,
            AdapterFormat::Diffusers | AdapterFormat::DiffusersOld => &diffusers::Keys,
            AdapterFormat::Kohya => &kohya::Keys,
            AdapterFormat::ComfyUi => &comfyui::Keys,
        }
    }
}

/// A key, taken apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct ParsedKey<'k> {
    /// The module's name, as the layout spells it.
    pub(super) name: &'k str,
    pub(super) part: Part,
}

/// Takes a key apart; `None` if the layout has no such keys.
pub(super) fn parse<'k>(layout: &dyn KeyLayout, key: &'k str) -> Option<ParsedKey<'k>> {
    let (_, rest) = layout.component(key)?;
    split_end(layout, rest)
}

/// [`parse`] for keys of one component. Where that is `""` every key is taken
/// whole: a module's own name may look like a component.
pub(super) fn parse_in<'k>(layout: &dyn KeyLayout, key: &'k str, component: &str) -> Option<ParsedKey<'k>> {
    let rest = match component {
        "" => key.strip_prefix(&layout.prefix(""))?,
        _ => layout.component(key).filter(|(found, _)| *found == component)?.1,
    };
    split_end(layout, rest)
}

fn split_end<'k>(layout: &dyn KeyLayout, rest: &'k str) -> Option<ParsedKey<'k>> {
    let fits =
        layout.ends().iter().filter_map(|(end, part)| Some(ParsedKey { name: rest.strip_suffix(end)?, part: *part }));
    fits.min_by_key(|parsed| parsed.name.len()).filter(|parsed| !parsed.name.is_empty())
}
