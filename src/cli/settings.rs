//! What the results of a run depend on: it is kept beside them, and a run is gone on with only where it is the same.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::ensemble::Ensemble;
use crate::eval::fingerprint;
use crate::fusion::{FusionRule, Objective, SearchMode};
use crate::model::LlamaModel;
use crate::weights::{Linear, Tensor};

/// Bytes at either end of a tensor that its identity is made of: reading all of a large model takes minutes.
const END: usize = 256;

/// The models: role, name, and what tells them from others.
pub(super) fn models(ensemble: &Ensemble) -> Vec<Value> {
    let describe = |model: &std::sync::Arc<LlamaModel>| {
        json!({
            "role": model.role.to_string(),
            "name": model.name,
            "weight_bytes": model.weights.bytes(),
            "weights_fingerprint": format!("{:016x}", weights_fingerprint(model)),
        })
    };
    ensemble.models().iter().map(describe).collect()
}

/// The rule, by the names of the command line.
pub(super) fn rule(rule: &FusionRule, ensemble: &Ensemble) -> Value {
    let method = rule.name();
    match rule {
        FusionRule::Dynamic(dynamic) => json!({
            "method": method,
            "alpha_grid": alpha_grid(rule),
            "alpha_every": dynamic.every,
            "search": match dynamic.mode {
                SearchMode::Grid => "grid",
                SearchMode::Refine => "refine",
            },
            "objective": match dynamic.objective {
                Objective::Both => "both",
                Objective::Forward => "forward",
                Objective::Reverse => "reverse",
            },
        }),
        FusionRule::Static(alpha) => json!({ "method": method, "alpha": alpha.as_slice() }),
        FusionRule::Expert(expert) => json!({ "method": method, "expert": ensemble.expert_name(*expert) }),
        FusionRule::Large | FusionRule::Small => json!({ "method": method }),
    }
}

/// What α is chosen from, as `--alpha-grid` takes it; none where it isn't searched for.
pub(super) fn alpha_grid(rule: &FusionRule) -> Option<String> {
    let FusionRule::Dynamic(dynamic) = rule else { return None };
    Some(dynamic.grids.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
}

/// Both ends of every tensor, and the config.
fn weights_fingerprint(model: &LlamaModel) -> u64 {
    let mut bytes = format!("{:?}", model.config).into_bytes();
    let mut add = |tensor: &Tensor| {
        let all = tensor.as_bytes();
        bytes.extend(all.iter().take(END).chain(all.iter().rev().take(END)));
    };
    let weights = &model.weights;
    [&weights.embed_tokens, &weights.norm, &weights.lm_head].into_iter().for_each(&mut add);
    for layer in &weights.layers {
        [&layer.input_layernorm, &layer.post_attention_layernorm].into_iter().for_each(&mut add);
        layer.projections().into_iter().flat_map(Linear::tensors).for_each(&mut add);
    }
    let adapters = model.adapter.iter().flat_map(|adapter| &adapter.layers);
    for delta in adapters.flat_map(|layer| layer.deltas.iter().flatten()) {
        [&delta.a, &delta.b].into_iter().for_each(&mut add);
    }
    fingerprint(&bytes)
}

/// Fails where the settings beside `output` are not these; an output that has none is taken as it is.
pub(super) fn check(output: &Path, settings: &Value) -> Result<()> {
    let path = beside(output);
    if path.exists() { check_same(&path, &read(&path)?, settings, &[]) } else { Ok(()) }
}

/// Writes the settings beside `output`, where that is a file.
pub(super) fn keep(output: &Path, settings: &Value) -> Result<()> {
    if output.is_file() { write(&beside(output), settings) } else { Ok(()) }
}

fn beside(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".run.json");
    name.into()
}

/// Fails where two runs differ in anything but `besides`.
pub(super) fn check_same(path: &Path, found: &Value, wanted: &Value, besides: &[&str]) -> Result<()> {
    let empty = Map::new();
    let wanted = wanted.as_object().unwrap_or(&empty);
    for (field, value) in wanted.iter().filter(|(field, _)| !besides.contains(&field.as_str())) {
        let other = found.get(field).unwrap_or(&Value::Null);
        // A number that was read may be another kind of number than the one that was made.
        let same = other == value || matches!((other.as_f64(), value.as_f64()), (Some(a), Some(b)) if a == b);
        ensure!(same, "{}: this is another run: `{field}` was {other}, and is {value}", path.display());
    }
    Ok(())
}

pub(super) fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

pub(super) fn write(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(path, text + "\n").with_context(|| path.display().to_string())
}
