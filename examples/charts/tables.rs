//! The tables of the guides.
//!
//! A guide marks the place of each: what lies between `<!-- table: NAME -->` and `<!-- end -->` is
//! written here, and nobody types a figure twice.

use super::Result;
use super::figures::{Figures, Row, find, values};
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- table: ";
const END: &str = "<!-- end -->";

/// The guides with the tables that belong there.
pub fn written(docs: &Path, figures: &Figures) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(docs)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "md") {
            let text = std::fs::read_to_string(&path)?;
            if text.contains(BEGIN) {
                let text = replaced(&text, figures).map_err(|e| format!("{}: {e}", path.display()))?;
                found.push((path, text));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn replaced(text: &str, figures: &Figures) -> Result<String> {
    let mut parts = text.split(BEGIN);
    let mut result = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let (name, rest) = part.split_once(" -->").ok_or("a marker without its end")?;
        let (_, after) = rest.split_once(END).ok_or_else(|| format!("no {END} after the table {name}"))?;
        result += &format!("{BEGIN}{name} -->\n\n{}\n{END}{after}", table(name, figures)?);
    }
    Ok(result)
}

fn table(name: &str, figures: &Figures) -> Result<String> {
    match name {
        "quantization" => quantization(&figures.quantization),
        "memory" => memory(&figures.memory),
        "lora" => lora(&figures.lora),
        // FILE OUT IN step|forward
        _ => match name.split(' ').collect::<Vec<_>>()[..] {
            [file, out, inn, what] => {
                let rows = figures.linear.get(file).ok_or_else(|| format!("no table {name}"))?;
                linear(rows, [("out", out), ("in", inn), ("what", what)])
            }
            _ => Err(format!("no table {name}").into()),
        },
    }
}

fn line(cells: impl IntoIterator<Item = String>) -> String {
    cells.into_iter().fold("|".to_string(), |line, cell| line + &format!(" {cell} |")) + "\n"
}

/// The header and the line below it.
fn header(cells: &[String]) -> String {
    line(cells.iter().cloned()) + "|" + &"---|".repeat(cells.len()) + "\n"
}

fn quantization(rows: &[Row]) -> Result<String> {
    let columns = ["scheme", "bits, bf16 weight", "bits, f32 weight", "error, normal", "error, heavy-tailed"];
    let mut text = header(&columns.map(String::from));
    for row in rows {
        let percent = |column| -> Result<String> {
            let value = 100.0 * row.number(column)?;
            Ok(format!("{value:.*} %", if value < 0.1 { 3 } else { 2 }))
        };
        let bits = |column| -> Result<String> { Ok(format!("{:.2}", row.number(column)?)) };
        let name = format!("`{}`", row.text("scheme"));
        text += &line([name, bits("bits_bf16")?, bits("bits_f32")?, percent("normal")?, percent("heavy")?]);
    }
    Ok(text)
}

fn linear(all: &[Row], wanted: [(&str, &str); 3]) -> Result<String> {
    let rows: Vec<Row> = all.iter().filter(|row| wanted.iter().all(|(c, v)| row.text(c) == *v)).cloned().collect();
    if rows.is_empty() {
        return Err(format!("nothing was measured of {wanted:?}").into());
    }
    let mut columns = Vec::new();
    for dtype in values(&rows, "dtype") {
        columns.extend(values(&rows, "rows").into_iter().map(|n| (dtype.clone(), n)));
    }
    let name = |(dtype, n): &(String, String)| {
        let dtype = if dtype == "float32" { "f32" } else { "bf16" };
        format!("{dtype}, {n} {}", if n == "1" { "row" } else { "rows" })
    };
    let mut text = header(&[vec!["layer".into()], columns.iter().map(name).collect()].concat());
    for layer in values(&rows, "layer") {
        let mut cells = vec![label(&layer)];
        for (dtype, n) in &columns {
            cells.push(match find(&rows, &[("layer", &layer), ("dtype", dtype), ("rows", n)]) {
                Some(row) => format!("{:.2}", row.number("milliseconds")?),
                None => "–".into(),
            });
        }
        text += &line(cells);
    }
    Ok(text)
}

/// What the bench's names stand for.
pub fn label(layer: &str) -> String {
    match layer {
        "dense (mm)" => "dense, libtorch, without LoRA".into(),
        "dense (oneDNN)" => "dense, oneDNN, without LoRA".into(),
        other => other.replace("PEFT ", "PEFT, ").replace("bnb", "bitsandbytes").replace("quanto", "optimum-quanto"),
    }
}

fn memory(rows: &[Row]) -> Result<String> {
    let counts = values(rows, "rows");
    let mut text = header(&[vec![String::new()], counts.iter().map(|n| format!("{n} rows")).collect()].concat());
    for layer in values(rows, "layer") {
        let mut cells = vec![label(&layer)];
        for n in &counts {
            cells.push(match find(rows, &[("layer", &layer), ("rows", n)]) {
                Some(row) => {
                    let (used, dense) = (row.number("megabytes")?, row.number("dense_megabytes")?);
                    format!("{used:.1} ({:.0} %)", 100.0 * used / dense)
                }
                None => "–".into(),
            });
        }
        text += &line(cells);
    }
    Ok(text)
}

fn lora(rows: &[Row]) -> Result<String> {
    let columns = ["", "tch-peft, ms", "PEFT, ms", "PEFT / tch-peft", "over LoRA's step", "PEFT's over its own"];
    let mut text = header(&columns.map(String::from));
    let plain = find(rows, &[("case", "lora")]).ok_or("no row of plain LoRA")?;
    for row in rows {
        let name = match row.text("case") {
            "base" => "base alone",
            "lora" => "LoRA",
            "dropout" => "LoRA with dropout",
            "dora" => "DoRA",
            other => other,
        };
        let (ours, theirs) = (row.number("tch_peft")?, row.number("peft")?);
        let over = [ours / plain.number("tch_peft")?, theirs / plain.number("peft")?];
        let figures = [ours, theirs, theirs / ours, over[0], over[1]].map(|value| format!("{value:.2}"));
        text += &line([name.to_string()].into_iter().chain(figures));
    }
    Ok(text)
}
