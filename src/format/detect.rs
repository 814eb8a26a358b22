//! Which layout a file has, told by its keys.

use super::AdapterFormat;
use super::diffusers::OLD_ENDS;
use super::keys::parse;
use crate::error::{Error, Result};
use std::fmt;
use std::path::Path;

/// The layout of an adapter's file, and what tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DetectedFormat {
    /// The layout.
    pub format: AdapterFormat,
    /// The parts of a pipeline that the file adapts, as diffusers calls them:
    /// `unet`, `text_encoder`, …; `""` for keys that name none.
    pub components: Vec<String>,
    /// What tells the layout.
    pub reason: String,
}

impl fmt::Display for DetectedFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.format, self.reason)?;
        match self.components.as_slice() {
            [] => Ok(()),
            [only] if only.is_empty() => Ok(()),
            components => write!(f, "; components: {}", components.join(", ")),
        }
    }
}

/// Layouts whose keys tell them from each other by how they begin.
const FAMILIES: [AdapterFormat; 5] = [
    AdapterFormat::Peft,
    AdapterFormat::Kohya,
    AdapterFormat::ComfyUi,
    AdapterFormat::Lycoris,
    AdapterFormat::Diffusers,
];

/// Beginnings of the last parts of keys that no adapter here has, with what
/// they belong to.
const OTHER_KINDS: [(&str, &str); 7] = [
    ("oft_", "OFT"),
    ("glora_", "GLoRA"),
    ("vera_lambda", "VeRA"),
    ("on_input", "IA3"),
    ("diff", "the whole difference of a weight, which would take the base's own place"),
    ("w_norm", "the difference of a norm's weight"),
    ("b_norm", "the difference of a norm's bias"),
];

/// Refuses keys of other adapters than LoRA, LoHa and LoKr, by name.
pub(super) fn refuse_other_kinds<'k>(keys: impl Iterator<Item = &'k str> + Clone) -> Result<()> {
    let found = OTHER_KINDS.iter().filter_map(|(mark, kind)| {
        let key = keys.clone().find(|key| key.rsplit('.').next().is_some_and(|end| end.starts_with(mark)))?;
        Some(format!("{kind}, as in {key}"))
    });
    match found.collect::<Vec<_>>() {
        fields if fields.is_empty() => Ok(()),
        fields => Err(Error::Unsupported { fields }),
    }
}

/// The layout of the file with these keys.
///
/// # Errors
/// [`Error::Unsupported`] for adapters of other kinds; [`Error::Corrupt`] for
/// no keys of a layout or keys of several; [`Error::Keys`] for keys of none
/// among others.
pub(super) fn detect<'k>(path: &Path, keys: impl Iterator<Item = &'k str> + Clone) -> Result<DetectedFormat> {
    refuse_other_kinds(keys.clone())?;
    let mut found: Vec<(AdapterFormat, Vec<&str>)> = FAMILIES.iter().map(|format| (*format, Vec::new())).collect();
    let mut unknown: Vec<&str> = Vec::new();
    for key in keys.clone() {
        match found.iter_mut().find(|(format, _)| parse(format.keys(), key).is_some()) {
            Some((_, known)) => known.push(key),
            None => unknown.push(key),
        }
    }
    found.retain(|(_, keys)| !keys.is_empty());
    match found.as_slice() {
        [] => {
            let some = unknown.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            let reason =
                format!("no keys of an adapter in a layout that is known; its {} keys begin {some}", unknown.len());
            Err(Error::corrupt(path, reason))
        }
        [(_, _)] if !unknown.is_empty() => {
            let unexpected = unknown.iter().map(|key| key.to_string()).collect();
            Err(Error::Keys { path: path.into(), missing: vec![], unexpected })
        }
        [(format, keys)] => Ok(describe(*format, keys)),
        several => {
            let each = several.iter().map(|(format, keys)| format!("{format}: {}", keys.join(", ")));
            let each = each.collect::<Vec<_>>().join("; ");
            Err(Error::corrupt(path, format!("keys of more than one layout ({each}); divide the file")))
        }
    }
}

fn describe(family: AdapterFormat, keys: &[&str]) -> DetectedFormat {
    let old = |key: &&&str| OLD_ENDS.iter().any(|(end, _)| key.ends_with(end));
    let (format, example) = match keys.iter().find(old) {
        Some(key) if family == AdapterFormat::Diffusers => (AdapterFormat::DiffusersOld, Some(key)),
        _ => (family, keys.iter().find(|key| !key.ends_with(".alpha")).or(keys.first())),
    };
    let mut components: Vec<String> =
        keys.iter().filter_map(|key| Some(family.keys().component(key)?.0.to_string())).collect();
    components.sort();
    components.dedup();
    let reason = format!("{} keys such as {}", keys.len(), example.unwrap_or(&""));
    DetectedFormat { format, components, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(keys: &[&str]) -> Result<DetectedFormat> {
        detect(Path::new("x"), keys.iter().copied())
    }

    #[test]
    fn keys_tell_the_layout() {
        let cases: [(&[&str], AdapterFormat, &[&str]); 12] = [
            (&["base_model.model.h.q.lora_A.weight"], AdapterFormat::Peft, &[""]),
            (&["transformer.b.0.to_q.lora_A.weight"], AdapterFormat::Diffusers, &["transformer"]),
            (&["b.0.to_q.lora_B.weight"], AdapterFormat::Diffusers, &[""]),
            (&["unet.a.to_k.lora.down.weight", "unet.f.lora_A.weight"], AdapterFormat::DiffusersOld, &["unet"]),
            (&["unet.attn1.processor.to_q_lora.down.weight"], AdapterFormat::DiffusersOld, &["unet"]),
            (
                &["text_encoder.q_proj.lora_linear_layer.up.weight", "unet.a.lora_A.weight"],
                AdapterFormat::DiffusersOld,
                &["text_encoder", "unet"],
            ),
            (
                &["lora_unet_a_to_q.lora_down.weight", "lora_te1_x.alpha"],
                AdapterFormat::Kohya,
                &["text_encoder", "unet"],
            ),
            (&["diffusion_model.b.lora_A.weight", "diffusion_model.b.alpha"], AdapterFormat::ComfyUi, &["transformer"]),
            (
                &["text_encoders.clip_l.transformer.a.lora_up.weight", "diffusion_model.b.lokr_w1"],
                AdapterFormat::ComfyUi,
                &["clip_l", "transformer"],
            ),
            (&["lycoris_b_0_to_q.lokr_w1", "lycoris_b_0_to_q.alpha"], AdapterFormat::Lycoris, &[""]),
            (&["lora_unet_b.hada_w1_a", "lora_unet_b.dora_scale"], AdapterFormat::Kohya, &["unet"]),
            (&["transformer.b.0.to_q.lokr_w2_a"], AdapterFormat::Diffusers, &["transformer"]),
        ];
        for (keys, format, components) in cases {
            let found = found(keys).unwrap();
            assert_eq!(found.format, format, "{keys:?}");
            assert_eq!(found.components, components, "{keys:?}");
            assert!(found.to_string().contains("keys such as"), "{found}");
        }
    }

    #[test]
    fn what_is_ambiguous_or_unknown_is_listed() {
        let error = found(&["lora_unet_x.lora_up.weight", "transformer.y.lora_A.weight"]).unwrap_err().to_string();
        assert!(error.contains("lora_unet_x.lora_up.weight") && error.contains("transformer.y"), "{error}");
        let error = found(&["lora_unet_x.lora_up.weight", "lora_unet_x.other", "betas"]).unwrap_err();
        let Error::Keys { unexpected, .. } = &error else { panic!("{error}") };
        assert_eq!(unexpected, &["lora_unet_x.other", "betas"]);
        let error = found(&["model.embed.weight"]).unwrap_err().to_string();
        assert!(error.contains("model.embed.weight"), "{error}");
        let error = found(&["lora_unet_x.on_input", "lora_unet_y.oft_blocks", "diffusion_model.z"]).unwrap_err();
        let Error::Unsupported { fields } = &error else { panic!("{error}") };
        assert_eq!(fields, &["OFT, as in lora_unet_y.oft_blocks", "IA3, as in lora_unet_x.on_input"]);
    }
}
