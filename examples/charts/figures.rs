//! The figures, as the files in docs/data hold them.

use super::Result;
use std::collections::HashMap;
use std::path::Path;

/// One line of a CSV file: values by the names of their columns.
#[derive(Debug, Clone)]
pub struct Row(HashMap<String, String>);

impl Row {
    /// A value as it is written; empty if there is no such column.
    pub fn text(&self, column: &str) -> &str {
        self.0.get(column).map_or("", String::as_str)
    }

    /// A number.
    pub fn number(&self, column: &str) -> Result<f64> {
        self.text(column).parse().map_err(|e| format!("column {column}: {:?}: {e}", self.text(column)).into())
    }
}

/// All figures.
pub struct Figures {
    /// `scheme,bits_f32,bits_bf16,normal,heavy`
    pub quantization: Vec<Row>,
    /// `out,in,rows,dtype,what,layer,milliseconds`, by the names of their files: one for each processor.
    pub linear: HashMap<String, Vec<Row>>,
    /// `layer,rows,megabytes,dense_megabytes`
    pub memory: Vec<Row>,
    /// `case,tch_peft,peft`, in milliseconds
    pub lora: Vec<Row>,
}

impl Figures {
    /// Reads the files in a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let file = |name: &str| {
            let path = folder.join(name);
            let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            rows(&text).map_err(|e| format!("{}: {e}", path.display()))
        };
        Ok(Figures {
            quantization: file("quantization.csv")?,
            linear: names_of(folder, "linear")?
                .into_iter()
                .map(|name| Ok((name.clone(), file(&format!("{name}.csv"))?)))
                .collect::<Result<_>>()?,
            memory: file("memory.csv")?,
            lora: file("lora.csv")?,
        })
    }
}

/// The CSV files whose names begin so, without `.csv`.
fn names_of(folder: &Path, begin: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let name = name.to_str().and_then(|name| name.strip_suffix(".csv")).filter(|name| name.starts_with(begin));
        names.extend(name.map(String::from));
    }
    Ok(names)
}

/// The lines below the first, which names the columns. No value holds a comma or a quote; lines
/// that begin with `#` say what was measured where.
fn rows(text: &str) -> Result<Vec<Row>, String> {
    let mut lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let columns: Vec<&str> = lines.next().ok_or("no line with the columns' names")?.split(',').collect();
    lines
        .map(|line| {
            let values: Vec<&str> = line.split(',').collect();
            if values.len() != columns.len() {
                return Err(format!("expected {} values: {line}", columns.len()));
            }
            Ok(Row(columns.iter().zip(values).map(|(column, value)| (column.to_string(), value.to_string())).collect()))
        })
        .collect()
}

/// The different values of a column, in the order in which they come.
pub fn values(rows: &[Row], column: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for row in rows {
        if !found.iter().any(|value| value == row.text(column)) {
            found.push(row.text(column).into());
        }
    }
    found
}

/// The one row with these values.
pub fn find<'a>(rows: &'a [Row], wanted: &[(&str, &str)]) -> Option<&'a Row> {
    rows.iter().find(|row| wanted.iter().all(|(column, value)| row.text(column) == *value))
}
