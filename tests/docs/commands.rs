//! Commands: each is one that works from a clone.
//!
//! In a `console` block a command stands behind `$ `, and what follows is what it prints; in a `sh`
//! block every line is one. Words in capitals and paths stand for the reader's own.

use super::common::root;
use super::none_wrong;
use super::texts::{Text, source_below};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

#[allow(dead_code)]
#[path = "../../xtask/src/cli.rs"]
mod xtask;

#[allow(dead_code)]
#[path = "../../examples/convert.rs"]
mod convert;
#[allow(dead_code)]
#[path = "../../examples/demo/args.rs"]
mod demo;
#[allow(dead_code)]
#[path = "../../examples/finetune_llm/main.rs"]
mod finetune_llm;

// What the examples' modules take from their own roots.
use super::Result;

type Check = Result<(), String>;

#[test]
fn every_command_is_one_that_works() {
    let (mut wrong, mut count) = (Vec::new(), 0);
    // Where a reader of each text is by now.
    let mut folders: HashMap<String, PathBuf> = HashMap::new();
    for block in Text::blocks("console").into_iter().chain(Text::blocks("sh")) {
        let text = block.text.replace("\\\n", " ");
        let folder = folders.entry(block.file.clone()).or_insert(root().to_path_buf());
        for line in text.lines() {
            let command = match (&*block.language, line.strip_prefix("$ ")) {
                ("console", command) => command,
                _ => Some(line).filter(|line| !line.trim_start().starts_with('#')),
            };
            let Some(words) = command.map(words).filter(|words| !words.is_empty()) else { continue };
            count += 1;
            if let Err(why) = check(&words, folder) {
                wrong.push(format!("{}: {}: {why}", block.place(), words.join(" ")));
            }
        }
    }
    assert!(count > 10, "{count} commands");
    none_wrong(wrong);
}

/// As a shell would split it, without what follows a `#`.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in command.chars() {
        match (quote, c) {
            (Some(open), _) if open == c => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Checks one command, given in this folder.
fn check(words: &[String], folder: &mut PathBuf) -> Check {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match &words[..] {
        ["cd", to] => {
            folder.push(to);
            folder.is_dir().then_some(()).ok_or_else(|| format!("no {}", folder.display()))
        }
        ["export", assignment] => variable(assignment),
        // What is asked of a server is that server's to test.
        ["curl", rest @ ..] if rest.iter().any(|word| word.contains("localhost:")) => Ok(()),
        ["cargo", "xtask", rest @ ..] => xtask::parse(&os(rest)).map(drop),
        // The script of a bundle.
        ["./run", rest @ ..] => {
            let script = std::fs::read_to_string(root().join("xtask/src/bundle.sh")).map_err(|e| e.to_string())?;
            let bench = std::fs::read_to_string(root().join("benches/common/mod.rs")).map_err(|e| e.to_string())?;
            options(rest, |option| {
                script.contains(&format!("{option})")) || bench.contains(option) || option == "--nocapture"
            })
        }
        ["cargo", "run", rest @ ..] => run(rest, folder),
        ["cargo", "test", rest @ ..] => targets(rest, "--test", "tests"),
        ["cargo", "bench", rest @ ..] => targets(rest, "--bench", "benches"),
        ["cargo", "clean"] | ["cargo", "build"] => Ok(()),
        ["cargo", "+nightly", "fuzz", "run", rest @ ..] => fuzz(rest),
        ["python" | "target/python/bin/python", script, rest @ ..] => python(script, rest),
        [assignment, rest @ ..] if assignment.contains('=') => {
            variable(assignment)?;
            check(&rest.iter().map(|word| word.to_string()).collect::<Vec<_>>(), folder)
        }
        _ => Err("no such command is known here; see tests/docs/commands.rs".into()),
    }
}

fn os(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// `NAME=VALUE`, of which the guides or the code say what it means.
fn variable(assignment: &str) -> Check {
    let (name, _) = assignment.split_once('=').ok_or("expected NAME=VALUE")?;
    let known = ["LIBTORCH", "LIBTORCH_USE_PYTORCH", "CXX", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "RUST_LOG"];
    let own = name.starts_with("TCH_PEFT_") && source_below(&root().join("tests"))?.contains(name);
    (own || known.contains(&name)).then_some(()).ok_or_else(|| format!("no variable {name}"))
}

/// `cargo fuzz run`, of a target that is there.
fn fuzz(words: &[&str]) -> Check {
    let manifest = std::fs::read_to_string(root().join("fuzz/Cargo.toml")).map_err(|e| format!("fuzz: {e}"))?;
    let is_target = |word: &&str| manifest.contains(&format!("name = \"{word}\""));
    words.iter().any(is_target).then_some(()).ok_or_else(|| "no such target in fuzz/Cargo.toml".into())
}

/// `cargo test` or `cargo bench`, of files that are there, with options that they know.
fn targets(words: &[&str], flag: &str, folder: &str) -> Check {
    let at = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (ours, theirs) = words.split_at(at);
    // What all benches understand.
    let mut source = std::fs::read_to_string(root().join("benches/common/mod.rs")).map_err(|e| e.to_string())?;
    let mut ours = ours.iter();
    while let Some(word) = ours.next() {
        match *word {
            "--workspace" | "--doc" | "--release" => {}
            word if word == flag => source += &target(folder, ours.next().ok_or("a name is missing")?)?,
            other => return Err(format!("{other} is not looked at here")),
        }
    }
    let known_everywhere = ["--nocapture", "--ignored", "--exact", "--test-threads"];
    options(theirs, |option| known_everywhere.contains(&option) || source.contains(option))
}

/// The code of a test, bench or example of this name.
fn target(folder: &str, name: &str) -> Result<String, String> {
    let folder = root().join(folder);
    let file = folder.join(format!("{name}.rs"));
    if file.exists() {
        return std::fs::read_to_string(file).map_err(|e| e.to_string());
    }
    if !folder.join(name).join("main.rs").exists() {
        return Err(format!("no {name} in {}", folder.display()));
    }
    source_below(&folder.join(name))
}

fn options(words: &[&str], known: impl Fn(&str) -> bool) -> Check {
    let unknown = words.iter().find(|word| word.starts_with("--") && **word != "--" && !known(word));
    unknown.map_or(Ok(()), |word| Err(format!("no option {word}")))
}

/// An example, or a program with a manifest of its own.
fn run(words: &[&str], folder: &Path) -> Check {
    let at = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (ours, theirs) = (&words[..at], words.get(at + 1..).unwrap_or_default());
    let value = |flag: &str| ours.iter().position(|word| *word == flag).and_then(|at| ours.get(at + 1)).copied();
    let known = |option: &str| ["--release", "--example", "--manifest-path"].contains(&option);
    options(ours, known)?;
    let manifest = value("--manifest-path").map(|path| root().join(path));
    let manifest = manifest.or((folder != root()).then(|| folder.join("Cargo.toml")));
    if let Some(manifest) = manifest {
        if !manifest.exists() {
            return Err(format!("no {}", manifest.display()));
        }
        let source = source_below(&manifest.with_file_name("src"))?;
        return options(theirs, |option| source.contains(option));
    }
    let name = value("--example").ok_or("which example?")?;
    target("examples", name)?;
    let args = os(theirs);
    let failed = |error: Box<dyn std::error::Error>| error.to_string();
    match name {
        "demo" => demo::parse(args).map(drop).map_err(failed),
        "finetune_llm" => parsed(finetune_llm::run(with_help(args))),
        "convert" => convert::parse(args).map(drop).map_err(failed),
        "charts" => super::tables::charts::parse(args).map(drop).map_err(failed),
        "inspect_checkpoint" => match theirs {
            [folder] if !folder.starts_with('-') => Ok(()),
            _ => Err("expected one folder".into()),
        },
        // A help names the option.
        _ => {
            let source = source_below(&root().join("examples"))?;
            options(theirs, |option| source.contains(&format!("  {option} ")))
        }
    }
}

/// A program that answers `--help` once it has understood all that stands before it.
fn with_help(mut args: Vec<OsString>) -> Vec<OsString> {
    args.push("--help".into());
    args
}

fn parsed(code: u8) -> Check {
    if code == 0 { Ok(()) } else { Err("its arguments are not understood".into()) }
}

/// A script of this repository, with options that its parser has.
fn python(script: &str, words: &[&str]) -> Check {
    let source = std::fs::read_to_string(root().join(script)).map_err(|e| format!("{script}: {e}"))?;
    options(words, |option| source.contains(&format!("\"{}\"", option.split('=').next().unwrap_or(option))))
}
