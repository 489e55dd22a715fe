//! The test's side of the driver, as C functions: a test and the driver are two images with statics of their own,
//! so they talk through these. [`crate::host`] wraps them.

// What each function does is said at its wrapper in `host`.
#![allow(clippy::missing_safety_doc, missing_docs)]

use crate::counters::Counters;
use crate::device::{Device, Totals, Work};
use crate::driver::{Call, add_device, on_device};
use crate::exec::Accumulate;
use crate::faults::{Injection, Mutation, Target};
use crate::graph::Graph;
use crate::profile::Profile;
use crate::sanitizer::{Kind, Options};
use std::ffi::{CStr, c_char};

/// What [`vcuda_configure`] sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Setting {
    /// [`Options::bits`].
    Sanitizers,
    /// Seed of all permutations; 0 for none.
    Seed,
    /// 1 if findings fail the launch.
    Strict,
    /// 0 exact, 1 sequential, 2 truncating.
    Accumulate,
    /// Warp instructions of a launch before it counts as hung.
    Budget,
    /// Forget launches, findings, calls and totals (the value is not used).
    Clear,
    /// Forget the error that the context is stuck with.
    Recover,
    /// 1 if a launch is waited for.
    Blocking,
    /// Count what is loaded of the allocation that begins there.
    Watch,
}

fn quietly(f: impl FnOnce() -> i64) -> i64 {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(-1)
}

fn look(ordinal: u64, f: impl FnOnce(&mut Device) -> Option<i64>) -> i64 {
    quietly(|| on_device(ordinal, |d| Ok(f(d))).ok().flatten().unwrap_or(-1))
}

/// Copies text into a caller's buffer, as much as fits; the full length.
unsafe fn copy_text(text: &str, to: *mut u8, capacity: usize) -> i64 {
    // SAFETY: the caller's promise that `capacity` bytes can be written.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), to, text.len().min(capacity)) };
    text.len() as i64
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_add_device(profile: *const c_char, memory: u64) -> i64 {
    quietly(|| {
        // SAFETY: the caller passes a C string.
        let name = unsafe { CStr::from_ptr(profile) }.to_string_lossy();
        let Ok(profile) = Profile::named(&name) else { return -1 };
        let memory = if memory == 0 { profile.memory } else { memory };
        add_device(profile, memory).map_or(-1, |ordinal| ordinal as i64)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn vcuda_configure(ordinal: u64, setting: u32, value: u64) -> i64 {
    look(ordinal, |d| {
        match setting {
            0 => d.settings.options = Options::from_bits(value as u32),
            1 => d.set_seed(value),
            2 => d.strict = value != 0,
            3 => {
                d.settings.accumulate = match value {
                    0 => Accumulate::Exact,
                    1 => Accumulate::Sequential,
                    _ => Accumulate::Truncating,
                }
            }
            4 => d.settings.budget = value,
            5 => {
                d.launches.clear();
                d.reports.clear();
                d.calls.clear();
                d.struck.clear();
                d.totals = Totals::default();
                d.totals.peak_bytes = d.memory.used;
            }
            6 => d.sticky = None,
            7 => d.blocking = value != 0,
            8 => d.memory.at(value)?.watch(),
            _ => return None,
        }
        Some(0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn vcuda_inject(ordinal: u64, call: u32, nth: u64, code: i32) -> i64 {
    look(ordinal, |d| {
        let target = Target::Kind(Call::numbered(call)?);
        d.injections.push(Injection { target, left: nth.max(1), code });
        Some(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_inject_into(ordinal: u64, name: *const c_char, nth: u64, code: i32) -> i64 {
    // SAFETY: the caller passes a C string.
    let function = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    look(ordinal, |d| {
        d.injections.push(Injection { target: Target::Function(function), left: nth.max(1), code });
        Some(0)
    })
}

/// `change` holds kernel, line and replacement, separated by the unit separator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_mutate(ordinal: u64, change: *const c_char, nth: u64) -> i64 {
    // SAFETY: the caller passes a C string.
    let change = unsafe { CStr::from_ptr(change) }.to_string_lossy();
    let mut parts = change.splitn(3, '\x1f').map(str::to_owned);
    let (Some(kernel), Some(find), Some(replacement)) = (parts.next(), parts.next(), parts.next()) else {
        return -1;
    };
    look(ordinal, |d| {
        d.mutations.push(Mutation { kernel, find, nth, replacement });
        Some(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_nudge(ordinal: u64, kernel: *const c_char, at: u64) -> i64 {
    // SAFETY: the caller passes a C string.
    let kernel = unsafe { CStr::from_ptr(kernel) }.to_string_lossy().into_owned();
    look(ordinal, |d| {
        d.nudges.push((kernel, at as usize));
        Some(0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn vcuda_launch_count(ordinal: u64) -> i64 {
    look(ordinal, |d| Some(d.launches.len() as i64))
}

/// `shape` gets grid, block, dynamic shared memory, and 1 if the launch came from a graph.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_launch(
    ordinal: u64,
    index: u64,
    name: *mut u8,
    capacity: usize,
    shape: *mut [u32; 8],
    counters: *mut Counters,
) -> i64 {
    look(ordinal, |d| {
        let launch = d.launches.get(index as usize)?;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: the caller's promise that all three can be written.
        unsafe {
            shape.write([gx, gy, gz, bx, by, bz, launch.dynamic_shared, u32::from(launch.from_graph)]);
            counters.write(launch.counters);
            Some(copy_text(&launch.kernel, name, capacity))
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn vcuda_report_count(ordinal: u64) -> i64 {
    look(ordinal, |d| Some(d.reports.len() as i64))
}

/// `place` gets kind, block, thread, PTX line and source line; the text holds kernel, source file and message,
/// separated by the unit separator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_report(
    ordinal: u64,
    index: u64,
    place: *mut [u32; 9],
    text: *mut u8,
    capacity: usize,
) -> i64 {
    look(ordinal, |d| {
        let r = d.reports.get(index as usize)?;
        let kind = Kind::ALL.iter().position(|&k| k == r.kind)? as u32;
        let ([bx, by, bz], [tx, ty, tz]) = (r.block, r.thread);
        let (file, line) = r.source.clone().unwrap_or_default();
        let all = format!("{}\x1f{file}\x1f{}", r.kernel, r.message);
        // SAFETY: the caller's promise that both can be written.
        unsafe {
            place.write([kind, bx, by, bz, tx, ty, tz, r.line, line]);
            Some(copy_text(&all, text, capacity))
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_totals(ordinal: u64, totals: *mut Totals) -> i64 {
    look(ordinal, |d| {
        let all =
            Totals { live_bytes: d.memory.live().1, used_bytes: d.memory.used, alive: d.alive(), ..d.totals };
        // SAFETY: the caller's promise.
        unsafe { totals.write(all) };
        Some(0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_calls(ordinal: u64, name: *const c_char) -> i64 {
    // SAFETY: the caller passes a C string.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    look(ordinal, |d| {
        if name.is_empty() {
            return Some(d.calls.values().sum::<u64>() as i64);
        }
        Some(d.calls.get(name.as_ref()).copied().unwrap_or(0) as i64)
    })
}

/// What [`vcuda_text`] tells: lists with an entry a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Listing {
    /// Functions in whose place an error was returned, in order.
    Struck,
    /// Functions that were called: name, a space, how often.
    Called,
    /// Nodes of the graphs that are ready to run: what it does, a colon, the numbers of the nodes before it. An empty
    /// line ends a graph.
    Graphs,
    /// Live allocations of device memory: address, a space, bytes.
    Allocations,
}

fn describe(graph: &Graph) -> String {
    let name = |work: &Work| match work {
        Work::Launch(kernel, _) => kernel.name.clone(),
        Work::ToDevice(..) => "copy to the device".into(),
        Work::ToHost(..) => "copy to the host".into(),
        _ => "other".to_string(),
    };
    let after = |after: &[usize]| after.iter().map(|node| format!(" {node}")).collect::<String>();
    let nodes = graph.nodes.iter().map(|node| format!("{}:{}\n", name(&node.work), after(&node.after)));
    nodes.collect::<String>() + "\n"
}

/// A [`Listing`], as much of it as fits; the full length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_text(ordinal: u64, listing: u32, text: *mut u8, capacity: usize) -> i64 {
    look(ordinal, |d| {
        let all: String = match listing {
            0 => d.struck.iter().map(|name| format!("{name}\n")).collect(),
            1 => d.calls.iter().map(|(name, count)| format!("{name} {count}\n")).collect(),
            2 => {
                let mut graphs: Vec<_> = d.executables.iter().collect();
                graphs.sort_unstable_by_key(|(id, _)| **id);
                graphs.into_iter().map(|(_, graph)| describe(graph)).collect()
            }
            3 => d.memory.list().map(|(base, size)| format!("{base} {size}\n")).collect(),
            _ => return None,
        };
        // SAFETY: the caller's promise that so many bytes can be written.
        Some(unsafe { copy_text(&all, text, capacity) })
    })
}

/// The bytes that were loaded of each sector of a watched allocation, as many as fit; how many sectors there are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vcuda_loads(ordinal: u64, base: u64, sectors: *mut u32, capacity: usize) -> i64 {
    look(ordinal, |d| {
        let loads = d.memory.at(base)?.loads()?;
        // SAFETY: the caller's promise that so many numbers can be written.
        unsafe { std::ptr::copy_nonoverlapping(loads.as_ptr(), sectors, loads.len().min(capacity)) };
        Some(loads.len() as i64)
    })
}
