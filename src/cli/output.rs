//! Results in the order of the input, to stdout or to files that a killed run can resume.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;

/// JSON lines to a file or to stdout. Every line is flushed whole.
pub(crate) struct JsonLines {
    name: PathBuf,
    writer: Box<dyn Write>,
}

impl JsonLines {
    /// To stdout.
    pub(crate) fn stdout() -> Self {
        Self { name: "stdout".into(), writer: Box::new(io::stdout()) }
    }

    /// To a new file.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Self { name: path.to_owned(), writer: Box::new(BufWriter::new(file)) })
    }

    /// To a file whose beginning is kept: its whole lines, up to the first that `keep` declines. `keep` is given
    /// the line's number, from 0. Returns how many were kept. A file that isn't there is begun.
    ///
    /// # Errors
    /// Where a whole line isn't JSON, or `keep` fails: the file is another one, and is left as it is.
    pub(crate) fn resume(
        path: &Path,
        mut keep: impl FnMut(usize, &Value) -> Result<bool>,
    ) -> Result<(Self, usize)> {
        let name = path.display();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| name.to_string())?;
        let (mut end, mut kept, mut line) = (0, 0, Vec::new());
        let mut reader = BufReader::new(&file);
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).with_context(|| name.to_string())?;
            // A line without its end was being written when the run was killed.
            let Some(whole) = line.strip_suffix(b"\n") else { break };
            let place = || format!("--resume: {name}:{}", kept + 1);
            let value = serde_json::from_slice(whole).with_context(place)?;
            if !keep(kept, &value).with_context(place)? {
                break;
            }
            end += read as u64;
            kept += 1;
        }
        drop(reader);
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).with_context(|| name.to_string())?;
        Ok((Self { name: path.to_owned(), writer: Box::new(BufWriter::new(file)) }, kept))
    }

    /// Writes one line.
    pub(crate) fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let written = self.writer.write_all(&line).and_then(|()| self.writer.flush());
        written.with_context(|| self.name.display().to_string())
    }
}

/// Fails where a line of an output to resume isn't the result of the input line in its place.
pub(crate) fn check_resumed(line: &Value, field: &str, wanted: Option<Value>) -> Result<bool> {
    let Some(wanted) = wanted else { bail!("the output has more lines than the input") };
    ensure!(
        line[field] == wanted,
        "the input has another `{field}` here: it has changed, or the output is another one"
    );
    // What failed is tried again.
    Ok(line.get("error").is_none())
}

/// Fails where two of the files named by flags are the same regular file: writing one would destroy the other.
pub(crate) fn check_distinct(files: &[(&str, Option<&Path>)]) -> Result<()> {
    let mut known: Vec<(&str, PathBuf)> = Vec::new();
    for &(flag, path) in files {
        let Some(path) = path else { continue };
        // What isn't there yet is told apart by the way it is written.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if real.exists() && !real.is_file() {
            continue;
        }
        if let Some((other, _)) = known.iter().find(|(_, file)| *file == real) {
            bail!("{other} and {flag} are one file: {}", path.display());
        }
        known.push((flag, real));
    }
    Ok(())
}

/// Hands out results in the order of their numbers.
pub(crate) struct InOrder<T> {
    next: usize,
    early: BTreeMap<usize, T>,
}

impl<T> InOrder<T> {
    /// The first number to come is `first`.
    pub(crate) fn from(first: usize) -> Self {
        Self { next: first, early: BTreeMap::new() }
    }

    /// The number whose turn it is.
    pub(crate) fn turn(&self) -> usize {
        self.next
    }

    /// Takes result `number`, and returns all whose turn has come.
    pub(crate) fn push(&mut self, number: usize, result: T) -> Vec<T> {
        self.early.insert(number, result);
        let mut ready = Vec::new();
        while let Some(result) = self.early.remove(&self.next) {
            ready.push(result);
            self.next += 1;
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        let mut order = InOrder::from(2);
        assert_eq!(order.push(4, 'c'), []);
        assert_eq!(order.push(2, 'a'), ['a']);
        assert_eq!(order.turn(), 3);
        assert_eq!(order.push(3, 'b'), ['b', 'c']);
    }

    #[test]
    fn a_torn_line_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        std::fs::write(&path, "{\"a\":1}\n{\"a\":2}\n{\"a\":").unwrap();
        let (mut lines, kept) = JsonLines::resume(&path, |_, _| Ok(true)).unwrap();
        assert_eq!(kept, 2);
        lines.write(&serde_json::json!({"a": 3})).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"a\":1}\n{\"a\":2}\n{\"a\":3}\n");
    }

    #[test]
    fn lines_past_the_first_declined_one_are_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        std::fs::write(&path, "{\"a\":1}\n{\"a\":2}\n{\"a\":3}\n").unwrap();
        let (_, kept) = JsonLines::resume(&path, |_, value| Ok(value["a"] != 2)).unwrap();
        assert_eq!(kept, 1);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"a\":1}\n");
    }
}
