//! `dlf-engine inspect`.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::InspectArgs;
use crate::ensemble::{Ensemble, EnsembleSpec, ExpertSpec};
use crate::model::{LlamaModel, Role};

pub(super) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let (ensemble, obstacle) = open(args)?;
    let models: Vec<Summary> = ensemble.iter().flat_map(summaries).collect();
    let verdict = Verdict { possible: obstacle.is_none(), reason: obstacle };
    let text = if args.json {
        let mut line = serde_json::to_string(&Report { models: &models, ensemble: &verdict })?;
        line.push('\n');
        line
    } else {
        report(&models, &verdict)
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("stdout")?;
    Ok(ExitCode::SUCCESS)
}

/// All directories as one ensemble; where they can't form one, each by itself, and why they can't.
fn open(args: &InspectArgs) -> Result<(Vec<Ensemble>, Option<String>)> {
    let mut dirs = args.dirs.iter().cloned();
    let spec = EnsembleSpec {
        large: dirs.next(),
        small: dirs.next(),
        experts: dirs.map(|path| ExpertSpec { name: None, path }).collect(),
    };
    let obstacle = match Ensemble::load(&spec) {
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
        Err(_) => Err(obstacle.into()),
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

fn summaries(ensemble: &Ensemble) -> Vec<Summary> {
    let alone = ensemble.models().len() == 1;
    let summarise = |(index, model): (usize, &std::sync::Arc<LlamaModel>)| {
        let config = &model.config;
        let tokenizer = ensemble.tokenizer(index);
        Summary {
            path: model.path.display().to_string(),
            role: (!alone).then(|| match model.role {
                Role::Expert(_) => format!("expert {}", model.name),
                role => role.to_string(),
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
    };
    ensemble.models().iter().enumerate().map(summarise).collect()
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
