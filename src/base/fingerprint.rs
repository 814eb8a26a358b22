//! What identifies a base: each weight's name, shape, dtype, scheme and bytes.

use super::weights::{Weight, Weights, dtype_name};
use crate::error::Result;
use crate::ffi::bytes::TensorBytes;
use crate::quant::Scheme;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The identity of one weight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightPrint {
    /// Its name.
    pub name: String,
    /// Its dense shape.
    pub shape: Vec<i64>,
    /// Its dtype before packing, as safetensors names it (`F32`, `BF16`, …).
    pub dtype: String,
    /// How it is packed; `None` for a dense weight.
    pub scheme: Option<Scheme>,
    /// blake3 of its bytes as kept in memory, in hex. For a packed weight, of
    /// each of its tensors' names and bytes in turn.
    pub hash: String,
}

/// The identity of a base: that of each weight, sorted by name.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_peft::Base;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let base = Base::new(vs, net);
/// let print = base.fingerprint()?;
/// assert_eq!(print.weights[1].name, "proj.weight");
/// assert_eq!((print.weights[1].shape.as_slice(), print.weights[1].dtype.as_str()), (&[8, 8][..], "F32"));
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// One entry per weight.
    pub weights: Vec<WeightPrint>,
}

impl Fingerprint {
    pub(super) fn of(weights: &Weights) -> Result<Self> {
        let mut prints = Vec::new();
        let mut batch = Vec::new();
        let mut bytes = 0;
        for weight in weights.iter() {
            let unhashed = Unhashed::of(weight)?;
            bytes += unhashed.pieces.iter().map(|(_, piece)| piece.as_slice().len()).sum::<usize>();
            batch.push(unhashed);
            if bytes >= BATCH {
                prints.par_extend(std::mem::take(&mut batch).into_par_iter().map(Unhashed::hash));
                bytes = 0;
            }
        }
        prints.par_extend(batch.into_par_iter().map(Unhashed::hash));
        Ok(Fingerprint { weights: prints })
    }

    /// One line for each weight in which `found` differs from this, the
    /// recorded one. Empty if the bases are the same.
    pub fn differences(&self, found: &Fingerprint) -> Vec<String> {
        let by_name = |prints: &'_ Fingerprint| -> BTreeMap<String, WeightPrint> {
            prints.weights.iter().map(|w| (w.name.clone(), w.clone())).collect()
        };
        let (recorded, mut found) = (by_name(self), by_name(found));
        let mut lines = Vec::new();
        for (name, recorded) in recorded {
            match found.remove(&name) {
                None => lines.push(format!("{name}: recorded, but missing in this base")),
                Some(found) if found == recorded => {}
                Some(found) => lines.push(format!("{name}: {}", difference(&recorded, &found))),
            }
        }
        lines.extend(found.into_keys().map(|name| format!("{name}: not in the recorded base")));
        lines
    }
}

/// The first thing that differs, from the coarsest to the finest.
fn difference(recorded: &WeightPrint, found: &WeightPrint) -> String {
    let scheme = |s: &Option<Scheme>| s.map_or("dense".to_string(), |s| s.to_string());
    if recorded.shape != found.shape {
        format!("expected shape {:?}, found {:?}", recorded.shape, found.shape)
    } else if recorded.scheme != found.scheme {
        format!("expected {}, found {}", scheme(&recorded.scheme), scheme(&found.scheme))
    } else if recorded.dtype != found.dtype {
        format!("expected dtype {}, found {}", recorded.dtype, found.dtype)
    } else {
        "same shape and scheme, other values".into()
    }
}

/// Weights of so many bytes are hashed at a time: those of a device are in the
/// CPU's memory meanwhile.
const BATCH: usize = 256 << 20;

/// A weight about to be hashed.
struct Unhashed {
    /// Without the hash.
    print: WeightPrint,
    /// Its bytes, those of a packed one with names.
    pieces: Vec<(String, TensorBytes)>,
}

impl Unhashed {
    fn of(weight: &Weight) -> Result<Self> {
        let frozen = weight.site().map(|site| site.frozen());
        let mut pieces = Vec::new();
        let (shape, kind, scheme) = match &frozen {
            Some(packed) if packed.scheme().is_some() => {
                for (name, tensor) in packed.tensors()? {
                    pieces.push((name.to_string(), TensorBytes::of(&tensor)?));
                }
                (packed.sizes().to_vec(), packed.kind(), packed.scheme())
            }
            other => {
                let dense = other.as_ref().and_then(|dense| dense.as_dense());
                let dense = dense.as_ref().unwrap_or(&weight.tensor);
                pieces.push((String::new(), TensorBytes::of(dense)?));
                (dense.size(), dense.f_kind()?, None)
            }
        };
        let (name, dtype) = (weight.name.clone(), dtype_name(kind).into());
        Ok(Unhashed { print: WeightPrint { name, shape, dtype, scheme, hash: String::new() }, pieces })
    }

    fn hash(self) -> WeightPrint {
        let mut hasher = blake3::Hasher::new();
        for (name, bytes) in &self.pieces {
            hasher.update(name.as_bytes()).update_rayon(bytes.as_slice());
        }
        WeightPrint { hash: hasher.finalize().to_hex().to_string(), ..self.print }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(name: &str, scheme: Option<Scheme>, hash: &str) -> WeightPrint {
        let (name, dtype, hash) = (name.into(), "F32".into(), hash.into());
        WeightPrint { name, shape: vec![2, 2], dtype, scheme, hash }
    }

    #[test]
    fn differences_name_what_differs() {
        let recorded = Fingerprint {
            weights: vec![print("a", None, "1"), print("b", None, "1"), print("c", Some(Scheme::Int8), "1")],
        };
        let nf4 = Scheme::NF4;
        let found =
            Fingerprint { weights: vec![print("b", None, "2"), print("c", Some(nf4), "1"), print("d", None, "1")] };
        assert_eq!(
            recorded.differences(&found),
            [
                "a: recorded, but missing in this base",
                "b: same shape and scheme, other values",
                "c: expected int8, found nf4",
                "d: not in the recorded base",
            ]
        );
        assert!(recorded.differences(&recorded).is_empty());
    }
}
