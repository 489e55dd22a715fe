//! Loads and stores of shared and local memory, with their checks and counts.

use super::address::{Pattern, Request, lanes};
use super::{Fault, Machine, traffic, values};
use crate::byteset::aligned;
use crate::program::{Access, Flow, Inst};
use crate::ptx::ast::Space;
use crate::sanitizer::Kind;
use crate::sanitizer::shared::{self, Race, Stamp};

/// Bytes of shared memory, or of a thread's local memory.
#[inline(always)]
fn size(m: &Machine, space: Space) -> usize {
    if space == Space::Shared { m.block.shared.len() } else { m.kernel.local_bytes }
}

/// Checks bounds and alignment of a request to shared or local memory.
#[inline(always)]
pub fn check(m: &mut Machine, i: &Inst, space: Space, request: &Request, verb: &str) -> Result<(), Flow> {
    let (_, high, bits) = request.union();
    let len = u64::from(request.len);
    let fits = high.checked_add(len).is_some_and(|end| end <= size(m, space) as u64);
    if fits && bits & (len - 1) == 0 { Ok(()) } else { outside(m, i, space, request, verb) }
}

#[cold]
#[inline(never)]
fn outside(m: &mut Machine, i: &Inst, space: Space, request: &Request, verb: &str) -> Result<(), Flow> {
    let (at, len, limit) = (&request.at, u64::from(request.len), size(m, space) as u64);
    let name = if space == Space::Shared { "shared" } else { "local" };
    for lane in lanes(request.mask) {
        if at[lane].checked_add(len).is_none_or(|end| end > limit) {
            let text = format!("{verb} of {len} bytes at {:#x} of {limit} bytes of {name} memory", at[lane]);
            return Err(m.fail(Kind::OutOfBounds, Fault::IllegalAddress, i, lane as u32, text));
        }
        if at[lane] & (len - 1) != 0 {
            let text = format!("{verb} of {len} bytes at {:#x} of {name} memory", at[lane]);
            return Err(m.fail(Kind::Misaligned, Fault::Misaligned, i, lane as u32, text));
        }
    }
    Ok(())
}

/// Counts a request to shared memory.
#[inline(always)]
pub fn count_shared(m: &mut Machine, request: &Request) {
    if !m.settings.options.traffic {
        return;
    }
    let (total, ideal) = traffic::waves(request);
    m.counters.shared_requests += 1;
    m.counters.shared_waves += total;
    m.counters.shared_ideal_waves += ideal;
}

/// The stamp of an access by `lane`, now.
#[inline(always)]
pub fn stamp(m: &Machine, lane: usize) -> Stamp {
    Stamp::new(m.block.phase, m.block.warps[m.warp].warp_phase, m.thread(lane as u32))
}

/// Reports a race, naming both threads.
#[cold]
#[inline(never)]
pub fn report_race(m: &mut Machine, i: &Inst, lane: usize, offset: u64, race: Race) {
    let text = match race {
        Race::ReadAfterWrite(who) => format!("reads offset {offset:#x}, which thread {who} wrote"),
        Race::WriteAfterWrite(who) => format!("writes offset {offset:#x}, which thread {who} wrote"),
        Race::WriteAfterRead(Some(who)) => format!("writes offset {offset:#x}, which thread {who} read"),
        Race::WriteAfterRead(None) => format!("writes offset {offset:#x}, which several threads read"),
    };
    m.report(Kind::SharedRace, i, lane as u32, text + " with no barrier between");
}

/// Whether a range of shared memory was written, and waits for no asynchronous copy.
#[inline(always)]
fn sound(m: &Machine, offset: usize, len: usize) -> bool {
    let options = m.settings.options;
    (!options.uninitialised || m.block.shared_written.covers(offset, len))
        && (!options.races || m.block.in_flight_count == 0 || !m.block.in_flight.meets(offset, len))
}

/// All checks of a load from shared memory but its bounds: in one go where nothing can be wrong, else by lane.
#[inline(always)]
pub fn note_read(m: &mut Machine, i: &Inst, request: &Request) {
    let options = m.settings.options;
    let len = request.len as usize;
    let all_sound = match request.pattern {
        Pattern::Run => sound(m, request.first() as usize, 32 * len),
        Pattern::Same => sound(m, request.first() as usize, len),
        Pattern::Other => {
            let (block, watched) = (&m.block, options.races && m.block.in_flight_count != 0);
            let (mut unwritten, mut flying) = (0, 0);
            for lane in lanes(request.mask) {
                let (word, bits) = aligned(request.at[lane] as usize, len);
                unwritten |= bits & !block.shared_written.word(word);
                flying |= bits & block.in_flight.word(word);
            }
            (!options.uninitialised || unwritten == 0) && (!watched || flying == 0)
        }
    };
    let now = stamp(m, 0);
    if all_sound && (!options.races || m.history.plain(request, now, shared::Use::Read)) {
        return;
    }
    note_each_read(m, i, request);
}

#[inline(never)]
fn note_each_read(m: &mut Machine, i: &Inst, request: &Request) {
    let len = request.len as usize;
    for lane in lanes(request.mask) {
        let offset = request.at[lane] as usize;
        if m.settings.options.uninitialised && !m.block.shared_written.covers(offset, len) {
            let text = format!("{len} bytes of shared memory at offset {offset:#x}");
            m.report(Kind::Uninitialised, i, lane as u32, text);
        }
        if !m.settings.options.races {
            continue;
        }
        if m.block.in_flight.meets(offset, len) {
            let text = format!("reads offset {offset:#x} before cp.async.wait_group");
            m.report(Kind::AsyncCopy, i, lane as u32, text);
        }
        let now = stamp(m, lane);
        if let Some(race) = m.history.access(offset, len, now, shared::Use::Read) {
            report_race(m, i, lane, offset as u64, race);
        }
    }
}

/// All checks of a write to shared memory by `lane` but its bounds; `bytes` are what it will write.
#[inline(always)]
fn note_write(
    m: &mut Machine,
    i: &Inst,
    lane: usize,
    offset: usize,
    len: usize,
    bytes: impl Fn(&Machine) -> [u8; 16],
) {
    m.block.shared_written.insert(offset, len);
    if !m.settings.options.races {
        return;
    }
    let stamp = stamp(m, lane);
    if let Some(race) = m.history.access(offset, len, stamp, shared::Use::Write) {
        // Threads that write the same value agree on the result.
        let same = m.block.shared[offset..offset + len] == bytes(m)[..len];
        if !(same && matches!(race, Race::WriteAfterWrite(_))) {
            report_race(m, i, lane, offset as u64, race);
        }
    }
}

/// Writes shared memory for `lane`, with all checks but bounds.
pub fn write_shared(m: &mut Machine, i: &Inst, lane: usize, offset: usize, bytes: &[u8; 16]) {
    note_write(m, i, lane, offset, 16, |_| *bytes);
    m.block.shared[offset..offset + 16].copy_from_slice(bytes);
}

/// Where lane 0 of the running warp has its local memory, and how far the next lane's is.
fn local(m: &mut Machine) -> (usize, usize) {
    let size = m.kernel.local_bytes;
    (m.thread(0) as usize * size, size)
}

/// [`super::access::load`] from shared or local memory.
///
/// # Safety
/// The access must be the running kernel's.
#[inline(always)]
pub unsafe fn load(m: &mut Machine, i: &Inst, access: &Access, space: Space, request: &Request) -> Flow {
    if let Err(flow) = check(m, i, space, request, "load") {
        return flow;
    }
    if space == Space::Shared {
        note_read(m, i, request);
        count_shared(m, request);
        let origin = m.block.shared.as_ptr();
        // SAFETY: the range of each lane was checked.
        unsafe { values::load(m, access, request, origin) };
        return Flow::Next;
    }
    let (first, size) = local(m);
    let len = request.len as usize;
    m.counters.local_requests += 1;
    if m.settings.options.uninitialised {
        for lane in lanes(request.mask) {
            if !m.block.local_written.covers(first + lane * size + request.at[lane] as usize, len) {
                let text = format!("{len} bytes of local memory at {:#x}", request.at[lane]);
                m.report(Kind::Uninitialised, i, lane as u32, text);
            }
        }
    }
    let origin = m.block.local.as_ptr();
    let from = |lane: usize| origin.wrapping_add(first + lane * size + request.at[lane] as usize);
    // SAFETY: as above.
    unsafe { values::load_each(m, access, request.mask, from) };
    Flow::Next
}

/// [`super::access::store`] to shared or local memory.
///
/// # Safety
/// The access must be the running kernel's.
#[inline(always)]
pub unsafe fn store(m: &mut Machine, i: &Inst, access: &Access, space: Space, request: &Request) -> Flow {
    if let Err(flow) = check(m, i, space, request, "store") {
        return flow;
    }
    let len = request.len as usize;
    if space == Space::Shared {
        let now = stamp(m, 0);
        if !m.settings.options.races || m.history.plain(request, now, shared::Use::Write) {
            let origin = m.block.shared.as_mut_ptr();
            // SAFETY: the range of each lane was checked.
            unsafe { values::store(m, access, request, origin) };
            if request.pattern == Pattern::Run {
                m.block.shared_written.insert(request.first() as usize, 32 * len);
            } else {
                for lane in lanes(request.mask) {
                    let (word, bits) = aligned(request.at[lane] as usize, len);
                    m.block.shared_written.insert_word(word, bits);
                }
            }
        } else {
            let origin = m.block.shared.as_mut_ptr();
            for lane in lanes(request.mask) {
                let offset = request.at[lane] as usize;
                // SAFETY: the access is the running kernel's, and the range was checked.
                unsafe {
                    note_write(m, i, lane, offset, len, |m| values::pack(m, access, lane));
                    values::store_each(m, access, 1 << lane, |_| origin.wrapping_add(offset));
                }
            }
        }
        count_shared(m, request);
        return Flow::Next;
    }
    let (first, size) = local(m);
    let place = |lane: usize| first + lane * size + request.at[lane] as usize;
    let origin = m.block.local.as_mut_ptr();
    // SAFETY: the range of each lane was checked.
    unsafe { values::store_each(m, access, request.mask, |lane| origin.wrapping_add(place(lane))) };
    for lane in lanes(request.mask) {
        m.block.local_written.insert(place(lane), len);
    }
    m.counters.local_requests += 1;
    Flow::Next
}
