//! The files of a run: run.json, METHOD.jsonl, METHOD.seconds.jsonl, summary.json.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::no_scores;
use crate::cli::output::JsonLines;
use crate::cli::settings;
use crate::eval::{MethodScores, Metric, SampleResult, Scores, Summary};

const RUN: &str = "run.json";
const SUMMARY: &str = "summary.json";

/// Where results go, and whether there may be some already.
pub(super) struct Store {
    dir: Option<PathBuf>,
    resumed: bool,
}

/// What is read back of a line of METHOD.jsonl.
#[derive(Deserialize)]
struct Kept {
    index: usize,
    scores: Map<String, Value>,
    mean_alpha: Option<f64>,
    error: Option<String>,
}

impl Kept {
    fn scores(&self, metrics: &[String]) -> Result<Scores> {
        let value = |name: &String| {
            self.scores.get(name).and_then(Value::as_f64).with_context(|| format!("no score `{name}`"))
        };
        let values = metrics.iter().map(value).collect::<Result<_>>()?;
        Ok(Scores { values, failed: self.error.is_some(), mean_alpha: self.mean_alpha })
    }
}

impl Store {
    /// Makes the directory, or checks that it holds the same run.
    pub(super) fn open(dir: Option<&Path>, resume: bool, info: Value) -> Result<Self> {
        let Some(dir) = dir else { return Ok(Self { dir: None, resumed: false }) };
        ensure!(!dir.is_file(), "--output {}: this is a file; results go to a directory", dir.display());
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let path = dir.join(RUN);
        let resumed = is_run(dir);
        if resumed {
            ensure!(
                resume,
                "{} holds the results of a run: go on with it by --resume, or name another directory",
                dir.display()
            );
            settings::check_same(&path, &settings::read(&path)?, &info, &[])?;
        } else {
            settings::write(&path, &info)?;
        }
        Ok(Self { dir: Some(dir.to_owned()), resumed })
    }

    /// The files of all methods, with what they hold already.
    pub(super) fn methods(
        &self,
        labels: &[&str],
        indices: &[usize],
        metrics: &[Metric],
    ) -> Result<Vec<MethodFile>> {
        if let Some(twice) =
            labels.iter().enumerate().find(|(k, l)| labels[..*k].iter().any(|o| stem(o) == stem(l)))
        {
            bail!(
                "--method {}: another one's results would have the same name, {}.jsonl",
                twice.1,
                stem(twice.1)
            );
        }
        let names: Vec<String> = metrics.iter().map(|metric| metric.name().to_owned()).collect();
        labels.iter().map(|label| self.method(label, indices, &names)).collect()
    }

    fn method(&self, label: &str, indices: &[usize], metrics: &[String]) -> Result<MethodFile> {
        let mut scores = no_scores(label);
        let Some(dir) = &self.dir else { return Ok(MethodFile { files: None, scores }) };
        let (path, seconds_path) = paths(dir, label);
        if !self.resumed {
            let files = (JsonLines::create(&path)?, JsonLines::create(&seconds_path)?);
            return Ok(MethodFile { files: Some(files), scores });
        }
        let (results, done) = JsonLines::resume(&path, |number, line| {
            let kept = Kept::deserialize(line)?;
            ensure!(
                indices.get(number) == Some(&kept.index),
                "this is not the result of sample {number} of the run"
            );
            scores.samples.insert(kept.index, kept.scores(metrics)?);
            Ok(true)
        })?;
        let (seconds, _) = JsonLines::resume(&seconds_path, |number, line| {
            if number < done {
                scores.seconds.push(line["seconds"].as_f64().context("no `seconds`")?);
            }
            Ok(number < done)
        })?;
        Ok(MethodFile { files: Some((results, seconds)), scores })
    }

    pub(super) fn write_summary(&self, summary: &Summary) -> Result<()> {
        self.dir
            .as_ref()
            .map_or(Ok(()), |dir| settings::write(&dir.join(SUMMARY), &serde_json::to_value(summary)?))
    }
}

/// Whether a directory holds the results of a run.
pub(super) fn is_run(dir: &Path) -> bool {
    dir.join(RUN).exists()
}

/// The results of one method.
pub(super) struct MethodFile {
    files: Option<(JsonLines, JsonLines)>,
    scores: MethodScores,
}

impl MethodFile {
    /// Samples that are there already.
    pub(super) fn done(&self) -> usize {
        self.scores.samples.len()
    }

    /// Takes the next one.
    pub(super) fn push(&mut self, result: &SampleResult, time: Duration) -> Result<()> {
        let seconds = time.as_secs_f64();
        if let Some((results, times)) = &mut self.files {
            // The time first: a killed run may have one too many, which is cut off, and never one too few.
            times.write(&json!({ "index": result.index, "seconds": seconds }))?;
            results.write(result)?;
        }
        let values = result.scores.iter().map(|(_, score)| *score).collect();
        let scores = Scores { values, failed: result.error.is_some(), mean_alpha: result.mean_alpha };
        self.scores.samples.insert(result.index, scores);
        self.scores.seconds.push(seconds);
        Ok(())
    }

    pub(super) fn take_scores(&mut self) -> MethodScores {
        std::mem::take(&mut self.scores)
    }
}

/// The lines of a finished method: raw, and what the table needs of them.
pub(super) struct Lines {
    pub(super) raw: Vec<String>,
    pub(super) seconds: Vec<String>,
    pub(super) scores: Vec<(usize, Scores)>,
}

/// Reads a method's files whole.
pub(super) fn read_method(dir: &Path, label: &str, metrics: &[String]) -> Result<Lines> {
    let (path, seconds_path) = paths(dir, label);
    let read = |path: &Path| -> Result<Vec<String>> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let raw = read(&path)?;
    let mut scores = Vec::with_capacity(raw.len());
    for (number, line) in raw.iter().enumerate() {
        let place = || format!("{}:{}", path.display(), number + 1);
        let kept: Kept = serde_json::from_str(line).with_context(place)?;
        scores.push((kept.index, kept.scores(metrics).with_context(place)?));
    }
    Ok(Lines { raw, seconds: read(&seconds_path)?, scores })
}

/// Writes a method's files whole.
pub(super) fn write_method(dir: &Path, label: &str, raw: &[&str], seconds: &[&str]) -> Result<()> {
    let (path, seconds_path) = paths(dir, label);
    for (path, lines) in [(path, raw), (seconds_path, seconds)] {
        let text: String = lines.iter().flat_map(|line| [*line, "\n"]).collect();
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

pub(super) fn read_info(dir: &Path) -> Result<Value> {
    settings::read(&dir.join(RUN))
}

fn paths(dir: &Path, label: &str) -> (PathBuf, PathBuf) {
    let stem = stem(label);
    (dir.join(format!("{stem}.jsonl")), dir.join(format!("{stem}.seconds.jsonl")))
}

/// A method's label as the name of a file.
fn stem(label: &str) -> String {
    label.chars().map(|c| if c.is_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect()
}
