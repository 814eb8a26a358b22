//! Which checkpoints are kept.

use super::fs::FileSystem;
use super::latest::folder_names;
use super::layout;
use super::manifest::{Manifest, verify};
use super::write::discard;
use crate::error::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Which of a run's checkpoints are its best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Best {
    /// Those of the lowest metric, such as a loss.
    Lowest,
    /// Those of the highest metric, such as an accuracy.
    Highest,
}

/// A checkpoint is kept if any of these asks for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retention {
    /// The newest so many; 0 for all.
    pub(super) newest: usize,
    /// Those whose step is a multiple; 0 for none.
    pub(super) every: u64,
    /// The best so many of those that have a metric.
    pub(super) best: Option<(usize, Best)>,
}

impl Default for Retention {
    fn default() -> Self {
        Retention { newest: 2, every: 0, best: None }
    }
}

/// Whether each folder was found whole, so that it is read once only.
pub(super) type Judged = BTreeMap<String, bool>;

/// A checkpoint that may be deleted.
struct Candidate {
    name: String,
    step: u64,
    metric: Option<f64>,
}

/// Deletes what is no longer kept; the checkpoint of step `saved` always is.
///
/// Only folders with names and manifests of this crate are deleted. Damaged
/// ones, foreign ones and those of later steps, which the run has left behind
/// or not reached, stay, and don't count as kept.
pub(super) fn rotate(
    disk: &dyn FileSystem,
    run_dir: &Path,
    saved: u64,
    retention: Retention,
    judged: &mut Judged,
) -> Result<()> {
    if retention.newest == 0 {
        return Ok(());
    }
    let candidates = candidates(run_dir, saved)?;
    let mut is_whole = |candidate: &&Candidate| {
        let path = run_dir.join(&candidate.name);
        *judged.entry(candidate.name.clone()).or_insert_with(|| verify(&path).is_ok())
    };
    let saved = layout::folder(saved);
    let mut kept = BTreeSet::from([saved.clone()]);
    let mut keep = |chosen: Vec<&Candidate>| kept.extend(chosen.into_iter().map(|chosen| chosen.name.clone()));

    keep(candidates.iter().filter(|c| retention.every > 0 && c.step.is_multiple_of(retention.every)).collect());
    let newest = candidates.iter().filter(|c| c.name == saved || is_whole(c));
    keep(newest.take(retention.newest).collect());
    if let Some((count, best)) = retention.best {
        let mut ranked: Vec<_> = candidates.iter().filter_map(|c| Some((c.metric?, c))).collect();
        // Of equal ones the newest, which come first already.
        ranked.sort_by(|(a, _), (b, _)| match best {
            Best::Lowest => a.total_cmp(b),
            Best::Highest => b.total_cmp(a),
        });
        let ranked = ranked.into_iter().map(|(_, c)| c).filter(|c| c.name == saved || is_whole(c));
        keep(ranked.take(count).collect());
    }

    // The oldest first, so that killed halfway this has kept the newest.
    for Candidate { name, .. } in candidates.iter().rev().filter(|c| !kept.contains(&c.name)) {
        if judged.get(name) != Some(&false) {
            judged.remove(name);
            discard(disk, run_dir, name)?;
        }
    }
    Ok(())
}

/// This crate's checkpoints up to step `saved`, the newest first.
fn candidates(run_dir: &Path, saved: u64) -> Result<Vec<Candidate>> {
    let mut found = Vec::new();
    for name in folder_names(run_dir)? {
        let path = run_dir.join(&name);
        // A link is not a folder that this crate made.
        let own = layout::is_own(&name) && path.is_dir() && !path.is_symlink();
        if let (true, Ok(manifest)) = (own, Manifest::read(&path))
            && manifest.step <= saved
        {
            found.push(Candidate { step: manifest.step, metric: manifest.metric, name });
        }
    }
    // Of two of one step, the one with the proper name counts as the newer.
    let order = |c: &Candidate| (c.step, c.name == layout::folder(c.step));
    found.sort_by_key(|c| std::cmp::Reverse(order(c)));
    Ok(found)
}
