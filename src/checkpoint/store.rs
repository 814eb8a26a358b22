//! A run's folder, and the thread that writes into it.

use super::fs::FileSystem;
use super::lock::Lock;
use super::retention::{Judged, Retention, rotate};
use super::snapshot::{Files, Snapshot, Spare};
use super::write::commit;
use crate::error::{Error, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// A run's folder, locked for as long as anything may write into it.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) disk: Arc<dyn FileSystem>,
    pub(super) dir: PathBuf,
    pub(super) retention: Retention,
    pub(super) judged: Mutex<Judged>,
    pub(super) _lock: Arc<Lock>,
}

impl Store {
    /// Writes a checkpoint and deletes those no longer kept.
    fn write(&self, snapshot: &dyn Files) -> Result<PathBuf> {
        let step = snapshot.step();
        let disk = self.disk.as_ref();
        let not_saved = |error| Error::NotSaved { step, source: Box::new(error) };
        let path = commit(disk, &self.dir, snapshot).map_err(not_saved)?;
        tracing::info!(step, path = %path.display(), "saved a checkpoint");
        // The checkpoint is safe; old ones that stay are no reason to stop.
        let mut judged = self.judged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = rotate(disk, &self.dir, step, self.retention, &mut judged) {
            tracing::warn!(%error, "old checkpoints could not be deleted");
        }
        Ok(path)
    }
}

/// What a thread gives back.
type Written = (Result<PathBuf>, Spare);

/// Writes snapshots one after the other, here or on a thread.
#[derive(Debug)]
pub(super) struct Writer {
    store: Arc<Store>,
    background: bool,
    /// The step being written, by which thread.
    busy: Option<(u64, JoinHandle<Written>)>,
    /// The memory of the last copy: the next one is as large.
    spare: Spare,
}

impl Writer {
    pub(super) fn new(store: Store, background: bool) -> Self {
        Writer { store: Arc::new(store), background, busy: None, spare: Spare::new() }
    }

    /// Writes a snapshot, or has it written once the one before is done with.
    /// Answers what has been saved meanwhile.
    pub(super) fn write(&mut self, snapshot: Snapshot) -> Result<Option<PathBuf>> {
        if !self.background {
            return self.store.write(&snapshot).map(Some);
        }
        // An error of the one before must not keep this one from being tried.
        let before = self.flush();
        let step = snapshot.step;
        let copied = snapshot.copied(std::mem::take(&mut self.spare))?;
        let store = Arc::clone(&self.store);
        let thread = thread::Builder::new().name(format!("checkpoint {step}"));
        let spawned = thread.spawn(move || (store.write(&copied), copied.into_spare()));
        let not_saved = |source| Error::NotSaved { step, source: Box::new(Error::io(&self.store.dir)(source)) };
        self.busy = Some((step, spawned.map_err(not_saved)?));
        before
    }

    /// What has been saved since the last call, without waiting.
    pub(super) fn poll(&mut self) -> Result<Option<PathBuf>> {
        match &self.busy {
            Some((_, thread)) if thread.is_finished() => self.flush(),
            _ => Ok(None),
        }
    }

    /// Waits until nothing is being written.
    pub(super) fn flush(&mut self) -> Result<Option<PathBuf>> {
        let Some((step, thread)) = self.busy.take() else { return Ok(None) };
        let panicked = |_| {
            let source = Box::new(Error::corrupt(&self.store.dir, "the thread that wrote the checkpoint panicked"));
            (Err(Error::NotSaved { step, source }), Spare::new())
        };
        let (saved, spare) = thread.join().unwrap_or_else(panicked);
        self.spare = spare;
        saved.map(Some)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!(%error, "the last checkpoint of a run");
        }
    }
}
