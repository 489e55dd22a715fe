//! What is checked while kernels run, and how a finding is told.

pub mod blocks;
pub mod shared;

use std::fmt;

/// Switches. Bounds and alignment are always checked: the card faults on them too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Reads of memory never written.
    pub uninitialised: bool,
    /// Races between threads of a block in shared memory.
    pub races: bool,
    /// Conflicts between blocks in device memory.
    pub conflicts: bool,
    /// Barriers that not all threads of a warp reach.
    pub barriers: bool,
    /// Member masks that do not match the lanes that arrive.
    pub masks: bool,
    /// Count memory traffic (sectors, waves); instructions are always counted.
    pub traffic: bool,
}

impl Options {
    /// All on.
    pub const ALL: Options = Options {
        uninitialised: true,
        races: true,
        conflicts: true,
        barriers: true,
        masks: true,
        traffic: true,
    };

    /// From the bits of [`Options::bits`].
    pub fn from_bits(bits: u32) -> Self {
        let bit = |n: u32| bits >> n & 1 == 1;
        Options {
            uninitialised: bit(0),
            races: bit(1),
            conflicts: bit(2),
            barriers: bit(3),
            masks: bit(4),
            traffic: bit(5),
        }
    }

    /// One bit a switch, in the order of the fields.
    pub fn bits(self) -> u32 {
        let all = [self.uninitialised, self.races, self.conflicts, self.barriers, self.masks, self.traffic];
        all.iter().enumerate().map(|(n, &on)| u32::from(on) << n).sum()
    }
}

/// Kind of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An access outside every allocation.
    OutOfBounds,
    /// An access to memory that was freed.
    Freed,
    /// An address that is no multiple of the access size.
    Misaligned,
    /// A read of memory never written.
    Uninitialised,
    /// Two threads of a block meet in shared memory with no barrier between.
    SharedRace,
    /// Two blocks meet in device memory with no synchronisation between.
    BlockConflict,
    /// Not all threads of a warp reach a barrier, or not all warps.
    DivergentBarrier,
    /// The member mask of a shuffle, vote or reduction is wrong, or a lane reads one that is not there.
    ShuffleMask,
    /// Data of an asynchronous copy used before it has landed.
    AsyncCopy,
    /// The kernel ran too long or stopped at a trap.
    Stopped,
}

impl Kind {
    /// All kinds; the index is the number that crosses the C interface.
    pub const ALL: [Kind; 10] = [
        Kind::OutOfBounds,
        Kind::Freed,
        Kind::Misaligned,
        Kind::Uninitialised,
        Kind::SharedRace,
        Kind::BlockConflict,
        Kind::DivergentBarrier,
        Kind::ShuffleMask,
        Kind::AsyncCopy,
        Kind::Stopped,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::OutOfBounds => "out of bounds",
            Kind::Freed => "use after free",
            Kind::Misaligned => "misaligned",
            Kind::Uninitialised => "uninitialised read",
            Kind::SharedRace => "shared memory race",
            Kind::BlockConflict => "conflict between blocks",
            Kind::DivergentBarrier => "divergent barrier",
            Kind::ShuffleMask => "wrong shuffle mask",
            Kind::AsyncCopy => "unfinished asynchronous copy",
            Kind::Stopped => "stopped",
        })
    }
}

/// A finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What kind.
    pub kind: Kind,
    /// The kernel; for a copy or fill, the driver call.
    pub kernel: String,
    /// Block index.
    pub block: [u32; 3],
    /// Thread index in the block.
    pub thread: [u32; 3],
    /// Line of the PTX text; 0 for a driver call.
    pub line: u32,
    /// Source file and line, where the image has line information.
    pub source: Option<(String, u32)>,
    /// Addresses, sizes and the other party.
    pub message: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(f, "{}: {} in {}", self.kind, self.message, self.kernel)?;
        if self.line != 0 {
            write!(f, " block ({bx},{by},{bz}) thread ({tx},{ty},{tz}) at PTX line {}", self.line)?;
        }
        if let Some((file, line)) = &self.source {
            write!(f, ", {file}:{line}")?;
        }
        Ok(())
    }
}
