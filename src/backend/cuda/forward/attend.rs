//! Attention of one layer: row by row, or in tiles.

use super::{Group, Lists, u32_of};
use crate::backend::cuda::buffers::rows_of_a_part;
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::kernels::{AttentionArgs, WIDE_COLUMNS};
use crate::backend::cuda::weights::stride;
use crate::error::Result;
use crate::kv_cache::BLOCK_SIZE;

impl Group {
    /// attended = softmax(q kᵀ / √head_dim) v: rows that attend by themselves in parts, the others in tiles.
    pub(super) fn attend(&self, lists: Lists, cache: u64, splits: usize) -> Result<()> {
        let config = &self.config;
        let (heads, kv_heads, head_dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let mut args = AttentionArgs {
            queries: self.buffers.queries.address(),
            cache,
            partial: self.buffers.partial.address(),
            state: self.buffers.state.address(),
            attended: self.buffers.attended.address(),
            position: lists.position,
            table: lists.table,
            model: lists.model,
            block_tables: self.buffers.tables.address(),
            alone: lists.alone,
            tile_first: lists.tile_first,
            tile_rows: lists.tile_rows,
            model_stride: self.cache_stride.0 as u64,
            query_stride: u32_of(stride(heads * head_dim)),
            table_stride: u32_of(self.table_stride),
            heads: u32_of(heads),
            kv_heads: u32_of(kv_heads),
            head_dim: u32_of(head_dim),
            splits: u32_of(splits),
            lanes: u32_of(head_dim.div_ceil(8).next_power_of_two()),
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let tiles = self.plan.tile_first.len();
        if let (Some(kernel), true) = (&self.kernels.attention_wide, tiles > 0) {
            let blocks = (u32_of(tiles), u32_of(heads), u32_of(head_dim.div_ceil(WIDE_COLUMNS)));
            let shared = u32_of(2 * BLOCK_SIZE * (head_dim.next_multiple_of(32) + 4) * size_of::<f32>());
            let grid = Grid { blocks, threads: (128, 1, 1), shared };
            // SAFETY: rows were checked to have blocks up to their position; a tile has rows of one table.
            unsafe { self.gpu.launch(&self.stream, kernel, grid, &args) }?;
        }
        let rows_at_once = rows_of_a_part(heads, splits, head_dim);
        let (kernel, group) = (&self.kernels.attention.0, self.kernels.attention.1);
        let chunks = (heads / kv_heads.max(1)).div_ceil(group);
        let shared = kernel_shared(group, head_dim);
        let alone = self.plan.alone.len();
        for first in (0..alone).step_by(rows_at_once) {
            let rows = rows_at_once.min(alone - first);
            args.alone = lists.alone + (first * size_of::<u32>()) as u64;
            let blocks = (u32_of(kv_heads * chunks), u32_of(splits), u32_of(rows));
            let grid = Grid { blocks, threads: (128, 1, 1), shared: u32_of(shared) };
            // SAFETY: rows were checked to have blocks up to their position; partial and state hold `rows_at_once`
            // rows of `splits` splits (see `Buffers::new`).
            unsafe { self.gpu.launch(&self.stream, kernel, grid, &args) }?;
            let blocks = (u32_of(heads), u32_of(rows), 1);
            let grid = Grid { blocks, threads: (128, 1, 1), shared: 0 };
            // SAFETY: as above.
            unsafe { self.gpu.launch(&self.stream, &self.kernels.merge, grid, &args) }?;
        }
        Ok(())
    }
}

/// Shared memory of a block of attention, in bytes: four warps' states of `group` heads.
fn kernel_shared(group: usize, head_dim: usize) -> usize {
    4 * group * (head_dim + 2) * size_of::<f32>()
}
