//! The cards that can be imitated: what the driver tells about them, and the limits it enforces. Figures are those
//! of NVIDIA's published specifications and of the compute capability tables in the CUDA C++ Programming Guide.

use std::ffi::OsStr;

/// The environment variable that names the first card, or the first ones, with commas between them.
pub const VARIABLE: &str = "VCUDA_PROFILE";

/// A card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Short name, as tests give it.
    pub key: &'static str,
    /// Name that the driver reports.
    pub name: &'static str,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of device memory.
    pub memory: u64,
    /// Shared memory a multiprocessor has, bytes.
    pub shared_per_multiprocessor: u32,
    /// Shared memory that a block may ask for after opting in, bytes.
    pub shared_opt_in: u32,
    /// Threads that a multiprocessor holds.
    pub threads_per_multiprocessor: u32,
    /// Blocks that a multiprocessor holds.
    pub blocks_per_multiprocessor: u32,
    /// Bytes of L2 cache.
    pub l2: u32,
    /// Memory clock, kHz.
    pub memory_clock: u32,
    /// Width of the memory bus, bits.
    pub bus_width: u32,
    /// Core clock, kHz.
    pub core_clock: u32,
}

/// Shared memory of a block without opting in.
pub const SHARED_DEFAULT: u32 = 48 << 10;
/// Shared memory that the system keeps of each block (compute capability 8.0 and up).
pub const SHARED_RESERVED: u32 = 1 << 10;

/// All profiles; the first is the default.
pub const PROFILES: [Profile; 4] = [
    Profile {
        key: "a100",
        name: "NVIDIA A100-SXM4-40GB",
        capability: (8, 0),
        multiprocessors: 108,
        memory: 40 << 30,
        shared_per_multiprocessor: 164 << 10,
        shared_opt_in: 163 << 10,
        threads_per_multiprocessor: 2048,
        blocks_per_multiprocessor: 32,
        l2: 40 << 20,
        memory_clock: 1_215_000,
        bus_width: 5120,
        core_clock: 1_410_000,
    },
    Profile {
        key: "rtx4090",
        name: "NVIDIA GeForce RTX 4090",
        capability: (8, 9),
        multiprocessors: 128,
        memory: 24 << 30,
        shared_per_multiprocessor: 100 << 10,
        shared_opt_in: 99 << 10,
        threads_per_multiprocessor: 1536,
        blocks_per_multiprocessor: 24,
        l2: 72 << 20,
        memory_clock: 10_501_000,
        bus_width: 384,
        core_clock: 2_520_000,
    },
    Profile {
        key: "h100",
        name: "NVIDIA H100 80GB HBM3",
        capability: (9, 0),
        multiprocessors: 132,
        memory: 80 << 30,
        shared_per_multiprocessor: 228 << 10,
        shared_opt_in: 227 << 10,
        threads_per_multiprocessor: 2048,
        blocks_per_multiprocessor: 32,
        l2: 50 << 20,
        memory_clock: 2_619_000,
        bus_width: 5120,
        core_clock: 1_980_000,
    },
    // Older than what today's images are for: programs must say so.
    Profile {
        key: "t4",
        name: "Tesla T4",
        capability: (7, 5),
        multiprocessors: 40,
        memory: 16 << 30,
        shared_per_multiprocessor: 64 << 10,
        shared_opt_in: 64 << 10,
        threads_per_multiprocessor: 1024,
        blocks_per_multiprocessor: 16,
        l2: 4 << 20,
        memory_clock: 5_001_000,
        bus_width: 256,
        core_clock: 1_590_000,
    },
];

impl Profile {
    /// The profile of that short name.
    ///
    /// # Errors
    /// Where there is none: the names that there are.
    pub fn named(key: &str) -> Result<Profile, String> {
        let found = PROFILES.into_iter().find(|p| p.key == key);
        found.ok_or_else(|| format!("no card `{key}`; there are {}", PROFILES.map(|p| p.key).join(", ")))
    }

    /// The profiles of a value of [`VARIABLE`]; the default where it isn't set.
    ///
    /// # Errors
    /// Those of [`named`](Self::named).
    pub fn chosen(value: Option<&OsStr>) -> Result<Vec<Profile>, String> {
        let Some(value) = value else { return Ok(vec![PROFILES[0]]) };
        let all = value.to_string_lossy().split(',').map(Profile::named).collect::<Result<_, _>>();
        all.map_err(|reason| format!("{VARIABLE}: {reason}"))
    }

    /// Blocks of `threads` threads and `shared` bytes that a multiprocessor holds at once. Registers are not
    /// known before ptxas has run, so they do not limit it here.
    pub fn resident_blocks(&self, threads: u32, shared: u32) -> u32 {
        let threads = threads.max(1).next_multiple_of(32);
        let by_threads = self.threads_per_multiprocessor / threads;
        let by_shared = self.shared_per_multiprocessor / (shared + SHARED_RESERVED);
        by_threads.min(by_shared).min(self.blocks_per_multiprocessor)
    }

    /// A device attribute by its number in `CUdevice_attribute`, or None where the number is not modelled.
    pub fn attribute(&self, number: i32) -> Option<i32> {
        let value = match number {
            1 => 1024,
            2 | 3 => 1024,
            4 => 64,
            5 => i32::MAX as u32,
            6 | 7 => 65_535,
            8 => SHARED_DEFAULT,
            9 => 64 << 10,
            10 => 32,
            12 => 65_536,
            13 => self.core_clock,
            15 | 19 | 31 | 40 | 41 | 78 | 79 | 80 | 90 | 95 | 115 => 1,
            14 | 30 | 51 => 512,
            16 => self.multiprocessors,
            // Kernel timeout, integrated, compute mode, PCI numbers, TCC, managed memory.
            17 | 18 | 20 | 33 | 34 | 35 | 50 | 83 | 84 | 86 | 88 | 89 => 0,
            32 => u32::from(self.key != "rtx4090"),
            36 => self.memory_clock,
            37 => self.bus_width,
            38 => self.l2,
            39 => self.threads_per_multiprocessor,
            75 => self.capability.0,
            76 => self.capability.1,
            81 => self.shared_per_multiprocessor,
            82 => 65_536,
            97 => self.shared_opt_in,
            106 => self.blocks_per_multiprocessor,
            111 => SHARED_RESERVED,
            _ => return None,
        };
        i32::try_from(value).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_none_is_answered_with_those_there_are() {
        assert_eq!(Profile::chosen(None), Ok(vec![PROFILES[0]]));
        let keys = |value: &str| -> Vec<_> {
            Profile::chosen(Some(value.as_ref())).unwrap().iter().map(|profile| profile.key).collect()
        };
        assert_eq!(keys("h100"), ["h100"]);
        assert_eq!(keys("h100,rtx4090"), ["h100", "rtx4090"]);
        for (wrong, named) in [("H100", "H100"), ("", ""), ("a100,", ""), ("a100,x", "x")] {
            let message = format!("VCUDA_PROFILE: no card `{named}`; there are a100, rtx4090, h100, t4");
            assert_eq!(Profile::chosen(Some(wrong.as_ref())), Err(message));
        }
    }

    #[test]
    fn occupancy_follows_the_limits() {
        let a100 = Profile::named("a100").unwrap();
        assert_eq!(a100.resident_blocks(256, 0), 8);
        assert_eq!(a100.resident_blocks(32, 0), 32);
        assert_eq!(a100.resident_blocks(128, 40 << 10), 4);
        assert_eq!(a100.resident_blocks(1024, 163 << 10), 1);
        assert_eq!(Profile::named("rtx4090").unwrap().resident_blocks(1024, 0), 1);
    }
}
