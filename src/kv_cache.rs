//! The block table: which block holds which positions of which sequence.
//!
//! The cache of a model is a pool of blocks of [`BLOCK_SIZE`] positions. A sequence owns a [`BlockTable`] a model;
//! full blocks of a common prefix are shared by reference count, never copied, and stay findable after their
//! sequence has ended until their place is needed. The numbers themselves live in the backend.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, Result};

/// Positions in a block.
pub const BLOCK_SIZE: usize = 16;

/// The blocks of one sequence in one model: position `p` lies in `blocks[p / BLOCK_SIZE]` at `p % BLOCK_SIZE`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// Block ids, in order of position.
    pub blocks: Vec<u32>,
}

/// How many blocks `positions` positions take.
pub fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(BLOCK_SIZE)
}

/// A full block's content: the prefix before it and its own tokens. Prefixes are numbered anew whenever a block
/// is registered, so that a number never comes to mean another text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Content {
    prefix: u64,
    tokens: [u32; BLOCK_SIZE],
}

/// One registered block: where it is found, and the number of the prefix that ends with it.
#[derive(Clone, Debug)]
struct Registered {
    content: Content,
    prefix: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    references: usize,
    registered: Option<Registered>,
    /// Its place in `BlockPool::idle` while it has content that nobody refers to.
    idle_since: u64,
}

/// The blocks of one model's cache.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// Unreferenced blocks with findable content, oldest first.
    idle: BTreeMap<u64, u32>,
    by_content: HashMap<Content, u32>,
    clock: u64,
}

/// The prefix that ends before the first token.
const ROOT: u64 = 0;

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks],
            free: (0..blocks as u32).rev().collect(),
            idle: BTreeMap::new(),
            by_content: HashMap::new(),
            clock: ROOT,
        }
    }

    /// Blocks that can be handed out: free ones and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A table with room for `positions` positions of a sequence that starts with `tokens`, and how many of its
    /// first positions are in the cache already.
    ///
    /// Of `tokens`, only whole blocks are shared.
    ///
    /// # Errors
    /// [`Error::CacheFull`]; nothing is taken then.
    pub fn allocate(&mut self, tokens: &[u32], positions: usize) -> Result<(BlockTable, usize)> {
        let mut shared = Vec::new();
        let mut prefix = ROOT;
        for tokens in tokens.as_chunks::<BLOCK_SIZE>().0 {
            let Some(&block) = self.by_content.get(&Content { prefix, tokens: *tokens }) else { break };
            let Some(registered) = &self.blocks[block as usize].registered else { break };
            prefix = registered.prefix;
            shared.push(block);
        }
        let idle_shared = shared.iter().filter(|&&block| self.blocks[block as usize].references == 0).count();
        let needed = blocks_for(positions).saturating_sub(shared.len());
        let available = self.available() - idle_shared;
        if needed > available {
            return Err(Error::CacheFull { needed, available });
        }
        for &block in &shared {
            self.refer(block);
        }
        let cached = shared.len() * BLOCK_SIZE;
        let mut table = BlockTable { blocks: shared };
        table.blocks.extend((0..needed).filter_map(|_| self.take()));
        Ok((table, cached))
    }

    /// Makes the whole blocks of `tokens`, which `table` holds, findable by later sequences. Calling it again
    /// with more tokens of the same sequence registers the blocks that have filled up since.
    pub fn register(&mut self, table: &BlockTable, tokens: &[u32]) {
        let last = (tokens.len() / BLOCK_SIZE).checked_sub(1).and_then(|last| table.blocks.get(last));
        if last.is_none_or(|&last| self.blocks[last as usize].registered.is_some()) {
            // Blocks are registered in order: nothing has filled up since. So it is for most decoded tokens.
            return;
        }
        let mut prefix = ROOT;
        for (&block, tokens) in table.blocks.iter().zip(tokens.as_chunks::<BLOCK_SIZE>().0) {
            let content = Content { prefix, tokens: *tokens };
            prefix = match &self.blocks[block as usize].registered {
                Some(registered) => registered.prefix,
                None => {
                    match self.by_content.get(&content).map(|&twin| &self.blocks[twin as usize].registered) {
                        // Another sequence computed the same at the same time: its block is the one to be found.
                        Some(Some(twin)) => twin.prefix,
                        _ => {
                            self.clock += 1;
                            self.by_content.insert(content.clone(), block);
                            self.blocks[block as usize].registered =
                                Some(Registered { content, prefix: self.clock });
                            self.clock
                        }
                    }
                }
            };
        }
    }

    /// Gives the blocks of `table` back. Those with findable content are kept until their place is needed.
    pub fn release(&mut self, table: BlockTable) {
        // The end of a prefix goes first: what is shared most is forgotten last.
        for id in table.blocks.into_iter().rev() {
            let block = &mut self.blocks[id as usize];
            block.references -= 1;
            if block.references == 0 {
                if block.registered.is_some() {
                    self.clock += 1;
                    block.idle_since = self.clock;
                    self.idle.insert(self.clock, id);
                } else {
                    self.free.push(id);
                }
            }
        }
    }

    fn refer(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if block.references == 0 {
            self.idle.remove(&block.idle_since);
        }
        block.references += 1;
    }

    /// Takes a free block, or the one that has been idle longest.
    fn take(&mut self) -> Option<u32> {
        let id = self.free.pop().or_else(|| self.idle.pop_first().map(|(_, id)| id))?;
        let block = &mut self.blocks[id as usize];
        if let Some(registered) = block.registered.take() {
            self.by_content.remove(&registered.content);
        }
        block.references = 1;
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: usize) -> Vec<u32> {
        (0..count as u32).collect()
    }

    #[test]
    fn a_prefix_is_shared_by_whole_blocks_only() {
        let mut pool = BlockPool::new(8);
        let (first, cached) = pool.allocate(&tokens(40), 48).unwrap();
        assert_eq!((first.blocks.len(), cached), (3, 0));
        pool.register(&first, &tokens(40));
        let (second, cached) = pool.allocate(&tokens(40), 48).unwrap();
        assert_eq!(cached, 32);
        assert_eq!(second.blocks[..2], first.blocks[..2]);
        assert_ne!(second.blocks[2], first.blocks[2]);
        assert_eq!(pool.available(), 4);
    }

    #[test]
    fn another_prefix_with_the_same_block_is_not_shared() {
        let mut pool = BlockPool::new(8);
        let repeated = [7; 32];
        let (first, _) = pool.allocate(&repeated, 32).unwrap();
        pool.register(&first, &repeated);
        let mut other = [7; 32];
        other[0] = 8;
        let (_, cached) = pool.allocate(&other, 32).unwrap();
        assert_eq!(cached, 0);
    }

    #[test]
    fn released_content_is_found_again_until_its_place_is_needed() {
        let mut pool = BlockPool::new(2);
        let (table, _) = pool.allocate(&tokens(16), 16).unwrap();
        pool.register(&table, &tokens(16));
        pool.release(table);
        assert_eq!(pool.available(), 2);
        let (table, cached) = pool.allocate(&tokens(17), 17).unwrap();
        assert_eq!(cached, 16);
        pool.release(table);
        let (table, _) = pool.allocate(&[9; 32], 32).unwrap();
        assert_eq!(table.blocks.len(), 2);
        pool.release(table);
        let (_, cached) = pool.allocate(&tokens(17), 17).unwrap();
        assert_eq!(cached, 0);
    }

    #[test]
    fn a_full_cache_takes_nothing() {
        let mut pool = BlockPool::new(4);
        let (_table, _) = pool.allocate(&[], 40).unwrap();
        let error = pool.allocate(&[], 17).unwrap_err();
        assert!(matches!(error, Error::CacheFull { needed: 2, available: 1 }), "{error}");
        assert_eq!(pool.available(), 1);
        pool.allocate(&[], 16).unwrap();
    }

    #[test]
    fn a_shared_idle_block_does_not_count_as_room_for_the_rest() {
        let mut pool = BlockPool::new(2);
        let (table, _) = pool.allocate(&tokens(16), 16).unwrap();
        pool.register(&table, &tokens(16));
        pool.release(table);
        assert!(pool.allocate(&tokens(16), 48).is_err());
        assert_eq!(pool.available(), 2);
        let (table, cached) = pool.allocate(&tokens(16), 32).unwrap();
        assert_eq!((table.blocks.len(), cached), (2, 16));
    }

    #[test]
    fn an_evicted_prefix_does_not_make_its_continuation_match_another_text() {
        let mut pool = BlockPool::new(3);
        let (table, _) = pool.allocate(&tokens(32), 32).unwrap();
        pool.register(&table, &tokens(32));
        pool.release(table);
        // Takes the free block and evicts the continuation, which was released first.
        let (big, cached) = pool.allocate(&[5; 32], 32).unwrap();
        assert_eq!(cached, 0);
        pool.register(&big, &[5; 32]);
        let (_, cached) = pool.allocate(&tokens(32), 16).unwrap();
        assert_eq!(cached, 16, "the first block survived and is found");
        let mut other: Vec<u32> = vec![5; 16];
        other.extend(16..32);
        pool.release(big);
        let (_, cached) = pool.allocate(&other, 32).unwrap();
        assert_eq!(cached, 16, "only the block of fives is shared");
    }
}
