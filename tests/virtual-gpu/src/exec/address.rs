//! Addresses of a warp's lanes.

use super::Machine;
use crate::memory::{LOCAL_WINDOW, SHARED_WINDOW};
use crate::ptx::ast::Space;

/// Addresses of a warp's lanes.
pub type Addresses = [u64; 32];

/// Lanes of a mask, lowest first.
#[inline(always)]
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let lane = left.trailing_zeros() as usize;
        left &= left - 1;
        Some(lane)
    })
}

/// Base plus offset for each lane; `wide` tells whether the base is 64-bit.
///
/// # Safety
/// The slot must be the running kernel's.
#[inline(always)]
unsafe fn read_addresses(out: &mut Addresses, m: &Machine, slot: u32, wide: bool, offset: i64) {
    // SAFETY: slots come from the decoder, which knows their width.
    unsafe {
        if wide {
            let base = &*m.slot(slot).cast::<[u64; 32]>();
            for l in 0..32 {
                out[l] = base[l].wrapping_add(offset as u64);
            }
        } else {
            let base = &*m.slot(slot).cast::<[u32; 32]>();
            for l in 0..32 {
                out[l] = u64::from(base[l].wrapping_add(offset as u32));
            }
        }
    }
}

/// The state space that generic addresses point to; addresses are made relative to it.
pub fn resolve(space: Space, at: &mut Addresses, mask: u32) -> Space {
    if space != Space::Generic {
        return space;
    }
    let first = at[mask.trailing_zeros() as usize & 31];
    let window = match first >> 56 {
        2 => SHARED_WINDOW,
        3 => LOCAL_WINDOW,
        _ => return Space::Global,
    };
    for address in at.iter_mut() {
        *address = address.wrapping_sub(window);
    }
    if window == SHARED_WINDOW { Space::Shared } else { Space::Local }
}

/// How the addresses of a request lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// All lanes of the full warp, one after the other in one run of bytes.
    Run,
    /// All lanes that take part use one address.
    Same,
    /// Anything else.
    Other,
}

/// One memory instruction of a warp.
#[derive(Debug, Clone)]
pub struct Request {
    /// Address of each lane; those of lanes that don't take part mean nothing.
    pub at: Addresses,
    /// Lanes that take part, at least one.
    pub mask: u32,
    /// Bytes of each lane.
    pub len: u32,
    /// How the addresses lie.
    pub pattern: Pattern,
}

impl Request {
    /// The request of the lanes in `mask`, at least one, of `len` bytes each.
    #[inline(always)]
    pub fn new(at: Addresses, mask: u32, len: u32) -> Self {
        let mut request = Request { at, mask, len, pattern: Pattern::Other };
        request.classify();
        request
    }

    /// A request whose addresses are still to be [read](Request::read).
    #[inline(always)]
    pub fn blank(mask: u32, len: u32) -> Self {
        Request { at: [0; 32], mask, len, pattern: Pattern::Other }
    }

    /// Reads the addresses of an instruction, base plus offset, and tells which space named `space` they go to.
    ///
    /// # Safety
    /// The slot must be the running kernel's.
    #[inline(always)]
    pub unsafe fn read(
        &mut self,
        m: &Machine,
        (slot, wide, offset): (u32, bool, i64),
        space: Space,
    ) -> Space {
        // SAFETY: the caller's promise.
        unsafe { read_addresses(&mut self.at, m, slot, wide, offset) };
        let space = resolve(space, &mut self.at, self.mask);
        self.classify();
        space
    }

    /// Reads addresses of shared memory, be they generic or not.
    ///
    /// # Safety
    /// The slot must be the running kernel's.
    #[inline(always)]
    pub unsafe fn read_shared(&mut self, m: &Machine, (slot, wide, offset): (u32, bool, i64)) {
        // SAFETY: the caller's promise.
        unsafe { read_addresses(&mut self.at, m, slot, wide, offset) };
        for address in &mut self.at {
            if *address >> 56 == SHARED_WINDOW >> 56 {
                *address -= SHARED_WINDOW;
            }
        }
        self.classify();
    }

    #[inline(always)]
    fn classify(&mut self) {
        let (first, len) = (self.first(), u64::from(self.len));
        let (mut run, mut same) = (0, 0);
        if self.mask == u32::MAX {
            for (lane, &address) in self.at.iter().enumerate() {
                run |= address ^ first.wrapping_add(lane as u64 * len);
                same |= address ^ first;
            }
        } else {
            run = 1;
            for (lane, &address) in self.at.iter().enumerate() {
                let taken = 0u64.wrapping_sub(u64::from(self.mask >> lane & 1));
                same |= (address ^ first) & taken;
            }
        }
        self.pattern = match (run, same) {
            (0, _) => Pattern::Run,
            (_, 0) => Pattern::Same,
            _ => Pattern::Other,
        };
    }

    /// Address of the lowest lane.
    #[inline(always)]
    pub fn first(&self) -> u64 {
        self.at[self.mask.trailing_zeros() as usize & 31]
    }

    /// Lowest and highest address, and all bits that are set in any.
    #[inline(always)]
    pub fn union(&self) -> (u64, u64, u64) {
        let first = self.first();
        match self.pattern {
            Pattern::Same => (first, first, first),
            // Bits below `len`, which alone matter to alignment, are those of the first address.
            Pattern::Run => (first, first.wrapping_add(31 * u64::from(self.len)), first),
            Pattern::Other => {
                let (mut low, mut high, mut bits) = (u64::MAX, 0, 0);
                if self.mask == u32::MAX {
                    for &address in &self.at {
                        low = low.min(address);
                        high = high.max(address);
                        bits |= address;
                    }
                    return (low, high, bits);
                }
                for (lane, &address) in self.at.iter().enumerate() {
                    let taken = 0u64.wrapping_sub(u64::from(self.mask >> lane & 1));
                    low = low.min(address | !taken);
                    high = high.max(address & taken);
                    bits |= address & taken;
                }
                (low, high, bits)
            }
        }
    }
}
