//! The tensors that a file has for one module, and what they are in PEFT's
//! terms.

use super::keys::{AdapterKind, Part};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// One module of the base that the file adapts.
pub(super) struct Module {
    /// Its name in the file.
    pub(super) name: String,
    /// The tensors with their keys.
    pub(super) parts: BTreeMap<Part, (String, Tensor)>,
}

/// Parts of which none goes without the other.
const PAIRS: [(Part, Part); 8] = [
    (Part::A, Part::B),
    (Part::EmbeddingA, Part::EmbeddingB),
    (Part::HadaW1A, Part::HadaW1B),
    (Part::HadaW2A, Part::HadaW2B),
    (Part::HadaW1A, Part::HadaW2A),
    (Part::HadaT1, Part::HadaT2),
    (Part::LokrW1A, Part::LokrW1B),
    (Part::LokrW2A, Part::LokrW2B),
];

/// Parts that mean nothing without one of the others.
const NEEDS: [(Part, &[Part]); 6] = [
    (Part::BBias, &[Part::A]),
    (Part::Mid, &[Part::A]),
    (Part::Magnitude, &[Part::A, Part::EmbeddingA]),
    (Part::DoraScale, &[Part::A]),
    (Part::HadaT1, &[Part::HadaW1A, Part::HadaW1B]),
    (Part::LokrT2, &[Part::LokrW2A, Part::LokrW2B]),
];

impl Module {
    pub(super) fn size(&self, part: Part) -> Option<Vec<i64>> {
        self.parts.get(&part).map(|(_, tensor)| tensor.size())
    }

    fn has(&self, part: Part) -> bool {
        self.parts.contains_key(&part)
    }

    fn keys(&self) -> impl Iterator<Item = String> {
        self.parts.values().map(|(key, _)| key.clone())
    }

    /// What it is, by its first part.
    pub(super) fn kind(&self) -> Option<AdapterKind> {
        self.parts.keys().find_map(|part| part.kind())
    }

    /// The rank with the key that tells it; none of a LoKr of whole factors.
    pub(super) fn rank_and_key(&self) -> Option<(&str, i64)> {
        let told = [Part::A, Part::EmbeddingA, Part::HadaW1B, Part::LokrW2B, Part::LokrW1B];
        let (key, factor) = told.iter().find_map(|part| self.parts.get(part))?;
        Some((key, factor.size().first().copied().unwrap_or(0)))
    }

    pub(super) fn rank(&self) -> Option<i64> {
        self.rank_and_key().map(|(_, r)| r)
    }

    /// The alpha that stands there; sd-scripts and LyCORIS take 0 for none.
    pub(super) fn alpha(&self) -> Result<Option<f64>> {
        let Some((key, alpha)) = self.parts.get(&Part::Alpha) else { return Ok(None) };
        if alpha.numel() != 1 {
            return Err(Error::Mismatch {
                name: key.clone(),
                expected: "one number".into(),
                found: format!("{:?}", alpha.size()),
            });
        }
        let alpha = alpha.f_to_kind(Kind::Double)?.f_flatten(0, -1)?.f_double_value(&[0])?;
        Ok(Some(alpha).filter(|alpha| *alpha != 0.0))
    }

    /// Adds the keys of what it lacks, and of what it can't have.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for parts that contradict each other,
    /// [`Error::Unsupported`] for a DoRA of LoHa or LoKr.
    pub(super) fn check(&self, file: &Path, missing: &mut Vec<String>, unexpected: &mut Vec<String>) -> Result<()> {
        for (one, other) in PAIRS {
            match (self.parts.get(&one), self.parts.get(&other)) {
                (Some((key, _)), None) | (None, Some((key, _))) => missing.push(format!("the other half of {key}")),
                _ => {}
            }
        }
        let factors = self.parts.iter().filter(|(part, _)| **part != Part::DoraScale);
        let kinds: Vec<_> = factors.filter_map(|(part, (key, _))| Some((part.kind()?, key))).collect();
        if let Some((kind, one)) = kinds.first() {
            if let Some((_, other)) = kinds.iter().find(|(other, _)| other != kind) {
                return Err(twice(file, one, other));
            }
            if let Some((dora, _)) = self.parts.get(&Part::DoraScale).filter(|_| *kind != AdapterKind::Lora) {
                return Err(Error::Unsupported { fields: vec![format!("{dora}: DoRA of {kind}, as in {one}")] });
            }
        }
        for (whole, half, name) in [(Part::LokrW1, Part::LokrW1A, "lokr_w1"), (Part::LokrW2, Part::LokrW2A, "lokr_w2")]
        {
            match (self.parts.get(&whole), self.parts.get(&half)) {
                (Some((one, _)), Some((other, _))) => return Err(twice(file, one, other)),
                (None, None) if self.kind() == Some(AdapterKind::Lokr) => {
                    missing.push(format!("{name} of {}", self.name));
                }
                _ => {}
            }
        }
        if self.kind().is_none() {
            unexpected.extend(self.keys());
        }
        let lonely = NEEDS.iter().filter(|(_, needed)| !needed.iter().any(|part| self.has(*part)));
        unexpected.extend(lonely.filter_map(|(part, _)| Some(self.parts.get(part)?.0.clone())));
        Ok(())
    }

    /// The same parts as PEFT has them.
    ///
    /// A core between A and B is multiplied into A, in f64 and rounded once; a
    /// core of a kernel over one dimension gets a second one of size 1; DoRA's m
    /// has the sizes of its layer.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a core that doesn't fit;
    /// [`Error::Unsupported`] for a DoRA by input features.
    pub(super) fn into_peft(mut self) -> Result<Self> {
        if let (Some((key, core)), Some((_, a))) = (self.parts.remove(&Part::Mid), self.parts.get_mut(&Part::A)) {
            *a = with_core(&key, &core, a)?;
        }
        if let Some((key, scale)) = self.parts.remove(&Part::DoraScale) {
            let rows = self.size(Part::B).and_then(|sizes| sizes.first().copied()).unwrap_or(0);
            let found = scale.size();
            if found.first() != Some(&rows) || found.iter().skip(1).any(|&size| size != 1) {
                let what = format!("{key} {found:?}, where one value for each of {rows} outputs is known");
                return Err(Error::Unsupported { fields: vec![what] });
            }
            let mut sizes = vec![rows];
            let dims = self.size(Part::A).map_or(2, |sizes| sizes.len());
            if dims > 2 {
                sizes.insert(0, 1);
                sizes.resize(dims, 1);
            }
            self.parts.insert(Part::Magnitude, (key, scale.f_reshape(sizes)?));
        }
        for part in [Part::HadaT1, Part::HadaT2, Part::LokrT2] {
            if let Some((_, core)) = self.parts.get_mut(&part).filter(|(_, core)| core.dim() == 3) {
                *core = core.f_unsqueeze(-1)?;
            }
        }
        Ok(self)
    }

    /// Output and input features of the weight of a linear layer.
    pub(super) fn features(&self) -> Option<[i64; 2]> {
        let matrix = |part| <[i64; 2]>::try_from(self.size(part)?).ok();
        match self.kind()? {
            AdapterKind::Lora => Some([matrix(Part::B)?[0], matrix(Part::A)?[1]]),
            AdapterKind::Loha if self.has(Part::HadaT1) => None,
            AdapterKind::Loha => Some([matrix(Part::HadaW1A)?[0], matrix(Part::HadaW1B)?[1]]),
            AdapterKind::Lokr if self.has(Part::LokrT2) => None,
            AdapterKind::Lokr => {
                let left =
                    matrix(Part::LokrW1).or_else(|| Some([matrix(Part::LokrW1A)?[0], matrix(Part::LokrW1B)?[1]]))?;
                let right =
                    matrix(Part::LokrW2).or_else(|| Some([matrix(Part::LokrW2A)?[0], matrix(Part::LokrW2B)?[1]]))?;
                Some([left[0].checked_mul(right[0])?, left[1].checked_mul(right[1])?])
            }
        }
    }

    /// The module whose weight is these rows of this one's.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for rows of a Kronecker product that are no whole
    /// blocks of it.
    pub(super) fn rows(&self, start: i64, length: i64) -> Result<Module> {
        let block = self.size(Part::LokrW2).or_else(|| self.size(Part::LokrW2A)).map_or(1, |sizes| sizes[0].max(1));
        let mut parts = BTreeMap::new();
        for (part, (key, tensor)) in &self.parts {
            let tensor = match part {
                Part::B | Part::DoraScale | Part::HadaW1A | Part::HadaW2A => tensor.f_narrow(0, start, length)?,
                Part::LokrW1 | Part::LokrW1A if start % block == 0 && length % block == 0 => {
                    tensor.f_narrow(0, start / block, length / block)?
                }
                Part::LokrW1 | Part::LokrW1A => {
                    let what = format!("{key}: rows {start} to {} of a Kronecker product by {block}", start + length);
                    return Err(Error::Unsupported { fields: vec![what] });
                }
                _ => tensor.shallow_clone(),
            };
            parts.insert(*part, (key.clone(), tensor));
        }
        Ok(Module { name: self.name.clone(), parts })
    }
}

pub(super) fn twice(file: &Path, one: &str, other: &str) -> Error {
    Error::corrupt(file, format!("{one} and {other} are both for one part of a module"))
}

/// Σq core\[p, q, kernel…\] · a\[q, i\], which is A of a plain convolution: of
/// LoCon's three factors (LyCORIS, arXiv:2309.14859).
fn with_core(key: &str, core: &Tensor, a: &Tensor) -> Result<Tensor> {
    let (sizes, rest) = (core.size(), a.size());
    let fits = sizes.len() > 2 && sizes.len() == rest.len() && sizes[1] == rest[0] && rest[2..].iter().all(|&k| k == 1);
    if !fits {
        let expected = format!("(r, r, kernel…) beside lora_down (r, in, 1…), which is {rest:?}");
        return Err(Error::Mismatch { name: key.into(), expected, found: format!("{sizes:?}") });
    }
    let kind = a.f_kind()?;
    let product = Tensor::f_einsum(
        "pqk,qi->pik",
        &[core.f_flatten(2, -1)?.f_to_kind(Kind::Double)?, a.f_flatten(1, -1)?.f_to_kind(Kind::Double)?],
        None::<i64>,
    )?;
    let folded = [&[sizes[0], rest[1]], &sizes[2..]].concat();
    Ok(product.f_to_kind(kind)?.f_reshape(folded)?)
}
