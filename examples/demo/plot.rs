//! The losses as a picture: the killed run's thin line must lie right in the
//! middle of the straight run's broad one.

use crate::Result;
use crate::losses::Losses;
use crate::report::Findings;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::path::Path;

const STRAIGHT: RGBColor = RGBColor(160, 200, 240);
const KILLED: RGBColor = RGBColor(20, 50, 110);
const KILL: RGBColor = RGBColor(230, 150, 30);
const KILL_WRITING: RGBColor = RGBColor(200, 30, 40);

/// Writes the PNG, one panel for each scheme.
pub fn draw(path: &Path, findings: &[Findings]) -> Result<()> {
    let font = include_bytes!("../data/DejaVuSans.ttf");
    register_font("sans-serif", FontStyle::Normal, font).map_err(|_| "the font is broken")?;
    let root = BitMapBackend::new(path, (1200, 420 * findings.len() as u32 + 60)).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.margin(12, 0, 0, 0);
    let title = "LoRA fine-tuning, straight through and killed on the way: the same losses";
    let panels = root.titled(title, ("sans-serif", 26))?.split_evenly((findings.len(), 1));
    for (area, findings) in panels.iter().zip(findings) {
        panel(area, findings)?;
    }
    Ok(root.present()?)
}

fn panel(area: &DrawingArea<BitMapBackend, Shift>, findings: &Findings) -> Result<()> {
    let points = |losses: &Losses| -> Vec<(f64, f64)> {
        losses.by_step.iter().map(|(step, loss)| (*step as f64, f64::from(*loss))).collect()
    };
    let (straight, killed) = (points(&findings.straight.losses), points(&findings.killed.losses));
    let low = straight.iter().fold(f64::MAX, |low, (_, loss)| low.min(*loss)) - 0.05;
    let high = straight.iter().fold(f64::MIN, |high, (_, loss)| high.max(*loss)) + 0.05;
    let caption = format!("{} base, {} steps", findings.scheme, findings.steps);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(caption, ("sans-serif", 20))
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..findings.steps as f64 + 1.0, low..high)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("training loss, nats a byte")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 17))
        .draw()?;

    for (writing, colour, label) in
        [(false, KILL, "SIGKILL"), (true, KILL_WRITING, "SIGKILL while writing a checkpoint")]
    {
        let style = colour.stroke_width(2);
        let kills = findings.killed.kills.iter().filter(|kill| kill.torn.is_some() == writing);
        let marks = kills.map(|kill| PathElement::new([(kill.step as f64, low), (kill.step as f64, high)], style));
        chart.draw_series(marks)?.label(label).legend(sample(style));
    }

    let (broad, thin) = (STRAIGHT.stroke_width(8), KILLED.stroke_width(2));
    chart.draw_series(LineSeries::new(straight, broad))?.label("straight through").legend(sample(broad));
    chart.draw_series(LineSeries::new(killed, thin))?.label("killed and resumed").legend(sample(thin));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .margin(8)
        .draw()?;
    Ok(())
}

/// A short line for the legend.
fn sample(style: ShapeStyle) -> impl Fn((i32, i32)) -> PathElement<(i32, i32)> {
    move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style)
}
