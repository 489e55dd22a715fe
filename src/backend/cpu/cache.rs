//! Keys and values of one model: f32 in blocks of [`BLOCK_SIZE`] positions.
//!
//! A block of one layer and one head is its keys, transposed to `(head_dim, BLOCK_SIZE)` so that sixteen positions
//! are a vector and a score needs no sum over lanes, and its values, `(BLOCK_SIZE, head_dim)`. The memory is
//! mapped, so it costs nothing before it is written.

use std::ops::Range;

use memmap2::MmapMut;

use super::matrix::Shared;
use super::simd::padded;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kv_cache::BLOCK_SIZE;

/// f32 in memory that the system gives when it is first touched.
#[derive(Debug)]
pub(crate) struct Lazy {
    map: MmapMut,
}

impl Lazy {
    /// Zeros.
    ///
    /// # Errors
    /// [`Error::Device`] where the system has not so much memory; `what` names its use.
    pub(crate) fn new(shape: &[usize], what: &str) -> Result<Self> {
        let no_memory = |reason: String| Error::Device {
            requested: "cpu".to_owned(),
            reason: format!("no memory for {what} of shape {shape:?}: {reason}"),
        };
        let bytes = shape.iter().try_fold(size_of::<f32>(), |product, &n| product.checked_mul(n));
        let bytes = bytes.filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| no_memory("more than the address space".to_owned()))?;
        // A map of no bytes is an error on most systems.
        let map =
            MmapMut::map_anon(bytes.max(size_of::<f32>())).map_err(|source| no_memory(source.to_string()))?;
        Ok(Self { map })
    }

    /// The numbers.
    pub(crate) fn get(&self) -> &[f32] {
        bytemuck::cast_slice(&self.map)
    }

    /// The numbers.
    pub(crate) fn get_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.map)
    }
}

/// The cache of one model.
#[derive(Debug)]
pub(crate) struct KvCache {
    memory: Lazy,
    layout: Layout,
}

/// Where the numbers of a layer, block and head lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    blocks: usize,
    heads: usize,
    head_dim: usize,
}

impl KvCache {
    /// An empty cache of `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Device`] where the system has not so much address space.
    pub(crate) fn new(config: &LlamaConfig, blocks: usize) -> Result<Self> {
        let (heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let layout = Layout { blocks, heads, head_dim };
        let memory = Lazy::new(
            &[config.num_hidden_layers, blocks, heads, BLOCK_SIZE * (head_dim + padded(head_dim))],
            "the key-value cache",
        )?;
        Ok(Self { memory, layout })
    }

    /// Where things lie.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// All numbers.
    pub(crate) fn data(&self) -> &[f32] {
        self.memory.get()
    }

    /// All numbers, for tasks that write disjoint parts.
    pub(crate) fn shared(&mut self) -> Shared<'_> {
        Shared::new(self.memory.get_mut())
    }

    /// All numbers, for tests that poison what must not be read.
    #[cfg(test)]
    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        self.memory.get_mut()
    }
}

impl Layout {
    /// The keys, transposed, and the values of one layer, block and head.
    pub(crate) fn block(self, layer: usize, block: usize, head: usize) -> (Range<usize>, Range<usize>) {
        let keys = BLOCK_SIZE * self.head_dim;
        let values = BLOCK_SIZE * padded(self.head_dim);
        let start = ((layer * self.blocks + block) * self.heads + head) * (keys + values);
        (start..start + keys, start + keys..start + keys + values)
    }
}
