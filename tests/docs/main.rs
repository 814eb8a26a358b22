//! The texts beside the code: every block in them is compiled, run or parsed, every link leads
//! somewhere, every name is one of the crate's, and every table of figures is the one measured.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod links;
mod names;
mod python;
mod tables;
mod texts;

use texts::Text;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Languages of blocks, with what looks after them.
const LANGUAGES: [(&str, &str); 7] = [
    ("rust", "doctests, through the table in src/lib.rs"),
    ("console", "commands.rs"),
    ("sh", "commands.rs"),
    ("python", "python.rs"),
    ("toml", "below"),
    ("json", "below"),
    ("text", "free: what a program prints"),
];

/// Fails with all that is wrong, not only the first.
#[track_caller]
fn none_wrong(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_block_has_a_language_that_is_checked() {
    let mut wrong = Vec::new();
    let table = std::fs::read_to_string(common::root().join("src/lib.rs")).unwrap();
    for text in Text::all() {
        for block in &text.blocks {
            let (language, attributes) = block.language.split_once(',').unwrap_or((&block.language, ""));
            if !LANGUAGES.iter().any(|(known, _)| *known == language) {
                wrong.push(format!("{}: {:?} is not checked by anything", block.place(), block.language));
            }
            if !matches!(attributes, "" | "no_run") {
                wrong.push(format!("{}: {attributes} keeps the block from being compiled", block.place()));
            }
            if language == "rust" && !table.contains(&format!("\"../{}\"", text.name)) {
                wrong.push(format!("{}: {} is not in src/lib.rs' table of texts", block.place(), text.name));
            }
        }
    }
    none_wrong(wrong);
}

/// Cargo reads the manifest that a block is a part of, and the versions are this crate's own.
#[test]
fn every_toml_block_is_a_manifest_of_today() {
    let dir = common::fresh_dir("docs_toml");
    std::fs::create_dir_all(dir.join("src")).unwrap();
    std::fs::write(dir.join("src/lib.rs"), "").unwrap();
    let own = std::fs::read_to_string(common::root().join("Cargo.toml")).unwrap();
    let mut count = 0;
    for block in Text::blocks("toml") {
        let manifest = format!("[package]\nname = \"user\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n{}", block.text);
        std::fs::write(dir.join("Cargo.toml"), format!("{manifest}\n[workspace]\n")).unwrap();
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(&dir);
        let output = cargo.output().unwrap();
        assert!(output.status.success(), "{}: {}", block.place(), String::from_utf8_lossy(&output.stderr));
        for (name, line) in [("tch", "tch = { version = \""), ("tch-peft", "version = \"")] {
            let version = own.split_once(line).and_then(|(_, rest)| rest.split('"').next()).unwrap();
            let given = block.text.lines().find_map(|text| text.strip_prefix(&format!("{name} = \"")));
            let given = given.unwrap_or_else(|| panic!("{}: no {name}", block.place())).trim_end_matches('"');
            assert!(version.starts_with(given), "{}: {name} is {version}, not {given}", block.place());
        }
        count += 1;
    }
    assert!(count > 0);
}

/// One value, or one in each line.
#[test]
fn every_json_block_is_json() {
    for block in Text::blocks("json") {
        let values: Vec<_> = serde_json::Deserializer::from_str(&block.text).into_iter::<serde_json::Value>().collect();
        assert!(!values.is_empty() && values.iter().all(Result::is_ok), "{}: {values:?}", block.place());
    }
}
