//! A block and its warps.

use crate::byteset::ByteSet;
use crate::program::{Chunk, Kernel, NO_JOIN};
use crate::sanitizer::blocks::BlockOrder;
use std::collections::VecDeque;

/// Lanes set aside while others of their warp run.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// Where they go on.
    pub pc: u32,
    /// Where they meet those below them on the stack.
    pub join: u32,
    /// Which they are.
    pub mask: u32,
}

/// What a warp is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It can run.
    Ready,
    /// It waits at this barrier.
    Waiting(u32),
    /// All its lanes have left.
    Done,
}

/// A cp.async of a warp that has not landed for all of its lanes.
#[derive(Debug, Clone)]
pub struct Pending {
    /// Lanes for which it has not.
    pub mask: u32,
    /// Its group for each lane, by the lane's count of groups.
    pub groups: [u32; 32],
    /// Offsets in shared memory.
    pub offsets: [u32; 32],
    /// Bytes of a lane.
    pub len: u32,
    /// The data, read when it was asked for.
    pub data: [[u8; 16]; 32],
}

/// A warp that does not run at the moment.
#[derive(Debug, Clone)]
pub struct Warp {
    /// Its registers.
    pub registers: Vec<Chunk>,
    /// Its predicates.
    pub predicates: Vec<u32>,
    /// Next instruction.
    pub pc: u32,
    /// Reconvergence point of the current lanes.
    pub join: u32,
    /// Current lanes.
    pub mask: u32,
    /// Lanes that have not left.
    pub live: u32,
    /// Lanes set aside.
    pub stack: Vec<Frame>,
    /// State.
    pub status: Status,
    /// Warp barriers passed.
    pub warp_phase: u32,
    /// Copies in flight.
    pub copies: VecDeque<Pending>,
    /// Groups of copies that each lane has closed.
    pub groups: [u32; 32],
    /// Where the result of the barrier reduction goes: slot or predicate, and whether it is a predicate.
    pub reduction: Option<(u32, bool)>,
}

/// A barrier of a block.
#[derive(Debug, Clone, Copy, Default)]
pub struct Barrier {
    /// Threads that have arrived.
    pub arrived: u32,
    /// Threads expected; 0 for all of the block.
    pub expected: u32,
    /// Sum of predicates, for the reductions.
    pub sum: u32,
    /// Threads that took part in the reduction.
    pub votes: u32,
    /// 0 popc, 1 and, 2 or.
    pub operation: u32,
}

/// A block.
pub struct Block {
    /// Its index.
    pub index: [u32; 3],
    /// Its linear index.
    pub linear: u32,
    /// Its warps.
    pub warps: Vec<Warp>,
    /// Shared memory.
    pub shared: Vec<u8>,
    /// Which bytes of shared memory were written.
    pub shared_written: ByteSet,
    /// Which bytes wait for an asynchronous copy.
    pub in_flight: ByteSet,
    /// Asynchronous copies that have not landed.
    pub in_flight_count: usize,
    /// Local memory of all threads, one after the other.
    pub local: Vec<u8>,
    /// Which bytes of local memory were written.
    pub local_written: ByteSet,
    /// Barriers.
    pub barriers: [Barrier; 16],
    /// Current phase for the race detector.
    pub phase: u32,
    /// Place in the order of the launch.
    pub order: BlockOrder,
    /// Warp to run next.
    pub turn: usize,
}

impl Block {
    /// A block before its first instruction.
    pub fn new(kernel: &Kernel, grid: [u32; 3], threads: [u32; 3], shared_bytes: usize, linear: u32) -> Self {
        let index = [linear % grid[0], linear / grid[0] % grid[1], linear / (grid[0] * grid[1])];
        let count = threads.iter().product::<u32>();
        let warps = count.div_ceil(32) as usize;
        let one = |w: usize| {
            let lanes = (count - w as u32 * 32).min(32);
            let mask = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
            Warp {
                registers: vec![Chunk::default(); kernel.register_words / 16],
                predicates: vec![0; kernel.predicates + 1],
                pc: 0,
                join: NO_JOIN,
                mask,
                live: mask,
                stack: Vec::new(),
                status: Status::Ready,
                warp_phase: 0,
                copies: VecDeque::new(),
                groups: [0; 32],
                reduction: None,
            }
        };
        let local = kernel.local_bytes * count as usize;
        Block {
            index,
            linear,
            warps: (0..warps).map(one).collect(),
            shared: vec![0xff; shared_bytes],
            shared_written: ByteSet::new(shared_bytes),
            in_flight: ByteSet::new(shared_bytes),
            in_flight_count: 0,
            local: vec![0xff; local],
            local_written: ByteSet::new(local),
            barriers: [Barrier::default(); 16],
            phase: 0,
            order: BlockOrder::new(linear, warps, kernel.synchronises),
            turn: 0,
        }
    }

    /// Makes the block ready for another index, keeping its storage. Registers keep their values: a kernel that
    /// reads one it never set has no defined result anyway.
    pub fn reset(&mut self, grid: [u32; 3], threads: [u32; 3], linear: u32, exact: bool) {
        self.index = [linear % grid[0], linear / grid[0] % grid[1], linear / (grid[0] * grid[1])];
        self.linear = linear;
        let count = threads.iter().product::<u32>();
        for (w, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (count - w as u32 * 32).min(32);
            warp.mask = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
            warp.live = warp.mask;
            warp.pc = 0;
            warp.join = NO_JOIN;
            warp.stack.clear();
            warp.status = Status::Ready;
            warp.warp_phase = 0;
            warp.copies.clear();
            warp.groups = [0; 32];
            warp.reduction = None;
        }
        self.shared.fill(0xff);
        self.shared_written.clear();
        self.in_flight.clear();
        self.in_flight_count = 0;
        self.local.fill(0xff);
        self.local_written.clear();
        self.barriers = [Barrier::default(); 16];
        self.order = BlockOrder::new(linear, self.warps.len(), exact);
        self.turn = 0;
    }
}
