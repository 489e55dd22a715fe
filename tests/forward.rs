//! The forward pass of the CPU backend: against a plain f64 reference, against transformers' numbers, and against
//! itself in every way a batch can be cut.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init, reason = "a test; plans are lists of ranges")]

use std::ops::Range;
use std::sync::Arc;

use dlf_engine::adapter::{LoraDelta, Projection};
use dlf_engine::backend::cpu::{CpuBackend, CpuOptions};
use dlf_engine::backend::{Backend, Batch, Limits, Row};
use dlf_engine::kv_cache::{BLOCK_SIZE, BlockTable};
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::rope::Rope;
use dlf_engine::weights::{Dtype, Linear, Tensor};
use dlf_engine::{Ensemble, Error};

#[path = "support/goldens.rs"]
mod goldens;
#[path = "support/models.rs"]
mod models;

use goldens::{Prompt, Tiny};
use models::{EVEN, LIMITS, ODD, Sequence, Shape, adapter, feed, mixed_ensemble, model, model_apart, tokens};

fn backend(models: Vec<LlamaModel>, threads: usize, limits: Limits) -> CpuBackend {
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    CpuBackend::new(ensemble, CpuOptions { threads, limits }).unwrap()
}

#[test]
fn rows_do_not_depend_on_their_batch() {
    for (shape, dtype) in [(EVEN, Dtype::F32), (ODD, Dtype::Bf16), (EVEN, Dtype::F16)] {
        let (models, sequences) = mixed_ensemble(shape, dtype);
        let all = |backend: &mut CpuBackend, cut: &dyn Fn(usize, usize) -> Vec<Range<usize>>| {
            // Batch number i has chunk i of every sequence.
            let mut batches: Vec<Vec<_>> = Vec::new();
            for (index, sequence) in sequences.iter().enumerate() {
                for (i, range) in cut(index, sequence.tokens.len()).into_iter().enumerate() {
                    batches.resize_with(batches.len().max(i + 1), Vec::new);
                    batches[i].push((index, range));
                }
            }
            feed(backend, &sequences, &batches)
        };
        // Sequence by sequence, token by token, one thread.
        let mut alone = backend(models.clone(), 1, LIMITS);
        let single: Vec<Vec<_>> = sequences
            .iter()
            .enumerate()
            .flat_map(|(index, sequence)| (0..sequence.tokens.len()).map(move |p| vec![(index, p..p + 1)]))
            .collect();
        let expected = feed(&mut alone, &sequences, &single);
        let whole = |_: usize, length: usize| std::iter::once(0..length).collect();
        let chunks = |index: usize, length: usize| {
            let size = [5, 64, 1, 17, 100, 3, 33, 8, 9, 130][index % 10];
            (0..length).step_by(size).map(|start| start..length.min(start + size)).collect()
        };
        let prompt_then_tokens = |index: usize, length: usize| {
            let prompt = length - 6 - index % 3;
            std::iter::once(0..prompt).chain((prompt..length).map(|p| p..p + 1)).collect()
        };
        for threads in [1, 2, 3] {
            for (name, cut) in [
                ("whole", &whole as &dyn Fn(usize, usize) -> Vec<Range<usize>>),
                ("chunks", &chunks),
                ("prompt, then tokens", &prompt_then_tokens),
            ] {
                let logits = all(&mut backend(models.clone(), threads, LIMITS), cut);
                assert!(logits == expected, "{dtype:?}, {threads} threads, {name}");
            }
        }
    }
}

/// y = W x + b + scale · B (A x), in f64.
fn linear(linear: &Linear, delta: Option<&LoraDelta>, x: &[f64]) -> Vec<f64> {
    let product = |weight: &Tensor, x: &[f64]| -> Vec<f64> {
        let numbers = weight.data().to_f32();
        numbers.chunks(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
    };
    let mut y = product(&linear.weight, x);
    if let Some(bias) = &linear.bias {
        y.iter_mut().zip(bias.data().to_f32()).for_each(|(y, b)| *y += f64::from(b));
    }
    if let Some(LoraDelta { a, b, scale }) = delta {
        let low = product(b, &product(a, x));
        y.iter_mut().zip(low).for_each(|(y, low)| *y += f64::from(*scale) * low);
    }
    y
}

fn rms_norm(x: &[f64], weight: &Tensor, eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight.data().to_f32()).map(|(x, w)| x * scale * f64::from(w)).collect()
}

/// The logits of every position, from the definition, in f64.
fn reference(model: &LlamaModel, tokens: &[u32]) -> Vec<Vec<f64>> {
    let LlamaModel { config, weights, adapter, .. } = model;
    let (head_dim, half) = (config.head_dim, config.head_dim / 2);
    let group = config.num_attention_heads / config.num_key_value_heads;
    let rope = Rope::new(config);
    let rotate = |x: &mut [f64], position: usize| {
        let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
        rope.cos_sin(position, &mut cos, &mut sin);
        for head in x.chunks_mut(head_dim) {
            for i in 0..half {
                let (a, b, c, s) = (head[i], head[i + half], f64::from(cos[i]), f64::from(sin[i]));
                (head[i], head[i + half]) = (a * c - b * s, b * c + a * s);
            }
        }
    };
    let embedding = weights.embed_tokens.data().to_f32();
    let embed = |&token: &u32| embedding[token as usize * config.hidden_size..][..config.hidden_size].iter();
    let mut hidden: Vec<Vec<f64>> =
        tokens.iter().map(|t| embed(t).map(|&x| f64::from(x)).collect()).collect();
    for (number, layer) in weights.layers.iter().enumerate() {
        let delta = |p: Projection| adapter.as_ref().and_then(|adapter| adapter.layers[number].delta(p));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (position, hidden) in hidden.iter_mut().enumerate() {
            let x = rms_norm(hidden, &layer.input_layernorm, config.rms_norm_eps);
            let mut q = linear(&layer.q_proj, delta(Projection::Q), &x);
            let mut k = linear(&layer.k_proj, delta(Projection::K), &x);
            rotate(&mut q, position);
            rotate(&mut k, position);
            keys.push(k);
            values.push(linear(&layer.v_proj, delta(Projection::V), &x));
            let mut attended = Vec::new();
            for (head, q) in q.chunks(head_dim).enumerate() {
                let at = head / group * head_dim..(head / group + 1) * head_dim;
                let dot = |k: &Vec<f64>| q.iter().zip(&k[at.clone()]).map(|(q, k)| q * k).sum::<f64>();
                let weights: Vec<f64> =
                    keys.iter().map(|k| (dot(k) / (head_dim as f64).sqrt()).exp()).collect();
                let sum: f64 = weights.iter().sum();
                attended.extend(at.clone().map(|d| {
                    weights.iter().zip(&values).map(|(w, v): (_, &Vec<f64>)| w / sum * v[d]).sum::<f64>()
                }));
            }
            let o = linear(&layer.o_proj, delta(Projection::O), &attended);
            hidden.iter_mut().zip(o).for_each(|(x, o)| *x += o);
            let x = rms_norm(hidden, &layer.post_attention_layernorm, config.rms_norm_eps);
            let gate = linear(&layer.gate_proj, delta(Projection::Gate), &x);
            let up = linear(&layer.up_proj, delta(Projection::Up), &x);
            let act: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let down = linear(&layer.down_proj, delta(Projection::Down), &act);
            hidden.iter_mut().zip(down).for_each(|(x, down)| *x += down);
        }
    }
    let head = Linear { weight: weights.lm_head.clone(), bias: None };
    let norm = |hidden: &Vec<f64>| rms_norm(hidden, &weights.norm, config.rms_norm_eps);
    hidden.iter().map(|hidden| linear(&head, None, &norm(hidden))).collect()
}

/// The logits of a whole prompt, from a backend with one model.
fn logits_of(model: LlamaModel, tokens: &[u32]) -> Vec<Vec<f32>> {
    let blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let limits = Limits { rows: tokens.len(), slots: tokens.len(), blocks };
    let table = BlockTable { blocks: (0..blocks as u32).collect() };
    let sequences = [Sequence { model: 0, table, tokens: tokens.to_vec() }];
    let logits = feed(&mut backend(vec![model], 2, limits), &sequences, &[vec![(0, 0..tokens.len())]]);
    logits.into_values().map(|bits| bits.into_iter().map(f32::from_bits).collect()).collect()
}

#[test]
fn logits_are_those_of_the_definition() {
    for (shape, dtype) in [(EVEN, Dtype::F32), (EVEN, Dtype::F16), (ODD, Dtype::F32), (ODD, Dtype::Bf16)] {
        for adapter in [None, Some(adapter(shape, 9))] {
            let model = LlamaModel { adapter, ..model(Role::Small, shape, dtype, 4) };
            let tokens = tokens(290, shape.vocab, 1);
            let exact = reference(&model, &tokens);
            let logits = logits_of(model, &tokens);
            let error = |(y, x): (&f32, &f64)| (f64::from(*y) - x).abs();
            let worst = logits.iter().flatten().zip(exact.iter().flatten()).map(error).fold(0.0, f64::max);
            // Logits are of the order of 1, eps is 6e-8, and four roundings in a row of sums of up to 1101 terms
            // in two layers accumulate to some hundred of it.
            assert!(worst < 1e-5, "{dtype:?}: {worst:e}");
            // And the comparison can fail: a neighbour's logits are far away.
            let moved =
                logits.iter().skip(1).flatten().zip(exact.iter().flatten()).map(error).fold(0.0, f64::max);
            assert!(moved > 0.1);
        }
    }
}

#[test]
fn an_adapter_is_the_merged_weights() {
    let shape = EVEN;
    let base = model(Role::Small, shape, Dtype::F32, 4);
    let adapter = adapter(shape, 9);
    let mut merged = (*base.weights).clone();
    for (layer, updates) in merged.layers.iter_mut().zip(&adapter.layers) {
        let projections = [
            (&mut layer.q_proj, Projection::Q),
            (&mut layer.k_proj, Projection::K),
            (&mut layer.v_proj, Projection::V),
            (&mut layer.o_proj, Projection::O),
            (&mut layer.gate_proj, Projection::Gate),
            (&mut layer.up_proj, Projection::Up),
            (&mut layer.down_proj, Projection::Down),
        ];
        for (linear, projection) in projections {
            let Some(LoraDelta { a, b, scale }) = updates.delta(projection) else { continue };
            let (rows, cols, r) = (b.shape()[0], a.shape()[1], a.shape()[0]);
            let (mut w, a, b) = (linear.weight.data().to_f32(), a.data().to_f32(), b.data().to_f32());
            for i in 0..rows {
                for j in 0..cols {
                    let low: f32 = (0..r).map(|k| b[i * r + k] * a[k * cols + j]).sum();
                    w[i * cols + j] += scale * low;
                }
            }
            linear.weight = Tensor::from_f32(Dtype::F32, &[rows, cols], &w).unwrap();
        }
    }
    let tokens = tokens(40, shape.vocab, 1);
    let plain = logits_of(base.clone(), &tokens);
    let merged = logits_of(LlamaModel { weights: Arc::new(merged), ..base.clone() }, &tokens);
    let adapted = logits_of(LlamaModel { adapter: Some(adapter), ..base }, &tokens);
    let worst = |other: &[Vec<f32>]| {
        let pairs = adapted.iter().flatten().zip(other.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    // The two round differently; both are within 1e-5 of the definition.
    assert!(worst(&merged) < 2e-5, "{:e}", worst(&merged));
    assert!(worst(&plain) > 0.1, "the adapter changes something");
}

#[test]
fn an_expert_rotates_and_normalises_in_its_own_way() {
    let (small, expert) =
        (model(Role::Small, EVEN, Dtype::F32, 2), model_apart(Role::Expert(0), EVEN, Dtype::F32, 3));
    let tokens = tokens(20, EVEN.vocab, 1);
    let expected =
        [&small, &expert].map(|model| logits_of(LlamaModel { role: Role::Small, ..model.clone() }, &tokens));
    // The same weights give something else with the small model's angles and ε.
    let like_small = logits_of(model(Role::Small, EVEN, Dtype::F32, 3), &tokens);
    let last = |logits: &[Vec<f32>]| logits.last().unwrap().clone();
    let differences = last(&like_small).into_iter().zip(last(&expected[1])).map(|(a, b)| (a - b).abs());
    assert!(differences.fold(0.0, f32::max) > 0.01);

    let limits = Limits { rows: 40, slots: 40, blocks: 4 };
    let mut both = backend(vec![small, expert], 2, limits);
    let sequence = |model: usize| Sequence {
        model,
        table: BlockTable { blocks: vec![2 * model as u32, 2 * model as u32 + 1] },
        tokens: tokens.clone(),
    };
    let logits = feed(&mut both, &[sequence(0), sequence(1)], &[vec![(0, 0..20), (1, 0..20)]]);
    for ((model, position), bits) in logits {
        let expected: Vec<u32> = expected[model][position].iter().map(|logit| logit.to_bits()).collect();
        assert_eq!(bits, expected, "model {model}, position {position}");
    }
}

#[test]
fn tables_share_the_blocks_of_a_common_prefix() {
    let shape = EVEN;
    let all = tokens(100, shape.vocab, 5);
    let mut other = all[..48].to_vec();
    other.extend(tokens(30, shape.vocab, 6));
    let alone = |tokens: &[u32]| logits_of(model(Role::Small, shape, Dtype::F32, 4), tokens);
    let (first, second) = (alone(&all), alone(&other));
    // The first sequence has its own tail after three blocks that only the rows of the last one fill, in the same
    // batch, with rows for more than one turn between them.
    let table = |tail: Range<u32>| BlockTable { blocks: [20, 3, 11].into_iter().chain(tail).collect() };
    let mut sequences = vec![Sequence { model: 0, table: table(30..32), tokens: other }];
    let mut batch = vec![(0, 48..78)];
    for i in 0..3 {
        let table = BlockTable { blocks: (50 + 13 * i..63 + 13 * i).collect() };
        sequences.push(Sequence { model: 0, table, tokens: tokens(200, shape.vocab, i as usize) });
        batch.push((1 + i as usize, 0..200));
    }
    sequences.push(Sequence { model: 0, table: table(40..44), tokens: all });
    batch.push((4, 0..100));
    let limits = Limits { rows: 1000, slots: 1000, blocks: 100 };
    let mut backend = backend(vec![model(Role::Small, shape, Dtype::F32, 4)], 2, limits);
    let logits = feed(&mut backend, &sequences, &[batch]);
    let bits = |logits: &[f32]| -> Vec<u32> { logits.iter().map(|logit| logit.to_bits()).collect() };
    for position in 48..78 {
        assert_eq!(logits[&(0, position)], bits(&second[position]), "position {position}");
    }
    for position in 0..100 {
        assert_eq!(logits[&(4, position)], bits(&first[position]), "position {position}");
    }
}

#[test]
fn ids_past_the_shared_vocabulary_are_never_computed() {
    let wide = model(Role::Large, Shape { vocab: 120, ..EVEN }, Dtype::F32, 1);
    let tokens = tokens(5, 96, 0);
    let alone = logits_of(wide.clone(), &tokens);
    let limits = Limits { rows: 8, slots: 8, blocks: 1 };
    let mut both = backend(vec![wide, model(Role::Small, EVEN, Dtype::F32, 2)], 1, limits);
    let sequences = [Sequence { model: 0, table: BlockTable { blocks: vec![0] }, tokens }];
    for ((_, position), logits) in feed(&mut both, &sequences, &[vec![(0, 0..5)]]) {
        assert_eq!(logits.len(), 96);
        assert!(logits.iter().zip(&alone[position]).all(|(bits, alone)| *bits == alone.to_bits()));
    }
}

#[test]
fn rows_that_name_what_is_not_there_are_refused() {
    let limits = Limits { rows: 8, slots: 2, blocks: 3 };
    let mut backend = backend(vec![model(Role::Small, EVEN, Dtype::F32, 2)], 1, limits);
    let tables = [BlockTable { blocks: vec![2] }, BlockTable { blocks: vec![3] }];
    let good = Row { model: 0, table: 0, position: 0, token: 95, slot: Some(1) };
    backend.forward(&Batch { rows: &[good], tables: &tables }).unwrap();
    for rows in [
        vec![Row { model: 1, ..good }],
        vec![Row { table: 2, ..good }],
        vec![Row { table: 1, ..good }],
        vec![Row { position: 16, ..good }],
        vec![Row { token: 96, ..good }],
        vec![Row { slot: Some(2), ..good }],
        vec![good, Row { position: 1, ..good }],
    ] {
        let refused = backend.forward(&Batch { rows: &rows, tables: &tables });
        assert!(matches!(refused, Err(Error::Parameter { .. })), "{rows:?}");
    }
    assert!(backend.logits(0, 2).is_err() && backend.logits(1, 0).is_err());
}

#[test]
fn logits_are_those_of_transformers() {
    for Tiny { model, prompts } in goldens::tiny() {
        for (number, Prompt { tokens, log_probs }) in prompts.iter().enumerate() {
            let logits = logits_of(model.clone(), tokens);
            assert_eq!(logits.len(), log_probs.len(), "{}", model.name);
            let mut worst = 0.0_f64;
            for (logits, expected) in logits.iter().zip(log_probs) {
                assert_eq!(logits.len(), expected.len(), "{}", model.name);
                let lse = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                for (&logit, &expected) in logits.iter().zip(expected) {
                    worst = worst.max((f64::from(logit) - lse - f64::from(expected)).abs());
                }
            }
            // Both sides sum in f32, each in its own order; log-probabilities go down to some −30, where one ulp
            // is 2e-6. The goldens say that every mistake they were made to catch moves one by 0.05 or more.
            assert!(worst < 5e-5, "{} prompt {number}: {worst:e}", model.name);
        }
    }
}
