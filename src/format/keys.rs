//! What a key of an adapter's file says: which module, and which part of it.

use super::{AdapterFormat, comfyui, diffusers, kohya, lycoris, peft};
use std::fmt;

/// What a tensor of an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// (r, in), or (r, in, kernel…).
    A,
    /// (out, r), or (out, r / groups, 1…).
    B,
    /// (out).
    BBias,
    /// A core (r, r, kernel…) between A (r, in, 1…) and B, as LyCORIS has it.
    Mid,
    /// DoRA's m.
    Magnitude,
    /// The same as LyCORIS has it, (out, 1…).
    DoraScale,
    /// (r, rows) of a table.
    EmbeddingA,
    /// (dim, r) of a table.
    EmbeddingB,
    /// LoHa's factors of its two halves.
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    /// Their cores, where the kernel is decomposed.
    HadaT1,
    HadaT2,
    /// LoKr's W₁, whole or two factors.
    LokrW1,
    LokrW1A,
    LokrW1B,
    /// Its W₂, whole, two factors, or two and a core.
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    /// One number: the scale is alpha / r.
    Alpha,
}

/// What an adapter is, told by its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AdapterKind {
    Lora,
    Loha,
    Lokr,
}

impl fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AdapterKind::Lora => "LoRA",
            AdapterKind::Loha => "LoHa",
            AdapterKind::Lokr => "LoKr",
        })
    }
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

/// The ends of LoHa's and LoKr's keys, which are the same in all layouts.
const LYCORIS_ENDS: [(&str, Part); 13] = [
    (".hada_w1_a", Part::HadaW1A),
    (".hada_w1_b", Part::HadaW1B),
    (".hada_w2_a", Part::HadaW2A),
    (".hada_w2_b", Part::HadaW2B),
    (".hada_t1", Part::HadaT1),
    (".hada_t2", Part::HadaT2),
    (".lokr_w1", Part::LokrW1),
    (".lokr_w1_a", Part::LokrW1A),
    (".lokr_w1_b", Part::LokrW1B),
    (".lokr_w2", Part::LokrW2),
    (".lokr_w2_a", Part::LokrW2A),
    (".lokr_w2_b", Part::LokrW2B),
    (".lokr_t2", Part::LokrT2),
];

/// What LyCORIS adds to the keys of LoRA, in layouts that it is found in.
pub(super) const LOCON_ENDS: [(&str, Part); 2] = [(".lora_mid.weight", Part::Mid), (".dora_scale", Part::DoraScale)];

impl Part {
    /// The kind of adapter that has such a part; none for alpha, which each may
    /// have.
    pub(super) fn kind(self) -> Option<AdapterKind> {
        match self {
            Part::Alpha => None,
            _ if self < Part::HadaW1A => Some(AdapterKind::Lora),
            _ if self < Part::LokrW1 => Some(AdapterKind::Loha),
            _ => Some(AdapterKind::Lokr),
        }
    }

    /// The end of PEFT's key, without its dot; none for alpha, which stands in
    /// the configuration there.
    pub(super) fn peft_end(self) -> Option<&'static str> {
        let mut ends = PEFT_ENDS.iter().chain(&LYCORIS_ENDS);
        ends.find(|(_, part)| *part == self).map(|(end, _)| end.trim_start_matches('.'))
    }

    pub(super) fn of_peft_end(end: &str) -> Option<Self> {
        let mut ends = PEFT_ENDS.iter().chain(&LYCORIS_ENDS);
        ends.find(|(known, _)| known.trim_start_matches('.') == end).map(|(_, part)| *part)
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

    /// The ends of keys but those of LoHa and LoKr. Of two that fit, the longer
    /// one counts.
    fn ends(&self) -> &'static [(&'static str, Part)];
}

impl AdapterFormat {
    pub(super) fn keys(self) -> &'static dyn KeyLayout {
        match self {
            AdapterFormat::Peft => &peft::Keys,
            AdapterFormat::Diffusers | AdapterFormat::DiffusersOld => &diffusers::Keys,
            AdapterFormat::Kohya => &kohya::Keys,
            AdapterFormat::ComfyUi => &comfyui::Keys,
            AdapterFormat::Lycoris => &lycoris::Keys,
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
    let ends = layout.ends().iter().chain(&LYCORIS_ENDS);
    let fits = ends.filter_map(|(end, part)| Some(ParsedKey { name: rest.strip_suffix(end)?, part: *part }));
    fits.min_by_key(|parsed| parsed.name.len()).filter(|parsed| !parsed.name.is_empty())
}
