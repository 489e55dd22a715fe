//! What `/metrics` shows, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::ensemble::Ensemble;
use crate::generate::Step;

/// Upper bounds of a histogram's buckets, in seconds.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Upper bounds for α: the paper's candidates go from 0 to 1.9.
const ALPHA: [f64; 9] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0];

/// Counts of a server since its start.
pub(super) struct Metrics {
    /// Answers by (path, status).
    answers: Mutex<BTreeMap<(String, u16), u64>>,
    pub(super) prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    /// Sequences that were given up because their client had left.
    pub(super) cancelled: AtomicU64,
    pub(super) running: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    /// Blocks that sequences hold, one gauge a model.
    pub(super) cache_used: Vec<AtomicUsize>,
    first_token_seconds: Histogram,
    next_token_seconds: Histogram,
    pub(super) sequence_seconds: Histogram,
    alpha: Histogram,
}

impl Metrics {
    pub(super) fn new(models: usize) -> Self {
        Self {
            answers: Mutex::default(),
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            cache_used: (0..models).map(|_| AtomicUsize::new(0)).collect(),
            first_token_seconds: Histogram::new(&SECONDS),
            next_token_seconds: Histogram::new(&SECONDS),
            sequence_seconds: Histogram::new(&SECONDS),
            alpha: Histogram::new(&ALPHA),
        }
    }

    /// Counts an answer; `path` is one of the server's own.
    pub(super) fn answer(&self, path: &str, status: u16) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        *answers.entry((path.to_owned(), status)).or_default() += 1;
    }

    /// Counts a step of a sequence that arrived at `arrived` and whose step before was at `last`.
    pub(super) fn step(&self, step: &Step, arrived: Instant, last: Option<Instant>) {
        if !step.forced {
            self.generated_tokens.fetch_add(1, Ordering::Relaxed);
            match last {
                None => self.first_token_seconds.observe(arrived.elapsed().as_secs_f64()),
                Some(last) => self.next_token_seconds.observe(last.elapsed().as_secs_f64()),
            }
        }
        if !step.decision.alpha.is_empty() {
            self.alpha.observe(step.decision.alpha.iter().sum());
        }
    }

    /// The page.
    pub(super) fn page(&self, ensemble: &Ensemble, blocks: usize) -> String {
        let mut page = Page(String::new());
        page.head("dlf_answers_total", "counter", "Answers by path and HTTP status.");
        for ((path, status), count) in self.answers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            page.line(&format!("dlf_answers_total{{path=\"{path}\",status=\"{status}\"}}"), *count);
        }
        let counter = |count: &AtomicU64| count.load(Ordering::Relaxed);
        for (name, count, help) in [
            ("dlf_prompt_tokens_total", &self.prompt_tokens, "Tokens of prompts that were started."),
            ("dlf_generated_tokens_total", &self.generated_tokens, "Tokens that were generated."),
            ("dlf_cancelled_sequences_total", &self.cancelled, "Sequences whose client left."),
        ] {
            page.head(name, "counter", help);
            page.line(name, counter(count));
        }
        for (name, gauge, help) in [
            ("dlf_running_sequences", &self.running, "Sequences that are decoded."),
            ("dlf_waiting_sequences", &self.waiting, "Sequences that wait."),
        ] {
            page.head(name, "gauge", help);
            page.line(name, gauge.load(Ordering::Relaxed));
        }
        page.head("dlf_cache_used_blocks", "gauge", "Blocks of the key-value cache that sequences hold.");
        for (model, used) in ensemble.models().iter().zip(&self.cache_used) {
            let role = model.role.to_string().replace(['"', '\\', '\n'], "_");
            page.line(&format!("dlf_cache_used_blocks{{model=\"{role}\"}}"), used.load(Ordering::Relaxed));
        }
        page.head("dlf_cache_blocks", "gauge", "Blocks of the key-value cache of each model.");
        page.line("dlf_cache_blocks", blocks);
        for (name, histogram, help) in [
            ("dlf_first_token_seconds", &self.first_token_seconds, "From a request to its first token."),
            ("dlf_next_token_seconds", &self.next_token_seconds, "From a token to the next."),
            ("dlf_sequence_seconds", &self.sequence_seconds, "From a request to its last token."),
            ("dlf_alpha", &self.alpha, "α of each fused position, summed over the experts."),
        ] {
            page.head(name, "histogram", help);
            page.histogram(name, histogram);
        }
        page.0
    }
}

/// Counts of values by size.
pub(super) struct Histogram {
    bounds: &'static [f64],
    counts: Mutex<Counts>,
}

struct Counts {
    /// One a bound: the values up to it and above the one before.
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: Mutex::new(Counts { buckets: vec![0; bounds.len()], count: 0, sum: 0.0 }) }
    }

    pub(super) fn observe(&self, value: f64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        if let Some(bucket) = counts.buckets.get_mut(bucket) {
            *bucket += 1;
        }
        counts.count += 1;
        counts.sum += value;
    }
}

/// The text so far. Writing to a string doesn't fail.
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        let counts = histogram.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut up_to = 0;
        for (bound, bucket) in histogram.bounds.iter().zip(&counts.buckets) {
            up_to += bucket;
            self.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), up_to);
        }
        self.line(&format!("{name}_bucket{{le=\"+Inf\"}}"), counts.count);
        self.line(&format!("{name}_sum"), counts.sum);
        self.line(&format!("{name}_count"), counts.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_include_their_bound() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0].into_iter().for_each(|value| histogram.observe(value));
        let mut page = Page(String::new());
        page.histogram("x", &histogram);
        let expected =
            "x_bucket{le=\"1\"} 2\nx_bucket{le=\"2\"} 3\nx_bucket{le=\"+Inf\"} 4\nx_sum 12\nx_count 4\n";
        assert_eq!(page.0, expected);
    }
}
