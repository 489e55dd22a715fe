//! Loads and stores of device memory, with their checks and counts. Those of shared and local memory are in
//! [`super::window`].

use super::address::{Request, lanes};
use super::lanes::handler;
use super::traffic::Sectors;
use super::{Fault, Machine, values, window};
use crate::memory::Allocation;
use crate::program::{Flow, Inst, Kernel, Order};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;
use crate::sanitizer::blocks;

/// Finds the storage of a request to device memory: a pointer for each lane's address is `data + (address -
/// base)`. Checks bounds and alignment. Null if the lanes use different allocations.
#[inline(always)]
pub fn locate(m: &mut Machine, i: &Inst, request: &Request, verb: &str) -> Result<*mut Allocation, Flow> {
    let (low, high, bits) = request.union();
    let len = u64::from(request.len);
    let site = m.sites[i.ext as usize];
    // SAFETY: allocations do not move or go while a launch runs.
    if bits & (len - 1) == 0 && !site.is_null() && unsafe { (*site).holds(low, high - low + len) } {
        return Ok(site);
    }
    search(m, i, request, verb)
}

#[cold]
#[inline(never)]
fn search(m: &mut Machine, i: &Inst, request: &Request, verb: &str) -> Result<*mut Allocation, Flow> {
    let (low, high, bits) = request.union();
    let (at, mask, len) = (&request.at, request.mask, u64::from(request.len));
    if bits & (len - 1) != 0 {
        let lane = lanes(mask).find(|&l| at[l] & (len - 1) != 0).unwrap_or(0);
        let text = format!("{verb} of {len} bytes at {:#x}", at[lane]);
        return Err(m.fail(Kind::Misaligned, Fault::Misaligned, i, lane as u32, text));
    }
    if let Some(found) = m.memory().find(low, high - low + len) {
        let found: *mut Allocation = found;
        m.sites[i.ext as usize] = found;
        return Ok(found);
    }
    // Lanes may use different allocations, or one of them none.
    for lane in lanes(mask) {
        if m.memory().find(at[lane], len).is_none() {
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

/// Sanitizer and counters of a request to device memory whose allocation is known, and whose sectors these are.
#[inline(always)]
pub fn note_global(
    m: &mut Machine,
    i: &Inst,
    site: *mut Allocation,
    (request, sectors): (&Request, &Sectors),
    how: blocks::Use,
) {
    let options = m.settings.options;
    if !options.traffic && !options.conflicts {
        return;
    }
    let store = matches!(how, blocks::Use::Write | blocks::Use::StrongWrite);
    let first_here = if site.is_null() {
        let mut first_here = 0;
        for (sector, bytes) in sectors.iter() {
            let allocation = one(m, site, sector * 32 + u64::from(bytes.trailing_zeros()));
            if !allocation.is_null() {
                first_here += note_sectors(m, i, allocation, [(sector, bytes)], request.mask, how);
            }
        }
        first_here
    } else {
        note_sectors(m, i, site, sectors.iter(), request.mask, how)
    };
    if !options.traffic {
        return;
    }
    let (c, count, bytes) = (&mut m.counters, sectors.len() as u64, sectors.bytes());
    if store {
        c.global_store_requests += 1;
        c.global_store_sectors += count;
        c.global_store_bytes += bytes;
        c.distinct_store_sectors += first_here;
    } else {
        c.global_load_requests += 1;
        c.global_load_sectors += count;
        c.global_load_bytes += bytes;
        c.distinct_load_sectors += first_here;
    }
}

/// Notes the sectors of one allocation; how many of them are used in this way for the first time.
#[inline(always)]
fn note_sectors(
    m: &mut Machine,
    i: &Inst,
    allocation: *mut Allocation,
    sectors: impl IntoIterator<Item = (u64, u32)>,
    mask: u32,
    how: blocks::Use,
) -> u64 {
    let options = m.settings.options;
    let kind = u32::from(matches!(how, blocks::Use::Write | blocks::Use::StrongWrite));
    let (reader, launch) = (m.block.order.reader(m.warp), m.shape.number);
    // SAFETY: allocations live as long as the launch, and nothing else refers to this one now.
    let allocation = unsafe { &mut *allocation };
    let base = allocation.base >> 5;
    let mut first_here = 0;
    for (sector, bytes) in sectors {
        if kind == 0
            && let Some(loads) = allocation.loads()
        {
            loads[(sector - base) as usize] += bytes.count_ones();
        }
        let state = &mut allocation.sectors()[(sector - base) as usize];
        state.open(launch);
        if options.traffic {
            first_here += u64::from(state.touch(kind));
        }
        if options.conflicts && !(how == blocks::Use::Read && state.reads(bytes, reader)) {
            meet(m, i, allocation, (sector, bytes), mask, how);
        }
    }
    first_here
}

/// An access to a sector that more than one block uses, or that is written.
#[inline(never)]
fn meet(
    m: &mut Machine,
    i: &Inst,
    allocation: &mut Allocation,
    (sector, bytes): (u64, u32),
    mask: u32,
    how: blocks::Use,
) {
    let state = allocation.history((sector - (allocation.base >> 5)) as usize);
    let Some(other) = m.conflicts.access(state, m.shape.number, bytes, &m.block.order, m.warp, how) else {
        return;
    };
    let store = matches!(how, blocks::Use::Write | blocks::Use::StrongWrite);
    let verb = if store { "writes" } else { "reads" };
    let text = format!(
        "{verb} {:#x}, which block {other} used in this launch with no order between them",
        sector * 32 + u64::from(bytes.trailing_zeros())
    );
    m.report(Kind::BlockConflict, i, mask.trailing_zeros(), text);
}

/// Order of a strong access: publishes and acquires.
#[inline(always)]
pub fn synchronise(m: &mut Machine, request: &Request, order: Order, reads: bool, writes: bool) {
    if m.kernel.synchronises && order != Order::Weak {
        exchange(m, request, order, reads, writes);
    }
}

#[inline(never)]
fn exchange(m: &mut Machine, request: &Request, order: Order, reads: bool, writes: bool) {
    let warp = m.warp;
    if writes && matches!(order, Order::Release | Order::AcquireRelease) {
        m.block.order.fence(warp);
    }
    for lane in lanes(request.mask) {
        if reads {
            m.conflicts.observe(&mut m.block.order, warp, request.at[lane]);
        }
        if writes {
            m.conflicts.publish(&m.block.order, warp, request.at[lane]);
        }
    }
    if reads && matches!(order, Order::Acquire | Order::AcquireRelease) {
        m.block.order.fence(warp);
    }
}

/// Whether all bytes were written that a request to one allocation uses.
#[inline(always)]
pub fn written(site: *mut Allocation, sectors: &Sectors) -> bool {
    // SAFETY: allocations live as long as the launch.
    let allocation = unsafe { &mut *site };
    let first = allocation.base >> 5;
    let Some(written) = allocation.written() else { return true };
    let missing = |(sector, bytes): (u64, u32)| bytes & !written.word((sector - first) as usize);
    sectors.iter().fold(0, |all, sector| all | missing(sector)) == 0
}

/// Reports the first lane of a request that reads what was never written: a lane does exactly if a sector has
/// unwritten bytes among those that the request uses.
#[inline(always)]
fn check_written(m: &mut Machine, i: &Inst, site: *mut Allocation, request: &Request, sectors: &Sectors) {
    if site.is_null() || !written(site, sectors) {
        report_unwritten(m, i, site, request);
    }
}

#[cold]
#[inline(never)]
fn report_unwritten(m: &mut Machine, i: &Inst, site: *mut Allocation, request: &Request) {
    let len = request.len;
    for lane in lanes(request.mask) {
        let address = request.at[lane];
        let allocation = one(m, site, address);
        // SAFETY: as above; null cannot be, since bounds were checked.
        let bad = unsafe { (*allocation).unwritten((address - (*allocation).base) as usize, len as usize) };
        if bad {
            let text = format!("{len} bytes of device memory at {address:#x}");
            m.report(Kind::Uninitialised, i, lane as u32, text);
            return;
        }
    }
}

handler! {
    /// `ld`: `a` is the base, `c` tells whether it is 64-bit, `ext` the access.
    load = load_body
}

#[inline(always)]
unsafe fn load_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel: *const Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive; slots come from the decoder; ranges are checked before use.
    unsafe {
        let access = &(&(*kernel).accesses)[i.ext as usize];
        let mut request = Request::blank(mask, access.bytes * access.count);
        let space = request.read(m, (i.a, i.c != 0, i.imm), access.space);
        if space == Space::Shared || space == Space::Local {
            return window::load(m, i, access, space, &request);
        }
        let site = match locate(m, i, &request, "load") {
            Ok(site) => site,
            Err(flow) => return flow,
        };
        let options = m.settings.options;
        let sectors = match options.uninitialised | options.traffic | options.conflicts {
            true => Sectors::of(&request),
            false => Sectors::default(),
        };
        if options.uninitialised {
            check_written(m, i, site, &request, &sectors);
        }
        if !site.is_null() {
            values::load(m, access, &request, (*site).data().wrapping_sub((*site).base as usize));
        } else {
            let data = pointers(m, &request);
            values::load_each(m, access, mask, |lane| data[lane]);
        }
        let how = if access.order == Order::Weak { blocks::Use::Read } else { blocks::Use::StrongRead };
        synchronise(m, &request, access.order, true, false);
        note_global(m, i, site, (&request, &sectors), how);
    }
    Flow::Next
}

/// Where each lane's bytes are, when they lie in different allocations.
#[cold]
#[inline(never)]
fn pointers(m: &mut Machine, request: &Request) -> [*mut u8; 32] {
    let mut data = [std::ptr::null_mut(); 32];
    for lane in lanes(request.mask) {
        let address = request.at[lane];
        if let Some(found) = m.memory().find(address, 1) {
            data[lane] = found.data().wrapping_add((address - found.base) as usize);
        }
    }
    data
}

handler! {
    /// `st`: operands as in [`load`].
    store = store_body
}

#[inline(always)]
unsafe fn store_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let kernel: *const Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive; slots come from the decoder; ranges are checked before use.
    unsafe {
        let access = &(&(*kernel).accesses)[i.ext as usize];
        let mut request = Request::blank(mask, access.bytes * access.count);
        let space = request.read(m, (i.a, i.c != 0, i.imm), access.space);
        if space == Space::Shared || space == Space::Local {
            return window::store(m, i, access, space, &request);
        }
        let site = match locate(m, i, &request, "store") {
            Ok(site) => site,
            Err(flow) => return flow,
        };
        synchronise(m, &request, access.order, false, true);
        let sectors = Sectors::of(&request);
        if !site.is_null() {
            values::store(m, access, &request, (*site).data().wrapping_sub((*site).base as usize));
            let first = (*site).base >> 5;
            if let Some(written) = (*site).written() {
                for (sector, bytes) in sectors.iter() {
                    written.insert_word((sector - first) as usize, bytes);
                }
            }
        } else {
            let data = pointers(m, &request);
            values::store_each(m, access, mask, |lane| data[lane]);
            for lane in lanes(mask) {
                let allocation = &mut *one(m, site, request.at[lane]);
                allocation.set_written((request.at[lane] - allocation.base) as usize, request.len as usize);
            }
        }
        let how = if access.order == Order::Weak { blocks::Use::Write } else { blocks::Use::StrongWrite };
        note_global(m, i, site, (&request, &sectors), how);
    }
    Flow::Next
}
