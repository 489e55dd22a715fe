//! lora.cu: A x of each row's adapter, after RMSNorm or without.

use super::bed::{Arena, Bed, Found, Rng, Sum, assert_noticed, firsts, padded, sets_of};
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::kernels::{LoraArgs, WARPS};
use crate::backend::cuda::weights::stride;

const EPS: f32 = 1e-6;
const NO_ADAPTER: u32 = u32::MAX;

/// `outputs` numbers for each row of `rows` rows a set; three adapters by turns, and none.
fn lora_down(bed: &Bed, rows: &[usize], (outputs, cols): (usize, usize), normed: bool) -> Found {
    let rng = &mut Rng((outputs * 1000 + cols) as u64);
    let (set_of, width) = (sets_of(rows), stride(cols));
    let mut arena = Arena::default();
    let mut norms = Vec::new();
    for _ in rows {
        norms.push(arena.vector(rng, cols));
        arena.end();
    }
    let set_stride = arena.bytes.len() / rows.len();
    let x = rng.numbers(set_of.len() * cols);
    let a: Vec<Vec<f32>> = (0..3).map(|_| rng.numbers(outputs * cols)).collect();
    let adapter: Vec<u32> = (0..set_of.len()).map(|row| [2, NO_ADAPTER, 0, 1][row % 4]).collect();
    let (x_at, a_at) = (bed.put(&padded(&x, cols, 0.0)), bed.put(&padded(&a.concat(), cols, 0.0)));
    let (bytes, lists) = (bed.put(&arena.bytes), [bed.put(&adapter), bed.put(&firsts(rows))]);
    let t = bed.fresh(set_of.len() * outputs);
    let args = LoraArgs {
        x: x_at.address(),
        norm: if normed { bytes.address() + norms[0].0 } else { 0 },
        a: a_at.address(),
        t: t.address(),
        adapter: lists[0].address(),
        set_first: lists[1].address(),
        set_stride: set_stride as u64,
        lora_stride: (outputs * width * size_of::<f32>()) as u64,
        outputs: outputs as u32,
        stride: width as u32,
        cols: cols as u32,
        sets: rows.len() as u32,
        eps: EPS,
    };
    let blocks = (outputs.div_ceil(WARPS) as u32, set_of.len() as u32, 1);
    let grid = Grid { blocks, threads: (256, 1, 1), shared: 0 };
    let kernel = bed.gpu.kernel("lora", "lora_down").unwrap();
    bed.launch(&kernel, grid, &args)?;
    t.check(bed, &(rows, outputs, cols, normed), |at| {
        let (row, j) = (at / outputs, at % outputs);
        let of_adapter = a.get(adapter[row] as usize)?;
        let norm = &norms[set_of[row]].1;
        let (mut sum, mut squares) = (Sum::default(), 0.0);
        for (k, x) in x[row * cols..][..cols].iter().enumerate() {
            let (x, a) = (f64::from(*x), f64::from(of_adapter[j * cols + k]));
            sum.add(a * x * if normed { f64::from(norm[k]) } else { 1.0 });
            squares += x * x;
        }
        if normed {
            sum = sum.times((squares / cols as f64 + f64::from(EPS)).sqrt().recip());
        }
        // Four products each 128 columns along a lane, five steps over the lanes; x · norm; the squares, four and one
        // each 128 columns and five, halved by the root; mean, ε, root, reciprocal, the scaling.
        let steps = cols.div_ceil(128);
        Some(sum.rounded(4 * steps + 5 + 1 + (5 * steps + 5).div_ceil(2) + 5))
    })
}

#[test]
fn every_adapter_of_every_row() {
    let bed = Bed::new();
    let widths = [1, 8, 44, 129, 1000];
    for (index, rows) in [&[1][..], &[5], &[2, 0, 7], &[16], &[1, 1, 1, 1, 9]].into_iter().enumerate() {
        for (turn, outputs) in [8, 24, 40, 120].into_iter().enumerate() {
            for normed in [false, true] {
                lora_down(&bed, rows, (outputs, widths[(index + turn) % widths.len()]), normed).unwrap();
            }
        }
    }
}

#[test]
fn a_wrong_number_is_noticed() {
    let numbers = [(48, "set_stride"), (56, "lora_stride"), (64, "outputs"), (68, "stride"), (72, "cols")];
    for (at, name) in numbers {
        assert_noticed("lora_down", at, name, |bed| lora_down(bed, &[3, 5], (24, 44), true));
    }
}
