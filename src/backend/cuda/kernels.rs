//! The kernels of a group's forward pass, and what each takes: mirrors of the structs in kernels/, field by field.

use cudarc::driver::DeviceRepr;

use super::device::{Gpu, Grid, Kernel};
use crate::config::LlamaConfig;
use crate::error::Result;
use crate::weights::Dtype;

/// Rows that one launch of a projection can compute for a set: the kernels' M.
const ROWS: [usize; 4] = [1, 4, 8, 16];

/// The most of them.
pub(crate) const MOST_ROWS: usize = 16;

/// Rows of a block on tensor cores.
pub(crate) const WIDE_ROWS: usize = 64;
/// Its units of four outputs.
pub(crate) const WIDE_UNITS: usize = 32;

/// Blocks that a launch on tensor cores is to have, where ranges of columns can make so many of its tiles: about one for each
/// multiprocessor of an A100 (108), an RTX 4090 (128) or an H100 (132), and the same on all of them, so that sums are, too.
const WIDE_BLOCKS: usize = 128;
/// Columns of a range, about, at least: the sums of 64 rows are then a quarter of its weights' bytes in 16 bits.
pub(crate) const RANGE_COLUMNS: usize = 512;
/// Tiles of a launch that has several ranges, at most.
pub(crate) const MOST_TICKETS: usize = WIDE_BLOCKS / 2;
/// Sums of all ranges of all its tiles, at most.
pub(crate) const MOST_RANGE_SUMS: usize = WIDE_BLOCKS * WIDE_ROWS * WIDE_UNITS * OUTPUTS;

/// Query heads of one key head that one block of attention computes: the kernels' G.
const HEADS: [usize; 4] = [1, 2, 4, 8];

/// Positions of a split of attention.
pub(crate) const SPLIT: usize = 64;

/// Columns of the values that a block of attention on tensor cores computes.
pub(crate) const WIDE_COLUMNS: usize = 128;

/// Warps of a block of a projection, and outputs of each.
pub(crate) const WARPS: usize = 8;
/// Warps of a block of `split_rows`.
pub(crate) const SPLIT_WARPS: u32 = 4;
/// Outputs of a warp.
pub(crate) const OUTPUTS: usize = 4;
/// The largest head: a position is shared by the lanes of a warp, eight numbers each.
const MOST_HEAD_DIM: usize = 256;
/// Outputs of a matrix at most: a grid has 65,535 blocks along y.
const MOST_OUTPUTS: usize = 65_535 * WIDE_UNITS * OUTPUTS;
/// Columns that a warp reads at once.
pub(crate) const PANEL: usize = 256;
/// Numbers of a staged panel.
const STAGED: usize = 272;
/// Shared memory that every kernel may have, in numbers.
const SHARED: usize = (48 << 10) / size_of::<f32>();

/// `EmbedArgs` in embed.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct EmbedArgs {
    pub(crate) hidden: u64,
    pub(crate) table: u64,
    pub(crate) token: u64,
    pub(crate) set_first: u64,
    pub(crate) set_stride: u64,
    pub(crate) stride: u32,
    pub(crate) counters: u32,
    pub(crate) progress: u64,
}

/// `Product` in product.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Product {
    pub(crate) x: u64,
    pub(crate) weights: u64,
    pub(crate) bias: u64,
    pub(crate) norm: u64,
    pub(crate) set_first: u64,
    pub(crate) rows: u64,
    pub(crate) lora_b: u64,
    pub(crate) lora_t: u64,
    pub(crate) adapter: u64,
    pub(crate) set_stride: u64,
    pub(crate) lora_stride: u64,
    pub(crate) n: u32,
    pub(crate) cols: u32,
    pub(crate) stride: u32,
    pub(crate) chunk: u32,
    pub(crate) rank: u32,
    pub(crate) segments: u32,
    pub(crate) producers: u32,
    pub(crate) ranges: u32,
    pub(crate) lora_a: u64,
    pub(crate) progress: u64,
    pub(crate) range_sums: u64,
}

impl Product {
    /// Numbers of A x of a row.
    pub(crate) fn low_rank(&self) -> u32 {
        self.segments * self.rank
    }

    /// The blocks of a set that compute A x of up to `rows` rows: a warp for each number, but no more blocks than the
    /// GPU has multiprocessors, so that the others begin beside them.
    pub(crate) fn producers_for(&self, rows: usize, multiprocessors: usize) -> u32 {
        let blocks = (rows * self.low_rank() as usize).div_ceil(WARPS);
        blocks.min(multiprocessors) as u32
    }
}

/// How a projection on tensor cores is cut into blocks: follows from its shape alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    /// Blocks of rows, of units, and sets: a tile each.
    tiles: (usize, usize, usize),
    /// Of the columns, a block of each tile each.
    pub(crate) ranges: usize,
}

impl Tiling {
    /// For `units` units over `cols` columns, and up to `rows` rows of a set, at least one of each.
    pub(crate) fn new(rows: usize, units: usize, cols: usize, sets: usize) -> Self {
        let tiles = (rows.div_ceil(WIDE_ROWS), units.div_ceil(WIDE_UNITS), sets);
        let ranges = (WIDE_BLOCKS / (tiles.0 * tiles.1 * tiles.2).max(1)).min(cols / RANGE_COLUMNS).max(1);
        Self { tiles, ranges }
    }

    pub(crate) fn grid(self) -> Grid {
        let (rows, units, sets) = self.tiles;
        let blocks = ((rows * self.ranges) as u32, units as u32, sets as u32);
        Grid { blocks, threads: (256, 1, 1), shared: 0 }
    }
}

/// `QkvArgs` in projections.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct QkvArgs {
    pub(crate) product: Product,
    pub(crate) queries: u64,
    pub(crate) cache: u64,
    pub(crate) cos: u64,
    pub(crate) sin: u64,
    pub(crate) position: u64,
    pub(crate) table: u64,
    pub(crate) model: u64,
    pub(crate) block_tables: u64,
    pub(crate) model_stride: u64,
    pub(crate) angle_stride: u64,
    pub(crate) query_stride: u32,
    pub(crate) table_stride: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
}

/// `ResidualArgs` and `GateUpArgs` in projections.cuh: a product and where it goes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct IntoArgs {
    pub(crate) product: Product,
    pub(crate) to: u64,
    pub(crate) to_stride: u32,
}

/// `LmHeadArgs` in projections.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct LmHeadArgs {
    pub(crate) product: Product,
    pub(crate) logits: u64,
    pub(crate) slot: u64,
    pub(crate) vocab_stride: u32,
}

/// `SplitArgs` in gemm_projections.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SplitArgs {
    pub(crate) product: Product,
    pub(crate) to: u64,
}

/// `AttentionArgs` in attention.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct AttentionArgs {
    pub(crate) queries: u64,
    pub(crate) cache: u64,
    pub(crate) partial: u64,
    pub(crate) state: u64,
    pub(crate) attended: u64,
    pub(crate) position: u64,
    pub(crate) table: u64,
    pub(crate) model: u64,
    pub(crate) block_tables: u64,
    pub(crate) alone: u64,
    pub(crate) tile_first: u64,
    pub(crate) tile_rows: u64,
    pub(crate) model_stride: u64,
    pub(crate) query_stride: u32,
    pub(crate) table_stride: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) splits: u32,
    pub(crate) lanes: u32,
    pub(crate) scale: f32,
}

/// `StepGroup` in step.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct StepRows {
    pub(crate) token: u64,
    pub(crate) position: u64,
    pub(crate) wanted_slot: u64,
    pub(crate) rows: u64,
}

/// `AdvanceArgs` in step.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct AdvanceArgs {
    pub(crate) large: StepRows,
    pub(crate) small: StepRows,
    pub(crate) results: u64,
    pub(crate) fused: u64,
    pub(crate) samples: u64,
    pub(crate) stamps: u64,
    pub(crate) slots: u32,
    pub(crate) fused_rows: u32,
    pub(crate) vocab_size: u32,
}

/// `StampArgs` in step.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct StampArgs {
    pub(crate) to: u64,
}

// SAFETY: plain numbers in the layout of C, which is that of the kernels' structs.
unsafe impl DeviceRepr for EmbedArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for QkvArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for IntoArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for LmHeadArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for SplitArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for AttentionArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for AdvanceArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for StampArgs {}

/// One projection: for each number of rows, and for more on tensor cores.
pub(crate) struct Projections {
    few: [Kernel; 4],
    wide: Kernel,
}

impl Projections {
    fn new(gpu: &Gpu, name: &str, dtype: Dtype) -> Result<Self> {
        let module = match dtype {
            Dtype::F32 => "gemv_f32",
            Dtype::F16 => "gemv_f16",
            Dtype::Bf16 => "gemv_bf16",
        };
        let [a, b, c, d] = ROWS.map(|rows| gpu.kernel(module, &format!("{name}_{dtype}_{rows}")));
        let wide = gpu.kernel(wide_module(dtype), &format!("{name}_wide_{dtype}"))?;
        Ok(Self { few: [a?, b?, c?, d?], wide })
    }

    /// The kernel for `rows` rows, at most [`MOST_ROWS`], and its M.
    pub(crate) fn few(&self, rows: usize) -> (&Kernel, usize) {
        let index = ROWS.iter().position(|&most| rows <= most).unwrap_or(ROWS.len() - 1);
        (&self.few[index], ROWS[index])
    }

    /// The kernel on tensor cores, where `rows` are so many that it is used.
    pub(crate) fn wide(&self, rows: usize) -> Option<&Kernel> {
        (rows > MOST_ROWS).then_some(&self.wide)
    }
}

/// What of a model the kernels have no room for.
pub(crate) fn excess(config: &LlamaConfig) -> Option<String> {
    let LlamaConfig { head_dim, hidden_size, intermediate_size, vocab_size, .. } = *config;
    let qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim;
    let outputs = qkv.max(2 * intermediate_size).max(hidden_size).max(vocab_size);
    if head_dim > MOST_HEAD_DIM {
        return Some(format!("expected a head_dim of at most {MOST_HEAD_DIM}, found {head_dim}"));
    }
    (outputs > MOST_OUTPUTS)
        .then(|| format!("expected a projection to at most {MOST_OUTPUTS} numbers, found {outputs}"))
}

/// The image of the products on tensor cores.
fn wide_module(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "gemm_f32",
        Dtype::F16 => "gemm_f16",
        Dtype::Bf16 => "gemm_bf16",
    }
}

/// Words of 32 bits of a row as tensor cores take it, see `split_rows` in gemm_projections.cuh: two numbers of the
/// weights' type for each column, and sixteen bytes.
pub(crate) fn split_words(dtype: Dtype, stride: usize) -> usize {
    2 * stride * dtype.size() / size_of::<u32>() + 4
}

/// Panels that fit shared memory at once for M rows of `stride` columns, and the shared memory of that, in bytes.
pub(crate) fn staging(rows: usize, stride: usize) -> (usize, usize) {
    let panels = stride.div_ceil(PANEL);
    let fixed = rows * panels + WARPS * OUTPUTS * rows + 1;
    let fits = (SHARED.saturating_sub(fixed) / (rows * STAGED)).clamp(1, panels.max(1));
    // Panels of few rows come in pairs.
    let chunk = if rows <= 4 && fits < panels { fits - fits % 2 } else { fits };
    (chunk, (rows * chunk * STAGED + fixed) * size_of::<f32>())
}

/// All kernels of a forward pass for weights of one dtype.
pub(crate) struct Kernels {
    pub(crate) embed: Kernel,
    pub(crate) qkv: Projections,
    pub(crate) residual: Projections,
    pub(crate) gate_up: Projections,
    pub(crate) lm_head: Projections,
    /// Prepares rows for tensor cores.
    pub(crate) split_rows: Kernel,
    /// With the query heads of a block.
    pub(crate) attention: (Kernel, usize),
    pub(crate) merge: Kernel,
    /// For tiles of rows, where the size of a head allows it.
    pub(crate) attention_wide: Option<Kernel>,
}

impl Kernels {
    /// For `group` query heads of `head_dim` numbers a key head.
    pub(crate) fn new(gpu: &Gpu, dtype: Dtype, group: usize, head_dim: usize) -> Result<Self> {
        let heads = HEADS.into_iter().find(|&heads| group <= heads).unwrap_or(HEADS[HEADS.len() - 1]);
        Ok(Self {
            embed: gpu.kernel("embed", &format!("embed_{dtype}"))?,
            qkv: Projections::new(gpu, "qkv", dtype)?,
            residual: Projections::new(gpu, "residual", dtype)?,
            gate_up: Projections::new(gpu, "gate_up", dtype)?,
            lm_head: Projections::new(gpu, "lm_head", dtype)?,
            split_rows: gpu.kernel(wide_module(dtype), &format!("split_rows_{dtype}"))?,
            attention: (gpu.kernel("attention", &format!("attention_{heads}"))?, heads),
            merge: gpu.kernel("attention", "attention_merge")?,
            attention_wide: head_dim
                .is_multiple_of(8)
                .then_some(if head_dim <= 64 { "attention_wide_8" } else { "attention_wide_16" })
                .map(|name| gpu.kernel("attention_wide", name))
                .transpose()?,
        })
    }

    /// What nearly every generation needs: a step of `rows` rows of a set, and a prompt where a turn can have `capacity`
    /// rows.
    pub(crate) fn first(&self, rows: usize, capacity: usize) -> Vec<&Kernel> {
        let Self { embed, qkv, residual, gate_up, lm_head, split_rows, attention, merge, .. } = self;
        let step = [qkv, residual, gate_up, lm_head].map(|projections| projections.few(rows).0);
        let mut first = vec![embed, &attention.0, merge];
        first.extend(step);
        if capacity > MOST_ROWS {
            first.extend([&qkv.wide, &residual.wide, &gate_up.wide, split_rows]);
            first.extend(&self.attention_wide);
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_have_no_room_for_is_named() {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 256, "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
            "rope_theta": 10000.0,
        });
        let config = LlamaConfig::from_json("config.json".as_ref(), &json.to_string(), None).unwrap();
        let excess_of = |change: &dyn Fn(&mut LlamaConfig)| {
            let mut changed = config.clone();
            change(&mut changed);
            excess(&changed)
        };
        let message = "expected a head_dim of at most 256, found 258";
        assert_eq!(excess_of(&|config| config.head_dim = 258).as_deref(), Some(message));
        // As many whole heads as there is room for, and one more.
        for n in [8_388_352, 8_388_608] {
            let message = (n > 8_388_480)
                .then(|| format!("expected a projection to at most 8388480 numbers, found {n}"));
            assert_eq!(excess_of(&|config| config.hidden_size = n), message);
            assert_eq!(excess_of(&|config| config.vocab_size = n), message);
            assert_eq!(excess_of(&|config| config.intermediate_size = n / 2), message);
            assert_eq!(excess_of(&|config| config.num_attention_heads = n / 256 - 2), message);
        }
        assert_eq!(excess_of(&|config| config.vocab_size = 8_388_480), None);
        assert!(excess_of(&|config| config.vocab_size = 8_388_481).is_some());
    }

    #[test]
    fn few_tiles_share_their_columns_and_many_do_not() {
        // Rows, outputs, columns, sets; blocks and ranges.
        let cases = [
            // Llama-2-13B: qkv, the output of attention and of the feed-forward, gate and up.
            ((64, 15_360, 5120, 1), (120, 1)),
            ((64, 5120, 5120, 1), (120, 3)),
            ((17, 5120, 13_824, 1), (120, 3)),
            ((64, 27_648, 5120, 1), (216, 1)),
            ((65, 5120, 13_824, 1), (80, 1)),
            // TinyLlama-1.1B, alone and with two experts.
            ((64, 2560, 2048, 1), (80, 4)),
            ((64, 2048, 2048, 1), (64, 4)),
            ((64, 2048, 5632, 1), (128, 8)),
            ((64, 11_264, 2048, 1), (88, 1)),
            ((65, 2048, 5632, 1), (128, 4)),
            ((32, 2048, 5632, 3), (96, 2)),
            // Columns that aren't worth it.
            ((17, 2, 1023, 1), (1, 1)),
        ];
        for ((rows, outputs, cols, sets), expected) in cases {
            let tiling = Tiling::new(rows, usize::div_ceil(outputs, OUTPUTS), cols, sets);
            let (x, y, z) = tiling.grid().blocks;
            assert_eq!((x * y * z, tiling.ranges), expected, "{rows} {outputs} {cols} {sets}");
        }
        for (tiles, cols) in (1..200).flat_map(|tiles| [1, 512, 1024, 5000, 70_000].map(|cols| (tiles, cols)))
        {
            let tiling = Tiling::new(1, tiles * WIDE_UNITS, cols, 1);
            let blocks = tiles * tiling.ranges;
            assert!(tiling.ranges == 1 || (blocks <= WIDE_BLOCKS && tiles <= MOST_TICKETS), "{tiles} {cols}");
        }
    }

    #[test]
    fn staging_never_asks_for_more_shared_memory_than_every_kernel_may_have() {
        for rows in ROWS {
            for stride in [8, 256, 264, 4096, 11_008, 13_824, 28_672, 53_248] {
                let (chunk, bytes) = staging(rows, stride);
                assert!((1..=stride.div_ceil(PANEL)).contains(&chunk), "{rows} {stride}: {chunk}");
                assert!(bytes <= 48 << 10, "{rows} rows of {stride}: {bytes} bytes");
            }
        }
    }
}
