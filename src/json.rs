//! JSON files, read field by field, so that an error names the file, the field, what it must be and what it is.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The largest configuration file that is read: a hundred times the largest there is.
pub(crate) const MAX_CONFIG_BYTES: u64 = 64 << 20;

/// Reads `path` whole, or `None` where there is no such file.
///
/// Refuses what isn't a regular file (a pipe or a device may never end) and what is longer than `limit` bytes.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    if !metadata.is_file() {
        return Err(Error::io(path, std::io::Error::other("not a regular file")));
    }
    let too_long = || {
        let reason = format!("longer than the {} MiB that such a file may have", limit >> 20);
        Error::io(path, std::io::Error::new(std::io::ErrorKind::FileTooLarge, reason))
    };
    if metadata.len() > limit {
        return Err(too_long());
    }
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut bytes = Vec::new();
    // The file may have grown since its length was asked for.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| Error::io(path, error))?;
    if is_lfs_pointer(&bytes) {
        return Err(Error::io(path, std::io::Error::other(LFS_POINTER)));
    }
    if bytes.len() as u64 > limit { Err(too_long()) } else { Ok(Some(bytes)) }
}

/// What is said of a file that a clone without Git LFS has in the place of a large one.
pub(crate) const LFS_POINTER: &str =
    "a Git LFS pointer instead of the file: run `git lfs pull` in its directory";

/// Whether a file is what Git LFS leaves in the place of a large one.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs")
}

/// Reads `path` whole as text, or `None` where there is no such file.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<Option<String>> {
    let Some(bytes) = read_file(path, limit)? else { return Ok(None) };
    let text = String::from_utf8(bytes)
        .map_err(|error| invalid(path, "json", "UTF-8 text", format!("an invalid byte ({error})")))?;
    Ok(Some(text))
}

/// The error for a field that isn't what it must be.
pub(crate) fn invalid(path: &Path, field: &str, expected: &str, found: impl Into<String>) -> Error {
    Error::Config {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found: found.into(),
    }
}

/// Why a line of JSONL can't be read. The parser's own words count lines, of which there is one.
#[cfg(feature = "eval")]
pub(crate) fn not_a_line(error: &serde_json::Error) -> String {
    format!("not JSON at column {}: a line holds one object", error.column())
}

/// A JSON value as an error shows it: short, whatever a file holds.
pub(crate) fn show(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A JSON object of a file. A field that is `null` counts as absent, as it does in transformers.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    path: PathBuf,
    /// The fields that lead here from the root, each followed by a dot.
    prefix: String,
    fields: Map<String, Value>,
}

impl Object {
    /// Parses a file's text.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| invalid(path, "json", "JSON", error.to_string()))?;
        match value {
            Value::Object(fields) => Ok(Self { path: path.to_owned(), prefix: String::new(), fields }),
            other => Err(invalid(path, "json", "an object", show(&other))),
        }
    }

    /// Reads and parses a file, or `None` where there is no such file.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>> {
        read_text(path, MAX_CONFIG_BYTES)?.map(|text| Self::parse(path, &text)).transpose()
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The fields, `null` ones too.
    pub(crate) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The value of `field` unless it is absent or `null`.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Whether `field` is written at all, be it as `null`.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// The error for `field`.
    pub(crate) fn invalid(&self, field: &str, expected: &str, found: impl Into<String>) -> Error {
        invalid(&self.path, &format!("{}{field}", self.prefix), expected, found)
    }

    /// The error for `field`, which is absent, or whose value `accept` didn't take.
    fn wrong(&self, field: &str, expected: &str) -> Error {
        self.invalid(field, expected, self.get(field).map_or_else(|| "nothing".to_owned(), show))
    }

    fn typed<'a, T>(
        &'a self,
        field: &str,
        expected: &str,
        accept: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        accept(value).map(Some).ok_or_else(|| self.wrong(field, expected))
    }

    /// A boolean.
    pub(crate) fn bool(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A string.
    pub(crate) fn str(&self, field: &str) -> Result<Option<&str>> {
        self.typed(field, "a string", Value::as_str)
    }

    /// A nested object.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>> {
        let fields = self.typed(field, "an object", Value::as_object)?;
        Ok(fields.map(|fields| Self {
            path: self.path.clone(),
            prefix: format!("{}{field}.", self.prefix),
            fields: fields.clone(),
        }))
    }

    /// A whole number from 1 to `most`.
    pub(crate) fn size(&self, field: &str, most: usize) -> Result<Option<usize>> {
        let expected = format!("a whole number from 1 to {most}");
        self.typed(field, &expected, |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=most).contains(n))
        })
    }

    /// Like [`size`](Self::size), of a field that must be there.
    pub(crate) fn required_size(&self, field: &str, most: usize) -> Result<usize> {
        self.size(field, most)?.ok_or_else(|| self.wrong(field, &format!("a whole number from 1 to {most}")))
    }

    /// A number that `accept` takes.
    pub(crate) fn number(
        &self,
        field: &str,
        expected: &str,
        accept: impl FnOnce(f64) -> bool,
    ) -> Result<Option<f64>> {
        self.typed(field, expected, |value| value.as_f64().filter(|&number| accept(number)))
    }

    /// Like [`number`](Self::number), of a field that must be there.
    pub(crate) fn required_number(
        &self,
        field: &str,
        expected: &str,
        accept: impl FnOnce(f64) -> bool,
    ) -> Result<f64> {
        self.number(field, expected, accept)?.ok_or_else(|| self.wrong(field, expected))
    }

    /// One token id.
    pub(crate) fn token_id(&self, field: &str) -> Result<Option<u32>> {
        self.typed(field, "a token id", as_token_id)
    }

    /// One token id or a list of them; empty where the field is absent.
    pub(crate) fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let ids = self.typed(field, "a token id or a list of token ids", |value| match value {
            Value::Array(ids) => ids.iter().map(as_token_id).collect(),
            id => as_token_id(id).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

fn as_token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
