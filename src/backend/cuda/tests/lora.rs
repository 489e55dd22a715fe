//! lora.cuh: the blocks of a projection that compute A x, and those that wait for them. (The numbers themselves are
//! checked wherever a projection has adapters: see `Problem::project`.)

use super::bed::{Bed, Found, assert_noticed};
use super::problem::{Case, Problem};
use super::projections::{qkv, residual};
use crate::backend::cuda::kernels::IntoArgs;
use crate::backend::cuda::weights::stride;
use crate::weights::Dtype;

/// Several producers and tiles.
const CASE: Case = Case { dtype: Dtype::Bf16, rows: &[3, 4], cols: 300, bias: true, rank: 24 };
const N: usize = 130;

type Test = fn(&Bed) -> Found;

/// Instructions of a launch here, and then some: who waits for ever is stopped there.
const ENOUGH: u64 = 1_000_000;

#[test]
fn blocks_come_in_any_order() {
    for seed in 0..12 {
        let bed = Bed::new();
        bed.device.seed(seed);
        residual(&bed, CASE, N).unwrap();
        // More numbers than producers have warps; a set without rows.
        qkv(&bed, Case { rows: &[16, 0, 9], rank: 40, ..CASE }, (3, 1, 10)).unwrap();
    }
}

/// The residual projection, whose counters begin at `begun` blocks; what they end at.
fn count_from(bed: &Bed, begun: impl Fn(u32) -> [u32; 2]) -> Result<(u32, Vec<u32>), String> {
    let case = Case { rows: &[4], ..CASE };
    let mut problem = Problem::new(bed, case, (N, 1, false));
    let producers = problem.product.producers_for(problem.most, bed.gpu.multiprocessors());
    let progress = bed.put(&begun(producers));
    problem.product.progress = progress.address();
    let width = stride(N);
    let hidden = bed.output(&problem.rng.numbers(problem.rows() * width));
    let kernels = problem.kernels(bed);
    problem.launch(bed, &kernels.residual, N.div_ceil(4), |product| IntoArgs {
        product,
        to: hidden.address(),
        to_stride: width as u32,
    })?;
    Ok((producers, bed.back(&progress)?))
}

#[test]
fn each_block_takes_a_ticket_and_each_producer_counts() {
    let bed = Bed::new();
    let (producers, progress) = count_from(&bed, |_| [0, 0]).unwrap();
    // A warp for each number of A x, and a block for each tile.
    assert_eq!(producers, (4 * 24 / 8) as u32);
    assert_eq!(progress, [producers + N.div_ceil(32) as u32, producers]);
}

#[test]
fn the_others_wait_for_the_last_producer() {
    // As if all producers had begun, and one were not done yet: it never will be.
    let bed = Bed::new();
    bed.device.budget(ENOUGH);
    let error = count_from(&bed, |producers| [producers, producers - 1]).unwrap_err();
    assert!(error.contains("stopped"), "{error}");
    let bed = Bed::new();
    count_from(&bed, |producers| [producers, producers]).unwrap();
}

#[test]
fn a_missing_piece_of_the_order_is_noticed() {
    let changes = [
        // The barrier that gathers a producer's warps, its fence; the look at the counter, and the fence behind it.
        ("bar.sync", 1, ""),
        ("membar", 0, ""),
        ("ld.volatile.global", 0, "ld.global"),
        ("membar", 1, ""),
        // The barrier between the tickets' arrival and their use, and a ticket that doesn't count on.
        ("bar.sync", 0, ""),
        ("atom.global.add*, 1;", 0, ", 0;"),
        // A producer that doesn't count.
        ("atom.global.add*, 1;", 1, ", 0;"),
    ];
    let tests: [(&str, Test); 2] = [
        ("residual_bf16_4", |bed| residual(bed, CASE, N)),
        ("qkv_bf16_16", |bed| qkv(bed, Case { rows: &[2, 11], ..CASE }, (3, 1, 10))),
    ];
    for (kernel, test) in tests {
        let bed = Bed::new();
        bed.device.budget(ENOUGH);
        test(&bed).unwrap();
        for (find, nth, replacement) in changes {
            let bed = Bed::new();
            bed.device.budget(ENOUGH);
            bed.device.mutate(kernel, find, nth, replacement);
            let found = test(&bed);
            assert!(bed.device.mutations() > 0, "{kernel} has no {find} {nth}");
            assert!(found.is_err(), "{kernel} without {find} {nth} went unnoticed");
        }
    }
}

#[test]
fn a_wrong_number_is_noticed() {
    // One tile: a producer more is one that computes no output.
    assert_noticed("residual_bf16_4", 112, "producers", |bed| residual(bed, CASE, 30));
    for (at, name) in [(80, "lora_stride"), (92, "cols"), (96, "stride"), (104, "rank"), (108, "segments")] {
        let case = Case { rows: &[17, 2], ..CASE };
        assert_noticed("split_rows_bf16", at, name, |bed| qkv(bed, case, (3, 1, 10)));
    }
}
