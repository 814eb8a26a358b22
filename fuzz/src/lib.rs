//! Every reader of files that others wrote, as a target for fuzzing.
//!
//! A target takes the contents of a few files, writes them into a folder and
//! opens it. An error is fine. What is accepted must be sound: the shapes of the
//! model, no NaN, and the same again after it was saved and loaded. A panic is a
//! defect, and so is memory beyond what the files account for, which whoever runs
//! the targets watches.

mod adapters;
mod checkpoints;
mod models;

use std::path::Path;

/// A reader and valid files for it.
pub struct Target {
    pub name: &'static str,
    /// The names of its files. One of no bytes is not written.
    pub files: &'static [&'static str],
    /// Valid contents, made in an empty folder.
    pub seeds: fn(&Path) -> Vec<Vec<Vec<u8>>>,
    /// Opens a folder with the files: whether they were accepted.
    pub open: fn(&Path) -> bool,
}

pub const TARGETS: [Target; 6] = [
    adapters::PEFT,
    adapters::FILE,
    models::QUANTIZED,
    models::DENSE_SHARDS,
    checkpoints::CHECKPOINT,
    checkpoints::MANIFEST,
];

impl Target {
    /// Opens files with these contents: whether they were accepted.
    ///
    /// # Panics
    /// If something was accepted that isn't sound.
    pub fn run(&self, contents: &[Vec<u8>]) -> bool {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write(folder.path(), self.files, contents);
        (self.open)(folder.path())
    }
}

/// Runs a target on files in one piece, as libFuzzer has them: each but the last
/// after its length in four bytes.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.into_iter().find(|target| target.name == name).expect("a target of this name");
    target.run(&divided(data, target.files.len()));
}

/// Several files in one piece; see [`run`].
pub fn joined(contents: &[Vec<u8>]) -> Vec<u8> {
    let mut data = Vec::new();
    for (i, file) in contents.iter().enumerate() {
        if i + 1 < contents.len() {
            data.extend((file.len() as u32).to_le_bytes());
        }
        data.extend(file);
    }
    data
}

fn divided(mut data: &[u8], count: usize) -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    while files.len() + 1 < count {
        let (length, rest) = data.split_at(data.len().min(4));
        let length = length.try_into().map_or(0, u32::from_le_bytes) as usize;
        let (file, rest) = rest.split_at(rest.len().min(length));
        files.push(file.to_vec());
        data = rest;
    }
    files.push(data.to_vec());
    files
}

fn write(folder: &Path, names: &[&str], contents: &[Vec<u8>]) {
    for (name, content) in names.iter().zip(contents).filter(|(_, content)| !content.is_empty()) {
        std::fs::write(folder.join(name), content).expect("a file in a temporary folder");
    }
}

/// The files of these names, none of no bytes.
fn contents(folder: &Path, names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| std::fs::read(folder.join(name)).unwrap_or_default()).collect()
}
