//! The losses as a picture.

use super::Result;
use super::metrics::Row;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::path::Path;

const BATCHES: RGBColor = RGBColor(170, 200, 235);
const SMOOTHED: RGBColor = RGBColor(20, 60, 130);
const HELD_OUT: RGBColor = RGBColor(215, 95, 20);

/// Writes the PNG: the losses of the batches, their running mean, and the
/// held-out losses. `loss` says what they are.
pub fn draw(path: &Path, rows: &[Row], loss: &str) -> Result<()> {
    let batches: Vec<(f64, f64)> = rows.iter().map(|row| (row.step as f64, f64::from(row.loss))).collect();
    let held_out: Vec<(f64, f64)> =
        rows.iter().filter_map(|row| Some((row.step as f64, f64::from(row.held_out?)))).collect();
    // An exponential mean; divided by its weights' sum, as its beginning is short.
    let (mut sum, mut weights) = (0.0, 0.0);
    let smoothed: Vec<(f64, f64)> = batches
        .iter()
        .map(|(step, loss)| {
            (sum, weights) = (0.95 * sum + loss, 0.95 * weights + 1.0);
            (*step, sum / weights)
        })
        .collect();
    let Some((last, _)) = batches.last() else { return Ok(()) };
    let all = || batches.iter().chain(&held_out).map(|(_, loss)| *loss);
    let (low, high) = (all().fold(f64::MAX, f64::min), all().fold(f64::MIN, f64::max));
    let margin = 0.05 * (high - low).max(1e-3);

    let font = include_bytes!("../data/DejaVuSans.ttf");
    register_font("sans-serif", FontStyle::Normal, font).map_err(|_| "the font is broken")?;
    let root = BitMapBackend::new(path, (1000, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(68)
        .build_cartesian_2d(0.0..last + 1.0, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc(loss)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 17))
        .draw()?;
    let lines = [
        (batches, BATCHES.stroke_width(1), "batches"),
        (smoothed, SMOOTHED.stroke_width(2), "running mean"),
        (held_out.clone(), HELD_OUT.stroke_width(2), "held out"),
    ];
    for (points, style, label) in lines {
        let sample = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style);
        chart.draw_series(LineSeries::new(points, style))?.label(label).legend(sample);
    }
    chart.draw_series(held_out.into_iter().map(|point| Circle::new(point, 3, HELD_OUT.filled())))?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .margin(8)
        .draw()?;
    root.present()?;
    Ok(())
}
