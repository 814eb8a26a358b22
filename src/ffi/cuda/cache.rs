//! Compiled programs on disk.
//!
//! A file is named by a hash of all that went into it and holds its own, so
//! that one that was torn or changed is known and made again. The cache is a
//! convenience: without a place to write to, programs are compiled in every
//! process.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of a hash.
const HASH: usize = blake3::OUT_LEN;

/// A folder of compiled programs.
#[derive(Debug)]
pub(super) struct Cache(Option<PathBuf>);

impl Cache {
    /// The folder that the environment names: `TCH_PEFT_CACHE`, or `tch-peft` in
    /// `XDG_CACHE_HOME` or in `~/.cache`.
    pub(super) fn of_environment() -> Self {
        Cache(folder(|name| std::env::var_os(name)))
    }

    /// The program of this key: from its file, or else made and kept.
    pub(super) fn get_or_make<E>(
        &self,
        key: blake3::Hash,
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let Some(folder) = &self.0 else { return make() };
        let path = folder.join(format!("{}.cubin", key.to_hex()));
        if let Some(program) = read(&path) {
            return Ok(program);
        }
        let program = make()?;
        if let Err(error) = write(folder, &path, &program) {
            tracing::warn!(
                path = %path.display(), %error,
                "a compiled CUDA program can't be kept and will be compiled again by the next process; \
                 set TCH_PEFT_CACHE to a folder that can be written"
            );
        }
        Ok(program)
    }
}

fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let variable = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("TCH_PEFT_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("tch-peft")))
        .or_else(|| Some(variable("HOME")?.join(".cache/tch-peft")))
}

/// The program in a file, if it is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let hash: [u8; HASH] = *bytes.first_chunk()?;
    let program = bytes.split_off(HASH);
    if blake3::hash(&program) != hash {
        tracing::warn!(path = %path.display(), "a compiled CUDA program is damaged and will be compiled again");
        return None;
    }
    Some(program)
}

fn write(folder: &Path, path: &Path, program: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(blake3::hash(program).as_bytes())?;
    file.write_all(program)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// What the cache answers, and whether it had to ask.
    fn get(cache: &Cache, key: &str, made: &[u8]) -> (Vec<u8>, bool) {
        let mut asked = false;
        let make = || {
            asked = true;
            Ok::<_, Infallible>(made.to_vec())
        };
        let Ok(program) = cache.get_or_make(blake3::hash(key.as_bytes()), make);
        (program, asked)
    }

    #[test]
    fn a_program_is_made_once_and_again_when_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache(Some(folder.path().join("not/there/yet")));
        assert_eq!(get(&cache, "a", b"one"), (b"one".to_vec(), true));
        assert_eq!(get(&cache, "a", b"two"), (b"one".to_vec(), false));
        assert_eq!(get(&cache, "b", b"three"), (b"three".to_vec(), true));
        let path = folder.path().join("not/there/yet").join(format!("{}.cubin", blake3::hash(b"a").to_hex()));
        let whole = std::fs::read(&path).unwrap();
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..10], &[], &changed] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(get(&cache, "a", b"one"), (b"one".to_vec(), true));
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn without_a_place_to_write_programs_are_made_each_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for cache in [Cache(None), Cache(Some(file.path().join("below a file")))] {
            assert_eq!(get(&cache, "a", b"one"), (b"one".to_vec(), true));
            assert_eq!(get(&cache, "a", b"one"), (b"one".to_vec(), true));
        }
    }

    #[test]
    fn the_environment_names_the_folder() {
        let of = |variables: &[(&str, &str)]| {
            folder(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
        };
        let all = [("TCH_PEFT_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(of(&all), Some("/a".into()));
        assert_eq!(of(&all[1..]), Some("/b/tch-peft".into()));
        assert_eq!(of(&all[2..]), Some("/c/.cache/tch-peft".into()));
        assert_eq!(of(&[("TCH_PEFT_CACHE", ""), ("HOME", "/c")]), Some("/c/.cache/tch-peft".into()));
        assert_eq!(of(&[]), None);
    }
}
