//! `dlf-engine eval merge`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::args::MergeArgs;
use super::store::{Lines, Store, is_run, read_info, read_method, write_method};
use super::{no_scores, report};
use crate::cli::settings::check_same;
use crate::eval::{Metric, Summary};

pub(super) fn run(args: &MergeArgs) -> Result<ExitCode> {
    let output = args.output.display();
    ensure!(!is_run(&args.output), "{output} holds the results of a run: name another directory");
    let (dirs, mut info) = shards(&args.dirs)?;
    let samples = info["samples"].as_u64().context("run.json: no number of `samples`")? as usize;
    let strings = |field: &str, key: Option<&str>| -> Result<Vec<String>> {
        let list = info[field].as_array().with_context(|| format!("run.json: no list of `{field}`"))?;
        let text = |value: &Value| key.map_or(value, |key| &value[key]).as_str().map(str::to_owned);
        list.iter()
            .map(text)
            .collect::<Option<_>>()
            .with_context(|| format!("run.json: `{field}` is malformed"))
    };
    let (labels, names) = (strings("methods", Some("method"))?, strings("metrics", None)?);
    let metrics = names.iter().map(|name| metric(name)).collect::<Result<Vec<_>>>()?;
    // All is read and checked before anything is written.
    let mut merged = Vec::new();
    for label in &labels {
        let lines = dirs.iter().enumerate().map(|(shard, dir)| {
            let lines = read_method(dir, label, &names)?;
            check_whole(dir, label, &lines, shard, dirs.len(), samples)?;
            Ok(lines)
        });
        merged.push(lines.collect::<Result<Vec<Lines>>>()?);
    }
    info["shard"] = Value::Null;
    let task = info["task"].as_str().context("run.json: no `task`")?.to_owned();
    let store = Store::open(Some(&args.output), false, info)?;
    let mut all = Vec::new();
    for (label, shards) in labels.iter().zip(&merged) {
        let mut scores = no_scores(label);
        let (mut raw, mut seconds) = (Vec::new(), Vec::new());
        for index in 0..samples {
            let (shard, place) = (&shards[index % shards.len()], index / shards.len());
            raw.push(shard.raw[place].as_str());
            scores.samples.insert(index, shard.scores[place].1.clone());
            if let Some(line) = shard.seconds.get(place) {
                seconds.push(line.as_str());
                let time: Value =
                    serde_json::from_str(line).with_context(|| format!("seconds of {label}"))?;
                scores.seconds.extend(time["seconds"].as_f64());
            }
        }
        write_method(&args.output, label, &raw, &seconds)?;
        all.push(scores);
    }
    let summary = Summary::new(&task, &metrics, &all);
    store.write_summary(&summary)?;
    report(&summary, args.json)
}

/// The directories in the order of their shards, and what their runs have in common.
fn shards(dirs: &[PathBuf]) -> Result<(Vec<&Path>, Value)> {
    let mut found: BTreeMap<usize, &Path> = BTreeMap::new();
    let mut common: Option<(Value, usize)> = None;
    for dir in dirs {
        let info = read_info(dir)?;
        let shard = info["shard"].as_str().and_then(|text| text.split_once('/'));
        let shard = shard.and_then(|(i, n)| Some((i.parse::<usize>().ok()?, n.parse::<usize>().ok()?)));
        let Some((i, n)) = shard.filter(|(i, n)| (1..=*n).contains(i)) else {
            bail!("{}: not the result of a --shard", dir.display());
        };
        if let Some((common, shards)) = &common {
            check_same(dir, &info, common, &["shard"])?;
            ensure!(n == *shards, "{}: shard {i} of {n}, and others are of {shards}", dir.display());
        }
        if let Some(other) = found.insert(i, dir) {
            bail!("shard {i}/{n} is there twice: {} and {}", other.display(), dir.display());
        }
        common.get_or_insert((info, n));
    }
    let (info, shards) = common.context("no shards")?;
    if let Some(missing) = (1..=shards).find(|i| !found.contains_key(i)) {
        bail!("shard {missing}/{shards} is missing");
    }
    Ok((found.into_values().collect(), info))
}

fn check_whole(
    dir: &Path,
    label: &str,
    lines: &Lines,
    shard: usize,
    shards: usize,
    samples: usize,
) -> Result<()> {
    let wanted = (shard..samples).step_by(shards);
    ensure!(
        lines.scores.len() == wanted.clone().count(),
        "{}: {label}: {} of {} samples are there: finish it with --resume",
        dir.display(),
        lines.scores.len(),
        wanted.count()
    );
    ensure!(
        lines.scores.iter().map(|(index, _)| *index).eq(wanted),
        "{}: {label}: the samples are not those of shard {}/{shards}",
        dir.display(),
        shard + 1
    );
    Ok(())
}

/// A metric by the name that run.json has.
fn metric(name: &str) -> Result<Metric> {
    serde_json::from_value(Value::from(name))
        .with_context(|| format!("run.json: there is no metric {name:?}"))
}
