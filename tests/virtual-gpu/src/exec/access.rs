//! Loads and stores, with their checks and counts.

use super::address::{Addresses, addresses, consecutive, lanes, resolve, union};
use super::block::Warp;
use super::traffic::{Sectors, waves};
use super::{Fault, Machine};
use crate::memory::Allocation;
use crate::program::{Access, Flow, Inst, Order};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;
use crate::sanitizer::blocks;
use crate::sanitizer::shared::{self, Race, Stamp};

/// Finds the storage of a request to device memory: a pointer for each lane's address is `data + (address -
/// base)`. Checks bounds and alignment.
pub fn locate(
    m: &mut Machine,
    i: &Inst,
    at: &Addresses,
    mask: u32,
    len: u32,
    verb: &str,
) -> Result<*mut Allocation, Flow> {
    let (low, high, bits) = union(at, mask);
    if bits & u64::from(len - 1) != 0 {
        let lane = lanes(mask).find(|&l| at[l] & u64::from(len - 1) != 0).unwrap_or(0);
        let text = format!("{verb} of {len} bytes at {:#x}", at[lane]);
        return Err(m.fail(Kind::Misaligned, Fault::Misaligned, i, lane as u32, text));
    }
    let span = high - low + u64::from(len);
    let site = m.sites[i.ext as usize];
    // SAFETY: allocations do not move or go while a launch runs.
    if !site.is_null() && unsafe { (*site).holds(low, span) } {
        return Ok(site);
    }
    if let Some(found) = m.memory().find(low, span) {
        let found: *mut Allocation = found;
        m.sites[i.ext as usize] = found;
        return Ok(found);
    }
    // Lanes may use different allocations, or one of them none.
    for lane in lanes(mask) {
        if m.memory().find(at[lane], u64::from(len)).is_none() {
            let place = m.memory().describe(at[lane]);
            let kind = if place.contains("freed") { Kind::Freed } else { Kind::OutOfBounds };
            let text = format!("{verb} of {len} bytes at {:#x}, {place}", at[lane]);
            return Err(m.fail(kind, Fault::IllegalAddress, i, lane as u32, text));
        }
    }
    Ok(std::ptr::null_mut())
}

/// The allocation of one lane, when a request spans several.
fn one(m: &mut Machine, site: *mut Allocation, address: u64) -> *mut Allocation {
    if !site.is_null() {
        return site;
    }
    m.memory().find(address, 1).map_or(std::ptr::null_mut(), |a| a)
}

/// Sanitizer and counters of a request to device memory whose allocation is known.
pub fn note_global(
    m: &mut Machine,
    i: &Inst,
    site: *mut Allocation,
    at: &Addresses,
    mask: u32,
    len: u32,
    how: blocks::Use,
) {
    let options = m.settings.options;
    if !options.traffic && !options.conflicts {
        return;
    }
    let store = matches!(how, blocks::Use::Write | blocks::Use::StrongWrite);
    let run = consecutive(at, mask, u64::from(len));
    let mut sectors = Sectors::default();
    if run && at[0].is_multiple_of(32) {
        let first = at[0] >> 5;
        let count = u64::from(len).max(1);
        for s in 0..count {
            note_sector(m, i, site, first + s, u32::MAX, mask, how, store);
        }
        account(m, store, count, count * 32);
        return;
    }
    for lane in lanes(mask) {
        sectors.add(at[lane], len);
    }
    for (sector, bytes) in sectors.iter() {
        note_sector(m, i, site, sector, bytes, mask, how, store);
    }
    account(m, store, sectors.len() as u64, sectors.bytes());
}

fn account(m: &mut Machine, store: bool, sectors: u64, bytes: u64) {
    let c = &mut m.counters;
    if !m.settings.options.traffic {
        return;
    }
    if store {
        c.global_store_requests += 1;
        c.global_store_sectors += sectors;
        c.global_store_bytes += bytes;
    } else {
        c.global_load_requests += 1;
        c.global_load_sectors += sectors;
        c.global_load_bytes += bytes;
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn note_sector(
    m: &mut Machine,
    i: &Inst,
    site: *mut Allocation,
    sector: u64,
    bytes: u32,
    mask: u32,
    how: blocks::Use,
    store: bool,
) {
    let allocation = one(m, site, sector * 32 + u64::from(bytes.trailing_zeros()));
    if allocation.is_null() {
        return;
    }
    // SAFETY: allocations live as long as the launch, and nothing else refers to this one now.
    let allocation = unsafe { &mut *allocation };
    let index = (sector - (allocation.base >> 5)) as usize;
    if m.settings.options.traffic && allocation.touch(index, m.shape.number, u32::from(store)) {
        let counter = if store {
            &mut m.counters.distinct_store_sectors
        } else {
            &mut m.counters.distinct_load_sectors
        };
        *counter += 1;
    }
    if m.settings.options.conflicts {
        let state = &mut allocation.sectors()[index];
        let other = m.conflicts.access(state, m.shape.number, bytes, &m.block.order, m.warp, how);
        if let Some(other) = other {
            let verb = if store { "writes" } else { "reads" };
            let text = format!(
                "{verb} {:#x}, which block {other} used in this launch with no order between them",
                sector * 32 + u64::from(bytes.trailing_zeros())
            );
            m.report(Kind::BlockConflict, i, mask.trailing_zeros(), text);
        }
    }
}

/// Order of a strong access: publishes and acquires.
pub fn synchronise(m: &mut Machine, at: &Addresses, mask: u32, order: Order, reads: bool, writes: bool) {
    if !m.kernel.synchronises || order == Order::Weak {
        return;
    }
    let warp = m.warp;
    if writes && matches!(order, Order::Release | Order::AcquireRelease) {
        m.block.order.fence(warp);
    }
    for lane in lanes(mask) {
        if reads {
            m.conflicts.observe(&mut m.block.order, warp, at[lane]);
        }
        if writes {
            m.conflicts.publish(&m.block.order, warp, at[lane]);
        }
    }
    if reads && matches!(order, Order::Acquire | Order::AcquireRelease) {
        m.block.order.fence(warp);
    }
}

/// Where shared or local memory of the running block begins, and its size.
fn window(m: &mut Machine, space: Space, lane: usize) -> (usize, usize) {
    if space == Space::Shared {
        (0, m.block.shared.len())
    } else {
        let size = m.kernel.local_bytes;
        (m.thread(lane as u32) as usize * size, size)
    }
}

/// Checks a request to shared or local memory.
pub fn check_window(
    m: &mut Machine,
    i: &Inst,
    space: Space,
    at: &Addresses,
    mask: u32,
    len: u32,
    verb: &str,
) -> Result<(), Flow> {
    let (_, size) = window(m, space, 0);
    let (_, high, bits) = union(at, mask);
    let limit = size as u64;
    if bits & u64::from(len - 1) == 0 && high.checked_add(u64::from(len)).is_some_and(|end| end <= limit) {
        return Ok(());
    }
    let name = if space == Space::Shared { "shared" } else { "local" };
    for lane in lanes(mask) {
        if at[lane].checked_add(u64::from(len)).is_none_or(|end| end > limit) {
            let text = format!("{verb} of {len} bytes at {:#x} of {limit} bytes of {name} memory", at[lane]);
            return Err(m.fail(Kind::OutOfBounds, Fault::IllegalAddress, i, lane as u32, text));
        }
        if at[lane] & u64::from(len - 1) != 0 {
            let text = format!("{verb} of {len} bytes at {:#x} of {name} memory", at[lane]);
            return Err(m.fail(Kind::Misaligned, Fault::Misaligned, i, lane as u32, text));
        }
    }
    Ok(())
}

/// Counts a request to shared memory.
pub fn count_shared(m: &mut Machine, at: &Addresses, mask: u32, len: u32) {
    if !m.settings.options.traffic {
        return;
    }
    let (total, ideal) = if consecutive(at, mask, u64::from(len)) && at[0].is_multiple_of(4) {
        let ideal = if len <= 4 { 1 } else { u64::from(len / 4) };
        (ideal, ideal)
    } else {
        let offsets: [u32; 32] = std::array::from_fn(|l| at[l] as u32);
        waves(&offsets, mask, len)
    };
    m.counters.shared_requests += 1;
    m.counters.shared_waves += total;
    m.counters.shared_ideal_waves += ideal;
}

/// The stamp of an access by `lane`, now.
pub fn stamp(m: &Machine, lane: usize) -> Stamp {
    let warp: &Warp = &m.block.warps[m.warp];
    Stamp {
        phase: m.block.phase,
        warp_phase: warp.warp_phase,
        who: m.thread(lane as u32) as u16,
        atomic: false,
    }
}

/// Reports a race, naming both threads.
pub fn report_race(m: &mut Machine, i: &Inst, lane: usize, offset: u64, race: Race) {
    let text = match race {
        Race::ReadAfterWrite(who) => format!("reads offset {offset:#x}, which thread {who} wrote"),
        Race::WriteAfterWrite(who) => format!("writes offset {offset:#x}, which thread {who} wrote"),
        Race::WriteAfterRead(Some(who)) => format!("writes offset {offset:#x}, which thread {who} read"),
        Race::WriteAfterRead(None) => format!("writes offset {offset:#x}, which several threads read"),
    };
    m.report(Kind::SharedRace, i, lane as u32, text + " with no barrier between");
}

fn note_shared_read(m: &mut Machine, i: &Inst, lane: usize, offset: usize, len: usize) {
    if m.settings.options.uninitialised && m.block.shared_written[offset..offset + len].contains(&0) {
        let text = format!("{len} bytes of shared memory at offset {offset:#x}");
        m.report(Kind::Uninitialised, i, lane as u32, text);
    }
    if m.settings.options.races {
        if !m.block.in_flight.is_empty() && m.block.in_flight[offset..offset + len].iter().any(|&b| b != 0) {
            let text = format!("reads offset {offset:#x} before cp.async.wait_group");
            m.report(Kind::AsyncCopy, i, lane as u32, text);
        }
        let stamp = stamp(m, lane);
        if let Some(race) = m.history.access(offset, len, stamp, shared::Use::Read) {
            report_race(m, i, lane, offset as u64, race);
        }
    }
}

/// Reads `len` bytes of shared memory for `lane`, with all checks but bounds.
pub fn read_shared(m: &mut Machine, i: &Inst, lane: usize, offset: usize, len: usize) -> [u8; 16] {
    note_shared_read(m, i, lane, offset, len);
    let mut out = [0; 16];
    out[..len].copy_from_slice(&m.block.shared[offset..offset + len]);
    out
}

/// Writes shared memory for `lane`, with all checks but bounds.
pub fn write_shared(m: &mut Machine, i: &Inst, lane: usize, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if m.settings.options.races {
        let stamp = stamp(m, lane);
        if let Some(race) = m.history.access(offset, bytes.len(), stamp, shared::Use::Write) {
            // Threads that write the same value agree on the result.
            let harmless = matches!(race, Race::WriteAfterWrite(_)) && m.block.shared[offset..end] == *bytes;
            if !harmless {
                report_race(m, i, lane, offset as u64, race);
            }
        }
    }
    m.block.shared[offset..end].copy_from_slice(bytes);
    m.block.shared_written[offset..end].fill(1);
}

/// `ld`: `a` is the base, `c` tells whether it is 64-bit, `ext` the access.
///
/// # Safety
/// See [`crate::program::Handler`].
pub unsafe fn load(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel: *const crate::program::Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive; slots come from the decoder.
    unsafe {
        let access = &(&(*kernel).accesses)[i.ext as usize];
        let mut at = addresses(m, i.a, i.c != 0, i.imm);
        let space = resolve(access.space, &mut at, mask);
        let total = access.bytes * access.count;
        if space == Space::Shared || space == Space::Local {
            return load_window(m, i, access, space, &at, mask);
        }
        let site = match locate(m, i, &at, mask, total, "load") {
            Ok(site) => site,
            Err(flow) => return flow,
        };
        if m.settings.options.uninitialised {
            check_written(m, i, site, &at, mask, total);
        }
        if !site.is_null() {
            let origin = (*site).data().wrapping_sub((*site).base as usize);
            unpack(m, access, mask, |lane| origin.wrapping_add(at[lane] as usize));
        } else {
            let data: [*const u8; 32] = std::array::from_fn(|lane| pointer(m, at[lane], mask, lane));
            unpack(m, access, mask, |lane| data[lane].cast_mut());
        }
        let strong = access.order != Order::Weak;
        let how = if strong { blocks::Use::StrongRead } else { blocks::Use::Read };
        synchronise(m, &at, mask, access.order, true, false);
        note_global(m, i, site, &at, mask, total, how);
    }
    Flow::Next
}

fn pointer(m: &mut Machine, address: u64, mask: u32, lane: usize) -> *const u8 {
    if mask >> lane & 1 == 0 {
        return std::ptr::null();
    }
    let found = m.memory().find(address, 1);
    found.map_or(std::ptr::null(), |a| a.data().wrapping_add((address - a.base) as usize))
}

fn check_written(m: &mut Machine, i: &Inst, site: *mut Allocation, at: &Addresses, mask: u32, len: u32) {
    if !site.is_null() && consecutive(at, mask, u64::from(len)) {
        // SAFETY: allocations live as long as the launch.
        let bad = unsafe { (*site).unwritten((at[0] - (*site).base) as usize, 32 * len as usize) };
        if !bad {
            return;
        }
    }
    for lane in lanes(mask) {
        let allocation = one(m, site, at[lane]);
        // SAFETY: as above; null cannot be, since bounds were checked.
        let bad = unsafe { (*allocation).unwritten((at[lane] - (*allocation).base) as usize, len as usize) };
        if bad {
            let text = format!("{len} bytes of device memory at {:#x}", at[lane]);
            m.report(Kind::Uninitialised, i, lane as u32, text);
            return;
        }
    }
}

/// Puts loaded elements into registers.
#[inline(always)]
unsafe fn unpack(m: &mut Machine, access: &Access, mask: u32, data: impl Fn(usize) -> *mut u8) {
    let count = access.count as usize;
    // SAFETY: pointers were checked for the access's whole length; slots come from the decoder.
    unsafe {
        if access.bytes == 4 && !access.wide {
            let slots: [*mut u32; 4] = std::array::from_fn(|e| slot_or_null(m, access.slots[e], e < count));
            for lane in lanes(mask) {
                let p = data(lane).cast::<u32>();
                for (e, slot) in slots.iter().enumerate().take(count) {
                    if !slot.is_null() {
                        *slot.add(lane) = p.add(e).read_unaligned();
                    }
                }
            }
            return;
        }
        for e in 0..count {
            let slot = slot_or_null(m, access.slots[e], true);
            if slot.is_null() {
                continue;
            }
            for lane in lanes(mask) {
                let p = data(lane).add(e * access.bytes as usize);
                let value: u64 = match (access.bytes, access.signed) {
                    (1, false) => u64::from(*p),
                    (1, true) => *p.cast::<i8>() as i64 as u64,
                    (2, false) => u64::from(p.cast::<u16>().read_unaligned()),
                    (2, true) => p.cast::<i16>().read_unaligned() as i64 as u64,
                    (4, false) => u64::from(p.cast::<u32>().read_unaligned()),
                    (4, true) => p.cast::<i32>().read_unaligned() as i64 as u64,
                    _ => p.cast::<u64>().read_unaligned(),
                };
                if access.wide {
                    *slot.cast::<u64>().add(lane) = value;
                } else {
                    *slot.add(lane) = value as u32;
                }
            }
        }
    }
}

unsafe fn slot_or_null(m: &Machine, slot: u32, used: bool) -> *mut u32 {
    if !used || slot == crate::program::SINK {
        std::ptr::null_mut()
    } else {
        // SAFETY: the slot comes from the decoder.
        unsafe { m.slot(slot) }
    }
}

unsafe fn load_window(
    m: &mut Machine,
    i: &Inst,
    access: &Access,
    space: Space,
    at: &Addresses,
    mask: u32,
) -> Flow {
    let total = access.bytes * access.count;
    if let Err(flow) = check_window(m, i, space, at, mask, total, "load") {
        return flow;
    }
    let origin = if space == Space::Shared {
        for lane in lanes(mask) {
            note_shared_read(m, i, lane, at[lane] as usize, total as usize);
        }
        count_shared(m, at, mask, total);
        m.block.shared.as_mut_ptr()
    } else {
        m.counters.local_requests += 1;
        for lane in lanes(mask) {
            let offset = window(m, space, lane).0 + at[lane] as usize;
            let flags = &m.block.local_written[offset..offset + total as usize];
            if m.settings.options.uninitialised && flags.contains(&0) {
                let text = format!("{total} bytes of local memory at {:#x}", at[lane]);
                m.report(Kind::Uninitialised, i, lane as u32, text);
            }
        }
        m.block.local.as_mut_ptr()
    };
    let stride = if space == Space::Shared { 0 } else { m.kernel.local_bytes };
    let first = m.warp * 32;
    // SAFETY: the range of each lane was checked.
    unsafe { unpack(m, access, mask, |lane| origin.add((first + lane) * stride + at[lane] as usize)) };
    Flow::Next
}

/// The bytes that a lane stores.
unsafe fn pack(m: &Machine, access: &Access, lane: usize) -> [u8; 16] {
    let mut out = [0u8; 16];
    let bytes = access.bytes as usize;
    for e in 0..access.count as usize {
        // SAFETY: slots come from the decoder, which knows their width.
        let value = unsafe {
            let slot = m.slot(access.slots[e]);
            if access.wide { *slot.cast::<u64>().add(lane) } else { u64::from(*slot.add(lane)) }
        };
        out[e * bytes..(e + 1) * bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    out
}

/// `st`: operands as in [`load`].
///
/// # Safety
/// See [`crate::program::Handler`].
pub unsafe fn store(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel: *const crate::program::Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive; slots come from the decoder; ranges are checked before use.
    unsafe {
        let access = &(&(*kernel).accesses)[i.ext as usize];
        let mut at = addresses(m, i.a, i.c != 0, i.imm);
        let space = resolve(access.space, &mut at, mask);
        let total = access.bytes * access.count;
        let len = total as usize;
        if space == Space::Shared || space == Space::Local {
            if let Err(flow) = check_window(m, i, space, &at, mask, total, "store") {
                return flow;
            }
            for lane in lanes(mask) {
                let bytes = pack(m, access, lane);
                if space == Space::Shared {
                    write_shared(m, i, lane, at[lane] as usize, &bytes[..len]);
                } else {
                    let offset = window(m, space, lane).0 + at[lane] as usize;
                    m.block.local[offset..offset + len].copy_from_slice(&bytes[..len]);
                    m.block.local_written[offset..offset + len].fill(1);
                }
            }
            if space == Space::Shared {
                count_shared(m, &at, mask, total);
            } else {
                m.counters.local_requests += 1;
            }
            return Flow::Next;
        }
        let site = match locate(m, i, &at, mask, total, "store") {
            Ok(site) => site,
            Err(flow) => return flow,
        };
        let strong = access.order != Order::Weak;
        synchronise(m, &at, mask, access.order, false, true);
        for lane in lanes(mask) {
            let bytes = pack(m, access, lane);
            let allocation = &mut *one(m, site, at[lane]);
            let offset = (at[lane] - allocation.base) as usize;
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), allocation.data().add(offset), len);
            allocation.set_written(offset, len);
        }
        let how = if strong { blocks::Use::StrongWrite } else { blocks::Use::Write };
        note_global(m, i, site, &at, mask, total, how);
    }
    Flow::Next
}
