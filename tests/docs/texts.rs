//! README.md and docs/*.md, taken apart.

use super::common::root;
use std::path::Path;

/// A text.
pub struct Text {
    /// `docs/resume.md`
    pub name: String,
    /// The lines outside of blocks, with their numbers.
    pub prose: Vec<(usize, String)>,
    pub blocks: Vec<Block>,
}

/// What lies between two fences.
pub struct Block {
    pub file: String,
    /// That of the fence.
    pub line: usize,
    /// What stands behind the fence: `rust,no_run`.
    pub language: String,
    pub text: String,
}

impl Block {
    pub fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

impl Text {
    /// All texts that a user reads.
    pub fn all() -> Vec<Text> {
        let mut names = vec!["README.md".to_string(), "CHANGELOG.md".to_string()];
        for entry in std::fs::read_dir(root().join("docs")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                names.push(format!("docs/{name}"));
            }
        }
        names.sort();
        assert!(names.len() > 8, "{names:?}");
        names.into_iter().map(|name| Text::read(&name)).collect()
    }

    /// The blocks of all texts in one language.
    pub fn blocks(language: &str) -> Vec<Block> {
        let all = Text::all().into_iter().flat_map(|text| text.blocks);
        all.filter(|block| block.language.split(',').next() == Some(language)).collect()
    }

    pub fn read(name: &str) -> Text {
        let content = std::fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut text = Text { name: name.into(), prose: Vec::new(), blocks: Vec::new() };
        let mut open: Option<Block> = None;
        for (number, line) in (1..).zip(content.lines()) {
            match (line.trim_start().strip_prefix("```"), &mut open) {
                (Some(""), Some(_)) => text.blocks.extend(open.take()),
                (Some(language), None) => {
                    let (file, language) = (name.into(), language.trim().into());
                    open = Some(Block { file, line: number, language, text: String::new() });
                }
                (None, Some(block)) => block.text += &format!("{line}\n"),
                (Some(other), Some(block)) => panic!("{}: a fence within a block: {other}", block.place()),
                (None, None) => text.prose.push((number, line.into())),
            }
        }
        assert!(open.is_none(), "{name}: a block without an end");
        text
    }

    /// The prose alone, code spans included.
    pub fn prose(&self) -> String {
        self.prose.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n")
    }
}

/// All Rust code in a folder and those in it.
pub fn source_below(folder: &Path) -> Result<String, String> {
    let mut source = String::new();
    for entry in std::fs::read_dir(folder).map_err(|e| e.to_string())? {
        let path = entry.map_err(|e| e.to_string())?.path();
        if path.is_dir() && !path.ends_with("target") {
            source += &source_below(&path)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            source += &std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
        }
    }
    Ok(source)
}
