//! projections.cuh: each of the four kernels, in every dtype and for every number of rows.

use virtual_gpu::exec::Accumulate;

use super::bed::{Bed, DTYPES, Found, Near, ROUNDING, assert_noticed, firsts};
use super::problem::{Case, Problem};
use crate::backend::cuda::kernels::{IntoArgs, LmHeadArgs, QkvArgs, Tiling};
use crate::backend::cuda::weights::stride;
use crate::kv_cache::BLOCK_SIZE;
use crate::weights::Dtype;

/// The output projection, and that of the feed-forward: hidden += W x + b.
pub(super) fn residual(bed: &Bed, case: Case, n: usize) -> Found {
    residual_of(bed, Problem::new(bed, case, (n, 1, false)))
}

fn residual_of(bed: &Bed, mut problem: Problem) -> Found {
    let (case, n) = (problem.case, problem.product.n as usize);
    let width = stride(n);
    let before = problem.rng.numbers(problem.rows() * width);
    let hidden = bed.output(&before);
    let kernels = problem.kernels(bed);
    problem.project(bed, &kernels.residual, n.div_ceil(4), |product| IntoArgs {
        product,
        to: hidden.address(),
        to_stride: width as u32,
    })?;
    hidden.check(bed, &(case, n), |at| {
        let (row, i) = (at / width, at % width);
        let mut sum = (i < n).then(|| problem.y(row, i, 0))?;
        sum.add(f64::from(before[at]));
        Some(sum.rounded(problem.roundings() + 1))
    })
}

/// silu(g) and its error, where g is as far off as it may be.
fn silu(g: Near) -> Near {
    let value = g.value / (1.0 + (-g.value).exp());
    // |silu′| ≤ 1.1. The exponential is 2 to the power of g · log₂ e, which is rounded (half an ulp of |g| log₂ e, worth
    // |g| roundings), to 2 ulp; a sum and a division follow.
    let roundings = 2.0 * g.value.abs() + 8.0;
    Near { value, error: 1.1 * g.error + value.abs() * roundings * ROUNDING }
}

/// RMSNorm, gate and up, and SiLU.
fn gate_up(bed: &Bed, case: Case, size: usize) -> Found {
    let problem = Problem::new(bed, case, (2 * size, 2, true));
    let width = stride(size);
    let activated = bed.fresh(problem.rows() * width);
    let kernels = problem.kernels(bed);
    problem.project(bed, &kernels.gate_up, size.div_ceil(2), |product| IntoArgs {
        product,
        to: activated.address(),
        to_stride: width as u32,
    })?;
    activated.check(bed, &(case, size), |at| {
        let (row, i) = (at / width, at % width);
        let roundings = problem.roundings();
        let gate = (i < size).then(|| problem.y(row, i, 0))?.rounded(roundings);
        let (gate, up) = (silu(gate), problem.y(row, size + i, 1).rounded(roundings + 1));
        let error = gate.error * (up.value.abs() + up.error) + gate.value.abs() * up.error;
        Some(Near { value: gate.value * up.value, error })
    })
}

/// The last RMSNorm and the output embedding, for some rows of each set, in no order, to slots in no order.
fn lm_head(bed: &Bed, case: Case, vocab_size: usize) -> Found {
    let mut problem = Problem::new(bed, Case { bias: false, rank: 0, ..case }, (vocab_size, 1, true));
    // Every second row of a set, from its last on.
    let mut wanted: Vec<u32> = Vec::new();
    let mut wanted_of_sets = Vec::new();
    for ends in firsts(case.rows).windows(2) {
        let before = wanted.len();
        wanted.extend((ends[0]..ends[1]).rev().step_by(2));
        wanted_of_sets.push(wanted.len() - before);
    }
    let slots = wanted.len() + 3;
    let slot = &problem.rng.shuffled(slots)[..wanted.len()];
    let width = stride(vocab_size);
    let logits = bed.fresh(slots * width);
    let lists = [bed.put(&firsts(&wanted_of_sets)), bed.put(&wanted), bed.put(slot)];
    problem.product.set_first = lists[0].address();
    problem.product.rows = lists[1].address();
    problem.most = wanted_of_sets.iter().max().copied().unwrap_or(0);
    problem.indices.clone_from(&wanted);
    let kernels = problem.kernels(bed);
    problem.project(bed, &kernels.lm_head, vocab_size.div_ceil(4), |product| LmHeadArgs {
        product,
        logits: logits.address(),
        slot: lists[2].address(),
        vocab_stride: width as u32,
    })?;
    logits.check(bed, &(case, vocab_size), |at| {
        let (in_slot, id) = (at / width, at % width);
        let index = slot.iter().position(|&slot| slot as usize == in_slot)?;
        let sum = (id < vocab_size).then(|| problem.y(wanted[index] as usize, id, 0))?;
        Some(sum.rounded(problem.roundings()))
    })
}

/// Heads, key heads, head size.
type Heads = (usize, usize, usize);

/// RMSNorm, queries, keys and values, RoPE, and the cache.
pub(super) fn qkv(bed: &Bed, case: Case, (heads, kv_heads, head_dim): Heads) -> Found {
    const POSITIONS: usize = 70;
    let outputs = (heads + 2 * kv_heads) * head_dim;
    let mut problem = Problem::new(bed, case, (outputs, 3, true));
    let (rows, half, models) = (problem.rows(), head_dim / 2, case.rows.len());
    // Each set rotates by a table of its own.
    let of_set = POSITIONS * half;
    let angles: Vec<f32> = problem.rng.numbers(models * of_set);
    let [cos, sin] = [f32::cos, f32::sin].map(|f| angles.iter().map(|&x| f(x)).collect::<Vec<f32>>());
    // A block for each row, in no order; the rest of the tables names blocks that there aren't.
    let table_stride = POSITIONS / BLOCK_SIZE + 1;
    let (block, table) = (problem.rng.shuffled(rows + 1), problem.rng.shuffled(rows));
    let mut position: Vec<u32> = (0..rows).map(|_| problem.rng.below(POSITIONS) as u32).collect();
    position[0] = POSITIONS as u32 - 1;
    let model: Vec<u32> = problem.set_of.iter().map(|&set| (models - 1 - set) as u32).collect();
    let mut tables = vec![u32::MAX; rows * table_stride];
    for row in 0..rows {
        tables[table[row] as usize * table_stride + position[row] as usize / BLOCK_SIZE] = block[row];
    }
    let of_block = 2 * kv_heads * BLOCK_SIZE * head_dim;
    let of_model = (rows + 1) * of_block + 64;
    let (cache, query_stride) = (bed.fresh(models * of_model), stride(heads * head_dim));
    let queries = bed.fresh(rows * query_stride);
    let (cos_at, sin_at) = (bed.put(&cos), bed.put(&sin));
    let lists = [&position, &table, &model, &tables].map(|list| bed.put(list));
    let kernels = problem.kernels(bed);
    let units = (outputs / 2).div_ceil(2);
    problem.project(bed, &kernels.qkv, units, |product| QkvArgs {
        product,
        queries: queries.address(),
        cache: cache.address(),
        cos: cos_at.address(),
        sin: sin_at.address(),
        position: lists[0].address(),
        table: lists[1].address(),
        model: lists[2].address(),
        block_tables: lists[3].address(),
        model_stride: (of_model * size_of::<f32>()) as u64,
        angle_stride: (of_set * size_of::<f32>()) as u64,
        query_stride: query_stride as u32,
        table_stride: table_stride as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
    })?;
    // Number i of a head of queries (0), keys (1) or values (2), whose first output is `first`.
    let head = |row: usize, first: usize, segment: usize, i: usize| {
        let y = |i: usize| problem.y(row, first + i, segment);
        if segment == 2 {
            return y(i).rounded(problem.roundings());
        }
        let angle = problem.set_of[row] * of_set + position[row] as usize * half + i % half;
        let (c, s) = (f64::from(cos[angle]), f64::from(sin[angle]));
        let s = if i < half { -s } else { s };
        // A product and a sum more.
        y(i).times(c).plus(y((i + half) % head_dim).times(s)).rounded(problem.roundings() + 2)
    };
    let what = (case, heads, kv_heads, head_dim);
    queries.check(bed, &what, |at| {
        let (row, at) = (at / query_stride, at % query_stride);
        (at < heads * head_dim).then(|| head(row, at / head_dim * head_dim, 0, at % head_dim))
    })?;
    cache.check(bed, &what, |at| {
        let (in_model, at) = (at / of_model, at % of_model);
        let (in_block, at) = (at / of_block, at % of_block);
        let (is_value, at) = (at / (of_block / 2), at % (of_block / 2));
        let (kv_head, at) = (at / (BLOCK_SIZE * head_dim), at % (BLOCK_SIZE * head_dim));
        let (slot, i) = (at / head_dim, at % head_dim);
        let row = (0..rows).find(|&row| {
            (model[row] as usize, block[row] as usize) == (in_model, in_block)
                && position[row] as usize % BLOCK_SIZE == slot
        })?;
        let first = (heads + is_value * kv_heads + kv_head) * head_dim;
        Some(head(row, first, 1 + is_value, i))
    })
}

/// One for each dtype, and those of tensor cores.
const IMAGES: [&str; 6] = ["gemv_f32", "gemv_f16", "gemv_bf16", "gemm_f32", "gemm_f16", "gemm_bf16"];

/// A projection's own kernels, and the one that goes before some.
fn mine(prefix: &str) -> impl Fn(&str) -> bool {
    move |name| name.starts_with(prefix) || name.starts_with("split_rows_")
}

/// Rows of each set: those that each M is for, both ends of it, several sets, and those of tensor cores.
const ROWS: [&[usize]; 13] =
    [&[1], &[2], &[4], &[5], &[7], &[8], &[9], &[16], &[1, 1, 1], &[3, 0, 16], &[2, 19], &[65, 0, 3], &[34]];

/// Every dtype with all of `ROWS`, and widths that no vector, warp or panel divides, by turns.
fn cases() -> impl Iterator<Item = (usize, Case)> {
    let cols = [1, 7, 44, 128, 264, 520, 1111];
    let all = DTYPES.into_iter().flat_map(|dtype| ROWS.map(|rows| (dtype, rows)));
    all.enumerate().map(move |(index, (dtype, rows))| {
        let case = Case {
            dtype,
            rows,
            cols: cols[index % cols.len()],
            bias: index % 2 == 0,
            rank: [0, 8, 40][index % 3],
        };
        (index, case)
    })
}

#[test]
fn residual_against_a_plain_sum() {
    let bed = Bed::new();
    for (index, case) in cases() {
        residual(&bed, case, [1, 3, 44, 67][index % 4]).unwrap();
    }
    bed.assert_every(&IMAGES, mine("residual_"));
}

#[test]
fn gate_up_against_a_plain_sum() {
    let bed = Bed::new();
    for (index, case) in cases() {
        gate_up(&bed, case, [1, 2, 33, 70][index % 4]).unwrap();
    }
    bed.assert_every(&IMAGES, mine("gate_up_"));
}

#[test]
fn lm_head_against_a_plain_sum() {
    let bed = Bed::new();
    for (index, case) in cases() {
        lm_head(&bed, case, [1, 7, 64, 111][index % 4]).unwrap();
    }
    bed.assert_every(&IMAGES, mine("lm_head_"));
}

#[test]
fn qkv_against_a_plain_sum() {
    let heads = [(2, 1, 64), (1, 1, 96), (2, 2, 128), (1, 1, 256), (3, 1, 10), (7, 1, 2)];
    let bed = Bed::new();
    for (index, case) in cases() {
        let cols = if index % 4 == 3 { 128 } else { case.cols.min(264) };
        qkv(&bed, Case { cols, ..case }, heads[index % heads.len()]).unwrap();
    }
    bed.assert_every(&IMAGES, mine("qkv_"));
}

/// More panels than shared memory holds, for one row and for many; and more tiles than the GPU runs blocks.
#[test]
fn long_rows_and_many_outputs() {
    let bed = Bed::new();
    let case = Case { dtype: Dtype::Bf16, rows: &[1], cols: 11_790, bias: true, rank: 0 };
    residual(&bed, case, 5).unwrap();
    gate_up(&bed, Case { dtype: Dtype::F32, ..case }, 3).unwrap();
    residual(&bed, Case { rows: &[4], cols: 3300, ..case }, 6).unwrap();
    residual(&bed, Case { rows: &[17], cols: 3300, ..case }, 6).unwrap();
    residual(&bed, Case { rows: &[67, 130], cols: 100, rank: 16, ..case }, 301).unwrap();
    lm_head(&bed, Case { rows: &[9], cols: 44, ..case }, 7001).unwrap();
    lm_head(&bed, Case { rows: &[31, 1], cols: 530, dtype: Dtype::F16, ..case }, 7001).unwrap();
}

/// Columns that several blocks share, and more than one block of rows, of units and of sets.
const LONG: Case = Case { dtype: Dtype::Bf16, rows: &[20, 0, 66], cols: 1100, bias: true, rank: 8 };

#[test]
fn ranges_of_columns_against_a_plain_sum() {
    let bed = Bed::new();
    for (index, dtype) in DTYPES.into_iter().enumerate() {
        let case = Case { dtype, rank: [8, 0, 16][index], ..LONG };
        let three = Case { rows: &[33], cols: 1600, ..case };
        residual(&bed, three, 67).unwrap();
        residual(&bed, case, 131).unwrap();
        gate_up(&bed, three, 33).unwrap();
        gate_up(&bed, Case { rows: &[17, 19], ..case }, 65).unwrap();
        lm_head(&bed, Case { rows: &[40], ..case }, 130).unwrap();
        qkv(&bed, Case { rows: &[17, 3], ..case }, (3, 1, 30)).unwrap();
    }
    // So many ranges that whole steps leave none to the last one.
    residual(&bed, Case { rows: &[17], cols: 10_272, rank: 0, ..LONG }, 6).unwrap();
    let wide = |name: &str| name.contains("_wide_");
    let shared = bed.device.launches().into_iter().filter(|launch| wide(&launch.kernel));
    // Atomics are tickets: none of them was a launch with one range.
    assert!(shared.clone().all(|launch| launch.counters.global_atomics > 0));
    assert_eq!(shared.count(), 3 * 6 + 1);
    bed.assert_every(&IMAGES[3..], |name| name.contains("_wide_"));
}

/// What a projection writes, to the bit, whatever the order of its blocks; twice, since the second launch must find the
/// tickets as the first did.
#[test]
fn ranges_are_added_in_their_own_order() {
    let case = Case { rows: &[34], cols: 4200, rank: 0, ..LONG };
    let outputs = |seed: u64| {
        let bed = Bed::new();
        bed.device.seed(seed);
        let (problem, n) = (Problem::new(&bed, case, (67, 1, false)), 67_usize);
        let ranges = Tiling::new(34, n.div_ceil(4), 4200, 1).ranges;
        assert_eq!(ranges, 8);
        let to = [0, 1].map(|_| bed.output(&vec![0.0; 34 * stride(n)]));
        for hidden in &to {
            let args = |product| IntoArgs { product, to: hidden.address(), to_stride: stride(n) as u32 };
            problem.project(&bed, &problem.kernels(&bed).residual, n.div_ceil(4), args).unwrap();
        }
        to.map(|hidden| hidden.numbers(&bed).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let expected = outputs(0);
    assert_eq!(expected[0], expected[1]);
    for seed in 1..12 {
        assert!(outputs(seed) == expected, "seed {seed}");
    }
}

#[test]
fn a_missing_piece_of_the_ranges_is_noticed() {
    let changes = [
        // The barrier that gathers a block's sums, the fences on both sides of the ticket, the last block's word to its threads.
        ("bar.sync", 1, ""),
        ("membar", 0, ""),
        ("membar", 1, ""),
        ("bar.red.or.pred", 0, ""),
        // A ticket that doesn't count on, one too many, one that isn't taken back.
        ("atom.global.add*, 1;", 0, ", 0;"),
        ("atom.global.add*, 1;", 0, ", 2;"),
        ("st.global.u32", 0, ""),
        // Sums that don't come, and that aren't looked at.
        ("st.global.v4.f32", 3, ""),
        ("st.global.v4.f32", 4, ""),
        ("ld.global.cg.v4.f32", 0, ""),
        ("ld.global.cg.v4.f32", 5, ""),
    ];
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let kernel = &format!("residual_wide_{dtype}");
        let test = |bed: &Bed| residual(bed, Case { dtype, rows: &[32, 20], ..LONG }, 130);
        for (find, nth, replacement) in changes {
            let bed = Bed::new();
            bed.device.mutate(kernel, find, nth, replacement);
            let found = test(&bed);
            assert!(bed.device.mutations() > 0, "{kernel} has no {find} {nth}");
            assert!(found.is_err(), "{kernel} without {find} {nth} went unnoticed");
        }
        assert_noticed(kernel, 116, "ranges", test);
    }
}

#[test]
fn a_wrong_number_is_noticed() {
    const CASE: Case = Case { dtype: Dtype::Bf16, rows: &[3, 4], cols: 44, bias: true, rank: 8 };
    const PRODUCT: usize = 88;
    let of_product = [(0, "n"), (4, "cols"), (8, "stride"), (16, "rank"), (20, "segments")];
    for (at, name) in of_product {
        let normed = |bed: &Bed| qkv(bed, CASE, (3, 1, 10));
        // The number of outputs is told twice, and this kernel takes the other one.
        if name != "n" {
            assert_noticed("qkv_bf16_4", PRODUCT + at, name, normed);
        }
        if !["cols", "segments"].contains(&name) {
            assert_noticed("residual_bf16_4", PRODUCT + at, name, |bed| residual(bed, CASE, 30));
        }
        // This one halves the number of outputs.
        if name != "n" {
            assert_noticed("gate_up_bf16_4", PRODUCT + at, name, |bed| gate_up(bed, CASE, 31));
        }
        if !["rank", "segments"].contains(&name) {
            let case = Case { rows: &[7, 8], ..CASE };
            assert_noticed("lm_head_bf16_4", PRODUCT + at, name, |bed| lm_head(bed, case, 111));
        }
    }
    for (at, name) in [
        (208, "model_stride"),
        (216, "angle_stride"),
        (224, "query_stride"),
        (228, "table_stride"),
        (232, "heads"),
    ] {
        assert_noticed("qkv_bf16_4", at, name, |bed| qkv(bed, CASE, (3, 1, 10)));
    }
    for (at, name) in [(72, "set_stride"), (80, "lora_stride"), (236, "kv_heads"), (240, "head_dim")] {
        assert_noticed("qkv_bf16_4", at, name, |bed| qkv(bed, CASE, (3, 1, 10)));
    }
}

#[test]
fn a_wrong_number_is_noticed_on_tensor_cores() {
    const CASE: Case = Case { dtype: Dtype::Bf16, rows: &[18, 20], cols: 44, bias: true, rank: 8 };
    let of_qkv = [(72, "set_stride"), (80, "lora_stride"), (96, "stride"), (104, "rank"), (108, "segments")];
    for (at, name) in of_qkv.into_iter().chain([(232, "heads"), (236, "kv_heads"), (240, "head_dim")]) {
        assert_noticed("qkv_wide_bf16", at, name, |bed| qkv(bed, CASE, (3, 1, 10)));
    }
    for (kernel, at, name) in [("residual_wide_bf16", 88, "n"), ("residual_wide_bf16", 152, "hidden_stride")]
    {
        assert_noticed(kernel, at, name, |bed| residual(bed, CASE, 30));
    }
    for (at, name) in [(72, "set_stride"), (92, "cols"), (96, "stride")] {
        assert_noticed("split_rows_bf16", at, name, |bed| gate_up(bed, CASE, 31));
    }
}

/// Tensor cores may cut their sums off. Where all terms have one sign that goes one way, and sums would drift away along a
/// row, were they left to the tensor cores from its beginning to its end.
#[test]
fn sums_do_not_drift_where_they_are_cut_off() {
    for dtype in DTYPES {
        let case = Case { dtype, rows: &[34], cols: 3300, bias: false, rank: 0 };
        for mode in [Accumulate::Truncating, Accumulate::Sequential, Accumulate::Exact] {
            let bed = Bed::new();
            bed.device.accumulate(mode);
            residual_of(&bed, Problem::new(&bed, case, (6, 1, false)).without_signs(&bed)).unwrap();
        }
    }
}

/// Each product of halves that a step takes, two rows of W's fragments by four of x's, three products for one, twice.
#[test]
fn a_product_less_is_noticed_in_f32() {
    let case = Case { dtype: Dtype::F32, rows: &[34], cols: 44, bias: true, rank: 0 };
    for nth in 0..=48 {
        let bed = Bed::new();
        bed.device.mutate("residual_wide_f32", "mma.sync", nth, "");
        let found = residual(&bed, case, 67);
        assert_eq!(bed.device.mutations(), u64::from(nth < 48));
        assert_eq!(found.is_err(), nth < 48, "product {nth}: {found:?}");
    }
}

/// The comparison itself can fail: a number next to the one that was expected is not near it.
#[test]
fn the_tolerance_is_tight() {
    let bed = Bed::new();
    let case = Case { dtype: Dtype::F32, rows: &[2], cols: 300, bias: true, rank: 8 };
    let problem = Problem::new(&bed, case, (4, 1, true));
    for row in 0..2 {
        let near = problem.y(row, 1, 0).rounded(problem.roundings());
        let Near { value, error } = near;
        // A dropped column is worth 1/300 of the sum of sizes.
        assert!(error < problem.y(row, 1, 0).size / 30_000.0, "{error} of {value}");
    }
}
