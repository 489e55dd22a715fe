//! `atom` and `red`.

use super::Machine;
use super::access::{locate, note_global, synchronise};
use super::address::{Request, lanes};
use super::traffic::Sectors;
use super::window::{check, report_race, stamp};
use crate::num::{Half, max32, min32};
use crate::program::{Flow, Inst, SINK};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;
use crate::sanitizer::blocks;
use crate::sanitizer::shared::Use;

/// Operation of an atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Sum.
    Add,
    /// Smaller.
    Min,
    /// Larger.
    Max,
    /// `old >= b ? 0 : old + 1`.
    Inc,
    /// `old == 0 || old > b ? b : old - 1`.
    Dec,
    /// Exchange.
    Exch,
    /// Compare and swap.
    Cas,
    /// Bits.
    And,
    /// Bits.
    Or,
    /// Bits.
    Xor,
}

impl Operation {
    /// All, in order of their numbers.
    pub const ALL: [(&'static str, Operation); 10] = [
        ("add", Operation::Add),
        ("min", Operation::Min),
        ("max", Operation::Max),
        ("inc", Operation::Inc),
        ("dec", Operation::Dec),
        ("exch", Operation::Exch),
        ("cas", Operation::Cas),
        ("and", Operation::And),
        ("or", Operation::Or),
        ("xor", Operation::Xor),
    ];
}

/// Type of an atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Type {
    /// Unsigned or bits, of the access's width.
    Unsigned,
    /// Signed.
    Signed,
    /// f32 or f64.
    Float,
    /// f16 or f16x2.
    F16,
    /// bf16 or bf16x2.
    Bf16,
}

fn combine(operation: Operation, of: Type, bytes: u32, old: u64, b: u64, c: u64) -> u64 {
    match (operation, of) {
        (Operation::Exch, _) => b,
        (Operation::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (_, Type::F16 | Type::Bf16) => {
            let half = if of == Type::F16 { Half::F16 } else { Half::Bf16 };
            let one = |shift: u32| {
                let (x, y) = ((old >> shift) as u16, (b >> shift) as u16);
                let sum = half.fma(x, if half == Half::F16 { 0x3c00 } else { 0x3f80 }, y);
                u64::from(sum) << shift
            };
            if bytes == 2 { one(0) } else { one(0) | one(16) }
        }
        (Operation::Add, Type::Float) if bytes == 4 => {
            u64::from(crate::num::canon(f32::from_bits(old as u32) + f32::from_bits(b as u32)).to_bits())
        }
        (Operation::Add, Type::Float) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (Operation::Min, Type::Float) => {
            u64::from(min32(f32::from_bits(old as u32), f32::from_bits(b as u32)).to_bits())
        }
        (Operation::Max, Type::Float) => {
            u64::from(max32(f32::from_bits(old as u32), f32::from_bits(b as u32)).to_bits())
        }
        (Operation::Min | Operation::Max, Type::Signed) => {
            let wide = |x: u64| if bytes == 4 { i64::from(x as u32 as i32) } else { x as i64 };
            let first = (wide(old) < wide(b)) == (operation == Operation::Min);
            if first { old } else { b }
        }
        (Operation::Min, _) => old.min(b),
        (Operation::Max, _) => old.max(b),
        (Operation::Add, _) => old.wrapping_add(b),
        (Operation::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (Operation::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        (Operation::And, _) => old & b,
        (Operation::Or, _) => old | b,
        (Operation::Xor, _) => old ^ b,
    }
}

/// `a` the base address, `c` whether it is 64-bit, `b` operation and type (operation | type << 8); the access holds
/// destination, operand and swap value.
///
/// # Safety
/// See [`crate::program::Handler`].
pub unsafe fn atomic(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let (operation, of) = (Operation::ALL[(i.b & 0xff) as usize].1, TYPES[(i.b >> 8) as usize]);
    let access = m.kernel.accesses[i.ext as usize].clone();
    let len = access.bytes;
    // SAFETY: slots come from the decoder; ranges are checked before use.
    unsafe {
        let mut request = Request::blank(mask, len);
        let space = request.read(m, (i.a, i.c != 0, i.imm), access.space);
        let at = &request.at;
        let mut site = std::ptr::null_mut();
        if space == Space::Shared {
            if let Err(flow) = check(m, i, space, &request, "atomic") {
                return flow;
            }
        } else {
            match locate(m, i, &request, "atomic") {
                Ok(found) => site = found,
                Err(flow) => return flow,
            }
        }
        count(m, &request, space);
        if space != Space::Shared {
            synchronise(m, &request, access.order, true, true);
        }
        let order = lane_order(m);
        for lane in order.into_iter().filter(|&l| mask >> l & 1 == 1) {
            let value = |m: &Machine, slot: u32| {
                if slot == SINK {
                    0
                } else if access.wide {
                    *m.slot(slot).cast::<u64>().add(lane)
                } else {
                    u64::from(*m.slot(slot).add(lane)) & (u64::MAX >> (64 - 8 * len))
                }
            };
            let (b, c) = (value(m, access.slots[1]), value(m, access.slots[2]));
            let place = if space == Space::Shared {
                note_shared(m, i, lane, at[lane] as usize, len as usize);
                m.block.shared.as_mut_ptr().add(at[lane] as usize)
            } else {
                note_written(m, i, site, lane, at[lane], len)
            };
            let mut raw = [0u8; 8];
            std::ptr::copy_nonoverlapping(place, raw.as_mut_ptr(), len as usize);
            let old = u64::from_le_bytes(raw);
            let new = combine(operation, of, len, old, b, c).to_le_bytes();
            std::ptr::copy_nonoverlapping(new.as_ptr(), place, len as usize);
            if access.slots[0] != SINK {
                let dst = m.slot(access.slots[0]);
                if access.wide {
                    *dst.cast::<u64>().add(lane) = old;
                } else {
                    *dst.add(lane) = old as u32;
                }
            }
        }
        if space != Space::Shared {
            note_conflicts(m, i, site, &request);
        }
    }
    Flow::Next
}

/// The types by number.
pub const TYPES: [Type; 5] = [Type::Unsigned, Type::Signed, Type::Float, Type::F16, Type::Bf16];

/// Lanes in the order in which their atomics happen: any is allowed, a seed picks one.
fn lane_order(m: &mut Machine) -> [usize; 32] {
    let start = if m.settings.seed == 0 { 0 } else { m.draw() as usize };
    let odd = if m.settings.seed == 0 { 1 } else { m.draw() as usize | 1 };
    std::array::from_fn(|l| l.wrapping_mul(odd).wrapping_add(start) & 31)
}

fn count(m: &mut Machine, request: &Request, space: Space) {
    let number = u64::from(request.mask.count_ones());
    if space == Space::Shared {
        m.counters.shared_atomics += number;
    } else {
        m.counters.global_atomics += number;
    }
    let mut sorted: Vec<u64> = lanes(request.mask).map(|l| request.at[l]).collect();
    sorted.sort_unstable();
    let depth = sorted.chunk_by(|a, b| a == b).map(|run| run.len() as u64).max().unwrap_or(0);
    m.counters.atomic_depth = m.counters.atomic_depth.max(depth);
}

fn note_shared(m: &mut Machine, i: &Inst, lane: usize, offset: usize, len: usize) {
    if m.settings.options.uninitialised && !m.block.shared_written.covers(offset, len) {
        let text = format!("atomic on {len} bytes of shared memory at offset {offset:#x}");
        m.report(Kind::Uninitialised, i, lane as u32, text);
    }
    m.block.shared_written.insert(offset, len);
    if m.settings.options.races {
        let stamp = stamp(m, lane);
        if let Some(race) = m.history.access(offset, len, stamp, Use::Atomic) {
            report_race(m, i, lane, offset as u64, race);
        }
    }
}

/// Checks that the value was written, and gives its place.
fn note_written(
    m: &mut Machine,
    i: &Inst,
    site: *mut crate::memory::Allocation,
    lane: usize,
    address: u64,
    len: u32,
) -> *mut u8 {
    let allocation = if site.is_null() {
        m.memory().find(address, u64::from(len)).map_or(std::ptr::null_mut(), |a| a)
    } else {
        site
    };
    // SAFETY: bounds were checked, so there is an allocation, and it lives as long as the launch.
    let (allocation, offset) = unsafe { (&mut *allocation, (address - (*allocation).base) as usize) };
    if m.settings.options.uninitialised && allocation.unwritten(offset, len as usize) {
        let text = format!("atomic on {len} bytes of device memory at {address:#x}");
        m.report(Kind::Uninitialised, i, lane as u32, text);
    }
    allocation.set_written(offset, len as usize);
    allocation.data().wrapping_add(offset)
}

/// Atomics are kept out of the load and store counts: they are counted by themselves.
fn note_conflicts(m: &mut Machine, i: &Inst, site: *mut crate::memory::Allocation, request: &Request) {
    let traffic = std::mem::replace(&mut m.settings.options.traffic, false);
    note_global(m, i, site, (request, &Sectors::of(request)), blocks::Use::StrongWrite);
    m.settings.options.traffic = traffic;
}
