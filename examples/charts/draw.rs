//! The charts.

use super::Result;
use super::figures::{Figures, Row, find, values};
use super::tables::label;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{IntoSegmentedCoord, SegmentValue};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use std::path::Path;

const OURS: RGBColor = RGBColor(30, 90, 170);
const PEERS: RGBColor = RGBColor(225, 140, 45);
const DENSE: RGBColor = RGBColor(150, 150, 150);
const HEAVY: RGBColor = RGBColor(200, 50, 60);

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Writes all of them.
pub fn all(folder: &Path, figures: &Figures) -> Result<()> {
    let font = include_bytes!("../data/DejaVuSans.ttf");
    register_font("sans-serif", FontStyle::Normal, font).map_err(|_| "the font is broken")?;
    errors(&folder.join("quantization-error.png"), &figures.quantization)?;
    speed(&folder.join("speed.png"), figures.linear.get("linear").ok_or("no linear.csv")?)?;
    memory(&folder.join("memory.png"), &figures.memory)
}

fn sheet<'a>(path: &'a Path, size: (u32, u32), title: &str) -> Result<Area<'a>> {
    let root = BitMapBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    Ok(root.margin(12, 8, 8, 8).titled(title, ("sans-serif", 23))?)
}

/// One dot for each scheme and kind of weight, on a logarithmic scale.
fn errors(path: &Path, rows: &[Row]) -> Result<()> {
    let area = sheet(path, (1100, 640), "What packing a weight loses")?;
    let rows: Vec<&Row> = rows.iter().rev().collect();
    let names: Vec<String> = rows
        .iter()
        .map(|row| Ok(format!("{}, {:.2} bits", row.text("scheme"), row.number("bits_bf16")?)))
        .collect::<Result<_>>()?;
    let mut chart = ChartBuilder::on(&area)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(210)
        .build_cartesian_2d((1e-4..1.0).log_scale(), (0..rows.len()).into_segmented())?;
    chart
        .configure_mesh()
        .x_desc("norm of the error over the norm of the weight")
        .x_label_formatter(&|x: &f64| format!("{} %", (100.0 * x * 1e6).round() / 1e6))
        .y_labels(rows.len())
        .y_label_formatter(&|y| name(&names, y))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;
    for (column, colour, text) in
        [("normal", OURS, "normal values"), ("heavy", HEAVY, "heavy-tailed values (Student's t, 5 degrees)")]
    {
        let points: Vec<(f64, usize)> =
            rows.iter().enumerate().map(|(i, row)| Ok((row.number(column)?, i))).collect::<Result<_>>()?;
        let dots = points.into_iter().map(|(x, i)| Circle::new((x, SegmentValue::CenterOf(i)), 6, colour.filled()));
        chart.draw_series(dots)?.label(text).legend(move |(x, y)| Circle::new((x + 10, y), 6, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .margin(10)
        .draw()?;
    Ok(area.present()?)
}

/// The name of a row of a chart.
fn name(names: &[String], at: &SegmentValue<usize>) -> String {
    match at {
        SegmentValue::CenterOf(i) => names.get(*i).cloned().unwrap_or_default(),
        _ => String::new(),
    }
}

/// One bar.
struct Bar {
    name: String,
    value: f64,
    text: String,
    colour: RGBColor,
}

/// Horizontal bars from 0, the first on top. A bar of more than `limit` ends there, and says so.
fn bars(area: &Area<'_>, caption: &str, unit: &str, limit: f64, bars: Vec<Bar>) -> Result<()> {
    let bars: Vec<Bar> = bars.into_iter().rev().collect();
    let names: Vec<String> = bars.iter().map(|bar| bar.name.clone()).collect();
    let longest = bars.iter().map(|bar| bar.value.min(limit)).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .caption(caption, ("sans-serif", 18))
        .x_label_area_size(38)
        .y_label_area_size(220)
        .build_cartesian_2d(0.0..1.22 * longest, (0..bars.len()).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc(unit)
        .x_labels(6)
        .y_labels(bars.len())
        .y_label_formatter(&|y| name(&names, y))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 14))
        .draw()?;
    let shapes = bars.iter().enumerate().map(|(i, bar)| {
        let corners = [(0.0, SegmentValue::Exact(i)), (bar.value.min(limit), SegmentValue::Exact(i + 1))];
        let mut shape = Rectangle::new(corners, bar.colour.filled());
        shape.set_margin(3, 3, 0, 0);
        shape
    });
    chart.draw_series(shapes)?;
    let style = ("sans-serif", 13).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
    chart.draw_series(bars.iter().enumerate().map(|(i, bar)| {
        let more = if bar.value > limit { "→ " } else { "" };
        let at = (bar.value.min(limit) + 0.01 * longest, SegmentValue::CenterOf(i));
        Text::new(format!("{more}{}", bar.text), at, style.clone())
    }))?;
    Ok(())
}

fn colour(layer: &str) -> RGBColor {
    match layer {
        _ if layer.starts_with("PEFT") => PEERS,
        _ if layer.starts_with("dense (") => DENSE,
        _ => OURS,
    }
}

/// A training step of one layer: one panel for each dtype, with few rows and with many.
fn speed(path: &Path, all: &[Row]) -> Result<()> {
    let step: Vec<Row> = all.iter().filter(|row| row.text("what") == "step").cloned().collect();
    // 4096 x 4096 if that was measured.
    let shown = step.iter().find(|row| row.text("out") == "4096").or(step.first());
    let first = shown.ok_or("linear.csv has no training step")?;
    let (out, inn) = (first.text("out").to_string(), first.text("in").to_string());
    let size = [("out", out.as_str()), ("in", inn.as_str())];
    let title = format!("Forward and backward of a layer of {out} x {inn} with LoRA of rank 16, in milliseconds");
    let area = sheet(path, (1400, 860), &title)?;
    let panels = area.split_evenly((2, 2));
    let cases = [("float32", "1"), ("float32", "256"), ("bfloat16", "1"), ("bfloat16", "256")];
    for (panel, (dtype, rows)) in panels.iter().zip(cases) {
        let mut found = Vec::new();
        for layer in values(&step, "layer") {
            let case = [size[0], size[1], ("dtype", dtype), ("rows", rows), ("layer", layer.as_str())];
            if let Some(row) = find(&step, &case) {
                let value = row.number("milliseconds")?;
                found.push(Bar { name: label(&layer), value, text: format!("{value:.2}"), colour: colour(&layer) });
            }
        }
        let mut sorted: Vec<f64> = found.iter().map(|bar| bar.value).collect();
        sorted.sort_by(f64::total_cmp);
        let limit = sorted.iter().rev().nth(2).map_or(f64::MAX, |third| 1.5 * third);
        let dtype = if dtype == "float32" { "f32" } else { "bf16" };
        let caption = format!("{dtype}, {rows} {}", if rows == "1" { "row" } else { "rows" });
        bars(panel, &caption, "ms", limit, found)?;
    }
    Ok(area.present()?)
}

/// What a training step needs over the model: one panel for each number of rows.
fn memory(path: &Path, rows: &[Row]) -> Result<()> {
    let title = "Peak memory of a training step over the model: 16 layers of 2048 x 2048, f32, AdamW";
    let area = sheet(path, (1400, 420), title)?;
    let counts = values(rows, "rows");
    for (panel, n) in area.split_evenly((1, counts.len())).iter().zip(&counts) {
        let mut found = Vec::new();
        for layer in values(rows, "layer") {
            if let Some(row) = find(rows, &[("layer", &layer), ("rows", n)]) {
                let value = row.number("megabytes")?;
                found.push(Bar { name: label(&layer), value, text: format!("{value:.0}"), colour: colour(&layer) });
            }
        }
        bars(panel, &format!("{n} rows"), "MB", f64::MAX, found)?;
    }
    Ok(area.present()?)
}
