//! Schedules the blocks and warps of a launch.
//!
//! Without a seed blocks run one after the other, warps in turn. A block that spins on another gives way when its
//! slice is used up, and the next block becomes resident beside it, as many as the device holds.

use super::block::{Barrier, Block, Status};
use super::{Fault, Machine, Settings, Shape, draw};
use crate::counters::Counters;
use crate::memory::Memory;
use crate::program::{Flow, Kernel};
use crate::sanitizer::blocks::Conflicts;
use crate::sanitizer::shared::SharedHistory;
use crate::sanitizer::{Kind, Report};
use std::sync::Arc;

/// What a launch left behind.
#[derive(Debug)]
pub struct Outcome {
    /// The counts.
    pub counters: Counters,
    /// The findings.
    pub reports: Vec<Report>,
    /// Why it ended early, if it did.
    pub fault: Option<Fault>,
}

/// Instructions that a warp runs before the next gets its turn.
const WARP_SLICE: u64 = 1 << 14;
/// The same when all blocks are resident, and likely to wait for one another.
const COOPERATIVE_SLICE: u64 = 1 << 9;
/// Turns of warps after which a block lets another in.
const BLOCK_TURNS: usize = 64;

enum Progress {
    Finished,
    Paused,
    Fault,
}

/// Runs a launch to its end. `resident` is how many blocks the device holds at once.
pub fn run(
    kernel: &Arc<Kernel>,
    shape: Shape,
    memory: &mut Memory,
    settings: Settings,
    multiprocessors: u32,
    resident: usize,
) -> Outcome {
    let shared_bytes = kernel.shared_bytes + shape.dynamic_shared as usize;
    let total = shape.grid.iter().product::<u32>();
    let cooperative = shape.cooperative;
    let mut m = machine(kernel, shape, memory, settings, multiprocessors, shared_bytes);
    let order = permutation(total, settings.seed, &mut m.random);
    let mut waiting = order.into_iter();
    let mut running: Vec<Block> = Vec::new();
    let mut spare: Vec<Block> = Vec::new();
    let limit = if cooperative { total as usize } else { resident.max(1) };
    let mut turn = 0;
    let mut admit = true;
    loop {
        while (admit || running.is_empty() || cooperative) && running.len() < limit {
            let Some(linear) = waiting.next() else { break };
            running.push(fresh(&mut m, spare.pop(), shared_bytes, linear));
            admit = false;
        }
        if running.is_empty() {
            break;
        }
        turn %= running.len();
        std::mem::swap(&mut m.block, &mut running[turn]);
        let progress = m.run_block();
        std::mem::swap(&mut m.block, &mut running[turn]);
        match progress {
            Progress::Finished => spare.push(running.swap_remove(turn)),
            Progress::Paused => {
                admit = true;
                turn += 1;
            }
            Progress::Fault => break,
        }
    }
    m.finish()
}

fn machine(
    kernel: &Arc<Kernel>,
    shape: Shape,
    memory: &mut Memory,
    settings: Settings,
    multiprocessors: u32,
    shared_bytes: usize,
) -> Machine {
    let empty = Block::new(kernel, [1; 3], [0, 1, 1], 0, 0);
    Machine {
        banks: [std::ptr::null_mut(), kernel.constants.as_ptr().cast_mut().cast()],
        predicates: std::ptr::null_mut(),
        pc: 0,
        join: 0,
        mask: 0,
        live: 0,
        warp: 0,
        block: empty,
        kernel: Arc::clone(kernel),
        random: settings.seed ^ u64::from(shape.number) << 32,
        shape,
        memory,
        sites: vec![std::ptr::null_mut(); kernel.accesses.len()],
        counters: Counters::default(),
        block_runs: vec![(0, 0); kernel.blocks.len()],
        guarded_off: 0,
        settings,
        multiprocessors,
        conflicts: Conflicts::default(),
        history: SharedHistory::new(if settings.options.races { shared_bytes } else { 0 }),
        phases: 0,
        reports: Vec::new(),
        fault: None,
        steps: 0,
    }
}

fn permutation(total: u32, seed: u64, random: &mut u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..total).collect();
    if seed != 0 {
        for i in (1..order.len()).rev() {
            order.swap(i, (draw(random) % (i as u64 + 1)) as usize);
        }
    }
    order
}

fn fresh(m: &mut Machine, old: Option<Block>, shared_bytes: usize, linear: u32) -> Block {
    let (grid, threads) = (m.shape.grid, m.shape.block);
    let mut block = match old {
        Some(mut block) => {
            block.reset(grid, threads, linear, m.kernel.synchronises);
            block
        }
        None => Block::new(&m.kernel, grid, threads, shared_bytes, linear),
    };
    m.phases += 1;
    block.phase = m.phases;
    m.counters.blocks += 1;
    m.counters.warps += block.warps.len() as u64;
    block
}

impl Machine {
    fn enter(&mut self, warp: usize) {
        self.warp = warp;
        let w = &mut self.block.warps[warp];
        self.banks[0] = w.registers.as_mut_ptr().cast();
        self.predicates = w.predicates.as_mut_ptr();
        (self.pc, self.join, self.mask, self.live) = (w.pc, w.join, w.mask, w.live);
    }

    fn leave(&mut self) {
        let w = &mut self.block.warps[self.warp];
        (w.pc, w.join, w.mask, w.live) = (self.pc, self.join, self.mask, self.live);
    }

    /// Runs the current block until it ends or has used its turns.
    fn run_block(&mut self) -> Progress {
        let cooperative = self.shape.cooperative;
        let turns = if cooperative { self.block.warps.len() } else { BLOCK_TURNS };
        for _ in 0..turns {
            let count = self.block.warps.len();
            let first = self.block.turn;
            let ready = (0..count).map(|n| (first + n) % count);
            let Some(warp) = ready.into_iter().find(|&w| self.block.warps[w].status == Status::Ready) else {
                if self.block.warps.iter().all(|w| w.status == Status::Done) {
                    return Progress::Finished;
                }
                return self.stuck();
            };
            self.block.turn = (warp + 1) % count;
            let mut slice = if cooperative { COOPERATIVE_SLICE } else { WARP_SLICE };
            if self.settings.seed != 0 {
                slice = 1 + self.draw() % 300;
                self.block.turn = (self.draw() % count as u64) as usize;
            }
            self.enter(warp);
            let flow = self.run(slice);
            self.leave();
            match flow {
                Flow::Fault => return Progress::Fault,
                Flow::Done => {
                    super::copy::land(self, warp, u32::MAX, 0, true);
                    self.block.warps[warp].status = Status::Done;
                }
                _ => {}
            }
            if flow != Flow::Next {
                self.release_barriers();
            }
            if self.steps > self.settings.budget {
                return self.hung(warp);
            }
        }
        Progress::Paused
    }

    fn hung(&mut self, warp: usize) -> Progress {
        let kernel = Arc::clone(&self.kernel);
        let pc = self.block.warps[warp].pc as usize;
        let text = format!("no end after {} warp instructions", self.steps);
        let at = &kernel.code[pc.min(kernel.code.len() - 1)];
        self.fail(Kind::Stopped, Fault::Timeout, at, 0, text);
        Progress::Fault
    }

    fn stuck(&mut self) -> Progress {
        let kernel = Arc::clone(&self.kernel);
        let waiting = self.block.warps.iter().position(|w| w.status != Status::Done).unwrap_or(0);
        self.warp = waiting;
        let at = &kernel.code[(self.block.warps[waiting].pc as usize).saturating_sub(1)];
        let states: Vec<String> = self.block.warps.iter().map(|w| format!("{:?}", w.status)).collect();
        let text = format!("the warps wait for one another: {}", states.join(", "));
        self.fail(Kind::DivergentBarrier, Fault::Timeout, at, 0, text);
        Progress::Fault
    }

    fn release_barriers(&mut self) {
        let alive = self.block.warps.iter().filter(|w| w.status != Status::Done).count() as u32 * 32;
        for id in 0..16 {
            let bar = self.block.barriers[id as usize];
            let needed = if bar.expected == 0 { alive } else { bar.expected };
            if bar.arrived == 0 || bar.arrived < needed {
                continue;
            }
            self.block.barriers[id as usize] = Barrier::default();
            self.phases += 1;
            self.block.phase = self.phases;
            self.counters.barriers += 1;
            if self.kernel.synchronises {
                self.block.order.barrier();
            }
            for warp in &mut self.block.warps {
                if warp.status != Status::Waiting(id) {
                    continue;
                }
                warp.status = Status::Ready;
                if let Some((dst, to_predicate)) = warp.reduction.take() {
                    let truth = if bar.operation == 1 { bar.sum == bar.votes } else { bar.sum > 0 };
                    reduce_into(
                        warp,
                        dst,
                        to_predicate,
                        if to_predicate { u32::from(truth) } else { bar.sum },
                    );
                }
            }
        }
    }

    fn finish(mut self) -> Outcome {
        for (block, &(runs, lanes)) in self.kernel.blocks.iter().zip(&self.block_runs) {
            for (class, &count) in block.classes.iter().enumerate() {
                let count = u64::from(count);
                self.counters.classes[class] += runs * count;
                self.counters.warp_instructions += runs * count;
                self.counters.lane_instructions += lanes * count;
            }
        }
        self.counters.lane_instructions -= self.guarded_off;
        Outcome { counters: self.counters, reports: self.reports, fault: self.fault }
    }
}

fn reduce_into(warp: &mut super::block::Warp, dst: u32, to_predicate: bool, value: u32) {
    if to_predicate {
        let slot = &mut warp.predicates[dst as usize];
        *slot = if value != 0 { *slot | warp.mask } else { *slot & !warp.mask };
        return;
    }
    for lane in super::address::lanes(warp.mask) {
        warp.registers[dst as usize / 16 + lane / 16].0[lane % 16] = value;
    }
}
