//! cp.async: copies from device to shared memory that land when their group is waited for.

use super::access::{locate, note_global, written};
use super::address::{Addresses, Request, lanes};
use super::block::Pending;
use super::lanes::handler;
use super::traffic::Sectors;
use super::window::{check, count_shared, report_race, stamp};
use super::{Fault, Machine};
use crate::byteset::aligned;
use crate::memory::Allocation;
use crate::program::{Flow, Inst};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;
use crate::sanitizer::blocks;
use crate::sanitizer::shared::{Race, Stamp, Use};

handler! {
    /// `cp.async`: `a` the shared address (64-bit if `dst` is 1), `b` the source address, `c` the slot of the source
    /// size or SINK, `imm` bytes to copy in the low byte, offset of the destination above; the access holds the
    /// offset of the source in `slots[0..2]`.
    copy = copy_body
}

#[inline(always)]
unsafe fn copy_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let len = (i.imm & 0xff) as u32;
    let access = &m.kernel.accesses[i.ext as usize];
    let source_offset = (u64::from(access.slots[1]) << 32 | u64::from(access.slots[0])) as i64;
    // SAFETY: slots come from the decoder; ranges are checked before they are read.
    unsafe {
        let mut target = Request::blank(mask, len);
        target.read_shared(m, (i.a, i.dst != 0, i.imm >> 8));
        let sizes = if i.c == crate::program::SINK { [len; 32] } else { *m.slot(i.c).cast::<[u32; 32]>() };
        // Shorter sources are checked one by one: they may end where an allocation ends.
        let mut reading = 0;
        for (lane, &size) in sizes.iter().enumerate() {
            reading |= u32::from(size >= len) << lane;
        }
        reading &= mask;
        if let Err(flow) = check(m, i, Space::Shared, &target, "cp.async") {
            return flow;
        }
        let mut site = std::ptr::null_mut();
        let mut source = Request::blank(reading, len);
        source.read(m, (i.b, true, source_offset), Space::Global);
        let mut sectors = Sectors::default();
        if reading != 0 {
            match locate(m, i, &source, "cp.async") {
                Ok(found) => site = found,
                Err(flow) => return flow,
            }
            sectors = Sectors::of(&source);
        }
        let mut pending = Pending {
            mask,
            groups: m.block.warps[m.warp].groups,
            offsets: target.at.map(|address| address as u32),
            len,
            data: [[0; 16]; 32],
        };
        // In one go where nothing can be wrong, else by lane.
        let plain = reading == mask
            && !site.is_null()
            && (!m.settings.options.uninitialised || written(site, &sectors))
            && (!m.settings.options.races || m.history.plain(&target, stamp(m, 0), Use::Write));
        if plain {
            let origin = (*site).data().wrapping_sub((*site).base as usize).cast_const();
            for lane in lanes(mask) {
                let (from, to) = (origin.wrapping_add(source.at[lane] as usize), &mut pending.data[lane]);
                match len {
                    16 => *to = from.cast::<[u8; 16]>().read(),
                    _ => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), len as usize),
                }
            }
            m.counters.async_copy_bytes += u64::from(len * mask.count_ones());
        } else if let Err(flow) = read_each(m, i, site, (&source.at, &sizes), &mut pending) {
            return flow;
        }
        for lane in lanes(mask) {
            let (word, bits) = aligned(target.at[lane] as usize, len as usize);
            m.block.in_flight.insert_word(word, bits);
        }
        m.block.in_flight_count += 1;
        let warp = m.warp;
        m.block.warps[warp].copies.push_back(pending);
        if reading != 0 {
            note_global(m, i, site, (&source, &sectors), blocks::Use::Read);
        }
        count_shared(m, &target);
    }
    Flow::Next
}

/// Reads what a copy copies, lane by lane, with all checks.
#[inline(never)]
fn read_each(
    m: &mut Machine,
    i: &Inst,
    site: *mut Allocation,
    (from, sizes): (&Addresses, &[u32; 32]),
    pending: &mut Pending,
) -> Result<(), Flow> {
    let len = pending.len;
    for lane in lanes(pending.mask) {
        let size = sizes[lane].min(len) as usize;
        let site = if size == len as usize { site } else { std::ptr::null_mut() };
        if size != 0 && !read_source(m, i, site, lane, from[lane], &mut pending.data[lane][..size]) {
            let place = m.memory().describe(from[lane]);
            let text = format!("cp.async of {size} bytes at {:#x}, {place}", from[lane]);
            return Err(m.fail(Kind::OutOfBounds, Fault::IllegalAddress, i, lane as u32, text));
        }
        note_destination(m, i, lane, pending.offsets[lane] as usize, len as usize);
        m.counters.async_copy_bytes += u64::from(len);
    }
    Ok(())
}

/// The destination counts as written from now on: whoever read it in this phase has a race.
fn note_destination(m: &mut Machine, i: &Inst, lane: usize, offset: usize, len: usize) {
    if !m.settings.options.races {
        return;
    }
    let stamp = stamp(m, lane);
    if let Some(race) = m.history.access(offset, len, stamp, Use::Write)
        && !matches!(race, Race::WriteAfterWrite(_))
    {
        report_race(m, i, lane, offset as u64, race);
    }
}

/// Reads the source of one lane; false if it lies outside every allocation.
fn read_source(
    m: &mut Machine,
    i: &Inst,
    site: *mut Allocation,
    lane: usize,
    address: u64,
    out: &mut [u8],
) -> bool {
    let uninitialised = m.settings.options.uninitialised;
    let allocation = if site.is_null() {
        m.memory().find(address, out.len() as u64)
    } else {
        // SAFETY: allocations live as long as the launch.
        Some(unsafe { &mut *site })
    };
    let Some(allocation) = allocation else { return false };
    let offset = (address - allocation.base) as usize;
    // SAFETY: the range was checked.
    unsafe { std::ptr::copy_nonoverlapping(allocation.data().add(offset), out.as_mut_ptr(), out.len()) };
    if uninitialised && allocation.unwritten(offset, out.len()) {
        let text = format!("{} bytes of device memory at {address:#x}", out.len());
        m.report(Kind::Uninitialised, i, lane as u32, text);
    }
    true
}

/// `cp.async.commit_group`.
pub unsafe fn commit(m: &mut Machine, _i: &Inst, mask: u32) -> Flow {
    let warp = m.warp;
    let warp = &mut m.block.warps[warp];
    lanes(mask).for_each(|lane| warp.groups[lane] += 1);
    Flow::Next
}

handler! {
    /// `cp.async.wait_group n` (`imm` = n) and `cp.async.wait_all` (`imm` = -1).
    wait = wait_body
}

#[inline(always)]
unsafe fn wait_body(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    let warp = m.warp;
    land(m, warp, mask, i.imm.max(0) as u32, i.imm < 0);
    Flow::Next
}

/// Lets the copies of `warp` land, all but the `keep` latest closed groups of each lane in `mask`.
#[inline(always)]
pub fn land(m: &mut Machine, warp: usize, mask: u32, keep: u32, all: bool) {
    let groups = m.block.warps[warp].groups;
    let mut copies = std::mem::take(&mut m.block.warps[warp].copies);
    for copy in &mut copies {
        let mut landing = 0;
        for (lane, (group, closed)) in copy.groups.iter().zip(&groups).enumerate() {
            landing |= u32::from(all | (group + keep < *closed)) << lane;
        }
        landing &= copy.mask & mask;
        if landing != 0 {
            land_lanes(m, warp, copy, landing);
            copy.mask &= !landing;
            m.block.in_flight_count -= usize::from(copy.mask == 0);
        }
    }
    // They nearly always land in order, so that nothing is moved.
    while copies.front().is_some_and(|copy| copy.mask == 0) {
        copies.pop_front();
    }
    copies.retain(|copy| copy.mask != 0);
    m.block.warps[warp].copies = copies;
}

/// The lanes `landing` of a copy land.
#[inline(always)]
fn land_lanes(m: &mut Machine, warp: usize, copy: &Pending, landing: u32) {
    let len = copy.len as usize;
    for lane in lanes(landing) {
        let at = copy.offsets[lane] as usize;
        match len {
            16 => m.block.shared[at..at + 16].copy_from_slice(&copy.data[lane]),
            _ => m.block.shared[at..at + len].copy_from_slice(&copy.data[lane][..len]),
        }
        let (word, bits) = aligned(at, len);
        m.block.shared_written.insert_word(word, bits);
        m.block.in_flight.remove_word(word, bits);
    }
    if !m.settings.options.races {
        return;
    }
    // A race with the copy was found when it was asked for; this moves its time to now.
    let now = Stamp::new(m.block.phase, m.block.warps[warp].warp_phase, (warp * 32) as u32);
    let request = Request::new(copy.offsets.map(u64::from), landing, copy.len);
    if !m.history.plain(&request, now, Use::Write) {
        for lane in lanes(landing) {
            m.history.access(copy.offsets[lane] as usize, len, now.lane(lane), Use::Write);
        }
    }
}
