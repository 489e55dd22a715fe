//! The tiny Llamas of tests/goldens, each with something that a Llama can have, and what transformers says of them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use dlf_engine::adapter::LoraAdapter;
use dlf_engine::config::LlamaConfig;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::LlamaWeights;

/// A model with its prompts.
pub(crate) struct Tiny {
    pub(crate) model: LlamaModel,
    pub(crate) prompts: Vec<Prompt>,
}

/// What was fed, and the log-probabilities after each token of it: `(tokens, vocab_size)`.
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    pub(crate) log_probs: Vec<Vec<f32>>,
}

/// All of them.
pub(crate) fn tiny() -> Vec<Tiny> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny");
    let mut cases: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.is_dir());
    cases.sort();
    assert!(cases.len() >= 15, "the goldens are there");
    cases.iter().map(|case| load(&root, case)).collect()
}

fn load(root: &Path, case: &Path) -> Tiny {
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(case.join("golden.json")).unwrap()).unwrap();
    let base = json["base"].as_str().map_or_else(|| case.join("model"), |base| root.join(base));
    let config = LlamaConfig::load(&base).unwrap();
    let weights = Arc::new(LlamaWeights::load(&base, &config).unwrap());
    let adapter = case.join("adapter");
    let adapter = adapter.is_dir().then(|| Arc::new(LoraAdapter::load(&adapter, &config).unwrap()));
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let model =
        LlamaModel { role: Role::Small, name, path: base, config: Arc::new(config), weights, adapter };
    let file = fs::read(case.join("golden.safetensors")).unwrap();
    let prompts = json["prompts"].as_array().unwrap().iter().enumerate().map(|(number, prompt)| {
        let ids = |key: &str| -> Vec<u32> {
            prompt[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let tokens = [ids("input_ids"), ids("greedy_ids")].concat();
        Prompt { tokens, log_probs: golden(&file, &format!("log_probs.{number}")) }
    });
    Tiny { model, prompts: prompts.collect() }
}

/// A golden's `key` as rows of f32.
fn golden(file: &[u8], key: &str) -> Vec<Vec<f32>> {
    let tensors = safetensors::SafeTensors::deserialize(file).unwrap();
    let tensor = tensors.tensor(key).unwrap();
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    let numbers: Vec<f32> = tensor.data().chunks(4).map(number).collect();
    numbers.chunks(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
}
