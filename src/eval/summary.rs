//! Scores of all samples → a table with intervals and paired differences.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::metrics::Metric;
use super::statistics::{Interval, bootstrap, mean, wilson};

/// What the table needs of one sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// In the order of the task's metrics.
    pub values: Vec<f64>,
    /// Whether it has no result.
    pub failed: bool,
    /// Mean α, where the method has one.
    pub mean_alpha: Option<f64>,
}

/// The samples of one method, by their place in the data.
#[derive(Clone, Debug, Default)]
pub struct MethodScores {
    /// The method as it was typed.
    pub method: String,
    /// By sample.
    pub samples: BTreeMap<usize, Scores>,
    /// Wall-clock seconds of each sample that was timed.
    pub seconds: Vec<f64>,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The method.
    pub method: String,
    /// The metric.
    pub metric: &'static str,
    /// Samples.
    pub n: usize,
    /// Samples without a result, which count as 0.
    pub failed: usize,
    /// The mean, from 0 to 1.
    pub score: f64,
    /// Its 95 % interval.
    pub interval: Interval,
    /// Score less that of the first method, on the same samples, and its 95 % interval.
    pub difference: Option<(f64, Interval)>,
    /// Wall-clock seconds a sample, batched as it was run.
    pub seconds_per_sample: Option<f64>,
    /// Mean over the samples of α summed over the experts.
    pub mean_alpha: Option<f64>,
}

/// The table.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The task.
    pub task: String,
    /// Method by method, in each metric by metric.
    pub rows: Vec<Row>,
}

impl Summary {
    /// Of methods that ran the same samples; differences are to the first.
    pub fn new(task: &str, metrics: &[Metric], methods: &[MethodScores]) -> Self {
        let mut rows = Vec::new();
        for (place, method) in methods.iter().enumerate() {
            for (k, metric) in metrics.iter().enumerate() {
                let value = |scores: &Scores| scores.values.get(k).copied().unwrap_or(0.0);
                let values: Vec<f64> = method.samples.values().map(value).collect();
                let first = methods.first().filter(|_| place > 0);
                let difference = first.map(|first| {
                    let pairs = method.samples.iter();
                    let pairs =
                        pairs.filter_map(|(index, s)| Some(value(s) - value(first.samples.get(index)?)));
                    let differences: Vec<f64> = pairs.collect();
                    (mean(&differences), bootstrap(&differences))
                });
                let alphas: Vec<f64> = method.samples.values().filter_map(|s| s.mean_alpha).collect();
                rows.push(Row {
                    method: method.method.clone(),
                    metric: metric.name(),
                    n: values.len(),
                    failed: method.samples.values().filter(|scores| scores.failed).count(),
                    score: mean(&values),
                    interval: if metric.is_proportion() {
                        wilson(values.iter().sum(), values.len())
                    } else {
                        bootstrap(&values)
                    },
                    difference,
                    seconds_per_sample: (!method.seconds.is_empty()).then(|| mean(&method.seconds)),
                    mean_alpha: (!alphas.is_empty()).then(|| mean(&alphas)),
                });
            }
        }
        Self { task: task.to_owned(), rows }
    }

    /// As a Markdown table, scores in per cent.
    pub fn table(&self) -> String {
        let several = self.rows.iter().any(|row| row.metric != self.rows[0].metric);
        let mut lines = vec![
            [
                "method",
                "metric",
                "n",
                "score %",
                "95 % interval",
                "to the first",
                "its 95 % interval",
                "s/sample",
                "mean Σα",
            ]
            .map(str::to_owned),
        ];
        let percent = |x: f64| format!("{:.1}", 100.0 * x);
        let span = |i: &Interval| format!("{} to {}", percent(i.low), percent(i.high));
        let optional = |x: Option<String>| x.unwrap_or_default();
        for row in &self.rows {
            lines.push([
                row.method.clone(),
                row.metric.to_owned(),
                row.n.to_string(),
                percent(row.score),
                span(&row.interval),
                optional(row.difference.map(|(d, _)| format!("{:+.1}", 100.0 * d))),
                optional(row.difference.map(|(_, interval)| span(&interval))),
                optional(row.seconds_per_sample.map(|s| format!("{s:.3}"))),
                optional(row.mean_alpha.map(|alpha| format!("{alpha:.2}"))),
            ]);
        }
        let width = |k: usize| lines.iter().map(|line| line[k].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..9).map(width).collect();
        let mut text = String::new();
        for (number, line) in lines.iter().enumerate() {
            for (cell, width) in line.iter().zip(&widths) {
                let _ = write!(text, "| {cell:<width$} ");
            }
            text.push_str("|\n");
            if number == 0 {
                for width in &widths {
                    let _ = write!(text, "|{}", "-".repeat(width + 2));
                }
                text.push_str("|\n");
            }
        }
        let kinds = match self.rows.iter().map(|row| row.interval.method).collect::<Vec<_>>() {
            kinds if kinds.iter().all(|kind| *kind == "wilson") => "Wilson intervals",
            _ if several => "Wilson intervals of proportions, bootstrap intervals of the rest",
            _ => "bootstrap intervals",
        };
        let _ = writeln!(text, "\n{}: {kinds}; those of differences by paired bootstrap.", self.task);
        let failed: usize = self.rows.iter().map(|row| row.failed).max().unwrap_or(0);
        if failed > 0 {
            let _ = writeln!(text, "Up to {failed} samples a method have no result; they count as 0.");
        }
        text
    }
}
