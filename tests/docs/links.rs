//! Links and pictures.

use super::common::root;
use super::none_wrong;
use super::texts::Text;
use regex::Regex;
use std::collections::HashSet;
use std::path::Path;

/// The anchors that GitHub makes of a text's headings.
fn anchors(text: &Text) -> HashSet<String> {
    let mut found = HashSet::new();
    for (_, line) in &text.prose {
        let Some(heading) = line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#')) else {
            continue;
        };
        let slug: String = heading
            .trim()
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        // A second heading of the same text gets a number.
        let number = (1..).map(|n| format!("{slug}-{n}")).find(|slug| !found.contains(slug));
        let slug = if found.contains(&slug) { number.unwrap_or(slug) } else { slug };
        found.insert(slug);
    }
    found
}

#[test]
fn every_link_and_picture_is_there() {
    let markdown = Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    let html = Regex::new(r#"(?:src|srcset|href)="([^"]+)""#).unwrap();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for text in Text::all() {
        for (number, line) in &text.prose {
            for link in markdown.captures_iter(line).chain(html.captures_iter(line)) {
                let target = &link[1];
                if target.starts_with("https://") {
                    continue;
                }
                count += 1;
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                let folder = Path::new(&text.name).parent().unwrap();
                let path = if file.is_empty() { text.name.clone().into() } else { folder.join(file) };
                let place = format!("{}:{number}: {target}", text.name);
                if !root().join(&path).exists() {
                    wrong.push(format!("{place}: there is no {}", path.display()));
                } else if !anchor.is_empty() && path.extension().is_some_and(|end| end == "md") {
                    let read = Text::read(path.to_str().unwrap());
                    if !anchors(&read).contains(anchor) {
                        wrong.push(format!("{place}: no such heading"));
                    }
                }
            }
        }
    }
    assert!(count > 20, "{count} links");
    none_wrong(wrong);
}

/// The front page leads to every guide.
#[test]
fn every_guide_is_listed_in_the_readme() {
    let readme = Text::read("README.md").prose();
    let missing = Text::all().into_iter().map(|text| text.name).filter(|name| name.starts_with("docs/"));
    none_wrong(missing.filter(|name| !readme.contains(&format!("]({name})"))).collect());
}
