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

fn ensemble() -> Arc<Ensemble> {
    let small = model(Role::Small, SHAPE, Dtype::Bf16, 2);
    let lora = LlamaModel { role: Role::Expert(0), adapter: Some(adapter(SHAPE, 3)), ..small.clone() };
    let other = model(Role::Expert(1), SHAPE, Dtype::Bf16, 4);
    let models = vec![model(Role::Large, SHAPE, Dtype::Bf16, 1), small, lora, other];
    Arc::new(Ensemble::from_models(models).unwrap())
}

/// Two sequences on a GPU whose kernels were changed by `mutate`; `None` where the run failed or was found faulty.
fn run(ensemble: &Arc<Ensemble>, mutate: impl FnOnce(&Gpu)) -> (Gpu, Option<Vec<Step>>) {
    let gpu = Driver::load().unwrap().device("a100").unwrap();
    // A loop without end ends here.
    gpu.budget(20_000_000);
    mutate(&gpu);
    let limits = Limits { rows: 24, slots: 2, blocks: 40 };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
    let steps = CudaBackend::new(Arc::clone(ensemble), options, &mut |_| {}).and_then(|cuda| {
        let mut generator = Generator::new(Arc::clone(ensemble), Box::new(cuda));
        let sampling = SamplingParams { temperature: 0.7, seed: 3, ..SamplingParams::default() };
        for request in [
            Request::new(tokens(19, SHAPE.vocab, 1), 4),
            Request::new(tokens(5, SHAPE.vocab, 2), 4).sampling(sampling),
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
fn survivors(changes: Vec<(String, Change<'_>)>) -> (Vec<String>, usize) {
    let ensemble = ensemble();
    let (_, expected) = run(&ensemble, |_| {});
    let expected = expected.unwrap();
    let (mut survived, mut all) = (Vec::new(), 0);
    for (name, change) in changes {
        let (gpu, found) = run(&ensemble, change);
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
    // Of a projection: before and after staging, before the sums are read, and before the next tile, which comes only
    // where a block has more than one.
    let mut changes = lines("gemv_residual_bf16_16", 0..3, "bar.sync", "");
    changes.extend(lines("lm_head_bf16_4", 1..4, "bar.sync", ""));
    changes.extend(lines("attention_4", 0..2, "bar.sync", ""));
    changes.extend(lines("fuse_2", 0..8, "bar.sync", ""));
    let (survived, all) = survivors(changes);
    assert!(survived.is_empty(), "{survived:#?}");
    assert!(all >= 14, "{all}");
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_mask_that_leaves_lanes_out_is_noticed() {
    let kernels = ["qkv_bf16_16", "qkv_bf16_4", "attention_4", "lora_down"];
    let mask = kernels.iter().flat_map(|kernel| lines(kernel, 0..2, "mov.*, -1;", ", 65535;"));
    let exchange = kernels.iter().flat_map(|kernel| lines(kernel, 2..3, "shfl.sync", ""));
    let (survived, all) = survivors(mask.chain(exchange).collect());
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
        ("gemv_residual_bf16_4", vec![("n", PRODUCT), ("stride", PRODUCT + 8)]),
        ("lm_head_bf16_4", vec![("n", PRODUCT), ("skip", PRODUCT + 12)]),
        ("qkv_bf16_4", vec![("cols", PRODUCT + 4), ("heads", 200), ("head_dim", 208)]),
        ("attention_4", vec![("heads", 88), ("head_dim", 96), ("splits", 100)]),
        ("fuse_2", vec![("vocab_stride", 64), ("vocab_size", 68), ("first_expert", 76), ("slice", 80)]),
        ("lora_down", vec![("outputs", 64), ("cols", 72)]),
        ("advance", vec![("slots", 88)]),
    ];
    let change = |kernel: &'static str, (name, at): (&str, usize)| {
        let change: Change<'static> = Box::new(move |gpu: &Gpu| gpu.nudge(kernel, at));
        (format!("{kernel}: {name}"), change)
    };
    let changes: Vec<_> = places
        .into_iter()
        .flat_map(|(kernel, numbers)| numbers.into_iter().map(move |number| change(kernel, number)))
        .collect();
    let (told, (survived, all)) = (changes.len(), survivors(changes));
    assert!(survived.is_empty(), "{survived:#?}");
    assert_eq!(all, told);
}
