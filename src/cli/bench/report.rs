//! Rows of results, as tables and as data.

use anyhow::Result;
use serde_json::{Map, Value, json};

/// A row: columns in the order of the table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record(Vec<(&'static str, Value)>);

impl Record {
    /// With one more column. What wasn't measured is null.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.0.push((name, value.into()));
        self
    }

    pub(crate) fn to_json(&self) -> Value {
        Value::Object(
            self.0.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect::<Map<_, _>>(),
        )
    }

    fn cells(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(_, value)| match value {
            Value::Null => "–".to_owned(),
            Value::String(text) => text.clone(),
            Value::Number(number) => {
                number.as_f64().filter(|_| number.is_f64()).map_or_else(|| number.to_string(), short)
            }
            other => other.to_string(),
        })
    }
}

/// Four digits that say something.
fn short(number: f64) -> String {
    let digits = if number == 0.0 { 0 } else { 3 - number.abs().log10().floor() as i32 };
    format!("{number:.*}", digits.clamp(0, 6) as usize)
}

/// How long each repetition took (none on a device without a clock), and the kernels that one launched.
pub(crate) struct Samples {
    pub(crate) seconds: Vec<f64>,
    pub(crate) launches: u64,
}

/// Mean and standard deviation (of a sample: n − 1; none of one).
pub(crate) fn mean_and_deviation(samples: &[f64]) -> (f64, Option<f64>) {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n;
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    (mean, (samples.len() > 1).then(|| (squares / (n - 1.0)).sqrt()))
}

/// A table in Markdown.
pub(crate) fn markdown(records: &[Record]) -> String {
    let Some(first) = records.first() else { return String::new() };
    let head: Vec<String> = first.0.iter().map(|(name, _)| (*name).to_owned()).collect();
    let rows: Vec<Vec<String>> =
        std::iter::once(head).chain(records.iter().map(|r| r.cells().collect())).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            text += &format!("| {cell:>width$} ");
        }
        text += "|\n";
        if index == 0 {
            for width in &widths {
                text += &format!("|{}:", "-".repeat(width + 1));
            }
            text += "|\n";
        }
    }
    text
}

/// Comma-separated values with a head.
pub(crate) fn csv(records: &[Record]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    if let Some(first) = records.first() {
        writer.write_record(first.0.iter().map(|(name, _)| *name))?;
    }
    for record in records {
        writer.write_record(record.0.iter().map(|(_, value)| match value {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// One JSON array.
pub(crate) fn json(records: &[Record]) -> Result<String> {
    let all: Vec<Value> = records.iter().map(Record::to_json).collect();
    Ok(serde_json::to_string_pretty(&json!(all))? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_deviations_those_of_a_sample() {
        assert_eq!(
            [short(0.0), short(1234.56), short(1.23456), short(0.00123456)],
            ["0", "1235", "1.235", "0.001235"]
        );
        assert_eq!(mean_and_deviation(&[1.0, 3.0]), (2.0, Some(2.0_f64.sqrt())));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, None));
    }
}
