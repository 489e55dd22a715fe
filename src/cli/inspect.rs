//! `dlf-engine inspect`.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::InspectArgs;
use super::setup::{check_directory, load, note, swapped_sizes};
use crate::ensemble::{Ensemble, EnsembleSpec, ExpertSpec};
use crate::model::{LlamaModel, Role};

pub(super) fn run(args: &InspectArgs) -> Result<ExitCode> {
    for dir in &args.dirs {
        check_directory(&dir.display().to_string(), dir)?;
    }
    let (ensembles, obstacle) = open(args)?;
    let alone = args.dirs.len() == 1;
    let models =
        ensembles.iter().flat_map(|ensemble| (0..ensemble.models().len()).map(move |m| (ensemble, m)));
    let roles = (0..).map(|place| if alone { None } else { Some(role(place)) });
    let models: Vec<Summary> =
        models.zip(roles).map(|((ensemble, model), role)| summary(ensemble, model, role)).collect();
    if let [large, small, ..] = &models[..] {
        note(false, swapped_sizes(large.parameters, small.parameters));
    }
    let possible = obstacle.is_none();
    let verdict = Verdict { possible, reason: obstacle };
    let text = if args.json {
        let mut line = serde_json::to_string(&Report { models: &models, ensemble: &verdict })?;
        line.push('\n');
        line
    } else {
        report(&models, &verdict)
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("stdout")?;
    // Loaded apart, they don't fit; a large model and a small one fit, and lack an expert.
    Ok(if ensembles.len() == 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All directories as one ensemble; where they can't form one, each by itself, and why they can't.
fn open(args: &InspectArgs) -> Result<(Vec<Ensemble>, Option<String>)> {
    let mut dirs = args.dirs.iter().cloned();
    let spec = EnsembleSpec {
        large: dirs.next(),
        small: dirs.next(),
        experts: dirs.map(|path| ExpertSpec { name: None, path }).collect(),
    };
    let obstacle = match load(&spec) {
        Ok(ensemble) if ensemble.num_experts() > 0 => return Ok((vec![ensemble], None)),
        Ok(ensemble) => {
            let reason = "an ensemble needs a large model, a small one, and an expert".to_owned();
            return Ok((vec![ensemble], Some(reason)));
        }
        Err(error) => error,
    };
    let alone = |large| EnsembleSpec { large: Some(large), ..EnsembleSpec::default() };
    let ensembles = args.dirs.iter().map(|dir| Ensemble::load(&alone(dir.clone()))).collect::<Result<_, _>>();
    match ensembles {
        Ok(ensembles) => Ok((ensembles, Some(obstacle.to_string()))),
        // One of them can't be loaded at all.
        Err(_) => Err(obstacle),
    }
}

#[derive(Serialize)]
struct Report<'a> {
    models: &'a [Summary],
    ensemble: &'a Verdict,
}

#[derive(Serialize)]
struct Verdict {
    possible: bool,
    reason: Option<String>,
}

#[derive(Serialize)]
struct Summary {
    path: String,
    role: Option<String>,
    lora: bool,
    parameters: usize,
    dtype: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    tokenizer: bool,
    chat_template: bool,
    weight_bytes: usize,
    kv_bytes_per_token: usize,
}

/// What the directory at a place of the command line is taken for.
fn role(place: usize) -> Role {
    match place {
        0 => Role::Large,
        1 => Role::Small,
        place => Role::Expert(place - 2),
    }
}

/// `role` is that in the ensemble which all directories would form; a model that is loaded by itself has another.
fn summary(ensemble: &Ensemble, index: usize, role: Option<Role>) -> Summary {
    let model: &LlamaModel = &ensemble.models()[index];
    let config = &model.config;
    let tokenizer = ensemble.tokenizer(index);
    Summary {
        path: model.path.display().to_string(),
        role: role.map(|role| match (role, model.role) {
            (Role::Expert(_), Role::Expert(_)) => format!("expert {}", model.name),
            (role, _) => role.to_string(),
        }),
        lora: model.adapter.is_some(),
        parameters: model.num_parameters(),
        dtype: model.dtype().name(),
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        tokenizer: tokenizer.is_some(),
        chat_template: tokenizer.is_some_and(|tokenizer| tokenizer.has_chat_template()),
        weight_bytes: model.weight_bytes(),
        kv_bytes_per_token: config.kv_bytes_per_token(),
    }
}

fn report(models: &[Summary], verdict: &Verdict) -> String {
    let mut text = String::new();
    for model in models {
        let role = model.role.as_deref().map(|role| format!("{role}: ")).unwrap_or_default();
        let yes = |there: bool, name: &str| if there { name.to_owned() } else { format!("no {name}") };
        text.push_str(&format!(
            "{role}{}\n  {} parameters{}, {} · {} layers of {}, feed-forward {}, {} heads of {} ({} for keys and \
             values)\n  {} token ids, context {} · {}, {}\n  memory: weights {}, cache {} a token\n",
            model.path,
            count(model.parameters),
            if model.lora { " in a LoRA adapter" } else { "" },
            model.dtype,
            model.num_hidden_layers,
            model.hidden_size,
            model.intermediate_size,
            model.num_attention_heads,
            model.head_dim,
            model.num_key_value_heads,
            model.vocab_size,
            model.max_position_embeddings,
            yes(model.tokenizer, "tokenizer"),
            yes(model.chat_template, "chat template"),
            bytes(model.weight_bytes),
            bytes(model.kv_bytes_per_token),
        ));
    }
    match &verdict.reason {
        None => text.push_str("They can form an ensemble.\n"),
        Some(reason) => text.push_str(&format!("No ensemble: {reason}.\n")),
    }
    text
}

fn count(n: usize) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} B", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n if n >= 1e3 => format!("{:.1} k", n / 1e3),
        n => format!("{n}"),
    }
}

fn bytes(n: usize) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n} B"),
    }
}
