//! Launches, attributes of functions, occupancy.

use super::*;
use crate::device::Work;
use crate::exec::Shape;
use crate::profile::{SHARED_DEFAULT, SHARED_RESERVED};
use crate::program::Kernel;
use std::ffi::{c_int, c_uint};

const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];

/// Checks what the driver checks before it takes a launch.
fn check(kernel: &Kernel, grid: [u32; 3], block: [u32; 3], shared: u32, allowed: u32) -> Result<(), Code> {
    let sized =
        |extent: [u32; 3], limit: [u32; 3]| extent.iter().zip(limit).all(|(&n, most)| n > 0 && n <= most);
    let refuse = |text: String| {
        errors::remember(&text);
        Err(code::INVALID_VALUE)
    };
    if !sized(grid, MAX_GRID) || !sized(block, MAX_BLOCK) {
        return refuse(format!("grid {grid:?} of blocks {block:?}"));
    }
    let threads: u32 = block.iter().product();
    let most = kernel.max_threads.map_or(1024, |n| n.iter().product()).min(1024);
    if threads > most {
        return refuse(format!("{threads} threads a block, {} takes {most}", kernel.name));
    }
    if kernel.required_threads.is_some_and(|required| required != block) {
        return refuse(format!("{} needs blocks of {:?}", kernel.name, kernel.required_threads));
    }
    if shared > allowed {
        return refuse(format!("{shared} bytes of dynamic shared memory, {allowed} are allowed"));
    }
    Ok(())
}

/// Copies the parameters, whose sizes only the kernel knows.
unsafe fn parameters(kernel: &Kernel, params: *mut Handle) -> Result<Vec<u8>, Code> {
    let mut out = vec![0; kernel.param_bytes];
    if !kernel.params.is_empty() && params.is_null() {
        return Err(code::INVALID_VALUE);
    }
    for (n, param) in kernel.params.iter().enumerate() {
        // SAFETY: the caller's promise: one pointer for each parameter, to at least its size.
        unsafe {
            let from = *params.add(n);
            if from.is_null() {
                return Err(code::INVALID_VALUE);
            }
            let to = &mut out[param.offset..param.offset + param.size];
            std::ptr::copy_nonoverlapping(from.cast(), to.as_mut_ptr(), param.size);
        }
    }
    Ok(out)
}

struct Request {
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Handle,
    params: *mut Handle,
    cooperative: bool,
}

unsafe fn launch(request: &Request, name: &'static str) -> Result<(), Code> {
    let (ordinal, id) = open(request.function, Kind::Function)?;
    let (_, stream) = open_stream(request.stream)?;
    perform(ordinal, name, Call::Launch, |d| {
        let function = d.functions.get(&id).ok_or(code::INVALID_HANDLE)?;
        let kernel = Arc::clone(&function.kernel);
        let &Request { grid, block, shared, cooperative, .. } = request;
        check(&kernel, grid, block, shared, function.max_dynamic_shared)?;
        let threads = block.iter().product();
        if cooperative {
            let total = kernel.shared_bytes as u32 + shared;
            let most = d.profile.resident_blocks(threads, total) * d.profile.multiprocessors;
            if u64::from(most) < grid.iter().map(|&n| u64::from(n)).product() {
                return Err(code::COOPERATIVE_LAUNCH_TOO_LARGE);
            }
        }
        // SAFETY: the caller's promise.
        let mut params = unsafe { parameters(&kernel, request.params)? };
        for (name, at) in &d.nudges {
            if let Some(bytes) = params.get_mut(*at..*at + 4).filter(|_| *name == kernel.name) {
                let number = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                bytes.copy_from_slice(&number.wrapping_add(1).to_le_bytes());
                *d.calls.entry(super::module::MUTATION).or_default() += 1;
            }
        }
        let shape = Shape { grid, block, dynamic_shared: shared, params, cooperative, number: 0 };
        d.enqueue(stream, Work::Launch(kernel, shape))?;
        if d.blocking && !d.capturing(stream) { d.drain(stream) } else { Ok(()) }
    })
}

/// Blocks a multiprocessor holds of a function.
fn resident(function: Handle, threads: c_int, dynamic: usize) -> Result<u32, Code> {
    let (ordinal, id) = open(function, Kind::Function)?;
    on_device(ordinal, |d| {
        let kernel = &d.functions.get(&id).ok_or(code::INVALID_HANDLE)?.kernel;
        let shared = u32::try_from(kernel.shared_bytes + dynamic).map_err(|_| code::INVALID_VALUE)?;
        if !(1..=1024).contains(&threads) || shared > d.profile.shared_opt_in {
            return Ok(0);
        }
        Ok(d.profile.resident_blocks(threads as u32, shared))
    })
}

type SharedOfBlock = Option<unsafe extern "C" fn(c_int) -> usize>;

/// The block size with the most threads resident; the largest on ties.
unsafe fn best_block(
    function: Handle,
    shared_of: SharedOfBlock,
    dynamic: usize,
    limit: c_int,
) -> Result<(c_int, c_int), Code> {
    let (ordinal, id) = open(function, Kind::Function)?;
    let (most, processors) = on_device(ordinal, |d| {
        let kernel = &d.functions.get(&id).ok_or(code::INVALID_HANDLE)?.kernel;
        let most = kernel.max_threads.map_or(1024, |n| n.iter().product()).min(1024);
        Ok((most as c_int, d.profile.multiprocessors as c_int))
    })?;
    let limit = if limit > 0 { limit.min(most) } else { most };
    let mut best = (0, 0, 0);
    for block in (32..=limit).rev().step_by(32) {
        // SAFETY: the caller's promise.
        let shared = shared_of.map_or(dynamic, |f| unsafe { f(block) });
        let blocks = resident(function, block, shared)? as c_int;
        if blocks * block > best.0 {
            best = (blocks * block, block, blocks * processors);
        }
    }
    Ok((best.2, best.1))
}

entry! {
    fn cuLaunchKernel(
        function: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared: c_uint, stream: Handle, params: *mut Handle, extra: *mut Handle,
    ) {
        if !extra.is_null() {
            return Err(code::NOT_SUPPORTED);
        }
        let (grid, block) = ([gx, gy, gz], [bx, by, bz]);
        let request = Request { function, grid, block, shared, stream, params, cooperative: false };
        launch(&request, "cuLaunchKernel")
    }

    fn cuLaunchCooperativeKernel(
        function: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared: c_uint, stream: Handle, params: *mut Handle,
    ) {
        let (grid, block) = ([gx, gy, gz], [bx, by, bz]);
        let request = Request { function, grid, block, shared, stream, params, cooperative: true };
        launch(&request, "cuLaunchCooperativeKernel")
    }

    fn cuLaunchHostFunc(stream: Handle, function: Option<unsafe extern "C" fn(Handle)>, data: Handle) {
        let (ordinal, id) = open_stream(stream)?;
        let function = function.ok_or(code::INVALID_VALUE)?;
        perform(ordinal, "cuLaunchHostFunc", Call::Launch, |d| d.enqueue(id, Work::Host(function, data)))
    }

    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Handle) {
        let (ordinal, id) = open(function, Kind::Function)?;
        let found = on_device(ordinal, |d| {
            let f = d.functions.get(&id).ok_or(code::INVALID_HANDLE)?;
            Ok(match attribute {
                0 => f.kernel.max_threads.map_or(1024, |n| n.iter().product::<u32>()),
                1 => f.kernel.shared_bytes as u32,
                2 => 0,
                3 => f.kernel.local_bytes as u32,
                // Registers are the business of ptxas; nothing here may depend on a number for them.
                4 => 0,
                5 | 6 => d.profile.capability.0 * 10 + d.profile.capability.1,
                8 => f.max_dynamic_shared,
                7 | 9 => 0,
                _ => return Err(code::INVALID_VALUE),
            })
        })?;
        give(value, found as c_int)
    }

    fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) {
        let (ordinal, id) = open(function, Kind::Function)?;
        perform(ordinal, "cuFuncSetAttribute", Call::Query, |d| {
            let opt_in = d.profile.shared_opt_in;
            let f = d.functions.get_mut(&id).ok_or(code::INVALID_HANDLE)?;
            match attribute {
                8 => {
                    let value = u32::try_from(value).map_err(|_| code::INVALID_VALUE)?;
                    if value + f.kernel.shared_bytes as u32 > opt_in {
                        return Err(code::INVALID_VALUE);
                    }
                    let default = SHARED_DEFAULT.saturating_sub(f.kernel.shared_bytes as u32);
                    f.max_dynamic_shared = value.max(default);
                    Ok(())
                }
                9 if (-1..=100).contains(&value) => Ok(()),
                _ => Err(code::INVALID_VALUE),
            }
        })
    }

    fn cuFuncSetCacheConfig(function: Handle, _config: c_int) {
        open(function, Kind::Function).map(|_| ())
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: *mut c_int, function: Handle, threads: c_int, shared: usize) {
        give(blocks, resident(function, threads, shared)? as c_int)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int, function: Handle, threads: c_int, shared: usize, _flags: c_uint,
    ) {
        give(blocks, resident(function, threads, shared)? as c_int)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: *mut c_int, block: *mut c_int, function: Handle, shared_of: SharedOfBlock, shared: usize, limit: c_int,
    ) {
        let (blocks, threads) = best_block(function, shared_of, shared, limit)?;
        give(grid, blocks)?;
        give(block, threads)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: *mut c_int, block: *mut c_int, function: Handle, shared_of: SharedOfBlock, shared: usize,
        limit: c_int, _flags: c_uint,
    ) {
        let (blocks, threads) = best_block(function, shared_of, shared, limit)?;
        give(grid, blocks)?;
        give(block, threads)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: *mut usize, function: Handle, blocks: c_int, _threads: c_int) {
        let (ordinal, id) = open(function, Kind::Function)?;
        let found = on_device(ordinal, |d| {
            let kernel = &d.functions.get(&id).ok_or(code::INVALID_HANDLE)?.kernel;
            if blocks < 1 {
                return Err(code::INVALID_VALUE);
            }
            let each = (d.profile.shared_per_multiprocessor / blocks as u32).saturating_sub(SHARED_RESERVED);
            Ok(each.min(d.profile.shared_opt_in).saturating_sub(kernel.shared_bytes as u32))
        })?;
        give(bytes, found as usize)
    }
}
