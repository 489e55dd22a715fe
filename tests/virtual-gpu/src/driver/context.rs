//! Devices and contexts. Every device has one context, its primary one.

use super::*;
use std::ffi::{c_char, c_int, c_uint};

entry! {
    fn cuInit(flags: c_uint) {
        if flags != 0 { Err(code::INVALID_VALUE) } else { device_count().map(drop) }
    }

    fn cuDriverGetVersion(version: *mut c_int) {
        let reported = match std::env::var(module::DRIVER_VERSION_VARIABLE) {
            Ok(text) => text.parse().map_err(|_| {
                errors::remember(&format!("{}: no number: {text}", module::DRIVER_VERSION_VARIABLE));
                code::INVALID_VALUE
            })?,
            Err(_) => module::DRIVER_VERSION,
        };
        give(version, reported)
    }

    fn cuDeviceGetCount(count: *mut c_int) {
        give(count, device_count()? as c_int)
    }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        if ordinal < 0 || ordinal as u64 >= device_count()? {
            return Err(code::INVALID_DEVICE);
        }
        perform(ordinal as u64, "cuDeviceGet", Call::Query, |_| Ok(()))?;
        give(device, ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) {
        let profile = perform(device as u64, "cuDeviceGetName", Call::Query, |d| Ok(d.profile))?;
        if name.is_null() || len < 1 {
            return Err(code::INVALID_VALUE);
        }
        let bytes = profile.name.as_bytes();
        let kept = bytes.len().min(len as usize - 1);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), name.cast(), kept);
        name.add(kept).write(0);
        Ok(())
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        let total = on_device(device as u64, |d| Ok(d.memory.capacity))?;
        give(bytes, total as usize)
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) {
        let found =
            perform(device as u64, "cuDeviceGetAttribute", Call::Query, |d| Ok(d.profile.attribute(attribute)))?;
        give(value, found.ok_or(code::INVALID_VALUE)?)
    }

    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) {
        on_device(device as u64, |_| Ok(()))?;
        let mut id = *b"virtual-gpu\0\0\0\0\0";
        id[15] = device as u8;
        give(uuid, id)
    }

    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        match cuDeviceGetUuid(uuid, device) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) {
        perform(device as u64, "cuDevicePrimaryCtxRetain", Call::Query, |d| {
            d.users += 1;
            Ok(())
        })?;
        give(context, handle(device as u64, Kind::Context, 1))
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        perform(device as u64, "cuDevicePrimaryCtxRelease_v2", Call::Query, |d| {
            d.users = d.users.saturating_sub(1);
            if d.users == 0 {
                d.reset();
            }
            Ok(())
        })
    }

    fn cuDevicePrimaryCtxReset_v2(device: c_int) {
        perform(device as u64, "cuDevicePrimaryCtxReset_v2", Call::Query, |d| {
            d.reset();
            Ok(())
        })
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: c_uint) {
        on_device(device as u64, |_| Ok(()))
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) {
        let users = on_device(device as u64, |d| Ok(d.users))?;
        give(flags, 0)?;
        give(active, c_int::from(users > 0))
    }

    fn cuCtxGetCurrent(context: *mut Handle) {
        if let Ok(ordinal) = current() {
            perform(ordinal, "cuCtxGetCurrent", Call::Query, |_| Ok(()))?;
        }
        give(context, current_handle())
    }

    fn cuCtxSetCurrent(context: Handle) {
        if !context.is_null() {
            let (ordinal, _) = open(context, Kind::Context)?;
            perform(ordinal, "cuCtxSetCurrent", Call::Query, |_| Ok(()))?;
        }
        set_current(context);
        Ok(())
    }

    fn cuCtxGetDevice(device: *mut c_int) {
        give(device, current()? as c_int)
    }

    fn cuCtxSetFlags(_flags: c_uint) {
        current().map(|_| ())
    }

    fn cuCtxSynchronize() {
        perform(current()?, "cuCtxSynchronize", Call::Synchronise, |d| {
            if !d.captures.is_empty() {
                d.captures.values_mut().for_each(|c| c.invalid = true);
                return Err(code::CAPTURE_UNSUPPORTED);
            }
            d.drain_all()
        })
    }

    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        current()?;
        give(least, 0)?;
        give(greatest, -5)
    }

    fn cuCtxGetLimit(value: *mut usize, limit: c_int) {
        current()?;
        // Stack, printf buffer and heap, as a fresh driver has them.
        let known = match limit {
            0 => 1024,
            1 => 1 << 20,
            2 => 8 << 20,
            _ => return Err(code::INVALID_VALUE),
        };
        give(value, known)
    }

    fn cuCtxSetLimit(_limit: c_int, _value: usize) {
        current().map(|_| ())
    }

    fn cuCtxGetCacheConfig(config: *mut c_int) {
        current()?;
        give(config, 0)
    }

    fn cuCtxSetCacheConfig(_config: c_int) {
        current().map(|_| ())
    }

    fn cuProfilerStart() { Ok(()) }

    fn cuProfilerStop() { Ok(()) }
}
