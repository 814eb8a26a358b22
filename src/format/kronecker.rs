//! LoKr's configuration, told by the sizes of its factors.
//!
//! A file of LyCORIS has none: which factor is whole, the rank and the sizes of
//! W₁ stand in the shapes. They are turned into the settings by which PEFT makes
//! the same shapes; where one `decompose_factor` doesn't give them all, the sizes
//! of the other modules' W₁ go into `w1_pattern`.

use super::keys::Part;
use super::parts::Module;
use super::read::BaseLayer;
use super::settings::ModuleSettings;
use crate::error::{Error, Result};
use crate::lora::{LokrConfig, is_low, left_sizes};
use std::collections::BTreeSet;

/// The sizes of one module's factors.
struct Sizes {
    /// W₁'s (a, c).
    left: [i64; 2],
    left_whole: bool,
    /// W₂'s (b, d).
    right: [i64; 2],
    right_whole: bool,
    /// Whether the kernel is decomposed.
    core: bool,
    /// Whether there is a kernel that could be.
    kernel: bool,
}

impl Sizes {
    fn of(layer: &BaseLayer, module: &Module) -> Result<Self> {
        let at = |part, dim: usize| module.size(part).and_then(|sizes| sizes.get(dim).copied());
        let core = module.size(Part::LokrT2).is_some();
        let left = [(Part::LokrW1, Part::LokrW1A, 0), (Part::LokrW1, Part::LokrW1B, 1)]
            .map(|(whole, half, dim)| at(whole, dim).or_else(|| at(half, dim)).unwrap_or(0));
        // A decomposed kernel has both factors the other way round.
        let rows = if core { 1 } else { 0 };
        let b = at(Part::LokrW2, 0).or_else(|| at(Part::LokrW2A, rows)).unwrap_or(0);
        let columns = at(Part::LokrW2, 1).or_else(|| at(Part::LokrW2B, 1)).unwrap_or(0);
        let wrong = || Error::Mismatch {
            name: module.name.clone(),
            expected: match &layer.sizes {
                Some(sizes) => format!("factors of LoKr for {} {sizes:?}", layer.path),
                None => "factors of LoKr".into(),
            },
            found: format!("W1 {left:?} and W2 ({b}, {columns}…)"),
        };
        let mut d = columns;
        let mut kernel = core;
        if let Some([out, inn, rest @ ..]) = layer.sizes.as_deref() {
            kernel = rest.iter().any(|&size| size != 1);
            d = inn.checked_div(left[1]).unwrap_or(0);
            let exact = core || module.size(Part::LokrW2).is_some();
            let fits = left[0].checked_mul(b) == Some(*out) && d.checked_mul(left[1]) == Some(*inn);
            if !fits || (exact && d != columns) {
                return Err(wrong());
            }
        }
        if left.iter().chain(&[b, d, columns]).any(|&size| size < 1) {
            return Err(wrong());
        }
        let (left_whole, right_whole) =
            (module.parts.contains_key(&Part::LokrW1), module.parts.contains_key(&Part::LokrW2));
        Ok(Sizes { left, left_whole, right: [b, d], right_whole, core, kernel })
    }

    /// Whether `decompose_factor` gives W₁ these sizes.
    fn made_by(&self, factor: i64) -> bool {
        let [out, inn] = [0, 1].map(|i| self.left[i].saturating_mul(self.right[i]));
        left_sizes(out, inn, factor) == self.left
    }

    /// The largest of all sizes: as a rank, it leaves both factors whole.
    fn largest(&self) -> i64 {
        self.left.into_iter().chain(self.right).max().unwrap_or(1)
    }

    /// Whether PEFT makes these factors with rank `r`.
    fn made_with(&self, r: i64, decompose_both: bool, effective: bool) -> bool {
        let low = |sizes: [i64; 2]| is_low(r, sizes[0], sizes[1]);
        (decompose_both && low(self.left)) != self.left_whole
            && low(self.right) != self.right_whole
            && (self.right_whole || self.core == (effective && self.kernel))
    }
}

/// The configuration and the modules' settings, of modules with the layers of
/// the base that they adapt.
///
/// # Errors
/// [`Error::Mismatch`] for factors that don't fit their weight;
/// [`Error::Unsupported`] for shapes that no configuration makes.
pub(super) fn config(modules: &[(&BaseLayer<'_>, &Module)]) -> Result<(LokrConfig, Vec<ModuleSettings>)> {
    let mut sizes = Vec::with_capacity(modules.len());
    for (layer, module) in modules {
        if module.size(Part::LokrW2).is_some_and(|sizes| sizes.len() == 3) {
            // PEFT's files mean another product by the same tensors.
            let what = format!("LoKr of {} with a whole W2 over one dimension", layer.path);
            return Err(Error::Unsupported { fields: vec![what] });
        }
        sizes.push(Sizes::of(layer, module)?);
    }
    let mut config = LokrConfig { use_effective_conv2d: sizes.iter().any(|one| one.core), ..LokrConfig::default() };
    config.method.decompose_both = sizes.iter().any(|one| !one.left_whole);
    config.method.decompose_factor = common_factor(&sizes);

    let mut settings = Vec::with_capacity(modules.len());
    let mut fields = Vec::new();
    for ((layer, module), one) in modules.iter().zip(&sizes) {
        let (r, lora_alpha) = match module.rank() {
            Some(r) => (r, module.alpha()?.unwrap_or(r as f64)),
            // LyCORIS leaves its alpha aside then.
            None => (one.largest(), one.largest() as f64),
        };
        if !one.made_with(r, config.method.decompose_both, config.use_effective_conv2d) {
            let form = |whole: bool| if whole { "whole" } else { "in factors" };
            fields.push(format!(
                "LoKr of {} with W1 {:?} {}, W2 {:?} {}{}, rank {r}, beside the other modules' forms",
                layer.path,
                one.left,
                form(one.left_whole),
                one.right,
                form(one.right_whole),
                if one.core { " and a core" } else { "" },
            ));
        }
        let w1 = Some(one.left).filter(|_| !one.made_by(config.method.decompose_factor));
        settings.push(ModuleSettings { name: layer.path.into(), r, lora_alpha, w1 });
    }
    if fields.is_empty() { Ok((config, settings)) } else { Err(Error::Unsupported { fields }) }
}

/// The factor that gives the most modules their sizes; of several, the first of
/// -1 and the sizes as they grow.
fn common_factor(sizes: &[Sizes]) -> i64 {
    let known: BTreeSet<i64> = sizes.iter().flat_map(|one| one.left).collect();
    let candidates = std::iter::once(-1).chain(known);
    let count = |factor: i64| sizes.iter().filter(|one| one.made_by(factor)).count();
    let mut best = (-1, 0);
    for factor in candidates {
        match count(factor) {
            made if made > best.1 => best = (factor, made),
            _ => {}
        }
    }
    best.0
}
