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

/// Base plus offset for each lane; `ext2` of the access tells whether the base is 64-bit.
///
/// # Safety
/// The slot must be the running kernel's.
#[inline(always)]
pub unsafe fn addresses(m: &Machine, slot: u32, wide: bool, offset: i64) -> Addresses {
    let mut out = [0; 32];
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
    out
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

/// Lowest and highest address, and all bits that are set in any.
pub fn union(at: &Addresses, mask: u32) -> (u64, u64, u64) {
    let (mut low, mut high, mut bits) = (u64::MAX, 0, 0);
    if mask == u32::MAX {
        for &a in at {
            low = low.min(a);
            high = high.max(a);
            bits |= a;
        }
    } else {
        for l in lanes(mask) {
            low = low.min(at[l]);
            high = high.max(at[l]);
            bits |= at[l];
        }
    }
    (low, high, bits)
}

/// Whether the lanes of a full warp access one run of bytes in order.
#[inline(always)]
pub fn consecutive(at: &Addresses, mask: u32, len: u64) -> bool {
    if mask != u32::MAX {
        return false;
    }
    let mut same = true;
    for (l, &a) in at.iter().enumerate() {
        same &= a == at[0].wrapping_add(l as u64 * len);
    }
    same
}
