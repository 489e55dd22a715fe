//! Kernels against f64, instruction sets against each other, and a cache full of NaN.

use std::sync::Arc;

use half::{bf16, f16};

use super::matmul::MatMul;
use super::matrix::{Aligned, stride};
use super::packed::{BLOCK_ROWS, Pack, PackedMatMul, WAITING, packed_len};
use super::simd::{Element, Isa, padded};
use super::*;
use crate::backend::{Backend, Choice, Row};
use crate::config::LlamaConfig;
use crate::fusion::FusionRule;
use crate::kv_cache::BlockTable;
use crate::model::LlamaModel;
use crate::weights::{Dtype, LlamaWeights};

/// What no kernel may touch.
const GUARD: f32 = 12345.0;

/// Numbers in [−1, 1).
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// x Wᵀ of `rows` by `cols`, with strides that leave guards between the rows of y; checks it against f64 and
/// returns it.
fn checked<E: Element>(
    isa: Isa,
    (rows, cols, k): (usize, usize, usize),
    from: impl Fn(f32) -> E,
) -> Vec<f32> {
    let mut next = noise((rows * 1000 + cols) as u64 * 10_000 + k as u64);
    let x_stride = padded(k) + 8;
    let mut x = vec![f32::NAN; rows * x_stride];
    for row in x.chunks_mut(x_stride) {
        row[..k].fill_with(&mut next);
        row[k..padded(k)].fill(0.0);
    }
    // A row of NaN follows each row of weights: reading past the end of one shows.
    let w_stride = k + 3;
    let mut w = vec![from(f32::NAN); cols * w_stride];
    w.chunks_mut(w_stride).for_each(|row| row[..k].fill_with(|| from(next())));
    let y_stride = cols + 2;
    let mut y = vec![GUARD; rows * y_stride + 2];
    y.chunks_mut(y_stride).take(rows).for_each(|row| row[..cols].fill(f32::NAN));
    isa.run(MatMul { x: &x, x_stride, rows, w: &w, w_stride, k, cols, y: &mut y, y_stride });
    let mut results = Vec::new();
    for (r, row) in y.chunks(y_stride).take(rows).enumerate() {
        assert!(row[cols..].iter().all(|&guard| guard == GUARD));
        for (c, &y) in row[..cols].iter().enumerate() {
            let terms = (0..k).map(|i| f64::from(x[r * x_stride + i]) * f64::from(w[c * w_stride + i].get()));
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
            // Each of at least eight lanes adds at most k / 8 terms one after the other, then three or four sums: the
            // classic bound n · ε · Σ|terms| with n = k / 8 + 3, doubled where product and sum round separately.
            let bound = 2.0 * (k / 8 + 4) as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
            assert!(
                (f64::from(y) - sum).abs() <= bound,
                "{isa:?} {rows}x{cols}x{k} at {r},{c}: {y} and {sum}"
            );
        }
        results.extend_from_slice(&row[..cols]);
    }
    assert_eq!(y[rows * y_stride..], [GUARD; 2]);
    results
}

#[test]
fn products_are_within_the_bound_of_f64() {
    for isa in Isa::every() {
        for k in [1, 7, 8, 9, 64, 173, 1024, 1025, 2100] {
            for (rows, cols) in [
                (1, 1),
                (1, 9),
                (2, 4),
                (3, 5),
                (4, 8),
                (5, 16),
                (6, 11),
                (7, 3),
                (16, 5),
                (24, 13),
                (BLOCK_ROWS, 13),
            ] {
                checked(isa, (rows, cols, k), |x| x);
                checked(isa, (rows, cols, k), f16::from_f32);
                checked(isa, (rows, cols, k), bf16::from_f32);
            }
        }
    }
}

/// Packs rows that lie `stride` apart, among NaN.
fn packed<E: Element>(isa: Isa, from: &[E], stride: usize, rows: usize, k: usize) -> Aligned {
    let len = packed_len(rows, k);
    let mut to = Aligned::zeros(len + 1);
    to.fill(f32::NAN);
    isa.run(Pack { from, stride, rows, k, to: &mut to[..len] });
    assert!(to[len..].iter().all(|guard| guard.is_nan()));
    to
}

#[test]
fn packed_products_have_the_bits_of_those_of_one_row() {
    for isa in Isa::every() {
        for k in [1, 7, 16, 17, 173, 1083] {
            for (rows, cols) in [(1, 1), (5, 16), (8, 33), (13, 48), (16, 23), (25, 97), (BLOCK_ROWS, 64)] {
                let mut next = noise((rows * 100 + cols) as u64 * 10_000 + k as u64);
                let x_stride = stride(k);
                let mut x = vec![0.0; rows * x_stride];
                x.chunks_mut(x_stride).for_each(|row| row[..k].fill_with(&mut next));
                let w: Vec<bf16> = (0..cols * k).map(|_| bf16::from_f32(next())).collect();
                let packed_x = packed(isa, &x, x_stride, rows, k);
                let packed_w = packed(isa, &w, k, cols, k);
                let y_stride = padded(cols);
                let mut y = vec![GUARD; rows * y_stride + 1];
                let mut waiting = vec![f32::NAN; WAITING];
                isa.run(PackedMatMul {
                    x: &packed_x,
                    rows,
                    w: &packed_w,
                    cols,
                    k,
                    y: &mut y,
                    waiting: &mut waiting,
                });
                assert_eq!(y[rows * y_stride], GUARD);
                let mut alone = vec![0.0; cols];
                for (row, y) in y.chunks_exact(y_stride).enumerate() {
                    let (x, y_stride) = (&x[row * x_stride..], cols);
                    isa.run(MatMul {
                        x,
                        x_stride,
                        rows: 1,
                        w: &w,
                        w_stride: k,
                        k,
                        cols,
                        y: &mut alone,
                        y_stride,
                    });
                    assert_eq!(alone, y[..cols], "{isa:?} {rows}x{cols}x{k} row {row}");
                }
            }
        }
    }
}

/// A model of odd sizes.
fn model(dtype: Dtype) -> LlamaModel {
    model_of(ODD, dtype)
}

/// Sizes that no register divides.
const ODD: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 44,
        "intermediate_size": 61, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 10, "vocab_size": 91, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false}"#;

/// Queries that are wider than everything else.
const WIDE: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 42, "num_key_value_heads": 2,
        "head_dim": 128, "vocab_size": 33, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false}"#;

/// A small model with random weights.
fn model_of(json: &str, dtype: Dtype) -> LlamaModel {
    let config = Arc::new(LlamaConfig::from_json("config.json".as_ref(), json, None).unwrap());
    let weights = Arc::new(LlamaWeights::random(&config, dtype, 8));
    LlamaModel {
        role: Role::Small,
        name: "small".to_owned(),
        path: "memory".into(),
        config,
        weights,
        adapter: None,
    }
}

/// Logits of the last tokens of a sequence of 290, decoded after a prompt, with a cache that holds `poison`.
fn decode(dtype: Dtype, isa: Isa, poison: f32) -> Vec<Vec<f32>> {
    let ensemble = Arc::new(Ensemble::from_models(vec![model(dtype)]).unwrap());
    let limits = Limits { rows: 290, slots: 1, blocks: 40 };
    let mut backend = CpuBackend::with_isa(ensemble, CpuOptions { threads: 2, limits }, isa).unwrap();
    backend.caches[0].data_mut().fill(poison);
    backend.logits.get_mut().fill(poison);
    let tables = [BlockTable { blocks: (0..19).map(|i| i * 5 % 37).collect() }];
    let row = |position: usize| Row {
        model: 0,
        table: 0,
        position,
        token: (position * position % 91) as u32,
        slot: (position >= 280).then_some(0),
    };
    let mut logits = Vec::new();
    let prompt: Vec<_> = (0..281).map(row).collect();
    for rows in std::iter::once(prompt).chain((281..290).map(|position| vec![row(position)])) {
        backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
        logits.push(backend.logits(0, 0).unwrap());
    }
    logits
}

#[test]
fn every_number_of_rows_gives_the_same_bits() {
    for (json, dtype) in [(ODD, Dtype::Bf16), (WIDE, Dtype::F32), (WIDE, Dtype::F16)] {
        for isa in Isa::every() {
            let ensemble = Arc::new(Ensemble::from_models(vec![model_of(json, dtype)]).unwrap());
            let limits = Limits { rows: 60, slots: 60, blocks: 4 };
            let mut backend = CpuBackend::with_isa(ensemble, CpuOptions { threads: 2, limits }, isa).unwrap();
            let tables = [BlockTable { blocks: vec![3, 1, 0, 2] }];
            let row = |position| Row {
                model: 0,
                table: 0,
                position,
                token: (position * 7 % 33) as u32,
                slot: Some(position),
            };
            let mut run = |parts: &[usize]| {
                // What another run left must not pass for a result.
                backend.caches[0].data_mut().fill(f32::NAN);
                backend.logits.get_mut().fill(f32::NAN);
                let mut start = 0;
                for part in parts {
                    let rows: Vec<_> = (start..start + part).map(row).collect();
                    backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
                    start += part;
                }
                (0..start).map(|slot| backend.logits(0, slot).unwrap()).collect::<Vec<_>>()
            };
            let alone = run(&[1; 60]);
            // Tiles of each height, tall ones and others; packed, one block of rows and more.
            for parts in [&[2, 3, 4, 5, 6, 7, 8, 24][..], &[39, 9, 12], &[40, 20], &[48, 12], &[60]] {
                assert_eq!(run(parts)[..], alone[..parts.iter().sum()], "{isa:?} {dtype:?} {parts:?}");
            }
        }
    }
}

#[test]
fn prompts_of_several_models_are_packed_side_by_side() {
    for isa in Isa::every() {
        let roles = [Role::Small, Role::Expert(0), Role::Expert(1)];
        let models = roles.map(|role| {
            let config = model(Dtype::Bf16).config;
            let seed = 8 + roles.iter().position(|other| *other == role).unwrap() as u64;
            let weights = Arc::new(LlamaWeights::random(&config, Dtype::Bf16, seed));
            LlamaModel { role, config, weights, ..model(Dtype::Bf16) }
        });
        let ensemble = Arc::new(Ensemble::from_models(models.into()).unwrap());
        let limits = Limits { rows: 60, slots: 1, blocks: 4 };
        let mut backend = CpuBackend::with_isa(ensemble, CpuOptions { threads: 2, limits }, isa).unwrap();
        let tables = [BlockTable { blocks: vec![3, 1, 0, 2] }];
        // Groups that two models would share, were they packed without a gap, and one model of too few rows.
        let prompt = |model: usize| {
            let rows = [41, 43, 9][model];
            let token = move |position: usize| ((position * 7 + model) % 91) as u32;
            (0..rows).map(move |position| Row {
                model,
                table: 0,
                position,
                token: token(position),
                slot: (position + 1 == rows).then_some(0),
            })
        };
        let mut run = |models: &[usize]| {
            backend.logits.get_mut().fill(f32::NAN);
            let rows: Vec<_> = models.iter().flat_map(|&model| prompt(model)).collect();
            backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
            models.iter().map(|&model| backend.logits(model, 0).unwrap()).collect::<Vec<_>>()
        };
        let together = run(&[0, 1, 2]);
        for (model, together) in together.iter().enumerate() {
            assert_eq!(run(&[model])[0], *together, "{isa:?} {model}");
        }
    }
}

#[test]
fn what_is_not_written_is_not_read() {
    for isa in Isa::every() {
        let clean = decode(Dtype::F32, isa, 0.0);
        assert!(clean.iter().flatten().all(|logit| logit.is_finite()));
        assert_eq!(clean, decode(Dtype::F32, isa, f32::NAN));
    }
}

#[test]
fn instruction_sets_agree() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let portable = decode(dtype, Isa::Portable, 0.0);
        for isa in Isa::every() {
            let other = decode(dtype, isa, 0.0);
            let difference = |(a, b): (&f32, &f32)| (a - b).abs();
            let worst =
                portable.iter().flatten().zip(other.iter().flatten()).map(difference).fold(0.0, f32::max);
            // Without FMA every product rounds once more, and sums of sixteen lanes have another order; logits are of
            // the order of 1, and each side is within 1e-5 of the definition.
            assert!(worst < 1e-5, "{isa:?} {dtype:?}: {worst:e}");
        }
    }
}

#[test]
fn fusion_reads_no_slot_that_does_not_exist() {
    let models = [Role::Large, Role::Small].map(|role| LlamaModel { role, ..model(Dtype::F32) });
    let ensemble = Arc::new(Ensemble::from_models(models.into()).unwrap());
    let limits = Limits { rows: 1, slots: 1, blocks: 1 };
    let mut backend = CpuBackend::new(ensemble, CpuOptions { threads: 1, limits }).unwrap();
    let mut decisions = Vec::new();
    // The large model's slot 1 would be the small model's slot 0.
    let row =
        |slot| FuseRow { slot, step: 0, rule: &FusionRule::Large, held: None, choice: Choice::Forced(1) };
    backend.fuse(&[row(0), row(1)], &mut decisions).unwrap();
    assert!(decisions[0].is_ok());
    assert!(matches!(decisions[1], Err(Error::MissingModel { .. })), "{:?}", decisions[1]);
}
