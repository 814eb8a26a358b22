//! The layout of kohya's sd-scripts, which Stable Diffusion web UIs load.
//!
//! A key is a component, the module's path with underscores for its dots, and
//! an end with a dot: `lora_unet_mid_block_…_to_q.lora_down.weight`. The
//! underscores can't be turned back: a base's modules tell what a name means.

use super::diffusers::clip_names;
use super::keys::{KeyLayout, LOCON_ENDS, Part};

/// The components by what stands before their modules, as diffusers calls them.
const COMPONENTS: [(&str, &str); 6] = [
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
];

pub(super) const ENDS: [(&str, Part); 5] = [
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".alpha", Part::Alpha),
    LOCON_ENDS[0],
    LOCON_ENDS[1],
];

pub(super) struct Keys;

impl KeyLayout for Keys {
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        COMPONENTS.iter().find_map(|(prefix, component)| Some((*component, key.strip_prefix(prefix)?)))
    }

    /// Diffusion transformers go by `lora_unet_` too. Of the two names for a
    /// first text encoder this is the one in a file with a second.
    fn prefix(&self, component: &str) -> String {
        match component {
            "" | "unet" | "transformer" => "lora_unet_".into(),
            "text_encoder" => "lora_te1_".into(),
            "text_encoder_2" => "lora_te2_".into(),
            "text_encoder_3" => "lora_te3_".into(),
            other => format!("lora_{other}_"),
        }
    }

    /// sd-scripts knows CLIP's text model by its older paths.
    fn names(&self, component: &str, path: &str) -> Vec<String> {
        let of_clip = component.starts_with("text_encoder");
        let names = if of_clip { clip_names(path) } else { vec![path.to_string()] };
        names.iter().map(|name| name.replace('.', "_")).collect()
    }

    fn ends(&self) -> &'static [(&'static str, Part)] {
        &ENDS
    }
}
