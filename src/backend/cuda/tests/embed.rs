//! embed.cu: rows of a table, bit for bit.

use super::bed::{Arena, Bed, DTYPES, Found, Near, Rng, assert_noticed, firsts, sets_of};
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::kernels::EmbedArgs;
use crate::backend::cuda::weights::stride;
use crate::weights::Dtype;

/// More than a block has threads, and no multiple of them.
const COUNTERS: usize = 301;

/// Random tokens of `rows` rows a set, the first and the last id among them.
fn embed(bed: &Bed, dtype: Dtype, rows: &[usize], (vocab_size, hidden_size): (usize, usize)) -> Found {
    let rng = &mut Rng((vocab_size * hidden_size) as u64);
    let mut arena = Arena::default();
    let mut tables = Vec::new();
    for _ in rows {
        tables.push(arena.matrix(rng, dtype, vocab_size, hidden_size));
        arena.end();
    }
    let set_stride = arena.bytes.len() / rows.len();
    let sets = sets_of(rows);
    let mut token: Vec<u32> = sets.iter().map(|_| rng.below(vocab_size) as u32).collect();
    token[0] = vocab_size as u32 - 1;
    if let Some(last) = token.last_mut() {
        *last = 0;
    }
    let (weights, tokens, set_first) = (bed.put(&arena.bytes), bed.put(&token), bed.put(&firsts(rows)));
    let width = stride(hidden_size);
    let hidden = bed.fresh(sets.len() * width);
    let progress = bed.fresh(COUNTERS);
    let args = EmbedArgs {
        hidden: hidden.address(),
        table: weights.address() + tables[0].0,
        token: tokens.address(),
        set_first: set_first.address(),
        set_stride: set_stride as u64,
        stride: width as u32,
        counters: COUNTERS as u32,
        progress: progress.address(),
    };
    let most = rows.iter().max().copied().unwrap_or(0) as u32;
    let grid = Grid { blocks: (most, 1, rows.len() as u32), threads: (128, 1, 1), shared: 0 };
    let kernel = bed.gpu.kernel("embed", &format!("embed_{dtype}")).unwrap();
    bed.launch(&kernel, grid, &args)?;
    let what = (dtype, rows, vocab_size, hidden_size);
    progress.check(bed, &what, |_| Some(Near::exactly(0.0)))?;
    hidden.check(bed, &what, |at| {
        let (row, k) = (at / width, at % width);
        let numbers = &tables[sets[row]].1;
        let value = if k < hidden_size { numbers[token[row] as usize * hidden_size + k] } else { 0.0 };
        Some(Near::exactly(value))
    })
}

#[test]
fn rows_of_the_table() {
    let bed = Bed::new();
    for dtype in DTYPES {
        for (rows, shape) in [
            (&[1][..], (1, 1)),
            (&[3], (7, 44)),
            (&[2, 0, 5], (31, 130)),
            (&[16], (100, 256)),
            (&[1, 1, 1, 1], (9, 1001)),
        ] {
            embed(&bed, dtype, rows, shape).unwrap();
        }
    }
    bed.assert_every(&["embed"], |_| true);
}

#[test]
fn a_wrong_number_is_noticed() {
    for (at, name) in [(32, "set_stride"), (40, "stride"), (44, "counters")] {
        assert_noticed("embed_bf16", at, name, |bed| embed(bed, Dtype::Bf16, &[2, 3], (31, 44)));
    }
}
