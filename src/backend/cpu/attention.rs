//! Causal attention over paged keys and values, grouped queries together.
//!
//! Positions are taken in chunks of [`CHUNK`], always from the same starts: for each, the maximum m, the sum
//! s = Σ e^(score − m) and o = Σ e^(score − m) v; then chunks are merged in order. So a row's result depends on
//! neither the rows beside it nor on who computed which chunk.

use std::ops::Range;

use super::cache::KvCache;
use super::matrix::{Aligned, Matrix, Shared};
use super::pool::Pool;
use super::rowwise::rotate;
use super::simd::{Isa, Kernel, LANES, Simd, exp, padded};
use crate::config::LlamaConfig;
use crate::kv_cache::BLOCK_SIZE;

/// Positions in a chunk: whole blocks, and scores of some 24 queries fit an L1.
pub(crate) const CHUNK: usize = 256;

/// Queries of a tile that share the loads of keys and values.
const TILE_QUERIES: usize = 24;

/// Consecutive rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    /// The first row.
    pub(crate) row: usize,
    /// How many.
    pub(crate) rows: usize,
    /// The position of the first row.
    pub(crate) position: usize,
    /// Whose cache: an index into the caches.
    pub(crate) model: usize,
    /// Whose block table: an index into the tables.
    pub(crate) table: usize,
}

impl Tile {
    /// The most rows of a tile.
    pub(crate) fn most_rows(config: &LlamaConfig) -> usize {
        (TILE_QUERIES / group(config)).clamp(1, BLOCK_SIZE)
    }

    /// Chunks up to the last row's position.
    fn chunks(&self) -> usize {
        (self.position + self.rows).div_ceil(CHUNK)
    }
}

/// Query heads that share a key and value head.
fn group(config: &LlamaConfig) -> usize {
    config.num_attention_heads / config.num_key_value_heads
}

/// The attention of one layer.
pub(crate) struct Attention<'a> {
    /// The instruction set.
    pub(crate) isa: Isa,
    /// The shape of all models of the group.
    pub(crate) config: &'a LlamaConfig,
    /// The layer.
    pub(crate) layer: usize,
    /// `(rows, ≥ num_attention_heads · head_dim)`: queries, not rotated yet, first in each row.
    pub(crate) qkv: &'a Matrix,
    /// `(rows, head_dim / 2)` each.
    pub(crate) cos: &'a Matrix,
    /// As `cos`.
    pub(crate) sin: &'a Matrix,
    /// The rows.
    pub(crate) tiles: &'a [Tile],
    /// The block tables.
    pub(crate) tables: &'a [crate::kv_cache::BlockTable],
    /// The caches of all models.
    pub(crate) caches: &'a [KvCache],
    /// `(rows, num_attention_heads · head_dim)`.
    pub(crate) out: Shared<'a>,
    /// The distance between its rows.
    pub(crate) out_stride: usize,
}

/// What a thread needs for one tile.
pub(crate) struct AttentionScratch {
    /// Rotated and scaled: `(queries, head_dim)`.
    queries: Aligned,
    /// `(queries, CHUNK)`
    scores: Aligned,
    /// The state of a chunk.
    part: State,
    /// The merged state of all chunks so far.
    total: State,
}

/// (m, s, o) of some queries.
pub(crate) struct State {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `(queries, padded(head_dim))`
    out: Aligned,
}

impl State {
    /// For up to `queries` queries.
    fn new(queries: usize, head_dim: usize) -> Self {
        Self {
            max: vec![0.0; queries],
            sum: vec![0.0; queries],
            out: Aligned::zeros(queries * padded(head_dim)),
        }
    }

    /// The state before the first chunk.
    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }
}

impl AttentionScratch {
    /// For tiles of models of these shapes.
    pub(crate) fn new<'a>(configs: impl Iterator<Item = &'a LlamaConfig>) -> Self {
        let (queries, head_dim) = configs.fold((0, 0), |(queries, head_dim), config| {
            (queries.max(Tile::most_rows(config) * group(config)), head_dim.max(config.head_dim))
        });
        Self {
            queries: Aligned::zeros(queries * head_dim),
            scores: Aligned::zeros(queries * CHUNK),
            part: State::new(queries, head_dim),
            total: State::new(queries, head_dim),
        }
    }
}

/// Partial states of tiles whose chunks are spread over threads; grows to what was needed once.
#[derive(Default)]
pub(crate) struct Partials {
    data: Vec<f32>,
    /// The first state of each tile and head.
    starts: Vec<usize>,
}

impl Attention<'_> {
    /// Computes all tiles.
    pub(crate) fn run(
        &self,
        pool: &mut Pool,
        scratch: &[std::sync::Mutex<super::Scratch>],
        partials: &mut Partials,
    ) {
        let heads = self.config.num_key_value_heads;
        let items = self.tiles.len() * heads;
        let spread = items < 8 * pool.threads() && self.tiles.iter().any(|tile| tile.chunks() > 1);
        if spread && pool.threads() > 1 {
            return self.run_spread(pool, scratch, partials);
        }
        // Later tiles of a prompt see more positions, and come first: the shortest are left for whoever is done.
        pool.run(items, |thread, index| {
            let (tile, head) = (&self.tiles[self.tiles.len() - 1 - index / heads], index % heads);
            let scratch = &mut super::lock(&scratch[thread]).attention;
            scratch.total.clear();
            self.isa.run(Prepare { attention: self, tile, head, scratch });
            for chunk in 0..tile.chunks() {
                let queries = self.isa.run(Chunk { attention: self, tile, head, chunk, scratch });
                let AttentionScratch { part, total, .. } = scratch;
                for query in queries {
                    let d = query * self.width()..(query + 1) * self.width();
                    self.isa.run(Merge {
                        max: &mut total.max[query],
                        sum: &mut total.sum[query],
                        out: &mut total.out[d.clone()],
                        part: (part.max[query], part.sum[query], &part.out[d]),
                    });
                }
            }
            self.store(tile, head, &scratch.total);
        });
    }

    /// As [`run`](Self::run), for few tiles with many positions: chunks are tasks, and are merged afterwards.
    fn run_spread(
        &self,
        pool: &mut Pool,
        scratch: &[std::sync::Mutex<super::Scratch>],
        partials: &mut Partials,
    ) {
        let heads = self.config.num_key_value_heads;
        let queries = |tile: &Tile| tile.rows * group(self.config);
        // A state is o, m, s.
        let size = self.width() + LANES;
        partials.starts.clear();
        let mut needed = 0;
        let mut tasks = 0;
        for tile in self.tiles {
            partials.starts.push(needed);
            needed += heads * tile.chunks() * queries(tile) * size;
            tasks += heads * tile.chunks();
        }
        if partials.data.len() < needed {
            partials.data.resize(needed, 0.0);
        }
        let Partials { data, starts } = partials;
        let shared = Shared::new(data);
        pool.run(tasks, |thread, mut index| {
            for (tile, start) in self.tiles.iter().zip(&*starts) {
                let count = heads * tile.chunks();
                if index >= count {
                    index -= count;
                    continue;
                }
                let scratch = &mut super::lock(&scratch[thread]).attention;
                let (head, chunk) = (index / tile.chunks(), index % tile.chunks());
                self.isa.run(Prepare { attention: self, tile, head, scratch });
                let active = self.isa.run(Chunk { attention: self, tile, head, chunk, scratch });
                for query in active {
                    let at = start + (index * queries(tile) + query) * size;
                    // SAFETY: each state belongs to one task.
                    let state = unsafe { shared.part(at, size) };
                    let (out, rest) = state.split_at_mut(self.width());
                    out.copy_from_slice(&scratch.part.out[query * self.width()..(query + 1) * self.width()]);
                    rest[0] = scratch.part.max[query];
                    rest[1] = scratch.part.sum[query];
                }
                return;
            }
        });
        let data = &*data;
        pool.run(self.tiles.len() * heads, |thread, index| {
            let (tile, head) = (&self.tiles[index / heads], index % heads);
            let total = &mut super::lock(&scratch[thread]).attention.total;
            total.clear();
            for chunk in 0..tile.chunks() {
                for query in self.active(tile, chunk)..queries(tile) {
                    let item = head * tile.chunks() + chunk;
                    let at = starts[index / heads] + (item * queries(tile) + query) * size;
                    let (out, rest) = data[at..at + size].split_at(self.width());
                    self.isa.run(Merge {
                        max: &mut total.max[query],
                        sum: &mut total.sum[query],
                        out: &mut total.out[query * self.width()..(query + 1) * self.width()],
                        part: (rest[0], rest[1], out),
                    });
                }
            }
            self.store(tile, head, total);
        });
    }

    /// Floats of an output with its padding.
    fn width(&self) -> usize {
        padded(self.config.head_dim)
    }

    /// The first query of `tile` that sees positions of `chunk`.
    fn active(&self, tile: &Tile, chunk: usize) -> usize {
        (chunk * CHUNK).saturating_sub(tile.position) * group(self.config)
    }

    /// o / s of every query, into its place.
    fn store(&self, tile: &Tile, head: usize, total: &State) {
        let (group, head_dim) = (group(self.config), self.config.head_dim);
        for row in 0..tile.rows {
            let start = (tile.row + row) * self.out_stride + head * group * head_dim;
            // SAFETY: a task is one tile and head, and no other writes its rows and columns.
            let out = unsafe { self.out.part(start, group * head_dim) };
            for (i, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let query = row * group + i;
                let scale = 1.0 / total.sum[query];
                let from = &total.out[query * self.width()..query * self.width() + head_dim];
                out.iter_mut().zip(from).for_each(|(out, o)| *out = o * scale);
            }
        }
    }
}

/// Rotates the queries of a tile and one head and multiplies them with 1 / √head_dim.
struct Prepare<'a, 'b> {
    attention: &'a Attention<'b>,
    tile: &'a Tile,
    head: usize,
    scratch: &'a mut AttentionScratch,
}

impl Kernel for Prepare<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { attention, tile, head, scratch } = self;
        let (group, head_dim) = (group(attention.config), attention.config.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for row in 0..tile.rows {
            let (cos, sin) = (attention.cos.row(tile.row + row), attention.sin.row(tile.row + row));
            let from =
                &attention.qkv.row(tile.row + row)[head * group * head_dim..(head + 1) * group * head_dim];
            let to = &mut scratch.queries[row * group * head_dim..(row + 1) * group * head_dim];
            for (from, to) in from.chunks_exact(head_dim).zip(to.chunks_exact_mut(head_dim)) {
                rotate(from, cos, sin, scale, to);
            }
        }
    }
}

/// One chunk of positions for a tile and one key and value head. Returns the queries that see any of it; their
/// states are in `scratch.part`.
struct Chunk<'a, 'b> {
    attention: &'a Attention<'b>,
    tile: &'a Tile,
    head: usize,
    chunk: usize,
    scratch: &'a mut AttentionScratch,
}

impl Kernel for Chunk<'_, '_> {
    type Output = Range<usize>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Range<usize> {
        let Self { attention, tile, head, chunk, scratch } = self;
        let AttentionScratch { queries, scores, part, .. } = scratch;
        let (group, head_dim) = (group(attention.config), attention.config.head_dim);
        let cache = &attention.caches[tile.model];
        let table = &attention.tables[tile.table].blocks;
        let active = attention.active(tile, chunk)..tile.rows * group;
        let start = chunk * CHUNK;
        let end = (tile.position + tile.rows).min(start + CHUNK);
        // The positions below `end` that the row of `query` sees, from `from` on.
        let seen =
            |query: usize, from: usize| (tile.position + query / group + 1).min(end).saturating_sub(from);
        let first = |from: usize| from.saturating_sub(tile.position) * group;
        let blocks =
            || (start..end).step_by(BLOCK_SIZE).map(|from| (from, table[from / BLOCK_SIZE] as usize));

        for (from, block) in blocks() {
            let keys = &cache.data()[cache.layout().block(attention.layer, block, head).0];
            let mut query = first(from).max(active.start);
            while query < active.end {
                let q = &queries[query * head_dim..];
                let to = &mut scores[query * CHUNK + from - start..];
                // Twelve accumulators hide the latency of a multiplication.
                query += match active.end - query {
                    1 => score_block::<S, 1>(simd, q, keys, head_dim, to),
                    2 => score_block::<S, 2>(simd, q, keys, head_dim, to),
                    3..6 => score_block::<S, 3>(simd, q, keys, head_dim, to),
                    12.. if S::LANES == BLOCK_SIZE => score_block::<S, 12>(simd, q, keys, head_dim, to),
                    _ => score_block::<S, 6>(simd, q, keys, head_dim, to),
                };
            }
        }
        let width = padded(head_dim);
        for query in active.clone() {
            let row = &mut scores[query * CHUNK..(query + 1) * CHUNK];
            (part.max[query], part.sum[query]) = exponentials(simd, row, seen(query, start));
        }
        part.out[active.start * width..active.end * width].fill(0.0);
        for (from, block) in blocks() {
            let values = &cache.data()[cache.layout().block(attention.layer, block, head).1];
            let mut query = first(from).max(active.start);
            while query < active.end {
                let (count, left) = (seen(query, from).min(BLOCK_SIZE), active.end - query);
                let p = &scores[query * CHUNK + from - start..];
                let o = &mut part.out[query * width..];
                // Rows see different parts of the last blocks only: there, one query at a time.
                query += match (count, left) {
                    (BLOCK_SIZE, 3..) => add_values::<S, 3>(simd, p, values, width, count, o),
                    (BLOCK_SIZE, 2) => add_values::<S, 2>(simd, p, values, width, count, o),
                    _ => add_values::<S, 1>(simd, p, values, width, count, o),
                };
            }
        }
        active
    }
}

/// scores\[q\]\[0..16\] = Σ_d queries\[q\]\[d\] · keys\[d\]\[0..16\] for `N` queries; returns `N`.
#[inline(always)]
fn score_block<S: Simd, const N: usize>(
    simd: S,
    queries: &[f32],
    keys: &[f32],
    head_dim: usize,
    scores: &mut [f32],
) -> usize {
    assert!(queries.len() >= N * head_dim && keys.len() >= head_dim * BLOCK_SIZE);
    assert!(scores.len() >= (N - 1) * CHUNK + BLOCK_SIZE);
    // Of one register a block, the second half of this stays unused.
    let registers = BLOCK_SIZE / S::LANES;
    let mut acc = [[simd.zero(); 2]; N];
    for d in 0..head_dim {
        let mut k = [simd.zero(); 2];
        for (j, k) in k[..registers].iter_mut().enumerate() {
            // SAFETY: asserted above.
            *k = unsafe { simd.load_at(keys.as_ptr().add(d * BLOCK_SIZE + j * S::LANES)) };
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: asserted above.
            let q = simd.splat(unsafe { *queries.get_unchecked(i * head_dim + d) });
            for (acc, &k) in acc[..registers].iter_mut().zip(&k) {
                *acc = simd.fma(q, k, *acc);
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        for (j, &acc) in acc[..registers].iter().enumerate() {
            // SAFETY: asserted above.
            unsafe { simd.store_at(scores.as_mut_ptr().add(i * CHUNK + j * S::LANES), acc) };
        }
    }
    N
}

/// Turns the first `seen` scores of a chunk into e^(score − m); returns m and their sum.
#[inline(always)]
fn exponentials<S: Simd>(simd: S, scores: &mut [f32], seen: usize) -> (f32, f32) {
    let (scores, _) = scores.split_at_mut(padded(seen));
    scores[seen..].fill(f32::NEG_INFINITY);
    let scores = S::parts_mut(scores.as_chunks_mut().0);
    let mut max = simd.splat(f32::NEG_INFINITY);
    for x in &*scores {
        max = simd.max(max, simd.load(x));
    }
    let max = simd.largest(max);
    let (shift, mut sum) = (simd.splat(max), simd.zero());
    for x in scores {
        let p = exp(simd, simd.sub(simd.load(x), shift));
        sum = simd.add(sum, p);
        simd.store(x, p);
    }
    (max, simd.sum(sum))
}

/// out\[q\] += Σ_j p\[q\]\[j\] · values\[j\] over the first `count` positions of a block, for `N` queries; returns
/// `N`.
#[inline(always)]
fn add_values<S: Simd, const N: usize>(
    simd: S,
    p: &[f32],
    values: &[f32],
    width: usize,
    count: usize,
    out: &mut [f32],
) -> usize {
    assert!(p.len() >= (N - 1) * CHUNK + count && out.len() >= N * width);
    assert!(count <= BLOCK_SIZE && values.len() >= BLOCK_SIZE * width);
    let mut d = 0;
    while d < width {
        d += if width - d >= 4 * S::LANES {
            add_columns::<S, N, 4>(simd, p, values, width, count, out, d)
        } else {
            add_columns::<S, N, 1>(simd, p, values, width, count, out, d)
        };
    }
    N
}

/// `D` registers of [`add_values`], from column `d` on; returns how many columns that is.
#[inline(always)]
fn add_columns<S: Simd, const N: usize, const D: usize>(
    simd: S,
    p: &[f32],
    values: &[f32],
    width: usize,
    count: usize,
    out: &mut [f32],
    d: usize,
) -> usize {
    let mut acc = [[simd.zero(); D]; N];
    for (i, acc) in acc.iter_mut().enumerate() {
        for (j, acc) in acc.iter_mut().enumerate() {
            // SAFETY: `add_values` asserted the lengths, and d + D registers is at most `width`.
            *acc = unsafe { simd.load_at(out.as_ptr().add(i * width + d + j * S::LANES)) };
        }
    }
    for position in 0..count {
        // Three weights and one register of values beside twelve accumulators fill sixteen registers.
        let mut weights = [simd.zero(); N];
        for (i, weight) in weights.iter_mut().enumerate() {
            // SAFETY: as above.
            *weight = simd.splat(unsafe { *p.get_unchecked(i * CHUNK + position) });
        }
        for j in 0..D {
            // SAFETY: as above.
            let v = unsafe { simd.load_at(values.as_ptr().add(position * width + d + j * S::LANES)) };
            for (acc, &weight) in acc.iter_mut().zip(&weights) {
                acc[j] = simd.fma(weight, v, acc[j]);
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        for (j, &acc) in acc.iter().enumerate() {
            // SAFETY: as above.
            unsafe { simd.store_at(out.as_mut_ptr().add(i * width + d + j * S::LANES), acc) };
        }
    }
    D * S::LANES
}

/// Adds the state of one chunk to that of those before it: both are rescaled to the larger maximum.
struct Merge<'a> {
    max: &'a mut f32,
    sum: &'a mut f32,
    /// Whole vectors.
    out: &'a mut [f32],
    /// (m, s, o) of the chunk.
    part: (f32, f32, &'a [f32]),
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (part_max, part_sum, part_out) = self.part;
        let max = if *self.max > part_max { *self.max } else { part_max };
        let (old, new) = (exp(simd, simd.splat(*self.max - max)), exp(simd, simd.splat(part_max - max)));
        *self.max = max;
        *self.sum = simd.lanes(old)[0] * *self.sum + simd.lanes(new)[0] * part_sum;
        let (out, part) = (S::parts_mut(self.out.as_chunks_mut().0), S::parts(part_out.as_chunks().0));
        for (out, part) in out.iter_mut().zip(part) {
            let scaled = simd.mul(old, simd.load(out));
            simd.store(out, simd.fma(new, simd.load(part), scaled));
        }
    }
}
