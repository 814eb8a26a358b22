//! The layout of LyCORIS' own wrapper, which SimpleTuner trains with: `lycoris_`,
//! the module's path with underscores for its dots, and an end with a dot.

use super::keys::{KeyLayout, Part};
use super::kohya;

const PREFIX: &str = "lycoris_";

pub(super) struct Keys;

impl KeyLayout for Keys {
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        key.strip_prefix(PREFIX).map(|rest| ("", rest))
    }

    fn prefix(&self, _component: &str) -> String {
        PREFIX.into()
    }

    fn names(&self, _component: &str, path: &str) -> Vec<String> {
        vec![path.replace('.', "_")]
    }

    fn ends(&self) -> &'static [(&'static str, Part)] {
        &kohya::ENDS
    }
}
