//! The layout that ComfyUI loads and ai-toolkit writes for diffusion
//! transformers: `diffusion_model`, a module's path, and PEFT's or kohya's end.

use super::keys::{KeyLayout, Part};

/// What ComfyUI calls the model that it denoises with.
const PREFIX: &str = "diffusion_model.";

const ENDS: [(&str, Part); 5] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".alpha", Part::Alpha),
];

pub(super) struct Keys;

impl KeyLayout for Keys {
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        key.strip_prefix(PREFIX).map(|rest| ("transformer", rest))
    }

    fn prefix(&self, _component: &str) -> String {
        PREFIX.into()
    }

    fn names(&self, _component: &str, path: &str) -> Vec<String> {
        vec![path.to_string()]
    }

    fn ends(&self) -> &'static [(&'static str, Part)] {
        &ENDS
    }
}
