//! What a step of decoding does to memory, counted on the virtual device: exact, and the same in every run.
//! `cargo test --release --test cuda_counters -- --nocapture` prints the numbers.
#![cfg(feature = "cuda")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test, which prints what it counts"
)]

use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::backend::{Backend, Batch, Choice, FuseRow, Limits, Row};
use dlf_engine::fusion::FusionRule;
use dlf_engine::kv_cache::BlockTable;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use virtual_gpu::host::{Driver, Gpu, Launch};

#[path = "support/models.rs"]
mod models;

use models::{Shape, adapter, model};

/// The widths of SmolLM2-135M, and two of its layers.
const SMOL: Shape =
    Shape { hidden: 576, intermediate: 1536, heads: 9, kv_heads: 3, head_dim: 64, vocab: 49152, bias: false };

/// What one step launched, for `sequences` sequences in every model.
fn step(roles: &[Role], sequences: usize, shape: Shape, dtype: Dtype) -> Vec<Launch> {
    let models = roles.iter().enumerate().map(|(seed, &role)| model(role, shape, dtype, seed as u64));
    step_of(models.collect(), sequences)
}

fn step_of(models: Vec<LlamaModel>, sequences: usize) -> Vec<Launch> {
    let count = models.len();
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    let gpu: Gpu = Driver::load().unwrap().device("h100").unwrap();
    let limits = Limits { rows: sequences, slots: sequences, blocks: sequences };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: false };
    let mut backend = CudaBackend::new(ensemble, options, &mut |_| {}).unwrap();
    let tables: Vec<BlockTable> =
        (0..sequences).map(|block| BlockTable { blocks: vec![block as u32] }).collect();
    let row = |model, table| Row { model, table, position: 0, token: 7, slot: Some(table) };
    let rows: Vec<Row> =
        (0..count).flat_map(|model| (0..sequences).map(move |table| row(model, table))).collect();
    gpu.clear();
    backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
    assert_eq!(gpu.reports(), []);
    gpu.launches()
}

/// What a prompt of `length` tokens launched.
fn prompt(length: usize, shape: Shape) -> Vec<Launch> {
    let ensemble = Arc::new(Ensemble::from_models(vec![model(Role::Large, shape, Dtype::Bf16, 1)]).unwrap());
    let gpu: Gpu = Driver::load().unwrap().device("h100").unwrap();
    let blocks = length.div_ceil(16);
    let limits = Limits { rows: length, slots: 1, blocks };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: false };
    let mut backend = CudaBackend::new(ensemble, options, &mut |_| {}).unwrap();
    let tables = [BlockTable { blocks: (0..blocks as u32).collect() }];
    let row = |position| Row { model: 0, table: 0, position, token: 7, slot: None };
    let rows: Vec<Row> = (0..length).map(row).collect();
    gpu.clear();
    backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
    assert_eq!(gpu.reports(), []);
    gpu.launches()
}

/// The bytes of the projections of one model: what decoding a token must read.
fn projections(shape: Shape) -> u64 {
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, vocab, .. } = shape;
    let layer =
        hidden * (heads + 2 * kv_heads) * head_dim + hidden * heads * head_dim + 3 * hidden * intermediate;
    (2 * (2 * layer + vocab * hidden)) as u64
}

/// Bytes that the projections read beside their weights, at most: each block stages the rows of x and, once a row,
/// the weights of the norm; where not all of it fits shared memory, again for each of its tiles of 32 outputs.
fn staged(launch: &Launch, shape: Shape, rows: usize) -> u64 {
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, vocab, .. } = shape;
    let (outputs, cols) = match launch.kernel.split('_').next().unwrap() {
        "qkv" => ((heads + 2 * kv_heads) * head_dim, hidden),
        "gate" => (2 * intermediate, hidden),
        "lm" => (vocab, hidden),
        _ => (hidden, intermediate),
    };
    // 48 KiB, less a few sums, in panels of 256 columns that take 272 numbers.
    let fits = rows * cols.div_ceil(256) * 272 <= (48 << 10) / 4 - 1024;
    let times = if fits { launch.counters.blocks } else { outputs.div_ceil(32) as u64 };
    times * (rows * cols * 4 * 2) as u64
}

fn is_projection(launch: &Launch) -> bool {
    ["qkv", "gate_up", "residual", "lm_head"].iter().any(|name| launch.kernel.starts_with(name))
}

#[test]
fn weights_are_read_once_a_step_whatever_the_batch() {
    for sequences in [1, 4, 16] {
        let launches = step(&[Role::Large], sequences, SMOL, Dtype::Bf16);
        let of_projections = launches.iter().filter(|launch| is_projection(launch));
        let (mut bytes, mut sectors, mut distinct, mut beside) = (0, 0, 0, 0);
        for launch in of_projections {
            bytes += launch.counters.global_load_bytes;
            sectors += launch.counters.global_load_sectors;
            distinct += launch.counters.distinct_load_sectors;
            beside += staged(launch, SMOL, sequences);
        }
        let weights = projections(SMOL);
        // Each byte of the weights once: twice would be far above, and a row too few below.
        assert!(bytes >= weights, "{sequences}: {bytes} of {weights}");
        let over = (bytes - beside.min(bytes)) as f64 / weights as f64;
        assert!(over <= 1.02, "{sequences}: {over}");
        // What memory must deliver, were every cache perfect: weights, and little else.
        let least = (32 * distinct) as f64 / weights as f64;
        assert!((1.0..=1.02).contains(&least), "{sequences}: {least}");
        println!(
            "{sequences} sequences: {weights} bytes of weights, {bytes} asked for ({over:.4} without what is staged), \
             {} in sectors, {} in distinct ones",
            32 * sectors,
            32 * distinct
        );
        // Whole sectors: nothing is fetched that isn't used. (More rows read more single words, of where they are.)
        assert!(sequences > 1 || 32 * sectors <= bytes + bytes / 50, "{} for {bytes}", 32 * sectors);
    }
}

#[test]
fn shared_memory_has_no_conflicts_and_nothing_spills_to_local() {
    for launch in step(&[Role::Large], 4, SMOL, Dtype::Bf16).iter().filter(|launch| is_projection(launch)) {
        let c = &launch.counters;
        assert_eq!(c.local_requests, 0, "{}", launch.kernel);
        // The rows that are staged are read by all warps at once: any conflict would show here.
        assert!(c.shared_waves <= c.shared_ideal_waves + c.shared_ideal_waves / 50, "{}", launch.kernel);
    }
}

#[test]
fn many_rows_are_multiplied_by_tensor_cores() {
    let shape = Shape { vocab: 1000, ..SMOL };
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, vocab, .. } = shape;
    for (dtype, products) in [(Dtype::Bf16, 2), (Dtype::F16, 2), (Dtype::F32, 3)] {
        let launches = step(&[Role::Large], 64, shape, dtype);
        for launch in launches.iter().filter(|launch| is_projection(launch)) {
            let c = &launch.counters;
            let (outputs, cols) = match launch.kernel.strip_suffix(&format!("_wide_{dtype}")).unwrap() {
                "qkv" => ((heads + 2 * kv_heads) * head_dim, hidden),
                "gate_up" => (2 * intermediate, hidden),
                "lm_head" => (vocab, hidden),
                // Both matrices of a layer that end in the residual stream: attention's is the narrower one.
                "residual" if c.tensor_multiply_adds < products << 25 => (hidden, heads * head_dim),
                "residual" => (hidden, intermediate),
                other => panic!("{other}"),
            };
            let tile = (outputs.next_multiple_of(128) * 64) as u64;
            // Both halves of every activation, in f32 those of the weights, too, and nothing twice.
            assert_eq!(c.tensor_multiply_adds, products * tile * cols as u64, "{}", launch.kernel);
            // Weights and both halves once a block of 128 outputs.
            let copied = tile / 64 * cols as u64 + outputs.div_ceil(128) as u64 * 64 * cols as u64 * 2;
            assert_eq!(c.async_copy_bytes, copied * dtype.size() as u64, "{}", launch.kernel);
            println!(
                "{}: {} of {} waves, {} tensor instructions of {}",
                launch.kernel,
                c.shared_waves,
                c.shared_ideal_waves,
                c.tensor_instructions,
                c.warp_instructions
            );
            assert_eq!(c.local_requests, 0, "{}", launch.kernel);
            assert_eq!(c.shared_waves, c.shared_ideal_waves, "{}", launch.kernel);
        }
    }
}

#[test]
fn attention_of_a_prompt_has_no_conflicts() {
    for head_dim in [64, 128] {
        let shape = Shape { head_dim, heads: 3, kv_heads: 1, vocab: 64, ..SMOL };
        let launches = prompt(64, shape);
        let launch = launches.iter().find(|launch| launch.kernel.starts_with("attention_wide")).unwrap();
        let c = &launch.counters;
        // Four warps of sixteen rows, each over the blocks of sixteen positions up to its own.
        let (warps_and_blocks, columns) = (4 + 3 + 2 + 1, head_dim / 8);
        // Scores and values: two times eight positions, and three products for one, for each eight columns.
        let products = 3 * warps_and_blocks * (2 + 2) * columns;
        assert_eq!(c.tensor_instructions, 3 * products as u64, "{head_dim}");
        // Keys and values once for each head.
        assert_eq!(c.async_copy_bytes, (3 * 2 * 64 * head_dim * 4) as u64, "{head_dim}");
        assert_eq!(c.local_requests, 0, "{head_dim}");
        assert_eq!(c.shared_waves, c.shared_ideal_waves, "{head_dim}");
        println!(
            "{head_dim}: {} waves, {} tensor instructions of {}",
            c.shared_waves, c.tensor_instructions, c.warp_instructions
        );
    }
}

#[test]
fn a_group_takes_no_more_launches_than_one_model() {
    let narrow = Shape { vocab: 512, ..SMOL };
    let alone = step(&[Role::Small], 1, narrow, Dtype::Bf16).len();
    let experts = [Role::Small, Role::Expert(0), Role::Expert(1), Role::Expert(2)];
    assert_eq!(step(&experts, 1, narrow, Dtype::Bf16).len(), alone);
    // Two layers of six, the embedding and the output.
    assert_eq!(alone, 2 * 6 + 2);
}

/// A small model, and experts that are low-rank updates of it.
fn adapted(experts: usize, shape: Shape) -> Vec<LlamaModel> {
    let small = model(Role::Small, shape, Dtype::Bf16, 1);
    let expert = |t: usize| LlamaModel {
        role: Role::Expert(t),
        adapter: Some(adapter(shape, t as u64 + 5)),
        ..small.clone()
    };
    std::iter::once(small.clone()).chain((0..experts).map(expert)).collect()
}

/// Bytes that low-rank updates read for one row: A, x and the norm's weights once for each number of A x; B and A x
/// once for each output.
fn updates(shape: Shape) -> usize {
    // Ranks of 3 to 9, in whole vectors.
    const RANK: usize = 16;
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, .. } = shape;
    let stages = [
        (3, hidden, (heads + 2 * kv_heads) * head_dim, true),
        (1, heads * head_dim, hidden, false),
        (2, hidden, 2 * intermediate, true),
        (1, intermediate, hidden, false),
    ];
    let of_stage = |(segments, cols, outputs, normed)| {
        segments * RANK * cols * if normed { 3 } else { 2 } + outputs * RANK * 2
    };
    2 * 4 * stages.map(of_stage).iter().sum::<usize>()
}

#[test]
fn adapters_take_no_launch_and_no_second_look_at_the_weights() {
    let shape = Shape { vocab: 512, ..SMOL };
    for experts in [1, 8] {
        // The same rows of the small model alone.
        let plain = step_of(adapted(0, shape), 1 + experts);
        let launches = step_of(adapted(experts, shape), 1);
        assert_eq!(launches.len(), 2 * 6 + 2);
        assert_eq!(plain.len(), launches.len());
        let asked = |launches: &[Launch]| -> u64 {
            launches.iter().filter(|l| is_projection(l)).map(|l| l.counters.global_load_bytes).sum()
        };
        let (more, expected) = (asked(&launches) - asked(&plain), (experts * updates(shape)) as u64);
        // Beside them single words: which adapter a row has, and counters.
        let weights = projections(shape);
        println!("{experts} experts: {more} bytes more than {}, {expected} of them updates", asked(&plain));
        assert!((expected..=expected + weights / 50).contains(&more), "{experts}: {more}, not {expected}");
    }
}

#[test]
fn adapters_take_no_launch_on_tensor_cores() {
    let shape = Shape { vocab: 64, hidden: 64, intermediate: 96, ..SMOL };
    // 20 rows of each model: each projection prepares its rows, which is when A x is computed.
    assert_eq!(step_of(adapted(2, shape), 20).len(), step_of(adapted(0, shape), 20).len());
}

/// The fusion launch of `experts` experts over `vocab` ids.
fn fusion(vocab: usize, experts: usize) -> Launch {
    let shape = Shape { hidden: 8, intermediate: 8, heads: 1, kv_heads: 1, head_dim: 8, vocab, bias: false };
    let roles: Vec<Role> =
        [Role::Large, Role::Small].into_iter().chain((0..experts).map(Role::Expert)).collect();
    let models = roles.iter().enumerate().map(|(seed, &role)| model(role, shape, Dtype::Bf16, seed as u64));
    let ensemble = Arc::new(Ensemble::from_models(models.collect()).unwrap());
    let gpu = Driver::load().unwrap().device("h100").unwrap();
    let limits = Limits { rows: 1, slots: 1, blocks: 1 };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: false };
    let mut backend = CudaBackend::new(ensemble, options, &mut |_| {}).unwrap();
    let rows: Vec<Row> =
        (0..roles.len()).map(|model| Row { model, table: 0, position: 0, token: 7, slot: Some(0) }).collect();
    backend.forward(&Batch { rows: &rows, tables: &[BlockTable { blocks: vec![0] }] }).unwrap();
    gpu.clear();
    let rule = FusionRule::default();
    let row = FuseRow { slot: 0, step: 0, rule: &rule, held: None, choice: Choice::Forced(5) };
    let mut decisions = Vec::new();
    backend.fuse(&[row], &mut decisions).unwrap();
    decisions.remove(0).unwrap();
    assert_eq!(gpu.reports(), []);
    let mut launches = gpu.launches();
    assert_eq!(launches.len(), 1);
    launches.remove(0)
}

#[test]
fn fusion_reads_each_logit_once_in_one_launch() {
    for (vocab, experts, most) in [(32000, 1, 0.3), (32000, 2, 0.3), (128_256, 1, 0.1)] {
        let c = fusion(vocab, experts).counters;
        let logits = (vocab * (2 + experts) * 4) as f64;
        // Partial states, twice; beside them, each block reads what it is to do: the row and its lanes.
        let lanes = experts * (1 + 20 + 2);
        let slices = vocab.div_ceil(if vocab == 32000 { 768 } else { 1024 });
        let states = (2 * slices * lanes * 24) as f64;
        let tasks = (slices * (280 + 12 * lanes)) as f64;
        assert!(states <= most * logits, "{vocab} {experts}: {}", states / logits);
        let bytes = (c.global_load_bytes + c.global_store_bytes) as f64;
        assert!(bytes >= logits + states, "{vocab} {experts}: {bytes}");
        assert!(bytes <= logits + states + tasks + 4096.0, "{vocab} {experts}: {bytes}");
        println!(
            "{vocab} ids, {experts} experts: {logits} bytes of logits, {states} of states, {bytes} moved, {} in sectors \
             read, {} warp instructions, {} of {} waves, {} atomics",
            32 * c.global_load_sectors,
            c.warp_instructions,
            c.shared_waves,
            c.shared_ideal_waves,
            c.global_atomics
        );
        // A warp's request is 32 consecutive logits: whole sectors. The states are read in three pieces, each of
        // which touches all their sectors.
        let sectors = (32 * c.global_load_sectors) as f64;
        assert!(sectors <= 1.02 * logits + 3.0 * states / 2.0 + 4.0 * tasks, "{vocab} {experts}: {sectors}");
    }
}
