//! Values that come from the launch: special registers and parameters.

use super::address::{Pattern, Request, lanes};
use super::lanes::handler;
use super::values::splat;
use super::{Fault, Machine};
use crate::program::{Access, Flow, Inst};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;

const NAMES: [&str; 31] = [
    "tid.x",
    "tid.y",
    "tid.z",
    "ntid.x",
    "ntid.y",
    "ntid.z",
    "ctaid.x",
    "ctaid.y",
    "ctaid.z",
    "nctaid.x",
    "nctaid.y",
    "nctaid.z",
    "laneid",
    "warpid",
    "nwarpid",
    "smid",
    "nsmid",
    "gridid",
    "lanemask_eq",
    "lanemask_le",
    "lanemask_lt",
    "lanemask_ge",
    "lanemask_gt",
    "clock",
    "clock64",
    "clock_hi",
    "globaltimer",
    "dynamic_smem_size",
    "total_smem_size",
    "globaltimer_lo",
    "globaltimer_hi",
];

/// Those that differ between the lanes of a warp.
fn differs(number: i64) -> bool {
    matches!(number, 0..=2 | 12 | 18..=22)
}

/// The number of a special register.
pub fn number(name: &str) -> Option<i64> {
    NAMES.iter().position(|&n| n == name).map(|n| n as i64)
}

fn value(m: &Machine, number: i64, lane: u32) -> u64 {
    let [w, h, _] = m.shape.block;
    let thread = m.thread(lane);
    let bit = 1u64 << lane;
    let component = (number % 3) as usize;
    match number {
        0 => u64::from(thread % w),
        1 => u64::from(thread / w % h),
        2 => u64::from(thread / (w * h)),
        3..=5 => u64::from(m.shape.block[component]),
        6..=8 => u64::from(m.block.index[component]),
        9..=11 => u64::from(m.shape.grid[component]),
        12 => u64::from(lane),
        13 => m.warp as u64,
        14 => m.block.warps.len() as u64,
        15 => u64::from(m.block.linear % m.multiprocessors.max(1)),
        16 => u64::from(m.multiprocessors),
        17 => u64::from(m.shape.number),
        18 => bit,
        19 => bit | (bit - 1),
        20 => bit - 1,
        21 => !(bit - 1) & 0xffff_ffff,
        22 => !(bit | (bit - 1)) & 0xffff_ffff,
        // A clock that counts instructions: it moves forward, and nothing else is known of it.
        23 | 24 | 26 | 29 => m.steps,
        25 | 30 => m.steps >> 32,
        27 => u64::from(m.shape.dynamic_shared),
        _ => m.block.shared.len() as u64,
    }
}

/// Reads special register `imm` into `dst` (64-bit if `c`).
///
/// # Safety
/// See [`crate::program::Handler`].
pub unsafe fn special(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // SAFETY: the slot comes from the decoder.
    unsafe {
        let dst = m.slot(i.dst);
        if !differs(i.imm) {
            let value = value(m, i.imm, 0);
            if i.c != 0 {
                splat(dst.cast::<u64>(), mask, value);
            } else {
                splat(dst, mask, value as u32);
            }
            return Flow::Next;
        }
        for lane in lanes(mask) {
            let value = value(m, i.imm, lane as u32);
            if i.c != 0 {
                *dst.cast::<u64>().add(lane) = value;
            } else {
                *dst.add(lane) = value as u32;
            }
        }
    }
    Flow::Next
}

/// `ld.param` at a fixed offset: access `ext`, offset `imm`.
///
/// # Safety
/// See [`crate::program::Handler`].
pub unsafe fn parameter(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    // The decoder checked that the range lies inside the kernel's parameters.
    let access = &m.kernel.accesses[i.ext as usize];
    // SAFETY: the access is the running kernel's.
    unsafe { read_parameter(m, access, i.imm as usize, mask) };
    Flow::Next
}

handler! {
    /// `ld.param` through a register: access `ext`, base `a` (64-bit if `c`), offset `imm`. A lane's address counts
    /// from the first parameter.
    parameter_at = parameter_at_body
}

#[inline(always)]
unsafe fn parameter_at_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let access = &m.kernel.accesses[i.ext as usize];
    let mut request = Request::blank(mask, access.bytes * access.count);
    // SAFETY: the slot comes from the decoder, which knows its width.
    unsafe { request.read(m, (i.a, i.c != 0, i.imm), Space::Param) };
    let (len, limit) = (u64::from(request.len), m.shape.params.len() as u64);
    let (_, high, bits) = request.union();
    if bits & (len - 1) != 0 || high.checked_add(len).is_none_or(|end| end > limit) {
        return outside_parameters(m, i, &request);
    }
    // SAFETY: the access is the running kernel's.
    unsafe {
        if request.pattern == Pattern::Same {
            read_parameter(m, access, request.first() as usize, mask);
        } else {
            for lane in lanes(mask) {
                read_parameter(m, access, request.at[lane] as usize, 1 << lane);
            }
        }
    }
    Flow::Next
}

#[cold]
#[inline(never)]
fn outside_parameters(m: &mut Machine, i: &Inst, request: &Request) -> Flow {
    let (at, len, limit) = (&request.at, u64::from(request.len), m.shape.params.len() as u64);
    for lane in lanes(request.mask) {
        let text = || format!("load of {len} bytes at {} of {limit} bytes of parameters", at[lane] as i64);
        if at[lane].checked_add(len).is_none_or(|end| end > limit) {
            return m.fail(Kind::OutOfBounds, Fault::IllegalAddress, i, lane as u32, text());
        }
        if !at[lane].is_multiple_of(len) {
            return m.fail(Kind::Misaligned, Fault::Misaligned, i, lane as u32, text());
        }
    }
    Flow::Next
}

/// Reads the elements from byte `from` of the parameters into the registers of the lanes in `mask`.
///
/// # Safety
/// The access must be the running kernel's.
#[inline(always)]
unsafe fn read_parameter(m: &Machine, access: &Access, from: usize, mask: u32) {
    for e in 0..access.count as usize {
        if access.slots[e] == crate::program::SINK {
            continue;
        }
        let value = parameter_value(m, access, from + e * access.bytes as usize);
        // SAFETY: the slot comes from the decoder, which knows its width.
        unsafe {
            let slot = m.slot(access.slots[e]);
            if access.wide {
                splat(slot.cast::<u64>(), mask, value);
            } else {
                splat(slot, mask, value as u32);
            }
        }
    }
}

/// One element at `from` of the launch's parameters.
#[inline(always)]
fn parameter_value(m: &Machine, access: &Access, from: usize) -> u64 {
    let bytes = access.bytes as usize;
    let mut raw = [0u8; 8];
    if let Some(part) = m.shape.params.get(from..from + bytes) {
        raw[..bytes].copy_from_slice(part);
    }
    let value = u64::from_le_bytes(raw);
    let shift = 64 - 8 * access.bytes;
    if access.signed { ((value << shift) as i64 >> shift) as u64 } else { value }
}
