//! Which libtorch the build uses, and the link that leads cargo to it.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::Result;
use crate::python;

/// Where `.cargo/config.toml` says that libtorch is, from the root.
const LINK: &str = "target/libtorch";

/// Where the libtorch comes from.
#[derive(Debug, PartialEq)]
pub enum Libtorch {
    /// The torch of our Python environment, through `target/libtorch`.
    Venv,
    /// One that the user chose; it is left alone.
    Own {
        /// Its folder, or the name of the Python that has it.
        path: PathBuf,
        /// How we know, for the message.
        origin: &'static str,
    },
}

impl Libtorch {
    /// Finds out from the environment and from what `target/libtorch` is.
    pub fn find(root: &Path) -> Result<Self> {
        let own = |path: PathBuf, origin| Ok(Self::Own { path, origin });
        let link = root.join(LINK);
        if let Some(path) = own_setting(std::env::var_os("LIBTORCH").as_deref(), &link) {
            if !path.join("lib").is_dir() {
                return Err(format!(
                    "LIBTORCH is {}, which has no `lib` folder; \
                     name the folder that holds `lib` and `include`, or unset it",
                    path.display()
                )
                .into());
            }
            return own(path, "LIBTORCH is set");
        }
        if std::env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
            return own("the torch of your Python".into(), "LIBTORCH_USE_PYTORCH is set");
        }
        // A working link to elsewhere, or a folder, is nothing that we made.
        match link.canonicalize() {
            Ok(target) if is_ours(root, &target) || !target.join("lib").is_dir() => Ok(Self::Venv),
            Ok(target) => own(target, "it is what target/libtorch leads to"),
            Err(_) => Ok(Self::Venv),
        }
    }
}

/// The user's own `LIBTORCH`: one that is set, and not to the default, which
/// cargo exports to every program that it runs.
fn own_setting(value: Option<&OsStr>, default: &Path) -> Option<PathBuf> {
    let path = PathBuf::from(value.filter(|value| !value.is_empty())?);
    let same = path == default || matches!((resolved(&path), resolved(default)), (Some(a), Some(b)) if a == b);
    (!same).then_some(path)
}

/// The path with its parent's links followed, but not its own: the link itself
/// need not exist yet, and what it leads to may be named by a user too.
fn resolved(path: &Path) -> Option<PathBuf> {
    let parent = path.parent()?.canonicalize().ok()?;
    Some(parent.join(path.file_name()?))
}

fn is_ours(root: &Path, target: &Path) -> bool {
    let venv = python::Venv::at(root);
    let home = venv.dir().canonicalize();
    home.is_ok_and(|home| target.starts_with(home))
}

/// Makes `target/libtorch` lead to `torch`, unless it does.
pub fn link(root: &Path, torch: &Path) -> Result<()> {
    let link = root.join(LINK);
    let leads_there = |link: &Path| match (link.canonicalize(), torch.canonicalize()) {
        (Ok(now), Ok(wanted)) => now == wanted,
        _ => false,
    };
    if leads_there(&link) {
        return Ok(());
    }
    let failed = |error: io::Error| {
        format!(
            "cannot link {LINK} to {}: {error}; remove what is in the way, \
             or set LIBTORCH to that folder",
            torch.display()
        )
    };
    match std::fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error).into()),
        _ => {}
    }
    // Relative, so that the repository can be moved.
    let target = link.parent().and_then(|from| relative(from, torch));
    symlink(target.as_deref().unwrap_or(torch), &link).map_err(failed)?;
    println!("Linked {LINK} to {}.", torch.display());
    Ok(())
}

/// `to` as seen from the folder `from`, if it lies within.
fn relative(from: &Path, to: &Path) -> Option<PathBuf> {
    let inner = to.strip_prefix(from).ok()?;
    let plain = inner.components().all(|c| matches!(c, Component::Normal(_)));
    plain.then(|| inner.to_path_buf())
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_that_cargo_exports_is_not_the_users_own() {
        let default = Path::new("/repo/target/libtorch");
        let own = |value: &str| own_setting(Some(OsStr::new(value)), default);
        assert_eq!(own_setting(None, default), None);
        assert_eq!(own(""), None);
        assert_eq!(own("/repo/target/libtorch"), None);
        assert_eq!(own("/repo/target/libtorch/"), None);
        assert_eq!(own("/opt/libtorch"), Some("/opt/libtorch".into()));
    }

    #[test]
    fn a_path_through_a_link_is_recognised() {
        // `src/..` stands for any other way to write the same folder.
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let other = root.join("src/../libtorch");
        assert_eq!(own_setting(Some(other.as_os_str()), &root.join("libtorch")), None);
    }

    #[test]
    fn a_link_is_relative_only_within_target() {
        let from = Path::new("/repo/target");
        let inside = Path::new("/repo/target/python/lib/torch");
        assert_eq!(relative(from, inside), Some("python/lib/torch".into()));
        assert_eq!(relative(from, Path::new("/opt/torch")), None);
    }
}
