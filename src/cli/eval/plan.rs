//! From flags to a task, its samples, an ensemble and the rules of all methods.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::args::{EvalMethod, TaskArgs};
use crate::backend::Limits;
use crate::cli::args::{Method, ModelArgs};
use crate::cli::output::check_distinct;
use crate::cli::settings;
use crate::cli::setup::{note, open, swapped};
use crate::ensemble::Ensemble;
use crate::eval::{Decoding, Encoder, Plan, Sample, Task, fingerprint, parse_samples};
use crate::fusion::FusionRule;
use crate::generate::{Generator, blocks_needed};
use crate::sampling::SamplingParams;

/// The samples of the demo's tasks.
const DEMO: [(&str, &str); 2] = [
    ("facts", include_str!("../../../models/demo/tasks/facts.jsonl")),
    ("sums", include_str!("../../../models/demo/tasks/sums.jsonl")),
];

/// All that a run needs, loaded and checked.
pub(crate) struct Prepared {
    task: Task,
    data: DataFile,
    shots: Vec<Sample>,
    shots_fingerprint: Option<u64>,
    /// The samples of this shard.
    pub(crate) indices: Vec<usize>,
    ensemble: Arc<Ensemble>,
    /// Label and rule.
    pub(crate) methods: Vec<(String, FusionRule)>,
    decoding: Decoding,
}

struct DataFile {
    path: PathBuf,
    samples: Vec<Sample>,
    fingerprint: u64,
}

impl DataFile {
    fn read(path: &Path, task: &Task, limit: Option<usize>) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        Self::parse(path, &bytes, task, limit)
    }

    fn parse(path: &Path, bytes: &[u8], task: &Task, limit: Option<usize>) -> Result<Self> {
        let samples = parse_samples(path, bytes, task.columns(), limit)?;
        Ok(Self { path: path.to_owned(), samples, fingerprint: fingerprint(bytes) })
    }
}

impl Prepared {
    /// Loads everything; `rule` makes the rule of a method.
    pub(crate) fn new(
        models: &ModelArgs,
        args: &TaskArgs,
        methods: &[EvalMethod],
        rule: impl Fn(&EvalMethod, &Ensemble) -> Result<FusionRule>,
    ) -> Result<Self> {
        let task = Task::load(args.task.as_deref().context("give --task")?)?;
        check_distinct(&[
            ("--data", args.data.as_deref()),
            ("--fewshot-data", args.fewshot_data.as_deref()),
        ])?;
        let limit = args.limit.map(|limit| limit as usize);
        let demo = DEMO.iter().find(|(name, _)| args.task.as_deref() == Some(*name));
        let data = match (&args.data, demo) {
            (Some(path), _) => DataFile::read(path, &task, limit)?,
            (None, Some((name, text))) => {
                DataFile::parse(&PathBuf::from(format!("{name}.jsonl")), text.as_bytes(), &task, limit)?
            }
            (None, None) => bail!("give the samples of {}: --data FILE", task.name()),
        };
        let (shots, shots_fingerprint) = shots(args, &task)?;
        let (first, step) = args.shard.unwrap_or((1, 1));
        let indices: Vec<usize> = (0..data.samples.len()).skip(first - 1).step_by(step).collect();
        ensure!(!indices.is_empty(), "--shard {first}/{step}: there are only {} samples", data.samples.len());
        let alone = match methods {
            [first, rest @ ..] if rest.iter().all(|other| other.method == first.method) => {
                first.method.clone()
            }
            _ => Method::Dynamic,
        };
        let ensemble = Arc::new(models.load(&alone)?);
        note(args.quiet, swapped(&ensemble));
        let mut rules: Vec<(String, FusionRule)> = Vec::new();
        for method in methods {
            ensure!(
                rules.iter().all(|(label, _)| *label != method.label),
                "--method: {} is there twice",
                method.label
            );
            let rule = rule(method, &ensemble).with_context(|| format!("--method {}", method.label))?;
            rules.push((method.label.clone(), rule));
        }
        let templates = ensemble.models().len();
        if args.chat && !(0..templates).any(|m| ensemble.tokenizer(m).is_some_and(|t| t.has_chat_template()))
        {
            bail!("--chat: none of the models has a chat template");
        }
        let sampling =
            SamplingParams { temperature: args.temperature, seed: args.seed, ..SamplingParams::default() };
        sampling.validate()?;
        let decoding = Decoding { sampling, max_new_tokens: args.max_new_tokens.map(|n| n as usize) };
        Ok(Self { task, data, shots, shots_fingerprint, indices, ensemble, methods: rules, decoding })
    }

    pub(crate) fn plan(&self, args: &TaskArgs) -> Plan<'_> {
        Plan {
            task: &self.task,
            path: &self.data.path,
            samples: &self.data.samples,
            indices: &self.indices,
            shots: &self.shots,
            encoder: Encoder { ensemble: &self.ensemble, chat: args.chat },
            decoding: &self.decoding,
        }
    }

    /// The file and line of a sample.
    pub(crate) fn place(&self, index: usize) -> String {
        let line = self.data.samples.get(index).map_or(0, |sample| sample.line);
        format!("{}:{line}", self.data.path.display())
    }

    /// A generator whose cache holds the longest sequence `batch_size` times; `choices` is how many a sample may have.
    pub(crate) fn generator(&self, args: &TaskArgs, longest: usize, choices: usize) -> Result<Generator> {
        let models = 0..self.ensemble.models().len();
        let context = models.map(|model| self.ensemble.context(model)).max().unwrap_or(1);
        let sequences = (self.indices.len() * choices).clamp(1, args.batch_size.into());
        let blocks = blocks_needed(sequences, longest.min(context + 1));
        let limits = Limits::for_vocabulary(self.ensemble.vocab_size(), sequences, blocks);
        open(args.device.backend(limits), Arc::clone(&self.ensemble), args.quiet)
    }

    /// All that the results depend on: a run is resumed, and shards are merged, only where it is the same.
    pub(crate) fn info(&self, args: &TaskArgs) -> Value {
        let methods = self.methods.iter();
        let methods: Vec<Value> = methods
            .map(|(label, rule)| json!({ "method": label, "rule": settings::rule(rule, &self.ensemble) }))
            .collect();
        let hex = |number: u64| format!("{number:016x}");
        json!({
            "task": self.task.name(),
            "task_fingerprint": hex(fingerprint(self.task.text().as_bytes())),
            "metrics": self.task.metrics().iter().map(|metric| metric.name()).collect::<Vec<_>>(),
            "data_fingerprint": hex(self.data.fingerprint),
            "samples": self.data.samples.len(),
            "num_fewshot": self.shots.len(),
            "fewshot_fingerprint": self.shots_fingerprint.map(hex),
            "models": settings::models(&self.ensemble),
            "methods": methods,
            "chat": args.chat,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "seed": args.seed,
            "shard": args.shard.map(|(i, n)| format!("{i}/{n}")),
        })
    }
}

fn shots(args: &TaskArgs, task: &Task) -> Result<(Vec<Sample>, Option<u64>)> {
    match (args.num_fewshot, &args.fewshot_data) {
        (0, None) => Ok((Vec::new(), None)),
        (0, Some(_)) => bail!("--fewshot-data: give --num-fewshot K, too"),
        (count, None) => {
            bail!("--num-fewshot {count}: give --fewshot-data FILE, which isn't that of the samples")
        }
        (count, Some(path)) => {
            let file = DataFile::read(path, task, Some(count))?;
            ensure!(
                file.samples.len() == count,
                "--num-fewshot {count}: {} has only {}",
                path.display(),
                file.samples.len()
            );
            Ok((file.samples, Some(file.fingerprint)))
        }
    }
}
