//! The calls by which a checkpoint reaches the disk.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// What saving checkpoints asks of a file system.
///
/// Whatever a [`Run`](crate::Run) changes on disk once it has begun, it changes
/// by one of these calls. An implementation of one's own can count them, slow
/// them down, or make each fail in turn; [`OsFileSystem`] is the real one.
pub trait FileSystem: fmt::Debug + Send + Sync {
    /// Makes a folder; its parent is there.
    ///
    /// # Errors
    /// The operating system's, as of every call here.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes a file, which must not be there yet, to write to.
    ///
    /// # Errors
    /// As above.
    fn create(&self, path: &Path) -> io::Result<Box<dyn SyncWrite>>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// As above.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Gives a file or folder another name in the same folder, at once.
    ///
    /// # Errors
    /// As above.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file or a link.
    ///
    /// # Errors
    /// As above.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty folder.
    ///
    /// # Errors
    /// As above.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// A file being written.
pub trait SyncWrite: Write {
    /// Makes what was written durable.
    ///
    /// # Errors
    /// The operating system's.
    fn sync(&mut self) -> io::Result<()>;
}

impl SyncWrite for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsFileSystem;

impl FileSystem for OsFileSystem {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SyncWrite>> {
        Ok(Box::new(File::create_new(path)?))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Elsewhere a folder can't be opened as a file.
        if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}
