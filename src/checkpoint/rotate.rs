//! Deleting checkpoints that are no longer wanted.

use super::latest::folder_names;
use super::layout;
use super::manifest::Manifest;
use super::write::discard;
use crate::error::Result;
use std::path::Path;

/// Keeps the checkpoint of `saved`, just written and read back, and the newest
/// of the others, `keep` in all; 0 keeps all.
///
/// Only folders with names and manifests of this crate are deleted: foreign
/// ones and damaged ones stay, and don't count.
pub(super) fn rotate(run_dir: &Path, saved: u64, keep: usize) -> Result<()> {
    if keep == 0 {
        return Ok(());
    }
    let mut others = Vec::new();
    for name in folder_names(run_dir)? {
        let path = run_dir.join(&name);
        // A link is not a folder that this crate made.
        let own = layout::is_own(&name) && path.is_dir() && !path.is_symlink();
        if own
            && name != layout::folder(saved)
            && let Ok(manifest) = Manifest::read(&path)
        {
            others.push((manifest.step, name));
        }
    }
    others.sort();
    others.truncate((others.len() + 1).saturating_sub(keep));
    others.iter().try_for_each(|(_, name)| discard(run_dir, name))
}
