//! What `/metrics` tells, in Prometheus' text format.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Latencies are those of the last so many requests.
const RECENT: usize = 1000;
/// The rate of tokens is that of the last seconds.
const WINDOW: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    completed: u64,
    refused: u64,
    cancelled: u64,
    failed: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    steps: u64,
    rows: u64,
    seconds: f64,
    latencies: VecDeque<f64>,
    /// Answered tokens of the last steps.
    generated: VecDeque<(Instant, usize)>,
}

impl Metrics {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request was answered.
    pub fn completed(&self, prompt: usize, latency: Duration) {
        let mut counts = self.counts();
        counts.completed += 1;
        counts.prompt_tokens += prompt as u64;
        counts.seconds += latency.as_secs_f64();
        counts.latencies.push_back(latency.as_secs_f64());
        if counts.latencies.len() > RECENT {
            counts.latencies.pop_front();
        }
    }

    pub fn refused(&self) {
        self.counts().refused += 1;
    }

    pub fn cancelled(&self, requests: usize) {
        self.counts().cancelled += requests as u64;
    }

    pub fn failed(&self, requests: usize) {
        self.counts().failed += requests as u64;
    }

    /// The model ran once, on so many requests, of which `tokens` got a token.
    pub fn step(&self, rows: usize, tokens: usize) {
        let mut counts = self.counts();
        counts.steps += 1;
        counts.rows += rows as u64;
        counts.completion_tokens += tokens as u64;
        let now = Instant::now();
        counts.generated.push_back((now, tokens));
        counts.forget(now);
    }

    /// The text, with the number of requests that wait.
    pub fn text(&self, waiting: usize) -> String {
        let mut counts = self.counts();
        counts.forget(Instant::now());
        let mut page = Page::default();
        page.head("serve_queue_length", "gauge", "Requests that wait for a row.");
        page.line("", waiting as f64);
        page.head("serve_requests_total", "counter", "Requests for completions.");
        for (outcome, count) in [
            ("completed", counts.completed),
            ("refused", counts.refused),
            ("cancelled", counts.cancelled),
            ("failed", counts.failed),
        ] {
            page.line(&format!("{{outcome=\"{outcome}\"}}"), count as f64);
        }
        page.head("serve_request_seconds", "summary", "From arrival to answer; quantiles of the last 1000.");
        let mut sorted: Vec<f64> = counts.latencies.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        for quantile in [0.5, 0.9, 0.99] {
            page.line(&format!("{{quantile=\"{quantile}\"}}"), percentile(&sorted, quantile));
        }
        page.line("_sum", counts.seconds);
        page.line("_count", counts.completed as f64);
        page.head("serve_tokens_total", "counter", "Tokens of answered prompts, and of answers.");
        page.line("{of=\"prompt\"}", counts.prompt_tokens as f64);
        page.line("{of=\"completion\"}", counts.completion_tokens as f64);
        page.head("serve_tokens_per_second", "gauge", "Tokens of answers, over the last 10 seconds.");
        let tokens: usize = counts.generated.iter().map(|(_, tokens)| tokens).sum();
        page.line("", tokens as f64 / WINDOW.as_secs_f64());
        page.head("serve_steps_total", "counter", "Forward passes of the model.");
        page.line("", counts.steps as f64);
        page.head("serve_batch_rows_mean", "gauge", "Requests in a forward pass, on average since the start.");
        page.line("", counts.rows as f64 / counts.steps.max(1) as f64);
        page.text
    }
}

impl Counts {
    fn forget(&mut self, now: Instant) {
        while self.generated.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            self.generated.pop_front();
        }
    }
}

/// By nearest rank; NaN of nothing.
pub fn percentile(sorted: &[f64], quantile: f64) -> f64 {
    let rank = (quantile * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[derive(Default)]
struct Page {
    name: &'static str,
    text: String,
}

impl Page {
    fn head(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        // Writing to a string can't fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn line(&mut self, label: &str, value: f64) {
        let _ = writeln!(self.text, "{}{label} {value}", self.name);
    }
}
