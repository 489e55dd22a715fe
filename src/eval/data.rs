//! Samples: JSONL, a JSON array, or CSV.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// One problem: the fields that it was published with.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The line it begins at, from 1; in a JSON array its place, from 1.
    pub line: u64,
    /// Its fields, in the file's order. CSV cells are strings.
    pub fields: Map<String, Value>,
}

/// Reads the samples of a file: at most `limit`. `columns` names the columns of a CSV file that has no header.
///
/// # Errors
/// [`Error::Io`]; [`Error::Data`] with the line where the file is malformed or has no samples.
pub fn read_samples(path: &Path, columns: &[String], limit: Option<usize>) -> Result<Vec<Sample>> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    parse_samples(path, &bytes, columns, limit)
}

/// Like [`read_samples`], from a file's bytes. The end of `path` says what they are: `.csv`, `.json` (an array), and
/// JSONL for all else.
///
/// # Errors
/// [`Error::Data`].
pub fn parse_samples(
    path: &Path,
    bytes: &[u8],
    columns: &[String],
    limit: Option<usize>,
) -> Result<Vec<Sample>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count() as u64;
        data(path, line, "a byte that is no UTF-8")
    })?;
    let limit = limit.unwrap_or(usize::MAX);
    let extension = path.extension().map(|end| end.to_string_lossy().to_lowercase());
    let samples = match extension.as_deref() {
        Some("csv") => csv_samples(path, text, columns, limit)?,
        Some("json") => array(path, text, limit)?,
        _ => json_lines(path, text, limit)?,
    };
    if samples.is_empty() {
        return Err(data(path, 1, "no samples"));
    }
    Ok(samples)
}

fn json_lines(path: &Path, text: &str, limit: usize) -> Result<Vec<Sample>> {
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    let parse = |(line, number): (&str, u64)| {
        let value = serde_json::from_str(line)
            .map_err(|error| data(path, number, &crate::json::not_a_line(&error)))?;
        object(path, number, value)
    };
    lines.take(limit).map(parse).collect()
}

fn array(path: &Path, text: &str, limit: usize) -> Result<Vec<Sample>> {
    let values: Vec<Value> = serde_json::from_str(text).map_err(|error| {
        data(
            path,
            error.line() as u64,
            &format!("expected an array of objects (JSON lines are .jsonl): {error}"),
        )
    })?;
    values.into_iter().zip(1..).take(limit).map(|(value, number)| object(path, number, value)).collect()
}

fn object(path: &Path, line: u64, value: Value) -> Result<Sample> {
    match value {
        Value::Object(fields) => Ok(Sample { line, fields }),
        other => Err(data(path, line, &format!("expected an object, found {}", crate::json::show(&other)))),
    }
}

fn csv_samples(path: &Path, text: &str, columns: &[String], limit: usize) -> Result<Vec<Sample>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
    let mut names: Vec<String> = Vec::new();
    let mut samples = Vec::new();
    for record in reader.records() {
        if samples.len() == limit {
            break;
        }
        let record = record.map_err(|error| {
            let line = error.position().map_or(1, csv::Position::line);
            data(path, line, &error.to_string())
        })?;
        let line = record.position().map_or(1, csv::Position::line);
        if names.is_empty() {
            let cells: Vec<String> = record.iter().map(|cell| cell.trim().to_owned()).collect();
            let is_header = columns.is_empty() || columns.iter().all(|name| cells.contains(name));
            names = if is_header { cells } else { columns.to_vec() };
            if let Some(twice) = names.iter().enumerate().find(|(k, name)| names[..*k].contains(name)) {
                return Err(data(path, line, &format!("two columns are called {:?}", twice.1)));
            }
            if is_header {
                continue;
            }
        }
        if record.len() != names.len() {
            let reason = format!("expected the columns {}, found {} cells", names.join(", "), record.len());
            return Err(data(path, line, &reason));
        }
        let fields = names.iter().cloned().zip(record.iter().map(Value::from)).collect();
        samples.push(Sample { line, fields });
    }
    Ok(samples)
}

/// The error for a line of a data file.
pub(super) fn data(path: &Path, line: u64, reason: &str) -> Error {
    Error::Data { path: path.to_owned(), line, reason: reason.to_owned() }
}
