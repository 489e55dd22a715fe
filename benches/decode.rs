//! Tokens per second of the CPU backend: a prompt of 512 tokens, and one token after a context of 128, on random
//! weights of SmolLM2-135M's shape; and of a triple that decodes in lockstep.
//!
//! `DLF_BENCH_MODEL=DIRECTORY` measures that model instead, `DLF_BENCH_THREADS` sets the threads.

#![allow(clippy::expect_used, reason = "a benchmark")]

use std::path::Path;
use std::sync::Arc;

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use dlf_engine::Ensemble;
use dlf_engine::backend::cpu::{CpuBackend, CpuOptions, available_threads};
use dlf_engine::backend::{Backend, Batch, Limits, Row};
use dlf_engine::config::LlamaConfig;
use dlf_engine::kv_cache::{BLOCK_SIZE, BlockTable};
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::{Dtype, LlamaWeights};

/// Tokens of the prompt.
const PROMPT: usize = 512;

/// Tokens before the one that is decoded.
const CONTEXT: usize = 128;

/// The shape of SmolLM2-135M.
const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "hidden_act": "silu", "tie_word_embeddings": true}"#;

fn main() {
    divan::main();
}

/// The model of the directory that the environment names, or random weights.
fn model(role: Role, dtype: Dtype) -> LlamaModel {
    let directory = std::env::var("DLF_BENCH_MODEL").ok();
    let path = Path::new(directory.as_deref().unwrap_or("random"));
    let (config, weights) = if directory.is_some() {
        let config = LlamaConfig::load(path).expect("a configuration");
        let weights = LlamaWeights::load(path, &config).expect("weights");
        (config, weights)
    } else {
        let config = LlamaConfig::from_json(path, CONFIG, None).expect("a configuration");
        let weights = LlamaWeights::random(&config, dtype, 1);
        (config, weights)
    };
    let (config, weights) = (Arc::new(config), Arc::new(weights));
    LlamaModel { role, name: role.to_string(), path: path.to_owned(), config, weights, adapter: None }
}

/// Runs positions `from..to` of one sequence in each of `models`, again and again.
fn bench(bencher: Bencher<'_, '_>, models: Vec<LlamaModel>, from: usize, to: usize) {
    let vocab_size = models[0].config.vocab_size;
    let threads = std::env::var("DLF_BENCH_THREADS").ok().and_then(|threads| threads.parse().ok());
    let limits = Limits { rows: PROMPT, slots: 1, blocks: PROMPT / BLOCK_SIZE };
    let options = CpuOptions { threads: threads.unwrap_or_else(available_threads), limits };
    let count = models.len();
    let ensemble = Arc::new(Ensemble::from_models(models).expect("an ensemble"));
    let mut backend = CpuBackend::new(ensemble, options).expect("a backend");
    let tables: Vec<_> =
        (0..count).map(|_| BlockTable { blocks: (0..limits.blocks as u32).collect() }).collect();
    let rows = |from: usize, to: usize| -> Vec<Row> {
        let row = |model, position| {
            let token = (position * 7919 % vocab_size) as u32;
            Row { model, table: model, position, token, slot: (position + 1 == to).then_some(0) }
        };
        (0..count).flat_map(|model| (from..to).map(move |position| row(model, position))).collect()
    };
    if from > 0 {
        backend.forward(&Batch { rows: &rows(0, from), tables: &tables }).expect("a context");
    }
    let rows = rows(from, to);
    bencher
        .counter(ItemsCount::new(to - from))
        .bench_local(|| black_box(backend.forward(&Batch { rows: &rows, tables: &tables })).expect("a step"));
}

#[divan::bench(args = [Dtype::F32, Dtype::F16, Dtype::Bf16], sample_count = 5, sample_size = 1)]
fn prompt_of_512(bencher: Bencher<'_, '_>, dtype: Dtype) {
    bench(bencher, vec![model(Role::Large, dtype)], 0, PROMPT);
}

#[divan::bench(args = [Dtype::F32, Dtype::F16, Dtype::Bf16], sample_count = 50, sample_size = 1)]
fn one_token(bencher: Bencher<'_, '_>, dtype: Dtype) {
    bench(bencher, vec![model(Role::Large, dtype)], CONTEXT, CONTEXT + 1);
}

/// A large model of the same shape, the small one and one expert: what a fused token costs before fusion.
#[divan::bench(args = [Dtype::Bf16], sample_count = 30, sample_size = 1)]
fn one_token_of_a_triple(bencher: Bencher<'_, '_>, dtype: Dtype) {
    let models = [Role::Large, Role::Small, Role::Expert(0)].map(|role| model(role, dtype));
    bench(bencher, models.into(), CONTEXT, CONTEXT + 1);
}
