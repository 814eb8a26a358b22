//! Commands are run, those of a text one after the other, in a shell and a folder with the files that they name.
//!
//! In a `console` block a command stands behind `$ `, and what follows is what it prints; in a `sh` block every line
//! is one. `cargo.sh` stands in for `cargo`: programs are those of the build for tests, and train for a few steps.

use super::common;
use super::none_wrong;
use super::texts::{Block, Text};
use rayon::prelude::*;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

#[allow(dead_code)]
#[path = "../../xtask/src/cli.rs"]
mod xtask;

/// Its commands are run by the tests of `examples/serve`.
const SERVING: &str = "docs/serving.md";

#[test]
fn every_command_runs() {
    let Some(python) = common::python() else { return };
    let dir = common::fresh_dir("docs_commands");
    let (files, tools) = (dir.join("files"), dir.join("bin"));
    for folder in [&files, &tools] {
        std::fs::create_dir(folder).unwrap();
    }
    common::peer("docs_files.py", &[&files]);
    link(&common::root().join("tests/docs/cargo.sh"), &tools.join("cargo"));
    let shell = Shell { tools, python };
    let run = "cargo run --example finetune_llm -- --model Qwen3-0.6B --data notes.jsonl --out runs/a";
    shell.run(run, &files).unwrap();

    let commands_of = |text: &Text| -> String {
        let blocks = text.blocks.iter().filter(|block| is_shell(block) && text.name != SERVING && !needs_gpu(block));
        blocks.map(|block| format!("echo at {} >&2\n{}", block.place(), commands(block))).collect()
    };
    let texts = Text::all().into_iter().map(|text| (commands_of(&text), text.name));
    let scripts: Vec<_> = texts.filter(|(script, _)| !script.is_empty()).collect();
    let count = scripts.len();
    // Most of them wait for a Python that starts: as many at a time as there are processors.
    let wrong = scripts.into_par_iter().filter_map(|(script, name)| {
        let folder = dir.join(name.replace('/', "_"));
        provide(&files, &folder);
        shell.run(&script, &folder).err().map(|why| format!("{name}: {why}"))
    });
    let wrong: Vec<String> = wrong.collect();
    assert!(count > 6, "commands in {count} texts");
    none_wrong(wrong);
}

/// What makes and starts the bundle for a machine with a GPU, and its bench, are understood by what reads them.
#[test]
fn commands_for_a_gpu_are_understood() {
    let text = |file: &str| std::fs::read_to_string(common::root().join(file)).unwrap();
    let (script, bench) = (text("xtask/src/bundle.sh"), text("benches/common/mod.rs") + &text("benches/cuda.rs"));
    let known = |option: &str| {
        script.contains(&format!("{option})")) || bench.contains(&format!("{option:?}")) || option == "--nocapture"
    };
    let (mut wrong, mut count) = (Vec::new(), 0);
    for block in Text::all().iter().flat_map(|text| &text.blocks).filter(|block| is_shell(block) && needs_gpu(block)) {
        for line in commands(block).lines() {
            let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with('#')).collect();
            count += 1;
            let problem = match &words[..] {
                ["cargo", "xtask", rest @ ..] => {
                    xtask::parse(&rest.iter().map(OsString::from).collect::<Vec<_>>()).err()
                }
                ["./run", rest @ ..] | ["cargo", "bench", "--bench", "cuda", "--", rest @ ..] => {
                    let mut options = rest.iter().filter(|word| word.starts_with("--") && word.len() > 2);
                    options.find(|option| !known(option)).map(|option| format!("no option {option}"))
                }
                _ => Some("not looked at here".into()),
            };
            wrong.extend(problem.map(|why| format!("{}: {line}: {why}", block.place())));
        }
    }
    assert!(count > 4, "{count} commands");
    none_wrong(wrong);
}

/// A shell in which the programs' names mean what they do here.
struct Shell {
    tools: PathBuf,
    python: PathBuf,
}

impl Shell {
    fn run(&self, script: &str, folder: &Path) -> Result<(), String> {
        let own = [&*self.tools, self.python.parent().unwrap()].map(Path::to_path_buf);
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&inherited))).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-euc", script]).current_dir(folder);
        shell.env("PATH", path).env("REAL_CARGO", env!("CARGO")).env("ROOT", common::root());
        shell.env("REAL_LIBTORCH", std::env::var_os("LIBTORCH").unwrap_or_default());
        shell.env("HF_HUB_OFFLINE", "1").env("PYTHONDONTWRITEBYTECODE", "1");
        let output = shell.output().map_err(|error| format!("sh: {error}"))?;
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        if output.status.success() { Ok(()) } else { Err(format!("{}\n{text}", output.status)) }
    }
}

fn is_shell(block: &Block) -> bool {
    ["sh", "console"].contains(&&*block.language)
}

fn needs_gpu(block: &Block) -> bool {
    ["./run", "--device cuda", "cuda.csv"].iter().any(|word| block.text.contains(word))
}

/// The commands of a block, as a shell reads them.
fn commands(block: &Block) -> String {
    if block.language == "sh" {
        return block.text.clone();
    }
    let (mut script, mut goes_on) = (String::new(), false);
    for line in block.text.lines() {
        if let Some(command) = line.strip_prefix("$ ").or(goes_on.then_some(line)) {
            script += &format!("{command}\n");
            goes_on = command.ends_with('\\');
        }
    }
    script
}

/// Links what the guides' files are to a folder for one of them.
fn provide(files: &Path, folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    for entry in std::fs::read_dir(files).unwrap() {
        let entry = entry.unwrap();
        link(&entry.path(), &folder.join(entry.file_name()));
    }
    for name in ["python", "target"] {
        link(&common::root().join(name), &folder.join(name));
    }
    // What is written there is not for the repository.
    let docs = common::root().join("docs");
    assert!(Command::new("cp").arg("-R").args([&docs, folder]).status().unwrap().success());
}

fn link(from: &Path, to: &Path) {
    std::os::unix::fs::symlink(from, to).unwrap();
}
