//! Tokens per second of one model directory: `cargo run --release --example throughput -- DIRECTORY [THREADS]`.
//!
//! Two numbers, as llama-bench has them: pp512, a prompt of 512 tokens, and tg64, 64 tokens decoded after a prompt
//! of 32; three passes after one that warms up.
#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use dlf_engine::Ensemble;
use dlf_engine::backend::cpu::{CpuBackend, CpuOptions};
use dlf_engine::backend::{Backend, Batch, Limits, Row};
use dlf_engine::config::LlamaConfig;
use dlf_engine::kv_cache::{BLOCK_SIZE, BlockTable};
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::LlamaWeights;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or("usage: throughput DIRECTORY [THREADS]")?;
    let threads = arguments.next().map_or(Ok(2), |threads| threads.parse())?;
    let path = Path::new(&directory);
    let config = LlamaConfig::load(path)?;
    let weights = LlamaWeights::load(path, &config)?;
    let vocab_size = config.vocab_size;
    let model = LlamaModel {
        role: Role::Large,
        name: "large".to_owned(),
        path: path.to_owned(),
        config: Arc::new(config),
        weights: Arc::new(weights),
        adapter: None,
    };
    let ensemble = Arc::new(Ensemble::from_models(vec![model])?);
    let limits = Limits { rows: 512, slots: 1, blocks: 512 / BLOCK_SIZE };
    let mut backend = CpuBackend::new(ensemble, CpuOptions { threads, limits })?;
    let tables = [BlockTable { blocks: (0..limits.blocks as u32).collect() }];
    let mut run = |positions: std::ops::Range<usize>| {
        let last = positions.end - 1;
        let token = |position: usize| (position * 7919 % vocab_size) as u32;
        let row = |position| Row {
            model: 0,
            table: 0,
            position,
            token: token(position),
            slot: (position == last).then_some(0),
        };
        let rows: Vec<_> = positions.map(row).collect();
        backend.forward(&Batch { rows: &rows, tables: &tables })
    };
    // The first pass touches all memory.
    run(0..512)?;
    for _ in 0..3 {
        let start = Instant::now();
        run(0..512)?;
        let prompt = 512.0 / start.elapsed().as_secs_f64();
        run(0..32)?;
        let start = Instant::now();
        for position in 32..96 {
            run(position..position + 1)?;
        }
        let decode = 64.0 / start.elapsed().as_secs_f64();
        println!("pp512 {prompt:8.1} tok/s   tg64 {decode:8.1} tok/s");
    }
    Ok(())
}
