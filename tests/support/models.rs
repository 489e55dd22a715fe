//! Models of odd and even shapes with random weights, and a way to feed them: what tests of backends share.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use dlf_engine::adapter::{LoraAdapter, LoraDelta, LoraLayer};
use dlf_engine::backend::{Backend, Batch, Limits, Row};
use dlf_engine::config::{LlamaConfig, RopeConfig, RopeScaling};
use dlf_engine::kv_cache::BlockTable;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::{Dtype, LlamaWeights, Tensor};

/// The shape of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub bias: bool,
}

/// Whole vectors everywhere.
pub const EVEN: Shape =
    Shape { hidden: 64, intermediate: 96, heads: 6, kv_heads: 2, head_dim: 16, vocab: 96, bias: false };

/// No size is a multiple of anything, and products are long enough to be summed in blocks.
pub const ODD: Shape =
    Shape { hidden: 37, intermediate: 1101, heads: 5, kv_heads: 1, head_dim: 6, vocab: 101, bias: true };

pub fn config(shape: Shape) -> Arc<LlamaConfig> {
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, vocab, bias } = shape;
    let json = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": {hidden},
            "intermediate_size": {intermediate}, "num_hidden_layers": 2, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "head_dim": {head_dim}, "vocab_size": {vocab},
            "attention_bias": {bias}, "mlp_bias": {bias}, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false}}"#
    );
    Arc::new(LlamaConfig::from_json("config.json".as_ref(), &json, None).unwrap())
}

pub fn model(role: Role, shape: Shape, dtype: Dtype, seed: u64) -> LlamaModel {
    let config = config(shape);
    let weights = Arc::new(LlamaWeights::random(&config, dtype, seed));
    LlamaModel { role, name: role.to_string(), path: "memory".into(), config, weights, adapter: None }
}

/// A model that normalises and rotates in its own way.
pub fn model_apart(role: Role, shape: Shape, dtype: Dtype, seed: u64) -> LlamaModel {
    let mut model = model(role, shape, dtype, seed);
    let mut config = (*model.config).clone();
    config.rms_norm_eps = 0.01;
    config.rope = RopeConfig { theta: 1e6, scaling: RopeScaling::Linear { factor: 1.5 } };
    model.config = Arc::new(config);
    model
}

/// Low-rank updates of every projection but one, of ranks that differ.
pub fn adapter(shape: Shape, seed: u64) -> Arc<LoraAdapter> {
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, .. } = shape;
    let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
    let sizes = [
        (queries, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, queries),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ];
    let mut state = seed;
    let mut tensor = |rows: usize, cols: usize| {
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) / (cols as f32).sqrt()
            })
            .collect();
        Tensor::from_f32(Dtype::F32, &[rows, cols], &values).unwrap()
    };
    let mut layer = |number: usize| {
        let mut layer = LoraLayer::default();
        for (i, &(rows, cols)) in sizes.iter().enumerate() {
            let r = 3 + (i + number) % 7;
            if i != (number + seed as usize) % 7 {
                layer.deltas[i] = Some(LoraDelta { a: tensor(r, cols), b: tensor(rows, r), scale: 0.75 });
            }
        }
        layer
    };
    Arc::new(LoraAdapter { layers: vec![layer(0), layer(1)] })
}

pub fn tokens(count: usize, vocab: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 7 + seed * 13) % vocab) as u32).collect()
}

/// A sequence in a model: which blocks it has, and what is fed.
pub struct Sequence {
    pub model: usize,
    pub table: BlockTable,
    pub tokens: Vec<u32>,
}

/// Logits by (sequence, position), as bits.
pub type Logits = BTreeMap<(usize, usize), Vec<u32>>;

/// Feeds `batches`, each a list of (sequence, positions), and collects all logits.
pub fn feed(
    backend: &mut dyn Backend,
    sequences: &[Sequence],
    batches: &[Vec<(usize, Range<usize>)>],
) -> Logits {
    let tables: Vec<_> = sequences.iter().map(|sequence| sequence.table.clone()).collect();
    let mut logits = Logits::new();
    for batch in batches {
        let mut rows = Vec::new();
        for (table, positions) in batch {
            let Sequence { model, tokens, .. } = &sequences[*table];
            let row = |position| Row {
                model: *model,
                table: *table,
                position,
                token: tokens[position],
                slot: None,
            };
            rows.extend(positions.clone().map(row));
        }
        rows.sort_by_key(|row| (row.model, row.table, row.position));
        for (slot, row) in rows.iter_mut().enumerate() {
            row.slot = Some(slot);
        }
        backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
        for row in &rows {
            let of_row = backend.logits(row.model, row.slot.unwrap()).unwrap();
            assert!(of_row.iter().all(|logit| logit.is_finite()));
            logits.insert((row.table, row.position), of_row.iter().map(|logit| logit.to_bits()).collect());
        }
    }
    logits
}

/// A large model, a small one, a full expert with its own rotation and ε between two adapters; two sequences each.
pub fn mixed_ensemble(shape: Shape, dtype: Dtype) -> (Vec<LlamaModel>, Vec<Sequence>) {
    let small = model(Role::Small, shape, dtype, 2);
    let lora = |t: usize| LlamaModel {
        role: Role::Expert(t),
        adapter: Some(adapter(shape, t as u64 + 5)),
        ..small.clone()
    };
    let (first, last) = (lora(0), lora(2));
    let large = model(Role::Large, Shape { hidden: shape.hidden + 3, ..shape }, dtype, 1);
    let models = vec![large, small, first, model_apart(Role::Expert(1), shape, dtype, 3), last];
    // Blocks in no order; those of a model are its own.
    let mut sequences = Vec::new();
    for model in 0..models.len() {
        for (number, length) in [(0, 300), (1, 41)] {
            let blocks =
                (0..(length as u32).div_ceil(16)).map(|i| (i * 7 + 3 + 11 * number) % 29 + 29 * number);
            let tokens = tokens(length, shape.vocab, model + 7 * number as usize);
            sequences.push(Sequence { model, table: BlockTable { blocks: blocks.collect() }, tokens });
        }
    }
    (models, sequences)
}

/// Enough for every batch of these tests.
pub const LIMITS: Limits = Limits { rows: 700, slots: 4000, blocks: 58 };
