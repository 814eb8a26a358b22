//! The table at the end.

use crate::args::Job;
use crate::kill::Outcome;
use crate::{Result, base};

/// All that was found out about one scheme.
pub struct Findings {
    pub scheme: &'static str,
    pub steps: u64,
    pub straight: Outcome,
    pub killed: Outcome,
    /// blake3 of the adapter, the same of both runs.
    pub adapter: String,
    /// The held-out loss from a fresh process.
    pub reloaded: f64,
}

impl Findings {
    /// `nf4: 6 kills`
    pub fn kills(&self) -> String {
        format!("{}: {} kills", self.scheme, self.killed.kills.len())
    }
}

/// Checks that the two runs left the same bytes, and answers their blake3.
pub fn same_adapter(straight: &Job, killed: &Job) -> Result<String> {
    let read = |job: &Job| std::fs::read(job.adapter().join("adapter_model.safetensors"));
    let (a, b) = (read(straight)?, read(killed)?);
    match a == b {
        true => Ok(blake3::hash(&a).to_hex().to_string()),
        false => Err(format!("{}: the adapters differ", straight.scheme).into()),
    }
}

/// Checks that two losses have the same bits.
pub fn same_loss(what: &str, a: f64, b: f64) -> Result<()> {
    match a.to_bits() == b.to_bits() {
        true => Ok(()),
        false => Err(format!("{what}: held-out loss {a} and {b}").into()),
    }
}

/// One column for each scheme.
pub fn print(base: &base::Trained, findings: &[Findings]) {
    let row = |name: &str, cell: &dyn Fn(&Findings) -> String| {
        let cells: String = findings.iter().map(|f| format!("{:>24}", cell(f))).collect();
        println!("{name:32}{cells}");
    };
    let megabytes = |bytes: usize| format!("{:.2} MB", bytes as f64 / 1e6);
    println!("base: {} weights, {:.3} bits a byte held out\n", base.weights, base.held_out / std::f64::consts::LN_2);
    row("scheme", &|f| f.scheme.into());
    row("linear weights, dense", &|f| megabytes(f.straight.weight_bytes[0]));
    row("linear weights, quantised", &|f| megabytes(f.straight.weight_bytes[1]));
    row("steps", &|f| f.steps.to_string());
    row("kills", &|f| f.killed.kills.len().to_string());
    row("  of which while writing", &|f| f.killed.kills.iter().filter(|k| k.torn.is_some()).count().to_string());
    row("steps done again", &|f| f.killed.losses.repeated.to_string());
    row("adapter, blake3, both runs", &|f| f.adapter[..16].into());
    row("losses equal, bit for bit", &|f| format!("{0} of {0}", f.straight.losses.by_step.len()));
    row("held-out loss, base", &|f| format!("{:.6}", f.straight.base_loss));
    row("held-out loss, tuned", &|f| format!("{:.6}", f.straight.tuned_loss));
    row("held-out loss, fresh process", &|f| format!("{:.6}", f.reloaded));
}
