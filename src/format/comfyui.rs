//! The layout that ComfyUI loads and ai-toolkit writes: what ComfyUI calls the
//! part of the pipeline, a module's path, and PEFT's or kohya's end.
//!
//! The model that denoises is `diffusion_model`. A text encoder is
//! `text_encoders.<name>.transformer`, where the name is ComfyUI's own: `clip_l`,
//! `clip_g`, `t5xxl`, `qwen25_7b`, … Which text encoder of a pipeline that is in
//! diffusers depends on the pipeline, so it is the component's name here.

use super::diffusers::clip_names;
use super::keys::{KeyLayout, LOCON_ENDS, Part};

/// What ComfyUI calls the model that it denoises with.
const PREFIX: &str = "diffusion_model.";

/// What stands before and after the name of a text encoder.
const TEXT_ENCODERS: (&str, &str) = ("text_encoders.", ".transformer.");

const ENDS: [(&str, Part); 7] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".alpha", Part::Alpha),
    LOCON_ENDS[0],
    LOCON_ENDS[1],
];

pub(super) struct Keys;

impl KeyLayout for Keys {
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        if let Some(rest) = key.strip_prefix(PREFIX) {
            return Some(("transformer", rest));
        }
        let (name, rest) = key.strip_prefix(TEXT_ENCODERS.0)?.split_once(TEXT_ENCODERS.1)?;
        (!name.is_empty() && !name.contains('.')).then_some((name, rest))
    }

    fn prefix(&self, component: &str) -> String {
        match component {
            "" | "unet" | "transformer" => PREFIX.into(),
            name => format!("{}{name}{}", TEXT_ENCODERS.0, TEXT_ENCODERS.1),
        }
    }

    /// CLIP's text models go by their older paths.
    fn names(&self, component: &str, path: &str) -> Vec<String> {
        if component.starts_with("clip_") { clip_names(path) } else { vec![path.to_string()] }
    }

    fn ends(&self) -> &'static [(&'static str, Part)] {
        &ENDS
    }
}
