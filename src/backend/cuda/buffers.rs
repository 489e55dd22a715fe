//! The memory of a group beside its weights: how much, and where it lies.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::device::Gpu;
use super::kernels::{MOST_RANGE_SUMS, MOST_ROWS, MOST_TICKETS, RANGE_COLUMNS, SPLIT, split_words};
use super::lora::rank_of;
use super::memory::Buffer;
use super::plan::{LISTS, MAX_GROUP, Members};
use super::weights::stride;
use crate::backend::Limits;
use crate::config::LlamaConfig;
use crate::ensemble::Ensemble;
use crate::error::Result;
use crate::kv_cache::BLOCK_SIZE;
use crate::weights::Dtype;

/// The most rows that run together: longer batches run in turns, so that activations need little memory.
const MOST_ROWS_OF_A_TURN: usize = 512;

/// Partial results of attention, in bytes: rows take turns where they would need more.
const PARTIAL_BYTES: usize = 64 << 20;

/// `(rows, …)` each, where nothing else is said.
pub(crate) struct Buffers {
    /// The residual stream: hidden_size.
    pub(crate) hidden: Buffer<f32>,
    /// Rotated queries: heads · head_dim.
    pub(crate) queries: Buffer<f32>,
    /// What attention computed: heads · head_dim.
    pub(crate) attended: Buffer<f32>,
    /// silu(gate) · up: intermediate_size.
    pub(crate) activated: Buffer<f32>,
    /// A x of up to three projections.
    pub(crate) low_rank: Buffer<f32>,
    /// The widest input of a projection as tensor cores take it: see `split_rows` in gemm_projections.cuh.
    pub(crate) split: Buffer<f32>,
    /// The sums of ranges of columns, where several blocks of tensor cores share a tile; no matter how many rows.
    pub(crate) range_sums: Buffer<f32>,
    /// One for each tile; zero between launches.
    pub(crate) tickets: Buffer<u32>,
    /// `(rows of a part, heads, splits, head_dim)`
    pub(crate) partial: Buffer<f32>,
    /// `(rows of a part, heads, splits, 2)`
    pub(crate) state: Buffer<f32>,
    /// Twelve lists of [`Group::room`] numbers: see [`Lists`].
    pub(crate) lists: Buffer<u32>,
    /// `(tables, table_stride)`
    pub(crate) tables: Buffer<u32>,
}

/// How much a group can hold.
pub(crate) struct Extent {
    /// Positions of a sequence.
    pub(crate) positions: usize,
    /// Rows of a turn.
    pub(crate) capacity: usize,
    /// Blocks of a table.
    pub(crate) table_stride: usize,
    /// Of the cache of one layer of one model.
    pub(crate) layer_bytes: usize,
}

impl Extent {
    pub(crate) fn of(ensemble: &Ensemble, members: &Members, limits: Limits) -> Self {
        let models = &members.models;
        let block = |model: usize| {
            let config = &ensemble.models()[model].config;
            2 * config.num_key_value_heads * BLOCK_SIZE * config.head_dim * size_of::<f32>()
        };
        let context = models.iter().map(|&model| ensemble.context(model)).max().unwrap_or(1);
        let positions = (limits.blocks * BLOCK_SIZE).min(context.next_multiple_of(BLOCK_SIZE)).max(1);
        Self {
            positions,
            capacity: MOST_ROWS_OF_A_TURN.min(limits.rows.saturating_mul(models.len())).max(1),
            table_stride: positions / BLOCK_SIZE + 1,
            layer_bytes: (limits.blocks * models.first().map_or(0, |&first| block(first)))
                .next_multiple_of(256),
        }
    }
}

/// The configs of the sets of a group that rotate by tables of their own: one where all rotate alike.
pub(crate) fn rotations<'a>(ensemble: &'a Ensemble, members: &Members) -> Vec<&'a LlamaConfig> {
    let mut configs: Vec<&LlamaConfig> =
        members.owners.iter().map(|&owner| &*ensemble.models()[owner].config).collect();
    if configs.iter().all(|config| config.rope == configs[0].rope) {
        configs.truncate(1);
    }
    configs
}

/// Bytes of the cache, and of the activations with the tables of angles, of a group.
pub(crate) fn memory_of(
    ensemble: &Ensemble,
    members: &Members,
    limits: Limits,
    dtype: Dtype,
) -> (usize, usize) {
    let Some(&first) = members.models.first() else { return (0, 0) };
    let config = &ensemble.models()[first].config;
    let extent = Extent::of(ensemble, members, limits);
    let adapters = members.models.iter().filter_map(|&model| ensemble.models()[model].adapter.as_deref());
    let rank = rank_of(adapters);
    let sizes = Sizes::new(config, dtype, (extent.capacity, extent.positions, extent.table_stride, rank));
    let angles = rotations(ensemble, members).len() * extent.positions * config.head_dim;
    let cache = extent.layer_bytes * config.num_hidden_layers * members.models.len();
    (cache, (sizes.total() + angles) * size_of::<f32>())
}

/// Numbers of each of [`Buffers`], in its order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    hidden: usize,
    queries: usize,
    attended: usize,
    activated: usize,
    low_rank: usize,
    split: usize,
    range_sums: usize,
    tickets: usize,
    partial: usize,
    state: usize,
    lists: usize,
    tables: usize,
}

impl Sizes {
    pub(crate) fn new(
        config: &LlamaConfig,
        dtype: Dtype,
        (rows, positions, table_stride, rank): (usize, usize, usize, usize),
    ) -> Self {
        let (heads, head_dim) = (config.num_attention_heads, config.head_dim);
        let splits = positions.div_ceil(SPLIT);
        // Fewer splits in a launch leave room for more rows, but never for more numbers than this.
        let parts = rows.min(rows_of_a_part(heads, splits, head_dim)) * heads * splits;
        let parts = parts.max(rows.min(rows_of_a_part(heads, 1, head_dim)) * heads);
        let most = (PARTIAL_BYTES / (head_dim * size_of::<f32>())).max(parts).min(rows * heads * splits);
        let widest = config.hidden_size.max(heads * head_dim).max(config.intermediate_size);
        let (is_wide, is_shared) = (rows > MOST_ROWS, rows > MOST_ROWS && widest >= 2 * RANGE_COLUMNS);
        Self {
            hidden: rows * stride(config.hidden_size),
            queries: rows * stride(heads * head_dim),
            attended: rows * stride(heads * head_dim),
            activated: rows * stride(config.intermediate_size),
            low_rank: rows * 3 * rank,
            split: if is_wide { rows * split_words(dtype, stride(widest)) } else { 0 },
            range_sums: if is_shared { MOST_RANGE_SUMS } else { 0 },
            tickets: if is_shared { MOST_TICKETS } else { 0 },
            partial: most * head_dim,
            state: most * 2,
            lists: LISTS * rows.max(MAX_GROUP + 1),
            tables: rows * table_stride,
        }
    }

    fn total(self) -> usize {
        let Self {
            hidden,
            queries,
            attended,
            activated,
            low_rank,
            split,
            range_sums,
            tickets,
            partial,
            state,
            lists,
            tables,
        } = self;
        let of_projections =
            hidden + queries + attended + activated + low_rank + split + range_sums + tickets;
        of_projections + partial + state + lists + tables
    }
}

impl Buffers {
    pub(crate) fn new(gpu: &Gpu, stream: &Arc<CudaStream>, sizes: Sizes) -> Result<Self> {
        let f32s = |numbers: usize| gpu.zeros::<f32>(stream, numbers, "activations");
        Ok(Self {
            hidden: f32s(sizes.hidden)?,
            queries: f32s(sizes.queries)?,
            attended: f32s(sizes.attended)?,
            activated: f32s(sizes.activated)?,
            low_rank: f32s(sizes.low_rank)?,
            split: f32s(sizes.split)?,
            range_sums: f32s(sizes.range_sums)?,
            tickets: gpu.zeros(stream, sizes.tickets, "activations")?,
            partial: f32s(sizes.partial)?,
            state: f32s(sizes.state)?,
            lists: gpu.zeros(stream, sizes.lists, "activations")?,
            tables: gpu.zeros(stream, sizes.tables, "block tables")?,
        })
    }
}

/// Rows whose partial results of `splits` splits fit [`PARTIAL_BYTES`]; at least one.
pub(crate) fn rows_of_a_part(heads: usize, splits: usize, head_dim: usize) -> usize {
    (PARTIAL_BYTES / (heads * splits * head_dim * size_of::<f32>()).max(1)).max(1)
}
