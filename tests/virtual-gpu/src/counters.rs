//! What a launch is counted by. Everything here is a count that follows from the program and its data; nothing
//! is a time.

/// What a warp instruction is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Moves, conversions between registers, selects, special registers.
    Move,
    /// Integer and logic.
    Integer,
    /// f32 add, multiply, fma, compare.
    Float,
    /// f16 and bf16.
    Half,
    /// f64.
    Double,
    /// exp2, log2, sqrt, reciprocal, sine, …
    Special,
    /// Conversions of numbers.
    Convert,
    /// Loads and stores of every space.
    Memory,
    /// Atomics and reductions.
    Atomic,
    /// Shuffles and votes.
    Shuffle,
    /// Tensor cores.
    Tensor,
    /// Barriers and fences.
    Barrier,
    /// Branches, returns.
    Control,
    /// Not an instruction of the program.
    None,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = 14;
    /// Their names, in order.
    pub const NAMES: [&'static str; 14] = [
        "move", "integer", "float", "half", "double", "special", "convert", "memory", "atomic", "shuffle",
        "tensor", "barrier", "control", "none",
    ];
}

/// The counters of one launch. `repr(C)`, all fields 64-bit: the layout is the interface between the driver and
/// [`crate::host`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Warp instructions executed, of all classes.
    pub warp_instructions: u64,
    /// Lanes that executed them.
    pub lane_instructions: u64,
    /// Warp instructions by [`Class`].
    pub classes: [u64; Class::COUNT],
    /// Branches whose lanes went both ways.
    pub divergent_branches: u64,
    /// Warp requests that load from device memory.
    pub global_load_requests: u64,
    /// Warp requests that store to device memory.
    pub global_store_requests: u64,
    /// 32-byte sectors that the loads touched, request by request.
    pub global_load_sectors: u64,
    /// 32-byte sectors that the stores touched, request by request.
    pub global_store_sectors: u64,
    /// Different bytes that the loads asked for, request by request.
    pub global_load_bytes: u64,
    /// Different bytes that the stores wrote, request by request.
    pub global_store_bytes: u64,
    /// Different sectors loaded in the whole launch: what memory must deliver at least once.
    pub distinct_load_sectors: u64,
    /// Different sectors stored in the whole launch.
    pub distinct_store_sectors: u64,
    /// Warp requests to shared memory.
    pub shared_requests: u64,
    /// Passes that the banks of shared memory need for them.
    pub shared_waves: u64,
    /// Passes that they would need without bank conflicts.
    pub shared_ideal_waves: u64,
    /// Warp requests to local memory.
    pub local_requests: u64,
    /// Lanes that did an atomic on device memory.
    pub global_atomics: u64,
    /// Lanes that did an atomic on shared memory.
    pub shared_atomics: u64,
    /// The most lanes of one request on one address.
    pub atomic_depth: u64,
    /// Barriers passed, counted once a block.
    pub barriers: u64,
    /// `mma` instructions, a warp each.
    pub tensor_instructions: u64,
    /// Multiply-adds that they did.
    pub tensor_multiply_adds: u64,
    /// Bytes copied by cp.async.
    pub async_copy_bytes: u64,
    /// Blocks run.
    pub blocks: u64,
    /// Warps run.
    pub warps: u64,
}

impl Counters {
    /// Share of lanes that worked, of 32 an instruction.
    pub fn lane_efficiency(&self) -> f64 {
        self.lane_instructions as f64 / (self.warp_instructions.max(1) as f64 * 32.0)
    }

    /// Bytes asked for over bytes of the sectors touched by loads; 1 is perfect.
    pub fn load_efficiency(&self) -> f64 {
        self.global_load_bytes as f64 / (self.global_load_sectors.max(1) as f64 * 32.0)
    }

    /// Bytes written over bytes of the sectors touched by stores; 1 is perfect.
    pub fn store_efficiency(&self) -> f64 {
        self.global_store_bytes as f64 / (self.global_store_sectors.max(1) as f64 * 32.0)
    }

    /// Warp instructions of a class.
    pub fn class(&self, class: Class) -> u64 {
        self.classes[class as usize]
    }
}
