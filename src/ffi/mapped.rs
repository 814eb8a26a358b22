//! A file mapped into memory.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// The bytes of a file, read as they are used.
#[derive(Debug)]
pub(crate) struct Mapped(Mmap);

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the mapping is private and read-only. If another process
        // writes to the file meanwhile, the bytes read are undefined, as they
        // are with `read`; cut short, the process is stopped with SIGBUS, not
        // led astray. What is read is checked as foreign data is.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Mapped(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Lets the memory of bytes go that are not needed again soon. Used again,
    /// they are read from the file again.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is of a file and never written to, so pages
            // that are dropped come back with the same bytes. That the advice
            // may be refused does no harm.
            let _ = unsafe { self.0.unchecked_advise_range(DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}
