//! A kernel ready to run: a flat list of decoded instructions, with the tables they refer to.

use crate::counters::Class;
use crate::exec::Machine;
use crate::ptx::ast::{Param, Space};
use std::collections::HashMap;
use std::sync::Arc;

/// What the warp does after an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Goes on at `Machine::pc`.
    Next,
    /// Waits at a barrier.
    Wait,
    /// Lets other warps run, then goes on.
    Yield,
    /// All lanes have left.
    Done,
    /// The launch ends with `Machine::fault`.
    Fault,
}

/// Executes one instruction for the lanes of a mask.
///
/// # Safety
/// The instruction must come from the kernel that the machine runs: its slots index that kernel's registers.
pub type Handler = unsafe fn(&mut Machine, &Inst, u32) -> Flow;

/// No guard.
pub const NO_GUARD: u32 = u32::MAX;
/// Marks a negated predicate operand.
pub const NEGATED: u32 = 1 << 31;
/// Marks an operand slot in the constant pool.
pub const CONSTANT: u32 = 1 << 31;
/// A result that is not wanted.
pub const SINK: u32 = u32::MAX;
/// No reconvergence point: the lanes meet when they exit.
pub const NO_JOIN: u32 = u32::MAX;

/// A decoded instruction.
#[derive(Clone)]
pub struct Inst {
    /// What executes it.
    pub run: Handler,
    /// Guard predicate, perhaps [`NEGATED`], or [`NO_GUARD`].
    pub guard: u32,
    /// Destination slot or predicate.
    pub dst: u32,
    /// First source.
    pub a: u32,
    /// Second source.
    pub b: u32,
    /// Third source.
    pub c: u32,
    /// Index of a side table, or a small option.
    pub ext: u32,
    /// Immediate: address offset, branch target, …
    pub imm: i64,
    /// What it is counted as.
    pub class: Class,
    /// Line of the PTX text.
    pub line: u32,
    /// Index in [`Kernel::sources`] plus one; 0 when the image has no line information.
    pub source: u32,
}

/// Registers and layout of a load, store or atomic.
#[derive(Debug, Clone)]
pub struct Access {
    /// State space named by the instruction.
    pub space: Space,
    /// Bytes of an element.
    pub bytes: u32,
    /// Elements.
    pub count: u32,
    /// Whether elements are sign-extended into their registers.
    pub signed: bool,
    /// Register slots of the elements.
    pub slots: [u32; 4],
    /// Whether the slots are 64-bit.
    pub wide: bool,
    /// Whether it takes part in synchronisation between blocks.
    pub order: Order,
}

/// Memory order of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// No synchronisation.
    Weak,
    /// Volatile or relaxed.
    Relaxed,
    /// Acquire.
    Acquire,
    /// Release.
    Release,
    /// Both.
    AcquireRelease,
}

/// A basic block.
#[derive(Debug, Clone, Default)]
pub struct Block {
    /// Instructions by class.
    pub classes: [u32; Class::COUNT],
}

/// A kernel.
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Its parameters.
    pub params: Vec<Param>,
    /// Bytes of its parameters.
    pub param_bytes: usize,
    /// The code; instruction 0 opens block 0.
    pub code: Vec<Inst>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Memory accesses by `Inst::ext`.
    pub accesses: Vec<Access>,
    /// Operand lists by `Inst::ext`.
    pub lists: Vec<Vec<u32>>,
    /// 32-bit words of a warp's register file, a multiple of 32.
    pub register_words: usize,
    /// Predicate registers.
    pub predicates: usize,
    /// Constants, each repeated for the 32 lanes.
    pub constants: Vec<Chunk>,
    /// Bytes of declared shared memory; dynamic shared memory begins behind it.
    pub shared_bytes: usize,
    /// Bytes of local memory a thread.
    pub local_bytes: usize,
    /// 32-bit registers a thread declared in the PTX (not what ptxas would allocate).
    pub virtual_registers: u32,
    /// `.maxntid`.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
    /// Places in source files: file and line.
    pub sources: Vec<(Arc<str>, u32)>,
    /// Whether the kernel orders blocks with fences, so that their happens-before has to be tracked.
    pub synchronises: bool,
    /// Whether its code holds addresses of the module's variables in device memory.
    pub placed: bool,
}

/// Sixteen words, aligned so that no vector of a register crosses a line of the cache.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Chunk(pub [u32; 16]);

/// A variable at module scope that lives in device memory.
#[derive(Debug, Clone)]
pub struct GlobalVariable {
    /// Its name.
    pub name: String,
    /// Its device address, given at load.
    pub address: u64,
    /// Bytes.
    pub size: usize,
}

/// A module.
pub struct Module {
    /// The kernels by name.
    pub kernels: HashMap<String, Arc<Kernel>>,
    /// The variables.
    pub globals: Vec<GlobalVariable>,
}
