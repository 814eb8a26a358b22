//! Names of the folders and files of a run.

/// The adapter's tensors, as HF PEFT names the file.
pub(super) const ADAPTER: &str = "adapter_model.safetensors";
/// The LoRA configuration, as HF PEFT names the file.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The optimizer's tensors.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
/// The tensors of the run's further parts; there only if it has any.
pub(super) const PARTS: &str = "parts.safetensors";
/// Step, schedule, sampler, random generators, the caller's own value.
pub(super) const TRAINING_STATE: &str = "training_state.json";
/// The identity of the base.
pub(super) const BASE: &str = "base.json";
/// Versions, machine and settings.
pub(super) const ENVIRONMENT: &str = "environment.json";
/// Size and hash of the others; written last.
pub(super) const MANIFEST: &str = "manifest.json";
/// Held open and locked by the run that writes into the folder.
pub(super) const LOCK: &str = ".run.lock";

/// What every checkpoint has.
pub(super) const REQUIRED: [&str; 6] = [ADAPTER, ADAPTER_CONFIG, OPTIMIZER, TRAINING_STATE, BASE, ENVIRONMENT];

const PREFIX: &str = "checkpoint-";
/// A checkpoint that makes way for a new one of the same step. It still counts
/// as a checkpoint, so that there is one at every instant.
const REPLACED: &str = ".replaced";

/// `checkpoint-00000400`.
pub(super) fn folder(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// `checkpoint-00000400.replaced`.
pub(super) fn replaced(step: u64) -> String {
    format!("{}{REPLACED}", folder(step))
}

/// `.checkpoint-00000400.tmp`: being written.
pub(super) fn temporary(step: u64) -> String {
    format!(".{}.tmp", folder(step))
}

/// `.<name>.old`: being deleted.
pub(super) fn discarded(name: &str) -> String {
    format!(".{name}.old")
}

/// Whether a folder of this name may hold a checkpoint: `checkpoint-*`.
pub(super) fn may_be_checkpoint(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Whether the name is one that this crate gives a checkpoint.
pub(super) fn is_own(name: &str) -> bool {
    let name = name.strip_suffix(REPLACED).unwrap_or(name);
    name.strip_prefix(PREFIX).is_some_and(|step| step.len() >= 8 && step.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether the name is that of a folder left over by a run that was killed
/// while it wrote or deleted a checkpoint.
pub(super) fn is_left_over(name: &str) -> bool {
    let name = name.strip_prefix('.');
    let name = name.and_then(|name| name.strip_suffix(".tmp").or(name.strip_suffix(".old")));
    name.is_some_and(is_own)
}

/// Whether the name is that of a file right inside its folder.
pub(super) fn is_plain(name: &str) -> bool {
    let separator = |c: char| matches!(c, '/' | '\\' | ':' | '\0');
    !(name.is_empty() || name == "." || name == ".." || name.contains(separator))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_are_told_from_foreign_ones() {
        for name in [folder(400), folder(123_456_789), replaced(400)] {
            assert!(is_own(&name) && may_be_checkpoint(&name) && !is_left_over(&name), "{name}");
            assert!(is_left_over(&discarded(&name)), "{name}");
        }
        assert!(is_left_over(&temporary(400)));
        for name in ["checkpoint-500", "checkpoint-old", "checkpoint-0000040x", ".checkpoint-old.tmp", "x.old"] {
            assert!(!is_own(name) && !is_left_over(name), "{name}");
        }
    }

    #[test]
    fn paths_are_not_plain_names() {
        assert!(is_plain("a.json") && is_plain("..a"));
        for name in ["", ".", "..", "../a", "/a", "a/b", "a\\b", "c:a"] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
