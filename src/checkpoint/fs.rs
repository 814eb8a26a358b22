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
///
/// ```
/// use std::{io, path::Path};
/// use tch_peft::checkpoint::{FileSystem, OsFileSystem, SyncWrite};
///
/// /// A disk that is always full.
/// #[derive(Debug)]
/// struct Full;
///
/// impl FileSystem for Full {
///     fn create(&self, _: &Path) -> io::Result<Box<dyn SyncWrite>> {
///         Err(io::ErrorKind::StorageFull.into())
///     }
///     fn create_dir(&self, path: &Path) -> io::Result<()> {
///         OsFileSystem.create_dir(path)
///     }
///     fn sync_dir(&self, path: &Path) -> io::Result<()> {
///         OsFileSystem.sync_dir(path)
///     }
///     fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
///         OsFileSystem.rename(from, to)
///     }
///     fn remove_file(&self, path: &Path) -> io::Result<()> {
///         OsFileSystem.remove_file(path)
///     }
///     fn remove_dir(&self, path: &Path) -> io::Result<()> {
///         OsFileSystem.remove_dir(path)
///     }
/// }
/// # use std::sync::Arc;
/// # use tch::{Device, nn};
/// # use tch_peft::{AdamW, Base, Error, LoraConfig, LoraModel, Parts, Run, Sampler, Schedule};
/// # let dir = tempfile::tempdir().unwrap();
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "proj", 8, 8, Default::default());
/// # let config = LoraConfig::builder().r(2).target_modules(["proj"]).build()?;
/// # let mut model = LoraModel::wrap(Base::new(vs, net), config)?;
/// # let mut optimizer = AdamW::builder().build(model.trainable_parameters())?;
/// # let (schedule, mut sampler) = (Schedule::constant(), Sampler::new(100, 10, 0)?);
/// # let mut parts = Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler);
/// let mut run = Run::builder(dir.path()).every(1).file_system(Arc::new(Full)).build()?;
/// run.resume_or_start(&mut parts)?;
/// assert!(matches!(run.step(&mut parts), Err(Error::NotSaved { step: 1, .. })));
/// # Ok::<(), tch_peft::Error>(())
/// ```
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
