//! Allocations, copies and fills.

use super::*;
use crate::device::{Source, Work};
use crate::memory::State;
use std::ffi::{c_int, c_uint};

/// What may not happen while a stream is captured ends the capture.
pub(super) fn invalidate_captures(d: &mut Device) -> Result<(), Code> {
    if d.captures.is_empty() {
        return Ok(());
    }
    d.captures.values_mut().for_each(|c| c.invalid = true);
    Err(code::CAPTURE_UNSUPPORTED)
}

fn allocate(d: &mut Device, size: usize, state: State) -> Result<u64, Code> {
    if size == 0 {
        return Err(code::INVALID_VALUE);
    }
    let mut found = d.memory.allocate(size as u64, state);
    if found.is_none() {
        // Frees that streams have not reached give their memory back, as in the driver's pool.
        d.drain_all()?;
        found = d.memory.allocate(size as u64, state);
    }
    d.totals.peak_bytes = d.totals.peak_bytes.max(d.memory.used);
    found.ok_or(code::OUT_OF_MEMORY)
}

unsafe fn allocate_async(to: *mut u64, size: usize, stream: Handle, name: &'static str) -> Result<(), Code> {
    let (ordinal, id) = open_stream(stream)?;
    let base = perform(ordinal, name, Call::Allocate, |d| {
        if d.capturing(id) {
            return d.enqueue(id, Work::Allocate(0)).map(|()| 0);
        }
        let base = allocate(d, size, State::Pending)?;
        d.enqueue(id, Work::Allocate(base))?;
        Ok(base)
    })?;
    // SAFETY: the caller's promise.
    unsafe { give(to, base) }
}

/// Whether host memory is pinned: copies from it are read when they run, not when they are asked for.
fn is_pinned(d: &Device, host: *const u8, len: usize) -> bool {
    let inside = |(&base, words): (&u64, &Vec<u64>)| {
        let offset = (host as u64).wrapping_sub(base);
        offset.checked_add(len as u64).is_some_and(|end| end <= words.len() as u64 * 8)
    };
    d.pinned.iter().any(inside)
}

unsafe fn to_device(
    to: u64,
    from: *const u8,
    len: usize,
    stream: Handle,
    name: &'static str,
    wait: bool,
) -> Result<(), Code> {
    let (ordinal, id) = open_stream(stream)?;
    perform(ordinal, name, Call::Copy, |d| {
        if len == 0 {
            return Ok(());
        }
        if wait {
            invalidate_captures(d)?;
        }
        let source = if d.capturing(id) || is_pinned(d, from, len) {
            Source::Pointer(from, len)
        } else {
            // SAFETY: the caller's promise that the range can be read.
            Source::Snapshot(unsafe { std::slice::from_raw_parts(from, len) }.to_vec())
        };
        d.enqueue(id, Work::ToDevice(to, source))?;
        if wait { d.drain(id) } else { Ok(()) }
    })
}

unsafe fn to_host(
    to: *mut u8,
    from: u64,
    len: usize,
    stream: Handle,
    name: &'static str,
    wait: bool,
) -> Result<(), Code> {
    let (ordinal, id) = open_stream(stream)?;
    perform(ordinal, name, Call::Copy, |d| {
        if len == 0 {
            return Ok(());
        }
        if wait {
            invalidate_captures(d)?;
        }
        d.enqueue(id, Work::ToHost(to, from, len))?;
        // A copy to pageable memory returns when it is done.
        let pageable = !d.capturing(id) && !is_pinned(d, to, len);
        if wait || pageable { d.drain(id) } else { Ok(()) }
    })
}

unsafe fn between(to: u64, from: u64, len: usize, stream: Handle, name: &'static str) -> Result<(), Code> {
    let (ordinal, id) = open_stream(stream)?;
    perform(ordinal, name, Call::Copy, |d| {
        if len == 0 { Ok(()) } else { d.enqueue(id, Work::Between(to, from, len)) }
    })
}

fn fill(
    to: u64,
    pattern: u32,
    width: usize,
    count: usize,
    stream: Handle,
    name: &'static str,
) -> Result<(), Code> {
    let (ordinal, id) = open_stream(stream)?;
    perform(ordinal, name, Call::Copy, |d| {
        if !to.is_multiple_of(width as u64) {
            return Err(code::INVALID_VALUE);
        }
        if count == 0 { Ok(()) } else { d.enqueue(id, Work::Fill(to, pattern, width, count)) }
    })
}

entry! {
    fn cuMemAlloc_v2(to: *mut u64, size: usize) {
        let base = perform(current()?, "cuMemAlloc_v2", Call::Allocate, |d| {
            invalidate_captures(d)?;
            allocate(d, size, State::Live)
        })?;
        give(to, base)
    }

    fn cuMemFree_v2(base: u64) {
        if base == 0 {
            return Ok(());
        }
        perform(current()?, "cuMemFree_v2", Call::Query, |d| {
            invalidate_captures(d)?;
            // The real call waits for the device.
            let _ = d.drain_all();
            d.note_free();
            if d.memory.free(base) { Ok(()) } else { Err(code::INVALID_VALUE) }
        })
    }

    fn cuMemAllocAsync(to: *mut u64, size: usize, stream: Handle) {
        allocate_async(to, size, stream, "cuMemAllocAsync")
    }

    fn cuMemAllocFromPoolAsync(to: *mut u64, size: usize, pool: Handle, stream: Handle) {
        open(pool, Kind::Pool)?;
        allocate_async(to, size, stream, "cuMemAllocFromPoolAsync")
    }

    fn cuMemFreeAsync(base: u64, stream: Handle) {
        if base == 0 {
            return Ok(());
        }
        let (ordinal, id) = open_stream(stream)?;
        perform(ordinal, "cuMemFreeAsync", Call::Query, |d| {
            if d.memory.at(base).is_none() {
                return Err(code::INVALID_VALUE);
            }
            d.note_free();
            d.enqueue(id, Work::Free(base))
        })
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let (used, capacity) = perform(current()?, "cuMemGetInfo_v2", Call::Query, |d| {
            Ok((d.memory.used, d.memory.capacity))
        })?;
        give(free, (capacity - used) as usize)?;
        give(total, capacity as usize)
    }

    fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, address: u64) {
        let found = on_device(current()?, |d| d.memory.locate(address).ok_or(code::NOT_FOUND))?;
        if !base.is_null() {
            base.write(found.0);
        }
        if !size.is_null() {
            size.write(found.1 as usize);
        }
        Ok(())
    }

    fn cuMemHostAlloc(to: *mut Handle, size: usize, _flags: c_uint) {
        let base = perform(current()?, "cuMemHostAlloc", Call::Allocate, |d| {
            if size == 0 {
                return Err(code::INVALID_VALUE);
            }
            let mut words = vec![u64::MAX; size.div_ceil(8)];
            let base = words.as_mut_ptr();
            d.memory.map_host(base.cast(), size as u64);
            d.pinned.insert(base as u64, words);
            Ok(base)
        })?;
        give(to, base.cast())
    }

    fn cuMemAllocHost_v2(to: *mut Handle, size: usize) {
        match cuMemHostAlloc(to, size, 0) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    fn cuMemFreeHost(base: Handle) {
        perform(current()?, "cuMemFreeHost", Call::Query, |d| {
            let _ = d.drain_all();
            d.note_free();
            d.memory.unmap_host(base as u64);
            d.pinned.remove(&(base as u64)).map(|_| ()).ok_or(code::INVALID_VALUE)
        })
    }

    fn cuMemHostGetDevicePointer_v2(to: *mut u64, host: Handle, _flags: c_uint) {
        give(to, host as u64)
    }

    fn cuMemcpyHtoD_v2(to: u64, from: *const u8, len: usize) {
        to_device(to, from, len, std::ptr::null_mut(), "cuMemcpyHtoD_v2", true)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, len: usize, stream: Handle) {
        to_device(to, from, len, stream, "cuMemcpyHtoDAsync_v2", false)
    }

    fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, len: usize) {
        to_host(to, from, len, std::ptr::null_mut(), "cuMemcpyDtoH_v2", true)
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, len: usize, stream: Handle) {
        to_host(to, from, len, stream, "cuMemcpyDtoHAsync_v2", false)
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) {
        between(to, from, len, std::ptr::null_mut(), "cuMemcpyDtoD_v2")
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: Handle) {
        between(to, from, len, stream, "cuMemcpyDtoDAsync_v2")
    }

    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) {
        fill(to, value.into(), 1, count, std::ptr::null_mut(), "cuMemsetD8_v2")
    }

    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: Handle) {
        fill(to, value.into(), 1, count, stream, "cuMemsetD8Async")
    }

    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: Handle) {
        fill(to, value.into(), 2, count, stream, "cuMemsetD16Async")
    }

    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: Handle) {
        fill(to, value, 4, count, stream, "cuMemsetD32Async")
    }

    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) {
        fill(to, value, 4, count, std::ptr::null_mut(), "cuMemsetD32_v2")
    }

    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) {
        on_device(device as u64, |_| Ok(()))?;
        give(pool, handle(device as u64, Kind::Pool, 1))
    }

    fn cuDeviceGetMemPool(pool: *mut Handle, device: c_int) {
        on_device(device as u64, |_| Ok(()))?;
        give(pool, handle(device as u64, Kind::Pool, 1))
    }

    fn cuDeviceSetMemPool(device: c_int, pool: Handle) {
        open(pool, Kind::Pool)?;
        on_device(device as u64, |_| Ok(()))
    }

    fn cuMemPoolTrimTo(pool: Handle, _keep: usize) {
        open(pool, Kind::Pool).map(|_| ())
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_int, _value: Handle) {
        open(pool, Kind::Pool)?;
        // Reuse policies and the release threshold change speed only.
        if (1..=4).contains(&attribute) { Ok(()) } else { Err(code::INVALID_VALUE) }
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_int, value: *mut u64) {
        let (ordinal, _) = open(pool, Kind::Pool)?;
        let (used, peak) = on_device(ordinal, |d| Ok((d.memory.used, d.totals.peak_bytes)))?;
        match attribute {
            1..=3 => give(value.cast::<c_int>(), 1),
            4 => give(value, 0),
            5 | 7 => give(value, used),
            6 | 8 => give(value, peak),
            _ => Err(code::INVALID_VALUE),
        }
    }
}
