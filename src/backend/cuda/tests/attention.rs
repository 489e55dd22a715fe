//! attention.cu: the splits by themselves, and their merge by itself; attention_wide.cu.

use virtual_gpu::exec::Accumulate;

use super::bed::{Bed, DTYPES, Found, Near, ROUNDING, Rng, assert_noticed};
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::kernels::{AttentionArgs, Kernels, SPLIT};
use crate::backend::cuda::weights::stride;
use crate::kv_cache::BLOCK_SIZE;

/// Heads, and the rows of two models: the positions that each row sees.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    lengths: &'static [usize],
    /// What queries are multiplied with: at one, weights span all that an f32 holds.
    sharpness: f32,
}

impl Case {
    /// As the engine chooses them: a power of two, with splits that have no position.
    fn splits(&self) -> usize {
        let longest = self.lengths.iter().max().copied().unwrap_or(1);
        ((longest - 1) / SPLIT + 1).next_power_of_two()
    }

    /// Lanes that share a position.
    fn lanes(&self) -> usize {
        self.head_dim.div_ceil(8).next_power_of_two()
    }

    /// What doesn't depend on where things lie.
    fn args(&self, table_stride: usize) -> AttentionArgs {
        AttentionArgs {
            queries: 0,
            cache: 0,
            partial: 0,
            state: 0,
            attended: 0,
            position: 0,
            table: 0,
            model: 0,
            block_tables: 0,
            alone: 0,
            tile_first: 0,
            tile_rows: 0,
            model_stride: 0,
            query_stride: stride(self.heads * self.head_dim) as u32,
            table_stride: table_stride as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
            splits: self.splits() as u32,
            lanes: self.lanes() as u32,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
        }
    }
}

/// Keys and values of two models as the cache has them, and who reads them where.
struct Cache {
    /// `(2, blocks, 2, kv_heads, 16, head_dim)`, NaN where no row looks.
    numbers: Vec<f32>,
    of_model: usize,
    tables: Vec<u32>,
    table_stride: usize,
    /// Of each row. The last row has the table of the first one: they are two rows of one sequence.
    table: Vec<u32>,
    model: Vec<u32>,
}

impl Cache {
    fn new(case: Case, rng: &mut Rng) -> Self {
        let Case { kv_heads, head_dim, lengths, .. } = case;
        let longest = lengths.iter().max().copied().unwrap_or(1);
        let table_stride = longest.div_ceil(BLOCK_SIZE) + 1;
        let (rows, of_block) = (lengths.len(), 2 * kv_heads * BLOCK_SIZE * head_dim);
        let blocks = rng.shuffled(rows * table_stride);
        let of_model = blocks.len() * of_block + 8;
        let mut table = rng.shuffled(rows);
        let mut model: Vec<u32> = (0..rows as u32).map(|row| row % 2).collect();
        if rows > 1 {
            (table[rows - 1], model[rows - 1]) = (table[0], model[0]);
        }
        let mut cache = Self {
            numbers: vec![f32::NAN; 2 * of_model],
            of_model,
            tables: blocks,
            table_stride,
            table,
            model,
        };
        for (row, &length) in lengths.iter().enumerate() {
            for position in 0..length {
                for half in 0..2 * kv_heads {
                    let at = cache.at(case, row, position, half);
                    cache.numbers[at..at + head_dim].copy_from_slice(&rng.numbers(head_dim));
                }
            }
        }
        cache
    }

    /// Where the head `half` of keys, then of values, begins.
    fn at(&self, case: Case, row: usize, position: usize, half: usize) -> usize {
        let entry = self.table[row] as usize * self.table_stride + position / BLOCK_SIZE;
        let head = self.tables[entry] as usize * 2 * case.kv_heads + half;
        let in_model = (head * BLOCK_SIZE + position % BLOCK_SIZE) * case.head_dim;
        self.model[row] as usize * self.of_model + in_model
    }
}

/// What a split of a head of a row must say: m, l and Σ e^(s − m) v, where m is the one that the kernel found.
struct Split {
    m: Near,
    l: Near,
    o: Vec<Near>,
}

fn split(
    case: Case,
    cache: &Cache,
    query: &[f32],
    (row, head, split): (usize, usize, usize),
    m: f32,
) -> Split {
    let kv_head = head / (case.heads / case.kv_heads);
    let last = case.lengths[row].min((split + 1) * SPLIT);
    let scale = 1.0 / (case.head_dim as f64).sqrt();
    // Positions that a lane merges, the lanes of a warp, the warps.
    let at_once = 32 / case.lanes();
    let merges = SPLIT / (4 * at_once) + at_once.ilog2() as usize + 4;
    let mut top = Near { value: f64::NEG_INFINITY, error: 0.0 };
    let mut l = Near { value: 0.0, error: 0.0 };
    let mut o = vec![l; case.head_dim];
    for position in split * SPLIT..last {
        let key = &cache.numbers[cache.at(case, row, position, kv_head)..][..case.head_dim];
        let (mut score, mut size) = (0.0, 0.0);
        for (q, k) in query.iter().zip(key) {
            let product = f64::from(*q) * f64::from(*k) * scale;
            score += product;
            size += product.abs();
        }
        // The scale and its product, eight products along a lane, the sum over the lanes.
        let off = (2 + 8 + case.lanes().ilog2() as usize) as f64 * ROUNDING * size * 1.01;
        top = Near { value: top.value.max(score), error: top.error.max(off) };
        // Each exponential's argument is rounded twice, and all of them together come to m − s; it is good to 2 ulp, and
        // a product and a sum follow.
        let weight = (score - f64::from(m)).exp();
        let roundings = 2.0 * (f64::from(m) - score).abs() + 7.0 * merges as f64;
        let error = weight * ((off + roundings * ROUNDING).exp() - 1.0);
        l = Near { value: l.value + weight, error: l.error + error };
        let value = &cache.numbers[cache.at(case, row, position, case.kv_heads + kv_head)..][..case.head_dim];
        for (o, &v) in o.iter_mut().zip(value) {
            let v = f64::from(v);
            *o = Near { value: o.value + weight * v, error: o.error + error * v.abs() };
        }
    }
    Split { m: top, l, o }
}

/// One launch of `attention_G`: what every split wrote.
fn attention(bed: &Bed, case: Case) -> Found {
    let Case { heads, kv_heads, head_dim, lengths, sharpness } = case;
    let rng = &mut Rng((heads * 1000 + head_dim + lengths.len()) as u64);
    let (rows, splits, query_stride) = (lengths.len(), case.splits(), stride(heads * head_dim));
    let cache = Cache::new(case, rng);
    let queries: Vec<f32> = rng.numbers(rows * query_stride).iter().map(|x| x * sharpness).collect();
    let position: Vec<u32> = lengths.iter().map(|&length| length as u32 - 1).collect();
    let (on_device, queries_at) = (bed.put(&cache.numbers), bed.put(&queries));
    let alone: Vec<u32> = (0..rows as u32).collect();
    let lists = [&position, &cache.table, &cache.model, &cache.tables, &alone].map(|list| bed.put(list));
    let (partial, state) =
        (bed.fresh(rows * heads * splits * head_dim), bed.fresh(rows * heads * splits * 2));
    let args = AttentionArgs {
        queries: queries_at.address(),
        cache: on_device.address(),
        partial: partial.address(),
        state: state.address(),
        position: lists[0].address(),
        table: lists[1].address(),
        model: lists[2].address(),
        block_tables: lists[3].address(),
        alone: lists[4].address(),
        model_stride: (cache.of_model * size_of::<f32>()) as u64,
        ..case.args(cache.table_stride)
    };
    let kernels = Kernels::new(&bed.gpu, DTYPES[0], heads / kv_heads, head_dim).unwrap();
    let (kernel, group) = (&kernels.attention.0, kernels.attention.1);
    let chunks = (heads / kv_heads).div_ceil(group);
    let shared = 4 * group * (head_dim + 2) * size_of::<f32>();
    let blocks = ((kv_heads * chunks) as u32, splits as u32, rows as u32);
    bed.launch(kernel, Grid { blocks, threads: (128, 1, 1), shared: shared as u32 }, &args)?;

    let found = state.numbers(bed)?;
    let place = |at: usize| (at / splits / heads, at / splits % heads, at % splits);
    let expected: Vec<Option<Split>> = (0..rows * heads * splits)
        .map(|at| {
            let (row, head, of_row) = place(at);
            let query = &queries[row * query_stride + head * head_dim..][..head_dim];
            let exists = of_row * SPLIT < lengths[row];
            exists.then(|| split(case, &cache, query, (row, head, of_row), found[2 * at]))
        })
        .collect();
    state.check(bed, &case, |at| {
        expected[at / 2].as_ref().map(|split| if at % 2 == 0 { split.m } else { split.l })
    })?;
    partial.check(bed, &case, |at| expected[at / head_dim].as_ref().map(|split| split.o[at % head_dim]))
}

/// One launch of `attention_merge`, over partial results of any size, NaN where a row has no split.
fn merge(bed: &Bed, case: Case) -> Found {
    let Case { heads, head_dim, lengths, sharpness, .. } = case;
    let rng = &mut Rng((heads * 77 + head_dim) as u64);
    let (rows, splits, query_stride) = (lengths.len(), case.splits(), stride(heads * head_dim));
    let exists = |at: usize| at % splits * SPLIT < lengths[at / splits / heads];
    let (mut state, mut partial) = (Vec::new(), Vec::new());
    for at in 0..rows * heads * splits {
        let numbers = if exists(at) { rng.numbers(2 + head_dim) } else { vec![f32::NAN; 2 + head_dim] };
        // At least one position has weight 1.
        state.extend([sharpness * numbers[0], 1.0 + numbers[1].abs()]);
        partial.extend_from_slice(&numbers[2..]);
    }
    let position: Vec<u32> = lengths.iter().map(|&length| length as u32 - 1).collect();
    let alone: Vec<u32> = (0..rows as u32).collect();
    let (states, partials) = (bed.put(&state), bed.put(&partial));
    let (positions, alone) = (bed.put(&position), bed.put(&alone));
    let attended = bed.fresh(rows * query_stride);
    let args = AttentionArgs {
        partial: partials.address(),
        state: states.address(),
        attended: attended.address(),
        position: positions.address(),
        alone: alone.address(),
        ..case.args(1)
    };
    let kernel = bed.gpu.kernel("attention", "attention_merge").unwrap();
    let grid = Grid { blocks: (heads as u32, rows as u32, 1), threads: (128, 1, 1), shared: 0 };
    bed.launch(&kernel, grid, &args)?;
    attended.check(bed, &case, |at| {
        let (row, at) = (at / query_stride, at % query_stride);
        let (head, i) = (at < heads * head_dim).then(|| (at / head_dim, at % head_dim))?;
        let first = (row * heads + head) * splits;
        let of_row = first..first + lengths[row].div_ceil(SPLIT);
        let top = of_row.clone().map(|at| f64::from(state[2 * at])).fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut total) = ([0.0; 2], [0.0; 2]);
        for at in of_row.clone() {
            let below = f64::from(state[2 * at]) - top;
            // As in `split`; a product and a sum for each split.
            let off = (2.0 * below.abs() + 4.0 + 2.0 * of_row.len() as f64) * ROUNDING;
            let (l, o) = (f64::from(state[2 * at + 1]), f64::from(partial[at * head_dim + i]));
            sum = [sum[0] + below.exp() * o, sum[1] + below.exp() * o.abs() * off];
            total = [total[0] + below.exp() * l, total[1] + below.exp() * l * off];
        }
        let value = sum[0] / total[0];
        let error = sum[1] / total[0] + value.abs() * (total[1] / total[0] + ROUNDING);
        Some(Near { value, error: 1.01 * error })
    })
}

/// The largest number that two of eleven bits hold, as in tf32.cuh: the next one is rounded to infinity.
const LARGEST_SPLIT: f32 = f32::from_bits(0x7f7f_efff);

/// One launch of `attention_wide_N`: the last rows of each sequence, in tiles. `spoilt` is a value at the last position of
/// the first sequence; where it can't be split, the rows that see it are NaN, and no others.
fn tiles(bed: &Bed, case: Case, spoilt: Option<f32>) -> Found {
    let Case { heads, kv_heads, head_dim, lengths, sharpness } = case;
    let rng = &mut Rng((heads * 31 + head_dim) as u64);
    let (mut cache, query_stride) = (Cache::new(case, rng), stride(heads * head_dim));
    if sharpness == 0.0 {
        // Equal weights of values of one sign: sums that only grow.
        cache.numbers.iter_mut().for_each(|number| *number = number.abs());
    }
    if let Some(spoilt) = spoilt {
        let at = cache.at(case, 0, lengths[0] - 1, kv_heads);
        cache.numbers[at + head_dim / 2] = spoilt;
    }
    let (mut of_row, mut tile_first, mut tile_rows) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, &length) in lengths.iter().enumerate() {
        let rows = length.min(75);
        for first in (0..rows).step_by(64) {
            tile_first.push((of_row.len() + first) as u32);
            tile_rows.push((rows - first).min(64) as u32);
        }
        of_row.extend((length - rows..length).map(|position| (sequence, position)));
    }
    let queries: Vec<f32> = rng.numbers(of_row.len() * query_stride).iter().map(|x| x * sharpness).collect();
    let list = |of: &dyn Fn(usize, usize) -> u32| of_row.iter().map(|&(s, p)| of(s, p)).collect::<Vec<u32>>();
    let lists = [
        list(&|_, position| position as u32),
        list(&|sequence, _| cache.table[sequence]),
        list(&|sequence, _| cache.model[sequence]),
        cache.tables.clone(),
        tile_first,
        tile_rows,
    ];
    let (on_device, queries_at) = (bed.put(&cache.numbers), bed.put(&queries));
    let attended = bed.fresh(of_row.len() * query_stride);
    let at = lists.each_ref().map(|list| bed.put(list));
    let args = AttentionArgs {
        queries: queries_at.address(),
        cache: on_device.address(),
        attended: attended.address(),
        position: at[0].address(),
        table: at[1].address(),
        model: at[2].address(),
        block_tables: at[3].address(),
        tile_first: at[4].address(),
        tile_rows: at[5].address(),
        model_stride: (cache.of_model * size_of::<f32>()) as u64,
        ..case.args(cache.table_stride)
    };
    let kernels = Kernels::new(&bed.gpu, DTYPES[0], heads / kv_heads, head_dim).unwrap();
    let blocks = (lists[4].len() as u32, heads as u32, head_dim.div_ceil(128) as u32);
    let shared = 2 * BLOCK_SIZE * (head_dim.next_multiple_of(32) + 4) * size_of::<f32>();
    let grid = Grid { blocks, threads: (128, 1, 1), shared: shared as u32 };
    bed.launch(kernels.attention_wide.as_ref().unwrap(), grid, &args)?;

    let row_and_head = |row: usize, head: usize| {
        let (sequence, position) = of_row[row];
        let query = &queries[row * query_stride + head * head_dim..][..head_dim];
        causal(case, &cache, query, (sequence, position, head))
    };
    let expected: Vec<Vec<Near>> =
        (0..of_row.len() * heads).map(|at| row_and_head(at / heads, at % heads)).collect();
    if spoilt.is_some_and(|spoilt| spoilt.is_nan() || spoilt.abs() > LARGEST_SPLIT) {
        for (at, &x) in attended.numbers(bed)?.iter().enumerate() {
            let (row, at) = (at / query_stride, at % query_stride);
            let (head, (sequence, position)) = ((at / head_dim).min(heads - 1), of_row[row]);
            let sees = cache.table[sequence] == cache.table[0] && position + 1 >= lengths[0];
            // Rows that see it may keep their other columns.
            let fits = match sees && head < heads / kv_heads {
                true => x.is_nan() || at % head_dim != head_dim / 2,
                false => expected[row * heads + head][at % head_dim].holds(x),
            };
            if at < heads * head_dim && !fits {
                return Err(format!("{case:?}: row {row}, {at}: {x}"));
            }
        }
        return Ok(());
    }
    attended.check(bed, &case, |at| {
        let (row, at) = (at / query_stride, at % query_stride);
        (at < heads * head_dim).then(|| expected[row * heads + at / head_dim][at % head_dim])
    })
}

/// What a head attends to from a position, by factors that lack their last bit and sums in f32.
fn causal(
    case: Case,
    cache: &Cache,
    query: &[f32],
    (sequence, position, head): (usize, usize, usize),
) -> Vec<Near> {
    let kv_head = head / (case.heads / case.kv_heads);
    let scale = 1.0 / (case.head_dim as f64).sqrt();
    let numbers =
        |p: usize, half: usize| &cache.numbers[cache.at(case, sequence, p, half)..][..case.head_dim];
    let scores: Vec<(f64, f64)> = (0..=position)
        .map(|p| {
            let products =
                query.iter().zip(numbers(p, kv_head)).map(|(q, k)| f64::from(*q) * f64::from(*k) * scale);
            products.fold((0.0, 0.0), |(score, size), product| (score + product, size + product.abs()))
        })
        .collect();
    let top = scores.iter().map(|score| score.0).fold(f64::NEG_INFINITY, f64::max);
    // Each factor lacks 2⁻²³, and the low parts' product, which is left out, is 2⁻²² at most; a sum of eight columns is cut
    // off once at its size, and two times below 2⁻¹⁰ of it; the sums of all columns; the scale and its product.
    let of_score = 2.0 * 2.0 + 4.0 + 2.0 + 1.0 + (case.head_dim as f64 / 8.0).ceil() + 2.0;
    let blocks = (position / BLOCK_SIZE + 1) as f64;
    // Blocks in which the top may grow: all that were summed is multiplied with an exponential.
    let (mut growing, mut highest) = (0.0, f64::NEG_INFINITY);
    for block in scores.chunks(BLOCK_SIZE) {
        let high = block
            .iter()
            .map(|(score, size)| score + 2.0 * of_score * ROUNDING * size)
            .fold(highest, f64::max);
        growing += f64::from(high > highest);
        let sure = block
            .iter()
            .map(|(score, size)| score - 2.0 * of_score * ROUNDING * size)
            .fold(highest, f64::max);
        highest = highest.max(sure);
    }
    let (mut l, mut l_error) = (0.0, 0.0);
    let mut o = vec![(0.0, 0.0); case.head_dim];
    for (p, (score, size)) in scores.iter().enumerate() {
        let weight = (score - top).exp();
        // The score; its distance from the top, rounded as often as the top grew; an exponential and a product wherever
        // it did, and a sum for each block from its own on; the weight and the value and their low parts' product, as for
        // a score; in its own block one sum that may be cut off, one that is rounded and two of small numbers, or six over
        // its positions and lanes.
        let sums = blocks - (p / BLOCK_SIZE) as f64;
        let off =
            of_score * size + (2.0 * (top - score) + 3.0 + 6.0 * growing + sums + 2.0 * 2.0 + 4.0 + 6.0);
        let error = weight * ((off * ROUNDING).exp() - 1.0);
        (l, l_error) = (l + weight, l_error + error);
        for (o, &v) in o.iter_mut().zip(numbers(p, case.kv_heads + kv_head)) {
            *o = (o.0 + weight * f64::from(v), o.1 + error * f64::from(v).abs());
        }
    }
    let near = |(value, error): (f64, f64)| {
        let value = value / l;
        Near { value, error: 1.01 * (error / l + value.abs() * (l_error / l + ROUNDING)) }
    };
    o.into_iter().map(near).collect()
}

/// Lengths around the borders of blocks of 16 and of splits of 64, in rows that differ.
const SHORT: &[usize] = &[1, 15, 16, 17, 2, 33, 9];
const LONG: &[usize] = &[63, 1, 65, 512, 64, 257, 100];
const LONGEST: &[usize] = &[1025, 768, 769, 17];

fn cases() -> Vec<Case> {
    let case = |heads, kv_heads, head_dim| Case { heads, kv_heads, head_dim, lengths: SHORT, sharpness: 1.0 };
    let shapes = [
        case(2, 2, 64),
        case(4, 2, 64),
        case(4, 1, 96),
        case(7, 1, 128),
        case(14, 2, 64),
        case(1, 1, 256),
        case(2, 1, 10),
        case(6, 2, 44),
        case(9, 1, 2),
    ];
    let mut all = Vec::new();
    for (index, case) in shapes.into_iter().enumerate() {
        for (turn, lengths) in [SHORT, LONG].into_iter().enumerate() {
            all.push(Case { lengths, sharpness: [1.0, 0.03][(index + turn) % 2], ..case });
        }
    }
    all.push(Case { lengths: LONGEST, sharpness: 0.1, ..case(7, 1, 64) });
    all.push(Case { lengths: &[1], ..case(3, 1, 64) });
    all
}

#[test]
fn splits_against_a_plain_softmax() {
    let bed = Bed::new();
    for case in cases() {
        attention(&bed, case).unwrap();
    }
    bed.assert_every(&["attention"], |name| name != "attention_merge");
}

#[test]
fn the_merge_against_a_plain_sum() {
    let bed = Bed::new();
    for case in cases() {
        merge(&bed, case).unwrap();
    }
}

#[test]
fn tiles_against_a_plain_softmax() {
    let bed = Bed::new();
    let case =
        |heads, kv_heads, head_dim, lengths| Case { heads, kv_heads, head_dim, lengths, sharpness: 0.1 };
    for case in [
        case(2, 1, 64, &[17, 75, 130]),
        case(2, 2, 8, &[33, 1, 200, 64]),
        case(3, 1, 96, &[20, 81]),
        case(1, 1, 136, &[76]),
        Case { sharpness: 1.0, ..case(2, 1, 128, &[50, 16]) },
        case(1, 1, 256, &[31]),
    ] {
        tiles(&bed, case, None).unwrap();
        let next = f32::from_bits(LARGEST_SPLIT.to_bits() + 1);
        for spoilt in [f32::NAN, f32::NEG_INFINITY, f32::MAX, -next, LARGEST_SPLIT] {
            tiles(&bed, case, Some(spoilt)).unwrap_or_else(|what| panic!("{spoilt:e}: {what}"));
        }
    }
    bed.assert_every(&["attention_wide"], |_| true);
}

/// Tensor cores may cut their sums off: over many blocks of one sign those would drift away, were they left to them.
#[test]
fn sums_of_values_do_not_drift_where_they_are_cut_off() {
    let case = Case { heads: 1, kv_heads: 1, head_dim: 16, lengths: &[10_000], sharpness: 0.0 };
    for mode in [Accumulate::Truncating, Accumulate::Sequential, Accumulate::Exact] {
        let bed = Bed::new();
        bed.device.accumulate(mode);
        tiles(&bed, case, None).unwrap();
    }
}

#[test]
fn a_wrong_number_is_noticed() {
    const CASE: Case =
        Case { heads: 4, kv_heads: 2, head_dim: 20, lengths: &[300, 30, 17, 270], sharpness: 0.1 };
    let numbers = [
        (96, "model_stride"),
        (104, "query_stride"),
        (108, "table_stride"),
        (112, "heads"),
        (116, "kv_heads"),
        (120, "head_dim"),
        (124, "splits"),
    ];
    for (at, name) in numbers {
        assert_noticed("attention_2", at, name, |bed| attention(bed, CASE));
    }
    for (at, name) in [(104, "query_stride"), (112, "heads"), (120, "head_dim"), (124, "splits")] {
        assert_noticed("attention_merge", at, name, |bed| merge(bed, CASE));
    }
    const TILES: Case = Case { heads: 4, kv_heads: 2, head_dim: 24, lengths: &[40, 70, 20], sharpness: 0.1 };
    let of_tiles = [(96, "model_stride"), (104, "query_stride"), (108, "table_stride"), (116, "kv_heads")];
    for (at, name) in of_tiles.into_iter().chain([(120, "head_dim")]) {
        assert_noticed("attention_wide_8", at, name, |bed| tiles(bed, TILES, None));
    }
}
