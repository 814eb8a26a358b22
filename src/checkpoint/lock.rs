//! One writer to a run's folder.

use super::fs::{FileSystem, OsFileSystem};
use super::layout::LOCK;
use crate::error::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::path::Path;

/// Keeps other runs out of the folder while it lives; the operating system
/// ends it with the process, however that ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Makes the folder if need be and locks it. Since this creates a file, a
    /// folder that can't be written to is found out at the start of a run.
    pub(super) fn acquire(run_dir: &Path) -> Result<Self> {
        fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
        if let Some(parent) = run_dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            OsFileSystem.sync_dir(parent).map_err(Error::io(parent))?;
        }
        let path = run_dir.join(LOCK);
        let file = File::options().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::RunInUse { path: run_dir.into() }),
            Err(TryLockError::Error(error)) => {
                tracing::warn!(path = %path.display(), %error, "this file system has no locks; make sure that only one run writes here");
            }
        }
        Ok(Lock { _file: file })
    }
}
