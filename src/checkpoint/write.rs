//! Writing a checkpoint so that it is there as a whole, or not at all.

use super::fs::FileSystem;
use super::latest::folder_names;
use super::layout;
use super::manifest::{FileEntry, Manifest};
use super::snapshot::Files;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, IntoInnerError, Write};
use std::path::{Path, PathBuf};

/// Pieces are put together to so many bytes.
const BUFFER: usize = 1 << 20;

/// Writes a snapshot into a hidden sibling, the manifest last, syncs it, and
/// gives the folder its name.
///
/// Killed at any instant, it leaves the checkpoints from before, and at most a
/// hidden folder that the next call removes. On an error it leaves nothing.
///
/// The files are not read back: their hashes were taken of the bytes in memory,
/// and right after a write the system would answer from its cache. Whatever
/// reads a checkpoint verifies it.
pub(super) fn commit(disk: &dyn FileSystem, run_dir: &Path, snapshot: &dyn Files) -> Result<PathBuf> {
    sweep(disk, run_dir)?;
    let temporary = run_dir.join(layout::temporary(snapshot.step()));
    let result = fill(disk, &temporary, snapshot).and_then(|()| publish(disk, run_dir, snapshot.step(), &temporary));
    if result.is_err() {
        // What went wrong matters more than whether this works; the next sweep
        // tries again.
        let _ = remove_if_there(disk, &temporary);
    }
    result
}

fn fill(disk: &dyn FileSystem, dir: &Path, snapshot: &dyn Files) -> Result<()> {
    disk.create_dir(dir).map_err(Error::io(dir))?;
    let mut entries = BTreeMap::new();
    snapshot.each(&mut |name, pieces| {
        let path = dir.join(name);
        let (entry, written) = rayon::join(|| FileEntry::of(pieces), || write_synced(disk, &path, pieces));
        written?;
        entries.insert(name.to_string(), entry);
        Ok(())
    })?;
    let manifest = Manifest::new(snapshot.step(), snapshot.metric(), entries);
    write_synced(disk, &dir.join(layout::MANIFEST), &[&manifest.to_text()?])?;
    disk.sync_dir(dir).map_err(Error::io(dir))
}

fn write_synced(disk: &dyn FileSystem, path: &Path, pieces: &[&[u8]]) -> Result<()> {
    let mut file = BufWriter::with_capacity(BUFFER, disk.create(path).map_err(Error::io(path))?);
    let written = pieces.iter().try_for_each(|piece| file.write_all(piece));
    let file = written.and_then(|()| file.into_inner().map_err(IntoInnerError::into_error));
    file.and_then(|mut file| file.sync()).map_err(Error::io(path))
}

/// Renames the finished folder, past one of the same step if there is any.
fn publish(disk: &dyn FileSystem, run_dir: &Path, step: u64, temporary: &Path) -> Result<PathBuf> {
    let path = run_dir.join(layout::folder(step));
    let replaced = run_dir.join(layout::replaced(step));
    let rename = |from: &Path, to: &Path| disk.rename(from, to).map_err(Error::io(to));
    if is_there(&path) {
        discard(disk, run_dir, &layout::replaced(step))?;
        rename(&path, &replaced)?;
    }
    if let Err(error) = rename(temporary, &path) {
        // Under its other name the one from before would do as well.
        let _ = disk.rename(&replaced, &path);
        return Err(error);
    }
    disk.sync_dir(run_dir).map_err(Error::io(run_dir))?;
    if let Err(error) = discard(disk, run_dir, &layout::replaced(step)) {
        tracing::warn!(%error, "a replaced checkpoint could not be deleted");
    }
    Ok(path)
}

/// Deletes a folder of a run, if it is there. It loses its name first: killed
/// halfway, this leaves nothing that looks like a checkpoint.
pub(super) fn discard(disk: &dyn FileSystem, run_dir: &Path, name: &str) -> Result<()> {
    let path = run_dir.join(name);
    if !is_there(&path) {
        return Ok(());
    }
    let hidden = run_dir.join(layout::discarded(name));
    // One that could not be deleted earlier is in the way.
    remove_if_there(disk, &hidden)?;
    disk.rename(&path, &hidden).map_err(Error::io(&path))?;
    remove(disk, &hidden)
}

/// Removes what killed runs left behind, known by its name.
fn sweep(disk: &dyn FileSystem, run_dir: &Path) -> Result<()> {
    let names = folder_names(run_dir)?;
    let left_over = names.iter().filter(|name| layout::is_left_over(name));
    left_over.map(|name| run_dir.join(name)).try_for_each(|path| remove(disk, &path))
}

fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn remove_if_there(disk: &dyn FileSystem, path: &Path) -> Result<()> {
    if is_there(path) { remove(disk, path) } else { Ok(()) }
}

/// Removes a folder with all in it, or a link or file in its place.
fn remove(disk: &dyn FileSystem, path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).map_err(Error::io(path))?.is_dir();
    if !is_dir {
        return disk.remove_file(path).map_err(Error::io(path));
    }
    for entry in fs::read_dir(path).map_err(Error::io(path))? {
        remove(disk, &entry.map_err(Error::io(path))?.path())?;
    }
    disk.remove_dir(path).map_err(Error::io(path))
}
