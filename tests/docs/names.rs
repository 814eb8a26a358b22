//! The names of items, tests and files that texts mention.

use super::common::root;
use super::none_wrong;
use super::texts::{Text, source_below};
use regex::Regex;

/// `LoraModel::wrap` and its like: if the crate has the type, it has the method, variant or constant.
#[test]
fn every_member_that_a_text_names_is_there() {
    let code = source_below(&root().join("src")).unwrap();
    let types = Regex::new(r"pub (?:struct|enum|trait|type) (\w+)").unwrap();
    let types: Vec<&str> = types.captures_iter(&code).map(|found| found.get(1).unwrap().as_str()).collect();
    let span = Regex::new(r"`([^`]+)`").unwrap();
    let member = Regex::new(r"\b([A-Z]\w*)::(\w+)").unwrap();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for text in Text::all() {
        for (number, line) in &text.prose {
            for found in span.captures_iter(line).flat_map(|code| {
                let code = code.get(1).unwrap().as_str();
                member.captures_iter(code).map(|found| [found[1].to_string(), found[2].to_string()]).collect::<Vec<_>>()
            }) {
                let [of, name] = found;
                if !types.contains(&of.as_str()) {
                    continue;
                }
                count += 1;
                let is_there = Regex::new(&format!(r"(?:fn|const|type) {name}\b|(?m)^\s+{name}(?:,| \{{|\()")).unwrap();
                if !is_there.is_match(&code) {
                    wrong.push(format!("{}:{number}: {of}::{name}", text.name));
                }
            }
        }
    }
    assert!(count > 50, "{count} names");
    none_wrong(wrong);
}

/// `resume::name_of_a_test`, where a text proves itself by one.
#[test]
fn every_test_that_a_text_names_is_there() {
    let code = source_below(&root().join("tests")).unwrap();
    let span = Regex::new(r"`([a-z]\w*)::([a-z]\w*)`").unwrap();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for text in Text::all() {
        for (number, line) in &text.prose {
            for found in span.captures_iter(line) {
                let file = root().join("tests").join(format!("{}.rs", &found[1]));
                if !file.exists() && !root().join("tests").join(&found[1]).is_dir() {
                    continue;
                }
                count += 1;
                if !code.contains(&format!("fn {}(", &found[2])) {
                    wrong.push(format!("{}:{number}: {}::{}", text.name, &found[1], &found[2]));
                }
            }
        }
    }
    assert!(count > 10, "{count} tests");
    none_wrong(wrong);
}
