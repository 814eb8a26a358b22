//! The tables of figures: they are those of the files in docs/data, and those are what is measured.

use super::common::root;
use super::none_wrong;

#[allow(dead_code)]
#[path = "../../examples/charts/main.rs"]
pub mod charts;

use charts::figures::{Figures, find};
use charts::{measure, tables};

fn figures() -> Figures {
    Figures::read(&root().join("docs/data")).unwrap()
}

#[test]
fn every_table_is_that_of_its_file() {
    let mut wrong = Vec::new();
    let written = tables::written(&root().join("docs"), &figures()).unwrap();
    assert!(written.len() > 1, "{} guides with tables", written.len());
    for (path, text) in written {
        if std::fs::read_to_string(&path).unwrap() != text {
            wrong.push(format!("{}: run `cargo run --release --example charts`", path.display()));
        }
    }
    none_wrong(wrong);
}

/// The same values on every machine; rounding differs in the last digits.
#[test]
fn the_errors_of_quantising_are_those_of_the_guide() {
    let figures = figures().quantization;
    let measured = measure::all(measure::ROWS).unwrap();
    assert_eq!(measured.len(), figures.len());
    for found in measured {
        let name = found.scheme.to_string();
        let row = find(&figures, &[("scheme", &name)]).unwrap_or_else(|| panic!("{name} is not in the file"));
        let bits = [("bits_f32", found.bits_f32), ("bits_bf16", found.bits_bf16)];
        for (column, value) in bits.into_iter().chain([("normal", found.normal), ("heavy", found.heavy)]) {
            let expected = row.number(column).unwrap();
            assert!((value - expected).abs() <= 2e-3 * expected, "{name}, {column}: {value}, not {expected}");
        }
    }
}
