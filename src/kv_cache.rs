//! The block table: which block holds which positions of which sequence.
//!
//! The cache of a model is a pool of blocks of [`BLOCK_SIZE`] positions. A sequence owns a [`BlockTable`] a model;
//! full blocks of a common prefix are shared by reference count, never copied. The numbers live in the backend.

/// Positions in a block.
pub const BLOCK_SIZE: usize = 16;

/// The blocks of one sequence in one model: position `p` lies in `blocks[p / BLOCK_SIZE]` at `p % BLOCK_SIZE`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// Block ids, in order of position.
    pub blocks: Vec<u32>,
}
