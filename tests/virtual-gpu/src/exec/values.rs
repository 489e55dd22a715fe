//! Moves values between memory and the registers of a warp.

use super::Machine;
use super::address::{Pattern, Request, lanes};
use crate::program::{Access, SINK};

/// Pointers to the slots of an access, null for those that are not wanted or not there.
///
/// # Safety
/// The access must be the running kernel's.
#[inline(always)]
unsafe fn slots(m: &Machine, access: &Access) -> [*mut u32; 4] {
    std::array::from_fn(|e| match access.slots[e] {
        slot if e < access.count as usize && slot != SINK => {
            // SAFETY: the slot comes from the decoder.
            unsafe { m.slot(slot) }
        }
        _ => std::ptr::null_mut(),
    })
}

/// Writes `value` to the lanes of a slot.
///
/// # Safety
/// `slot` must have 32 elements.
#[inline(always)]
pub unsafe fn splat<T: Copy>(slot: *mut T, mask: u32, value: T) {
    // SAFETY: the caller's promise.
    unsafe {
        if mask == u32::MAX {
            slot.cast::<[T; 32]>().write([value; 32]);
        } else {
            for lane in lanes(mask) {
                slot.add(lane).write(value);
            }
        }
    }
}

/// Loads: the bytes of address `a` are at `origin + a`.
///
/// # Safety
/// All of the request's bytes must be readable; the access must be the running kernel's.
#[inline(always)]
pub unsafe fn load(m: &Machine, access: &Access, request: &Request, origin: *const u8) {
    let from = |lane: usize| origin.wrapping_add(request.at[lane] as usize);
    // SAFETY: the caller's promise; a slot has 32 elements of four bytes, or of eight if it is wide.
    unsafe {
        match (request.pattern, access.bytes, access.count) {
            (Pattern::Same, ..) => {
                let at = origin.wrapping_add(request.first() as usize);
                for (e, slot) in slots(m, access).into_iter().enumerate().filter(|(_, slot)| !slot.is_null())
                {
                    let value = element(access, at.add(e * access.bytes as usize));
                    if access.wide {
                        splat(slot.cast::<u64>(), request.mask, value);
                    } else {
                        splat(slot, request.mask, value as u32);
                    }
                }
            }
            (Pattern::Run, 4, 1) if !access.wide => split::<u32, 1>(m, access, from(0)),
            (Pattern::Run, 4, 2) if !access.wide => split::<u32, 2>(m, access, from(0)),
            (Pattern::Run, 4, 4) if !access.wide => split::<u32, 4>(m, access, from(0)),
            (Pattern::Run, 8, 1) => split::<u64, 1>(m, access, from(0)),
            (Pattern::Run, 8, 2) => split::<u64, 2>(m, access, from(0)),
            _ => load_each(m, access, request.mask, from),
        }
    }
}

/// One element, as it goes into a register.
#[inline(always)]
unsafe fn element(access: &Access, p: *const u8) -> u64 {
    // SAFETY: the caller's promise that the element can be read.
    unsafe {
        match (access.bytes, access.signed) {
            (1, false) => u64::from(*p),
            (1, true) => *p.cast::<i8>() as i64 as u64,
            (2, false) => u64::from(p.cast::<u16>().read_unaligned()),
            (2, true) => p.cast::<i16>().read_unaligned() as i64 as u64,
            (4, false) => u64::from(p.cast::<u32>().read_unaligned()),
            (4, true) => p.cast::<i32>().read_unaligned() as i64 as u64,
            _ => p.cast::<u64>().read_unaligned(),
        }
    }
}

/// 32 vectors of `N` elements into `N` registers.
#[inline(always)]
unsafe fn split<T: Copy + Default, const N: usize>(m: &Machine, access: &Access, from: *const u8) {
    let mut out = [[T::default(); 32]; N];
    // SAFETY: the caller's promise: 32 * N elements can be read, and the slots have 32 each.
    unsafe {
        let from = from.cast::<T>();
        for (e, values) in out.iter_mut().enumerate() {
            for (lane, value) in values.iter_mut().enumerate() {
                *value = from.add(lane * N + e).read_unaligned();
            }
        }
        for (values, slot) in out.iter().zip(slots(m, access)) {
            if !slot.is_null() {
                slot.cast::<[T; 32]>().write(*values);
            }
        }
    }
}

/// Loads lane by lane, each from its own place.
///
/// # Safety
/// As [`load`].
#[inline(always)]
pub unsafe fn load_each(m: &Machine, access: &Access, mask: u32, from: impl Fn(usize) -> *const u8) {
    // SAFETY: the caller's promise; a slot has 32 elements of four bytes, or of eight if it is wide.
    unsafe {
        let slots = slots(m, access);
        if access.bytes == 4 && !access.wide {
            if access.count == 1 && !slots[0].is_null() {
                for lane in lanes(mask) {
                    *slots[0].add(lane) = from(lane).cast::<u32>().read_unaligned();
                }
                return;
            }
            for lane in lanes(mask) {
                let p = from(lane).cast::<u32>();
                for (e, slot) in slots.iter().enumerate().take(access.count as usize) {
                    if !slot.is_null() {
                        *slot.add(lane) = p.add(e).read_unaligned();
                    }
                }
            }
            return;
        }
        for (e, slot) in slots.into_iter().enumerate().filter(|(_, slot)| !slot.is_null()) {
            for lane in lanes(mask) {
                let value = element(access, from(lane).add(e * access.bytes as usize));
                if access.wide {
                    *slot.cast::<u64>().add(lane) = value;
                } else {
                    *slot.add(lane) = value as u32;
                }
            }
        }
    }
}

/// Stores: the bytes of address `a` go to `origin + a`.
///
/// # Safety
/// All of the request's bytes must be writable; the access must be the running kernel's.
#[inline(always)]
pub unsafe fn store(m: &Machine, access: &Access, request: &Request, origin: *mut u8) {
    let to = |lane: usize| origin.wrapping_add(request.at[lane] as usize);
    // SAFETY: as in `load`.
    unsafe {
        match (request.pattern, access.bytes, access.count) {
            (Pattern::Run, 4, 1) if !access.wide => join::<u32, 1>(m, access, to(0)),
            (Pattern::Run, 4, 2) if !access.wide => join::<u32, 2>(m, access, to(0)),
            (Pattern::Run, 4, 4) if !access.wide => join::<u32, 4>(m, access, to(0)),
            (Pattern::Run, 8, 1) => join::<u64, 1>(m, access, to(0)),
            (Pattern::Run, 8, 2) => join::<u64, 2>(m, access, to(0)),
            _ => store_each(m, access, request.mask, to),
        }
    }
}

/// `N` registers into 32 vectors of `N` elements.
#[inline(always)]
unsafe fn join<T: Copy + Default, const N: usize>(m: &Machine, access: &Access, to: *mut u8) {
    // SAFETY: the caller's promise: 32 * N elements can be written, and the slots have 32 each.
    unsafe {
        let values: [[T; 32]; N] = std::array::from_fn(|e| *m.slot(access.slots[e]).cast());
        let mut out = [[T::default(); N]; 32];
        for (lane, out) in out.iter_mut().enumerate() {
            for (value, values) in out.iter_mut().zip(&values) {
                *value = values[lane];
            }
        }
        to.cast::<[[T; N]; 32]>().write_unaligned(out);
    }
}

/// Stores lane by lane, each to its own place: of lanes that meet, the highest wins.
///
/// # Safety
/// As [`store`].
#[inline(always)]
pub unsafe fn store_each(m: &Machine, access: &Access, mask: u32, to: impl Fn(usize) -> *mut u8) {
    for lane in lanes(mask) {
        let to = to(lane);
        for e in 0..access.count as usize {
            // SAFETY: the caller's promise; slots come from the decoder, which knows their width.
            unsafe {
                let (value, to) = (stored(m, access, e, lane), to.add(e * access.bytes as usize));
                match access.bytes {
                    1 => *to = value as u8,
                    2 => to.cast::<u16>().write_unaligned(value as u16),
                    4 => to.cast::<u32>().write_unaligned(value as u32),
                    _ => to.cast::<u64>().write_unaligned(value),
                }
            }
        }
    }
}

/// What `lane` stores as element `e`, in the low bytes.
#[inline(always)]
unsafe fn stored(m: &Machine, access: &Access, e: usize, lane: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe {
        let slot = m.slot(access.slots[e]);
        if access.wide { *slot.cast::<u64>().add(lane) } else { u64::from(*slot.add(lane)) }
    }
}

/// The bytes that a lane stores.
///
/// # Safety
/// The access must be the running kernel's.
pub unsafe fn pack(m: &Machine, access: &Access, lane: usize) -> [u8; 16] {
    let mut out = [0u8; 16];
    let bytes = access.bytes as usize;
    for e in 0..access.count as usize {
        // SAFETY: the caller's promise.
        let value = unsafe { stored(m, access, e, lane) };
        out[e * bytes..(e + 1) * bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    out
}
