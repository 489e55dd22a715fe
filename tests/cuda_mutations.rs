//! Would the tests notice? Kernels are broken in one place at a time, and a short generation must fail
//! or say something else.
//!
//! Lines are changed where every change matters: barriers, masks of shuffles, and the bounds that a launch is told.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::ops::Range;
use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::backend::Limits;
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use dlf_engine::{Generator, Request, SamplingParams, Step};
use virtual_gpu::host::{Driver, Gpu};

#[path = "support/models.rs"]
mod models;

use models::{Shape, adapter, model, tokens};

/// No size is a multiple of a tile. The intermediate size is more than what is staged at once of 16 rows, and the
/// vocabulary is more tiles than the GPU runs blocks; it has no padding, which nobody would miss.
const SHAPE: Shape =
    Shape { hidden: 44, intermediate: 530, heads: 3, kv_heads: 1, head_dim: 10, vocab: 7000, bias: true };

/// Heads for tensor cores, of no whole bank.
const HEADS: Shape =
    Shape { hidden: 24, intermediate: 16, heads: 2, kv_heads: 1, head_dim: 24, vocab: 50, bias: false };

/// What is generated to see whether a change shows.
struct Workload {
    ensemble: Arc<Ensemble>,
    /// Tokens of the two prompts.
    lengths: [usize; 2],
    /// Tokens of a prompt that go together.
    rows: usize,
}

/// Sixteen rows of the large model at once, and 32 that share the small one's weights: for tensor cores.
fn projecting() -> Workload {
    let small = model(Role::Small, SHAPE, Dtype::Bf16, 2);
    let lora = LlamaModel { role: Role::Expert(0), adapter: Some(adapter(SHAPE, 3)), ..small.clone() };
    let other = model(Role::Expert(1), SHAPE, Dtype::Bf16, 4);
    let models = vec![model(Role::Large, SHAPE, Dtype::Bf16, 1), small, lora, other];
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    Workload { ensemble, lengths: [11, 5], rows: 16 }
}

/// A prompt whose rows attend in tiles, of two warps and over three blocks of the cache.
fn attending() -> Workload {
    let models = vec![
        model(Role::Large, HEADS, Dtype::F32, 1),
        model(Role::Small, HEADS, Dtype::F32, 2),
        model(Role::Expert(0), HEADS, Dtype::F32, 3),
    ];
    Workload { ensemble: Arc::new(Ensemble::from_models(models).unwrap()), lengths: [37, 5], rows: 42 }
}

/// Two sequences on a GPU whose kernels were changed by `mutate`; `None` where the run failed or was found faulty.
fn run(workload: &Workload, mutate: impl FnOnce(&Gpu)) -> (Gpu, Option<Vec<Step>>) {
    let Workload { ensemble, lengths, rows } = workload;
    let gpu = Driver::load().unwrap().device("a100").unwrap();
    // A loop without end ends here.
    gpu.budget(20_000_000);
    mutate(&gpu);
    let limits = Limits { rows: *rows, slots: 2, blocks: 40 };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
    let steps = CudaBackend::new(Arc::clone(ensemble), options, &mut |_| {}).and_then(|cuda| {
        let mut generator = Generator::new(Arc::clone(ensemble), Box::new(cuda));
        let sampling = SamplingParams { temperature: 0.7, seed: 3, ..SamplingParams::default() };
        for request in [
            Request::new(tokens(lengths[0], HEADS.vocab, 1), 4),
            Request::new(tokens(lengths[1], HEADS.vocab, 2), 4).sampling(sampling),
        ] {
            generator.push(Request { ignore_eos: true, ..request })?;
        }
        generator.collect::<Result<Vec<Step>, _>>()
    });
    let clean = gpu.reports().is_empty();
    (gpu, steps.ok().filter(|_| clean))
}

fn same(a: &[Step], b: &[Step]) -> bool {
    let key = |step: &Step| (step.request, step.index, step.token, step.decision.clone());
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| key(a) == key(b))
}

/// What a change is: something done to the GPU before it is used.
type Change<'a> = Box<dyn Fn(&Gpu) + 'a>;

/// Those of `changes` that found their place and that nobody noticed; and how many found it.
fn survivors(workload: &Workload, changes: Vec<(String, Change<'_>)>) -> (Vec<String>, usize) {
    let (_, expected) = run(workload, |_| {});
    let expected = expected.unwrap();
    let (mut survived, mut all) = (Vec::new(), 0);
    for (name, change) in changes {
        let (gpu, found) = run(workload, change);
        if gpu.mutations() > 0 {
            all += 1;
            if found.is_some_and(|found| same(&found, &expected)) {
                survived.push(name);
            }
        }
    }
    (survived, all)
}

/// The lines of a kernel, counted among those that hold `find`.
fn lines<'a>(
    kernel: &'a str,
    range: Range<u64>,
    find: &'a str,
    replacement: &'a str,
) -> Vec<(String, Change<'a>)> {
    let change = |nth: u64| {
        let change: Change<'a> = Box::new(move |gpu: &Gpu| gpu.mutate(kernel, find, nth, replacement));
        (format!("{kernel}: {find} {nth}"), change)
    };
    range.map(change).collect()
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_barrier_less_is_noticed() {
    // Of a projection with adapters: the ticket, what a producer computed, and that producers are done. Of all: before and
    // after staging; and, of a warp, before its sums are read, and before the next tile, which comes only where a block has
    // more than one.
    let mut changes = lines("residual_bf16_4", 0..2, "bar.sync", "");
    changes.extend(lines("residual_bf16_4", 4..5, "bar.sync", ""));
    changes.extend(lines("residual_bf16_16", 2..4, "bar.sync", ""));
    changes.extend(lines("lm_head_bf16_4", 3..4, "bar.sync", ""));
    changes.extend(lines("lm_head_bf16_4", 0..2, "bar.warp.sync", ""));
    changes.extend(lines("attention_4", 0..2, "bar.sync", ""));
    // The second is for ranges of columns, which there are none of: src/backend/cuda/tests/projections.rs.
    changes.extend(lines("residual_wide_bf16", 0..1, "bar.sync", ""));
    changes.extend(lines("residual_wide_bf16", 2..5, "bar.sync", ""));
    changes.extend(lines("split_rows_bf16", 0..1, "bar.sync", ""));
    changes.extend(lines("gate_up_wide_bf16", 0..1, "cp.async.wait_group", ""));
    // Those after them belong to the refined search: src/backend/cuda/fusion/tests/sampling.rs.
    changes.extend(lines("fuse_2", 0..7, "bar.sync", ""));
    let (survived, all) = survivors(&projecting(), changes);
    assert!(survived.is_empty(), "{survived:#?}");
    assert!(all >= 20, "{all}");
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_change_to_the_order_of_blocks_is_noticed() {
    // What a producer of A x does for the others, and what these do before they take it.
    let kernel = "qkv_bf16_4";
    let mut changes = lines(kernel, 0..2, "membar", "");
    changes.extend(lines(kernel, 0..1, "ld.volatile.global", "ld.global"));
    changes.extend(lines(kernel, 0..2, "atom.global.add*, 1;", ", 0;"));
    // The counters of the next step are those of this one.
    changes.extend(lines("embed_bf16", 0..1, "st.global.u32", ""));
    let told = changes.len();
    let (survived, all) = survivors(&projecting(), changes);
    assert!(survived.is_empty(), "{survived:#?}");
    assert_eq!(all, told);
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_mask_that_leaves_lanes_out_is_noticed() {
    // The first mask of a projection is that of A x, which only a model with adapters computes. Two lanes share a position in
    // attention: of five exchanges, sixteen scores each, that is the last.
    let masks = [("qkv_bf16_16", 1..3), ("qkv_bf16_4", 0..3), ("attention_4", 4..6)];
    let mask =
        masks.iter().flat_map(|(kernel, range)| lines(kernel, range.clone(), "mov.*, -1;", ", 65535;"));
    // Ten exchanges of A x, then those of the squares.
    let exchanges =
        [("qkv_bf16_16", 12..13), ("qkv_bf16_4", 2..3), ("qkv_bf16_4", 12..13), ("attention_4", 64..65)];
    let exchange = exchanges.iter().flat_map(|(kernel, range)| lines(kernel, range.clone(), "shfl.sync", ""));
    let (survived, all) = survivors(&projecting(), mask.chain(exchange).collect());
    assert!(survived.is_empty(), "{survived:#?}");
    assert!(all >= 8, "{all}");
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_bound_off_by_one_is_noticed() {
    // The places of numbers in the arguments: see the structs in kernels/.
    const PRODUCT: usize = 88;
    let places = [
        ("embed_bf16", vec![("stride", 40)]),
        ("residual_bf16_4", vec![("n", PRODUCT), ("stride", PRODUCT + 8)]),
        ("lm_head_bf16_4", vec![("n", PRODUCT), ("stride", PRODUCT + 8)]),
        ("qkv_bf16_4", vec![("cols", PRODUCT + 4), ("heads", 232), ("head_dim", 240)]),
        ("split_rows_bf16", vec![("cols", PRODUCT + 4), ("stride", PRODUCT + 8)]),
        ("qkv_wide_bf16", vec![("stride", PRODUCT + 8), ("heads", 232), ("head_dim", 240)]),
        ("residual_wide_bf16", vec![("n", PRODUCT), ("rank", PRODUCT + 16)]),
        ("attention_4", vec![("heads", 112), ("head_dim", 120), ("splits", 124)]),
        ("fuse_2", vec![("vocab_stride", 64), ("vocab_size", 68), ("first_expert", 76), ("slice", 80)]),
        ("advance", vec![("slots", 96)]),
    ];
    let change = |kernel: &'static str, (name, at): (&str, usize)| {
        let change: Change<'static> = Box::new(move |gpu: &Gpu| gpu.nudge(kernel, at));
        (format!("{kernel}: {name}"), change)
    };
    let changes: Vec<_> = places
        .into_iter()
        .flat_map(|(kernel, numbers)| numbers.into_iter().map(move |number| change(kernel, number)))
        .collect();
    let (told, (survived, all)) = (changes.len(), survivors(&projecting(), changes));
    assert!(survived.is_empty(), "{survived:#?}");
    assert_eq!(all, told);
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_change_to_projections_of_f32_on_tensor_cores_is_noticed() {
    // The second is for ranges of columns, the fifth comes after adapters, and there are none of both here.
    let mut changes = lines("residual_wide_f32", 0..1, "bar.sync", "");
    changes.extend(lines("residual_wide_f32", 2..4, "bar.sync", ""));
    changes.extend(lines("split_rows_f32", 0..1, "bar.sync", ""));
    changes.extend(lines("qkv_wide_f32", 0..1, "cp.async.wait_group", ""));
    for (kernel, name, at) in [
        ("qkv_wide_f32", "stride", 96),
        ("residual_wide_f32", "n", 88),
        ("split_rows_f32", "cols", 92),
        ("split_rows_f32", "stride", 96),
    ] {
        let change: Change<'_> = Box::new(move |gpu: &Gpu| gpu.nudge(kernel, at));
        changes.push((format!("{kernel}: {name}"), change));
    }
    let told = changes.len();
    let (survived, all) = survivors(&attending(), changes);
    assert!(survived.is_empty(), "{survived:#?}");
    assert_eq!(all, told);
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_change_to_attention_on_tensor_cores_is_noticed() {
    const KERNEL: &str = "attention_wide_8";
    // Keys have come, are read; values have come, are read.
    let mut changes = lines(KERNEL, 0..4, "bar.sync", "");
    changes.extend(lines(KERNEL, 0..2, "cp.async.wait_group", ""));
    // The sums and maxima of the lanes that share a row.
    changes.extend(lines(KERNEL, 0..8, "shfl.sync", ""));
    for (name, at) in [("query_stride", 104), ("table_stride", 108), ("kv_heads", 116), ("head_dim", 120)] {
        changes.push((format!("{KERNEL}: {name}"), Box::new(move |gpu: &Gpu| gpu.nudge(KERNEL, at))));
    }
    let told = changes.len();
    let (survived, all) = survivors(&attending(), changes);
    assert!(survived.is_empty(), "{survived:#?}");
    assert_eq!(all, told);
}
