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

use cudarc::driver::{CudaContext, DevicePtr};
use dlf_engine::backend::cuda::{CudaBackend, CudaFusion, CudaOptions, DeviceLogits};
use dlf_engine::backend::{Backend, Batch, Choice, FuseRow, Limits, Row};
use dlf_engine::fusion::{AlphaGrid, DynamicRule, FusionRule, ModelLogits, SearchMode};
use dlf_engine::kv_cache::BlockTable;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use dlf_engine::{Ensemble, SamplingParams};
use virtual_gpu::host::{Driver, Gpu, Launch};

#[path = "support/models.rs"]
mod models;

use models::{Shape, adapter, model};

/// The widths of SmolLM2-135M, and two of its layers.
const SMOL: Shape =
    Shape { hidden: 576, intermediate: 1536, heads: 9, kv_heads: 3, head_dim: 64, vocab: 49152, bias: false };

/// The same with few ids: an odd number, so that rows and tiles end apart.
const NARROW: Shape = Shape { vocab: 1001, ..SMOL };

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

/// The bytes of the weights' memory that one step reads once, and those of sectors that it reads more than once, for
/// `sequences` sequences.
fn looks_at_weights(dtype: Dtype, sequences: usize) -> (u64, u64) {
    let ensemble = Arc::new(Ensemble::from_models(vec![model(Role::Large, NARROW, dtype, 1)]).unwrap());
    let gpu: Gpu = Driver::load().unwrap().device("h100").unwrap();
    let limits = Limits { rows: sequences, slots: sequences, blocks: sequences };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: false };
    let mut backend = CudaBackend::new(ensemble, options, &mut |_| {}).unwrap();
    // All weights lie together, and nothing else is as large.
    let (weights, _) = gpu.allocations().into_iter().max_by_key(|(_, bytes)| *bytes).unwrap();
    let tables: Vec<BlockTable> =
        (0..sequences).map(|block| BlockTable { blocks: vec![block as u32] }).collect();
    let row = |table| Row { model: 0, table, position: 0, token: 7, slot: Some(table) };
    let rows: Vec<Row> = (0..sequences).map(row).collect();
    gpu.watch(weights);
    backend.forward(&Batch { rows: &rows, tables: &tables }).unwrap();
    assert_eq!(gpu.reports(), []);
    let sectors = gpu.loads(weights);
    // A sector has 32 bytes: more than that is a second look at some of them.
    let (once, again): (Vec<u32>, Vec<u32>) = sectors.into_iter().partition(|&bytes| bytes <= 32);
    (once.into_iter().map(u64::from).sum(), 32 * again.len() as u64)
}

#[test]
fn no_weight_is_read_twice_in_a_step() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (weights, hidden) = (projections(NARROW) / 2 * dtype.size() as u64, NARROW.hidden);
        for sequences in [1, 3, 16] {
            let (once, again) = looks_at_weights(dtype, sequences);
            println!(
                "{sequences} sequences, {dtype}: {once} of {weights} bytes once, {again} more than once"
            );
            // All but the last row of the output, which stands for the three that its group of four lacks. One row of
            // the embedding is the token of all sequences.
            let row = (hidden * dtype.size()) as u64;
            assert!((weights - row..=weights).contains(&once), "{sequences} {dtype}: {once}");
            // Both of these, and norms, which are f32: each block of the kernels that normalise looks at them for each
            // row of its input. Five norms, with ε in a sector behind each.
            let norms = (5 * (4 * hidden + 32)) as u64;
            assert!((norms..=norms + 2 * row).contains(&again), "{sequences} {dtype}: {again}");
        }
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

/// The widths of TinyLlama-1.1B, with few ids.
const TINY: Shape =
    Shape { hidden: 2048, intermediate: 5632, heads: 32, kv_heads: 4, head_dim: 64, vocab: 128, bias: false };

#[test]
fn blocks_that_share_a_tile_read_no_weight_twice() {
    let Shape { hidden, intermediate, heads, kv_heads, head_dim, vocab, .. } = TINY;
    // Outputs that are written for a row, outputs and columns of W, and blocks for each of its tiles.
    let launched = [
        ((heads + 2 * kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim, hidden, 4),
        (hidden, hidden, heads * head_dim, 4),
        (intermediate, 2 * intermediate, hidden, 1),
        (hidden, hidden, intermediate, 8),
    ];
    let launched = [&launched[..], &launched[..], &[(vocab, vocab, hidden, 4)]].concat();
    for rows in [32, 64] {
        let launches = step(&[Role::Large], rows, TINY, Dtype::Bf16);
        let projections = launches.iter().filter(|launch| is_projection(launch));
        for (launch, &(written, outputs, cols, ranges)) in projections.clone().zip(&launched) {
            let c = &launch.counters;
            assert_eq!(c.blocks, (outputs / 128 * ranges) as u64, "{}", launch.kernel);
            // What is multiplied is what one block a tile would multiply: weights once, x once a tile.
            let (weights, x) = (2 * outputs * cols, 2 * 2 * rows * cols);
            assert_eq!(c.async_copy_bytes, (weights + outputs / 128 * 2 * 2 * 64 * cols) as u64);
            // A block's sums are written once, and read once by another.
            let sums = if ranges > 1 { c.blocks as usize * rows * 128 * 4 } else { 0 };
            assert_eq!(
                c.global_store_bytes,
                (rows * written * 4 + sums + 4 * usize::from(ranges > 1) * outputs / 128) as u64
            );
            assert_eq!(c.global_atomics, if ranges > 1 { c.blocks } else { 0 });
            // Beside them what the epilogue reads: a factor a row, the residual stream, where queries and keys go.
            let distinct = 32 * c.distinct_load_sectors;
            let least = (weights + x + sums) as u64;
            assert!(
                (least..=least + least / 20).contains(&distinct),
                "{}: {distinct} of {least}",
                launch.kernel
            );
            assert_eq!(c.shared_waves, c.shared_ideal_waves, "{}", launch.kernel);
            println!(
                "{rows} rows: {}, {} blocks, {sums} bytes of sums each way beside {weights}; {} loaded, {} stored, {distinct} \
                 and {} in distinct sectors, {} warp instructions, {} barriers",
                launch.kernel,
                c.blocks,
                c.global_load_bytes,
                c.global_store_bytes,
                32 * c.distinct_store_sectors,
                c.warp_instructions,
                c.barriers
            );
        }
        assert_eq!(projections.count(), launched.len());
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

/// What a launch of fusion is to decide.
#[derive(Clone, Copy, Debug)]
struct Fusion {
    vocab: usize,
    experts: usize,
    /// α that are tried.
    candidates: usize,
    rows: usize,
    mode: SearchMode,
}

/// The fusion launch of a search.
fn fusion(case: Fusion) -> Launch {
    let Fusion { vocab, experts, candidates, rows, mode } = case;
    let shape = Shape { hidden: 8, intermediate: 8, heads: 1, kv_heads: 1, head_dim: 8, vocab, bias: false };
    let roles: Vec<Role> =
        [Role::Large, Role::Small].into_iter().chain((0..experts).map(Role::Expert)).collect();
    let models = roles.iter().enumerate().map(|(seed, &role)| model(role, shape, Dtype::Bf16, seed as u64));
    let ensemble = Arc::new(Ensemble::from_models(models.collect()).unwrap());
    let gpu = Driver::load().unwrap().device("h100").unwrap();
    let limits = Limits { rows, slots: rows, blocks: rows };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: false };
    let mut backend = CudaBackend::new(ensemble, options, &mut |_| {}).unwrap();
    let token = |slot: usize| 7 + slot as u32;
    let fed: Vec<Row> = (0..roles.len())
        .flat_map(|model| (0..rows).map(move |slot| (model, slot)))
        .map(|(model, slot)| Row { model, table: slot, position: 0, token: token(slot), slot: Some(slot) })
        .collect();
    let tables: Vec<BlockTable> = (0..rows).map(|row| BlockTable { blocks: vec![row as u32] }).collect();
    backend.forward(&Batch { rows: &fed, tables: &tables }).unwrap();
    gpu.clear();
    let grids = std::iter::once(AlphaGrid::new(0.0, 2.0, 2.0 / candidates as f64, false).unwrap()).collect();
    let rule = FusionRule::Dynamic(DynamicRule { grids, mode, ..DynamicRule::default() });
    let row = |slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice: Choice::Forced(5) };
    let mut decisions = Vec::new();
    backend.fuse(&(0..rows).map(row).collect::<Vec<_>>(), &mut decisions).unwrap();
    assert_eq!(decisions.len(), rows);
    assert!(decisions.iter().all(Result::is_ok));
    assert_eq!(gpu.reports(), []);
    let mut launches = gpu.launches();
    assert_eq!(launches.len(), 1);
    launches.remove(0)
}

/// Bytes of the logits of a launch, of the partial states that are written and read, and of what its blocks are told.
fn parts(case: Fusion) -> (u64, u64, u64) {
    let Fusion { vocab, experts, candidates, rows, .. } = case;
    let lanes = experts * (1 + candidates + 2);
    let slices = vocab.div_ceil(if vocab == 32000 { 768 } else { 1024 });
    let logits = vocab * (2 + experts) * 4;
    // And the last block reads from the result, for each candidate, the best so far and both KL terms of each expert.
    let told = slices * (280 + 12 * lanes) + (64 + 16 * experts) * experts * candidates;
    let states = 2 * slices * lanes * 16;
    ((rows * logits) as u64, (rows * states) as u64, (rows * told) as u64)
}

#[test]
fn fusion_reads_each_logit_once_in_one_launch() {
    let plain = Fusion { vocab: 32000, experts: 1, candidates: 20, rows: 1, mode: SearchMode::Grid };
    let cases = [
        // What partial states add, in per cent of the logits: what follows from the sizes, and is launched for some.
        (plain, 8.05, true),
        (Fusion { experts: 2, ..plain }, 12.1, true),
        (Fusion { experts: 4, ..plain }, 16.1, true),
        (Fusion { experts: 8, ..plain }, 19.3, false),
        (Fusion { candidates: 32, ..plain }, 12.25, true),
        (Fusion { candidates: 32, experts: 2, ..plain }, 18.4, false),
        (Fusion { candidates: 32, experts: 4, ..plain }, 24.5, false),
        (Fusion { candidates: 32, experts: 8, ..plain }, 29.4, true),
        (Fusion { rows: 3, experts: 2, ..plain }, 12.1, true),
        (Fusion { vocab: 128_256, ..plain }, 6.05, true),
        (Fusion { vocab: 128_256, experts: 2, ..plain }, 9.05, false),
        (Fusion { vocab: 128_256, candidates: 32, ..plain }, 9.2, false),
    ];
    for (case, share, launched) in cases {
        let (logits, states, told) = parts(case);
        let added = 100.0 * states as f64 / logits as f64;
        assert!((added - share).abs() <= 0.05, "{case:?}: {added}");
        if !launched {
            continue;
        }
        let c = fusion(case).counters;
        let bytes = c.global_load_bytes + c.global_store_bytes;
        println!(
            "{case:?}: {logits} bytes of logits, {states} of states ({added:.1} %), {bytes} moved, {} in sectors read, {} \
             warp instructions, {} of {} waves, {} atomics",
            32 * c.global_load_sectors,
            c.warp_instructions,
            c.shared_waves,
            c.shared_ideal_waves,
            c.global_atomics
        );
        // Logits and states, each once; beside them what each block is told, and the result.
        assert!(bytes >= logits + states, "{case:?}: {bytes}");
        assert!(bytes <= logits + states + told + 4096 * case.rows as u64, "{case:?}: {bytes}");
        // A warp's request is 32 consecutive logits, and states are sixteen bytes: whole sectors, or halves of them.
        let (sectors, most) = (32 * c.global_load_sectors, logits + logits / 50 + states + 4 * told);
        assert!(sectors <= most, "{case:?}: {sectors}");
    }
}

#[test]
fn the_refined_search_looks_at_a_row_once_more() {
    let case = Fusion { vocab: 32000, experts: 2, candidates: 20, rows: 3, mode: SearchMode::Refine };
    let grid = fusion(Fusion { mode: SearchMode::Grid, ..case }).counters;
    let refined = fusion(case).counters;
    // All models, since each of them can exclude a token.
    let row = (case.vocab * 4 * 4) as u64;
    let more = refined.global_load_bytes - grid.global_load_bytes;
    println!("{case:?}: {more} bytes more of {row} a row");
    // Beside them a few numbers of the result.
    let exact = case.rows as u64 * row;
    assert!((exact..=exact + 1024 * case.rows as u64).contains(&more), "{more}");
    // They come from the cache: memory delivers what it did, and of each result what was chosen, its loss, and the targets.
    let sectors = refined.distinct_load_sectors - grid.distinct_load_sectors;
    assert!(sectors <= 6 * case.rows as u64, "{sectors}");
}

/// Logits as language models give them, of a large model, a small one and an expert: the most probable 400 tokens, anywhere
/// in the vocabulary, fall off as a power of their rank, and the rest lie far below.
fn likely_logits(vocab: usize) -> [Vec<f32>; 3] {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 24) as f32
    };
    // Nearly normal, with variance 1.
    let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    let mut large: Vec<f32> = (0..vocab).map(|_| 1.8 * normal() - 2.0).collect();
    (0..400).for_each(|rank| large[(rank * 7919 + 13) % vocab] = 16.0 - 2.0 * (1.0 + rank as f32).ln());
    let small: Vec<f32> = large.iter().map(|x| 0.9 * x + 0.3 * normal()).collect();
    let expert = small.iter().map(|x| x + 0.2 * normal()).collect();
    [large, small, expert]
}

/// The launches that decide one row of such logits.
fn deciding(vocab: usize, params: &SamplingParams) -> Vec<Launch> {
    let gpu = Driver::load().unwrap().device("h100").unwrap();
    let stream = CudaContext::new(gpu.ordinal()).unwrap().new_stream().unwrap();
    let matrices = likely_logits(vocab).map(|row| stream.clone_htod(&row).unwrap());
    let [large, small, expert] = matrices.each_ref().map(|matrix| matrix.device_ptr(&stream).0);
    let logits =
        ModelLogits { large: Some(large), small: Some(small), experts: std::iter::once(expert).collect() };
    let shape = DeviceLogits { rows: 1, vocab_size: vocab, stride: vocab };
    let mut fusion = CudaFusion::new(gpu.ordinal(), 1, shape).unwrap();
    let rule = FusionRule::default();
    // Of a few hundred tokens some are repeated.
    let history: Vec<u32> = (0..500).map(|at| (at * at * 31 % (vocab / 2)) as u32).collect();
    let choice = Choice::Sample { params, history: &history, generated: 200, banned: &[] };
    let mut found = Vec::new();
    let row = FuseRow { slot: 0, step: 3, rule: &rule, held: None, choice };
    // SAFETY: the matrices live, with one row each; the stream is of the same context.
    unsafe { fusion.fuse(&logits, stream.cu_stream().cast(), &[row], &mut found) }.unwrap();
    assert!(found[0].is_ok());
    assert_eq!(gpu.reports(), []);
    gpu.launches()
}

#[test]
fn what_is_drawn_adds_eight_bytes_to_a_state() {
    let bytes = |temperature| {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let launches = deciding(32_000, &params);
        assert_eq!(launches.len(), 1);
        launches[0].counters.global_load_bytes + launches[0].counters.global_store_bytes
    };
    // Slices of 768 ids, and lanes of twenty candidates and three more, written and read. Of the eight warps that merge four
    // lanes each, two have none of their own and read the last one again.
    assert_eq!(bytes(1.0) - bytes(0.0), (2 * 23 + 2) * 42 * 8);
}

#[test]
fn the_sampler_looks_at_few_tokens() {
    let plain = SamplingParams { seed: 5, ..SamplingParams::default() };
    let (repetition_penalty, min_p) = (1.1, 0.05);
    let cases = [
        ("greedy, repetition penalty", SamplingParams { repetition_penalty, ..plain.clone() }),
        ("top-k 40", SamplingParams { temperature: 0.8, top_k: 40, ..plain.clone() }),
        ("top-p 0.9", SamplingParams { temperature: 0.7, top_p: 0.9, ..plain.clone() }),
        ("min-p 0.05", SamplingParams { temperature: 1.0, min_p, ..plain.clone() }),
        (
            "all together",
            SamplingParams {
                temperature: 0.8,
                top_k: 40,
                top_p: 0.9,
                min_p,
                repetition_penalty,
                ..plain.clone()
            },
        ),
        (
            "repetition penalty, nothing left out",
            SamplingParams { temperature: 1.0, repetition_penalty, ..plain.clone() },
        ),
        ("flat, top-p 0.9", SamplingParams { temperature: 5.0, top_p: 0.9, ..plain }),
    ];
    for vocab in [32_000_usize, 128_256] {
        let slices = vocab.div_ceil(2048) as u64;
        for (name, params) in &cases {
            let launches = deciding(vocab, params);
            let c = launches.iter().find(|launch| launch.kernel == "sample").unwrap().counters;
            let (bytes, row) = (c.global_load_bytes + c.global_store_bytes, 4 * vocab as u64);
            println!(
                "{vocab}, {name}: {bytes} bytes, {:.2} of a row, {} requests, {} warp instructions, {} blocks, {} of {} waves, {} atomics",
                bytes as f64 / row as f64,
                c.global_load_requests + c.global_store_requests,
                c.warp_instructions,
                c.blocks,
                c.shared_waves,
                c.shared_ideal_waves,
                c.global_atomics
            );
            assert_eq!(c.blocks, slices, "{name}");
            // The logits of three models, and, where tokens are left out, x.
            let truncates = params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0;
            let least = if truncates { 4 * row } else { 3 * row };
            assert!(bytes >= least, "{name}: {bytes}");
            if name.starts_with("flat") {
                continue;
            }
            // Beside them the history for each slice, 16 bytes for each 128 ids, a few times, and the likely of them.
            let history = if params.repetition_penalty == 1.0 { 0 } else { slices * 500 * 4 };
            let (warps, chunks) = (16 * slices, 256 * slices);
            assert!(bytes <= least + history + 12 * chunks, "{name}: {bytes}");
            // A request is 512 bytes, but for what each warp is told.
            let requests = c.global_load_requests + c.global_store_requests;
            assert!(requests <= least / 512 + 9 * warps, "{name}: {requests}");
        }
    }
}
