//! Execution of one launch: a [`Machine`] runs warps, one at a time, over the decoded code of a kernel.

pub(crate) mod access;
pub(crate) mod address;
pub(crate) mod atomic;
pub mod block;
pub(crate) mod control;
pub(crate) mod copy;
pub(crate) mod lanes;
pub mod launch;
pub(crate) mod shuffle;
pub(crate) mod tensor;
pub(crate) mod traffic;
pub(crate) mod values;
pub(crate) mod warp_values;
pub(crate) mod window;

use crate::counters::Counters;
use crate::memory::{Allocation, Memory};
use crate::program::{Flow, Inst, Kernel, NEGATED, NO_GUARD};
use crate::sanitizer::blocks::Conflicts;
use crate::sanitizer::shared::SharedHistory;
use crate::sanitizer::{Kind, Options, Report};
use block::Block;
use std::sync::Arc;

/// How tensor-core products are summed. Hardware does not say; tests should pass with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    /// All products of one instruction in f64, rounded once.
    Exact,
    /// In f32, one product after the other.
    Sequential,
    /// In f64, cut to f32 toward zero.
    Truncating,
}

/// Why a launch ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An address outside every allocation.
    IllegalAddress,
    /// A misaligned address.
    Misaligned,
    /// `trap`.
    Trap,
    /// No progress.
    Timeout,
}

/// Shape and arguments of a launch.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub dynamic_shared: u32,
    /// The parameter block.
    pub params: Vec<u8>,
    /// Whether all blocks are resident at once.
    pub cooperative: bool,
    /// Number of the launch on its device, from 1, below 2^30.
    pub number: u32,
}

/// Choices that change what is checked and in which order things run, never a correct program's result.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The sanitizers.
    pub options: Options,
    /// 0 runs blocks and warps in order; another seed permutes them.
    pub seed: u64,
    /// Tensor-core sums.
    pub accumulate: Accumulate,
    /// Warp instructions after which a launch counts as hung.
    pub budget: u64,
}

/// One launch in execution. The fields up to `live` are the running warp's, kept here for speed and put back
/// into its [`block::Warp`] when another takes over.
pub struct Machine {
    /// The warp's register file and the constant pool, selected by the upper bit of an operand.
    pub banks: [*mut u32; 2],
    /// The warp's predicates, one bit a lane.
    pub predicates: *mut u32,
    /// Next instruction.
    pub pc: u32,
    /// Instruction at which the current lanes meet those on the stack.
    pub join: u32,
    /// Lanes that execute.
    pub mask: u32,
    /// Lanes that have not left.
    pub live: u32,
    /// Index of the running warp in its block.
    pub warp: usize,
    /// The running block.
    pub block: Block,
    /// The code.
    pub kernel: Arc<Kernel>,
    /// Shape and arguments.
    pub shape: Shape,
    /// Device memory, borrowed from the device for the time of the launch.
    pub memory: *mut Memory,
    /// The allocation that each access found last time.
    pub sites: Vec<*mut Allocation>,
    /// Counts so far.
    pub counters: Counters,
    /// Times that each basic block was entered, and with how many lanes.
    pub block_runs: Vec<(u64, u64)>,
    /// Lanes that guards switched off.
    pub guarded_off: u64,
    /// Settings.
    pub settings: Settings,
    /// Multiprocessors of the device, for `%nsmid`.
    pub multiprocessors: u32,
    /// Blocks on which others depend, for the sanitizer of conflicts.
    pub conflicts: Conflicts,
    /// Accesses to shared memory.
    pub history: SharedHistory,
    /// Barrier phases over all blocks.
    pub phases: u32,
    /// Findings.
    pub reports: Vec<Report>,
    /// Why the launch must end.
    pub fault: Option<Fault>,
    /// State of the permutations.
    pub random: u64,
    /// Warp instructions of the whole launch, for the budget and for `%clock`.
    pub steps: u64,
}

/// Findings kept of one launch; more of the same say nothing new.
const MAX_REPORTS: usize = 64;

impl Machine {
    /// Pointer to the 32 words of a slot.
    ///
    /// # Safety
    /// `operand` must be a slot of the kernel that runs.
    #[inline(always)]
    pub unsafe fn slot(&self, operand: u32) -> *mut u32 {
        // SAFETY: the decoder gives only slots inside the register file and the constant pool.
        unsafe { self.banks[(operand >> 31) as usize].add((operand & 0x7fff_ffff) as usize) }
    }

    /// The lanes for which a predicate operand holds.
    ///
    /// # Safety
    /// `operand` must be a predicate of the kernel that runs.
    #[inline(always)]
    pub unsafe fn predicate(&self, operand: u32) -> u32 {
        // SAFETY: the decoder gives only predicates of the kernel.
        let bits = unsafe { *self.predicates.add((operand & !NEGATED) as usize) };
        if operand & NEGATED != 0 { !bits } else { bits }
    }

    /// Sets a predicate for the lanes of `mask`.
    ///
    /// # Safety
    /// As [`Machine::predicate`].
    #[inline(always)]
    pub unsafe fn set_predicate(&mut self, operand: u32, bits: u32, mask: u32) {
        // SAFETY: as above.
        let slot = unsafe { &mut *self.predicates.add(operand as usize) };
        *slot = (*slot & !mask) | (bits & mask);
    }

    /// The device's memory.
    #[inline(always)]
    pub fn memory(&mut self) -> &mut Memory {
        // SAFETY: the launch holds the device's lock, and no other reference is alive while one is used.
        unsafe { &mut *self.memory }
    }

    /// Linear thread index of a lane of the running warp.
    #[inline(always)]
    pub fn thread(&self, lane: u32) -> u32 {
        self.warp as u32 * 32 + lane
    }

    /// Notes a finding, once a kind and line.
    #[cold]
    pub fn report(&mut self, kind: Kind, inst: &Inst, lane: u32, message: String) {
        let known = self.reports.iter().any(|r| r.kind == kind && r.line == inst.line);
        if known || self.reports.len() >= MAX_REPORTS {
            return;
        }
        let [w, h, _] = self.shape.block;
        let thread = self.thread(lane);
        let source = (inst.source as usize).checked_sub(1).and_then(|n| self.kernel.sources.get(n));
        self.reports.push(Report {
            kind,
            kernel: self.kernel.name.clone(),
            block: self.block.index,
            thread: [thread % w, thread / w % h, thread / (w * h)],
            line: inst.line,
            source: source.map(|(file, line)| (file.to_string(), *line)),
            message,
        });
    }

    /// Notes a finding that ends the launch.
    #[cold]
    pub fn fail(&mut self, kind: Kind, fault: Fault, inst: &Inst, lane: u32, message: String) -> Flow {
        self.report(kind, inst, lane, message);
        self.fault = Some(fault);
        Flow::Fault
    }

    /// Next number of the seeded sequence (splitmix64).
    pub fn draw(&mut self) -> u64 {
        draw(&mut self.random)
    }

    /// Runs the current warp until it waits, yields, ends or has used `slice` instructions.
    pub fn run(&mut self, slice: u64) -> Flow {
        #[cfg(target_arch = "x86_64")]
        if lanes::has_avx2() {
            // SAFETY: the features were found.
            return unsafe { self.run_fast(slice) };
        }
        self.run_base(slice)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    fn run_fast(&mut self, slice: u64) -> Flow {
        self.run_base(slice)
    }

    #[inline(always)]
    fn run_base(&mut self, slice: u64) -> Flow {
        let code = Arc::clone(&self.kernel);
        let code = code.code.as_ptr();
        let mut left = slice;
        while left > 0 {
            left -= 1;
            // SAFETY: the code ends in an exit, and branch targets are instructions of the kernel, so `pc` stays
            // inside; the instruction comes from the kernel that runs.
            let flow = unsafe {
                let inst = &*code.add(self.pc as usize);
                self.pc += 1;
                let mut mask = self.mask;
                if inst.guard != NO_GUARD {
                    let active = mask & self.predicate(inst.guard);
                    self.guarded_off += u64::from((mask & !active).count_ones());
                    if active == 0 {
                        continue;
                    }
                    mask = active;
                }
                (inst.run)(self, inst, mask)
            };
            if flow != Flow::Next {
                self.steps += slice - left;
                return flow;
            }
        }
        self.steps += slice;
        Flow::Yield
    }
}

/// Next number of a splitmix64 sequence.
pub fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
