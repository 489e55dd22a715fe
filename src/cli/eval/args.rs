//! The flags of `eval`, and those it shares with `sweep`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::cli::args::{DeviceArgs, DynamicArgs, Method, ModelArgs, Search, method, positive};
use crate::ensemble::Ensemble;
use crate::fusion::FusionRule;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    pub(crate) command: Option<EvalCommand>,
    #[command(flatten)]
    pub(crate) models: ModelArgs,
    /// Methods, in the order of the table: large, small, expert[:NAME], static[:ALPHA], dynamic[:grid|:refine].
    /// Differences are to the first.
    #[arg(long, value_name = "A,B,…", value_delimiter = ',', default_value = "large,static,dynamic",
          value_parser = eval_method, help_heading = "Fusion")]
    pub(crate) method: Vec<EvalMethod>,
    /// α of the static method: one for all experts or one for each [default: 1].
    #[arg(
        long,
        value_name = "A[,A…]",
        value_delimiter = ',',
        allow_hyphen_values = true,
        help_heading = "Fusion"
    )]
    pub(crate) alpha: Vec<f64>,
    #[command(flatten)]
    pub(crate) dynamic: DynamicArgs,
    #[command(flatten)]
    pub(crate) task: TaskArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Put the results of all shards together: files and table as of one run.
    Merge(MergeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The --output of every shard.
    #[arg(required = true, value_name = "DIR")]
    pub(crate) dirs: Vec<PathBuf>,
    /// Where the merged results go.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is evaluated, and how it is run.
#[derive(Debug, Args)]
pub(crate) struct TaskArgs {
    /// gsm8k, triviaqa, cnn_dailymail, truthfulqa_mc, truthfulqa_mc1, truthfulqa_mc2, mmlu, the demo's facts and
    /// sums, or a task file.
    #[arg(long, required = true, value_name = "NAME|FILE.toml", help_heading = "Task")]
    pub(crate) task: Option<String>,
    /// The samples: .jsonl, .json (an array) or .csv. The demo's tasks bring theirs.
    #[arg(long, value_name = "FILE", help_heading = "Task")]
    pub(crate) data: Option<PathBuf>,
    /// Put the first K samples of --fewshot-data, with their answers, in front of every prompt.
    #[arg(long, value_name = "K", default_value = "0", help_heading = "Task")]
    pub(crate) num_fewshot: usize,
    /// Where examples come from.
    #[arg(long, value_name = "FILE", help_heading = "Task")]
    pub(crate) fewshot_data: Option<PathBuf>,
    /// Only the first N samples.
    #[arg(long, value_name = "N", value_parser = positive::<u32>, help_heading = "Task")]
    pub(crate) limit: Option<u32>,
    /// Put the prompt through each model's chat template; models without one get it as it is.
    #[arg(long, help_heading = "Task")]
    pub(crate) chat: bool,
    /// Generate at most N tokens, instead of the task's own number.
    #[arg(long, value_name = "N", value_parser = positive::<u32>, help_heading = "Task")]
    pub(crate) max_new_tokens: Option<u32>,
    /// 0 is greedy.
    #[arg(long, value_name = "T", default_value = "0", help_heading = "Task")]
    pub(crate) temperature: f32,
    /// The same seed gives the same texts.
    #[arg(long, value_name = "N", default_value = "0", help_heading = "Task")]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Sequences decoded together.
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=256),
          help_heading = "Running")]
    pub(crate) batch_size: u16,
    /// Write every sample's result to METHOD.jsonl in this directory, and the table to summary.json.
    #[arg(long, value_name = "DIR", help_heading = "Running")]
    pub(crate) output: Option<PathBuf>,
    /// Go on where a killed run stopped.
    #[arg(long, requires = "output", help_heading = "Running")]
    pub(crate) resume: bool,
    /// Only every N-th sample from the I-th on, I from 1 to N; `eval merge` puts shards together.
    #[arg(long, value_name = "I/N", value_parser = shard, help_heading = "Running")]
    pub(crate) shard: Option<(usize, usize)>,
    /// Print one JSON object instead of the table.
    #[arg(long, help_heading = "Running")]
    pub(crate) json: bool,
    /// No progress bar.
    #[arg(long, short, help_heading = "Running")]
    pub(crate) quiet: bool,
}

/// A method with settings of its own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EvalMethod {
    /// As it was typed.
    pub(crate) label: String,
    pub(crate) method: Method,
    pub(crate) alpha: Option<f64>,
    pub(crate) refine: Option<bool>,
}

impl EvalMethod {
    /// Static fusion with one α.
    pub(crate) fn fixed(alpha: f64) -> Self {
        Self { label: format!("static:{alpha}"), method: Method::Static, alpha: Some(alpha), refine: None }
    }

    /// The dynamic rule as the flags have it.
    pub(crate) fn dynamic() -> Self {
        Self { label: "dynamic".to_owned(), method: Method::Dynamic, alpha: None, refine: None }
    }

    /// The rule, where the method's own settings go before those of the flags.
    pub(crate) fn rule(&self, flags: &DynamicArgs, alpha: &[f64], ensemble: &Ensemble) -> Result<FusionRule> {
        let mut flags = flags.clone();
        if let Some(refine) = self.refine {
            flags.search = if refine { Search::Refine } else { Search::Grid };
        }
        match self.alpha {
            Some(alpha) => flags.rule(&self.method, &[alpha], ensemble),
            None => flags.rule(&self.method, alpha, ensemble),
        }
    }
}

fn eval_method(text: &str) -> Result<EvalMethod, String> {
    let label = text.to_owned();
    match text.split_once(':') {
        Some(("static", alpha)) => match alpha.parse::<f64>() {
            Ok(alpha) if alpha.is_finite() => Ok(EvalMethod { label, ..EvalMethod::fixed(alpha) }),
            _ => Err(format!("expected static:ALPHA with a finite number, found {alpha:?}")),
        },
        Some(("dynamic", search)) => match search {
            "grid" | "refine" => {
                Ok(EvalMethod { label, refine: Some(search == "refine"), ..EvalMethod::dynamic() })
            }
            _ => Err(format!("expected dynamic:grid or dynamic:refine, found {text:?}")),
        },
        _ => {
            let known = "expected large, small, expert[:NAME], static[:ALPHA] or dynamic[:grid|:refine]";
            let method = method(text).map_err(|_| known.to_owned())?;
            Ok(EvalMethod { label, method, alpha: None, refine: None })
        }
    }
}

fn shard(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parsed {
        Some((i, n)) if i >= 1 && i <= n => Ok((i, n)),
        _ => Err("expected I/N with I from 1 to N, as in 1/4".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_may_have_settings() {
        assert_eq!(eval_method("static:-0.5").unwrap().alpha, Some(-0.5));
        assert_eq!(eval_method("dynamic:refine").unwrap().refine, Some(true));
        assert_eq!(eval_method("expert:sums").unwrap().method, Method::Expert(Some("sums".to_owned())));
        for wrong in ["", "static:", "static:nan", "dynamic:x", "large:1", "Large"] {
            assert!(eval_method(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shards_are_counted_from_one() {
        assert_eq!(shard("2/3"), Ok((2, 3)));
        for wrong in ["0/3", "4/3", "1", "1/0", "a/b", "-1/2", ""] {
            assert!(shard(wrong).is_err(), "{wrong}");
        }
    }
}
