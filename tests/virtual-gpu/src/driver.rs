//! The exported driver interface: what cudarc calls, with the error codes of the real driver.
//!
//! Handles are numbers in the shape of pointers, never followed: device, kind, and a number of its own.

// The functions have the contracts of the CUDA driver API, which documents them.
#![allow(clippy::missing_safety_doc, missing_docs)]

pub mod context;
pub mod errors;
pub mod graph;
pub mod kernel;
pub mod memory;
pub mod module;
pub mod stream;

use crate::device::{Code, Device, code};
use crate::profile::{Profile, VARIABLE};
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// An opaque handle.
pub type Handle = *mut c_void;

/// What a call does, for the injection of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Call {
    /// Anything below.
    Any,
    /// Allocations of device or pinned memory.
    Allocate,
    /// Launches of kernels, launches and uploads of graphs.
    Launch,
    /// Copies and fills.
    Copy,
    /// Loads of modules, look-ups in them, instantiations of graphs.
    Module,
    /// Waiting.
    Synchronise,
    /// Streams, events and captures.
    Stream,
    /// Everything else; not part of `Any`.
    Query,
}

/// Kind of a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Kind {
    Context = 1,
    Stream,
    Event,
    Module,
    Function,
    Graph,
    Executable,
    Pool,
}

impl Call {
    /// The kind of that number.
    pub fn numbered(number: u32) -> Option<Self> {
        use Call::{Allocate, Any, Copy, Launch, Module, Query, Stream, Synchronise};
        let all = [Any, Allocate, Launch, Copy, Module, Synchronise, Stream, Query];
        all.into_iter().find(|&call| call as u32 == number)
    }
}

static DEVICES: RwLock<Vec<Arc<Mutex<Device>>>> = RwLock::new(Vec::new());

thread_local! {
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// The devices; the first are made at the first look, as [`VARIABLE`] names them. There are none where that is wrong.
fn with_devices<T>(f: impl FnOnce(&mut Vec<Arc<Mutex<Device>>>) -> T) -> Result<T, Code> {
    let mut devices = DEVICES.write().unwrap_or_else(PoisonError::into_inner);
    if devices.is_empty() {
        let profiles = Profile::chosen(std::env::var_os(VARIABLE).as_deref()).map_err(|reason| {
            errors::remember(&reason);
            code::NO_DEVICE
        })?;
        for (ordinal, profile) in (0..).zip(profiles) {
            devices.push(Arc::new(Mutex::new(Device::new(profile, profile.memory, ordinal))));
        }
    }
    Ok(f(&mut devices))
}

/// Adds a device; its ordinal.
pub fn add_device(profile: Profile, memory: u64) -> Result<u64, Code> {
    with_devices(|devices| {
        let ordinal = devices.len() as u64;
        devices.push(Arc::new(Mutex::new(Device::new(profile, memory, ordinal))));
        ordinal
    })
}

/// How many devices there are.
pub fn device_count() -> Result<u64, Code> {
    with_devices(|devices| devices.len() as u64)
}

/// Works on a device under its lock.
pub fn on_device<T>(ordinal: u64, f: impl FnOnce(&mut Device) -> Result<T, Code>) -> Result<T, Code> {
    let device = with_devices(|devices| devices.get(ordinal as usize).cloned())?;
    let device = device.ok_or(code::INVALID_DEVICE)?;
    let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
    f(&mut device)
}

/// The handle of a thing.
pub fn handle(ordinal: u64, kind: Kind, id: u64) -> Handle {
    ((ordinal + 1) << 40 | (kind as u64) << 36 | id) as Handle
}

/// Ordinal and number of a handle of the expected kind.
pub fn open(handle: Handle, kind: Kind) -> Result<(u64, u64), Code> {
    let bits = handle as u64;
    if bits >> 36 & 0xf != kind as u64 || bits >> 40 == 0 {
        return Err(code::INVALID_HANDLE);
    }
    Ok(((bits >> 40) - 1, bits & ((1 << 36) - 1)))
}

/// Ordinal and number of a stream; null and the per-thread handle are stream 0 of the current device.
pub fn open_stream(stream: Handle) -> Result<(u64, u64), Code> {
    match stream as u64 {
        0..=2 => Ok((current()?, 0)),
        _ => open(stream, Kind::Stream),
    }
}

/// The current device.
pub fn current() -> Result<u64, Code> {
    let bits = CURRENT.get();
    if bits == 0 {
        return Err(code::INVALID_CONTEXT);
    }
    open(bits as Handle, Kind::Context).map(|(ordinal, _)| ordinal)
}

/// The current context's handle, null if none.
pub fn current_handle() -> Handle {
    CURRENT.get() as Handle
}

/// Makes a context current.
pub fn set_current(context: Handle) {
    CURRENT.set(context as u64);
}

/// Notes a call on a device: counts it, injects errors, and refuses if the context has failed.
pub fn note(device: &mut Device, name: &'static str, call: Call) -> Result<(), Code> {
    *device.calls.entry(name).or_default() += 1;
    let mut struck = None;
    device.injections.retain_mut(|injection| {
        let strikes = injection.strikes(name, call);
        if strikes {
            struck = Some(injection.code);
        }
        !strikes
    });
    if let Some(code) = struck {
        device.struck.push(name);
        errors::remember("injected by the test");
        return Err(code);
    }
    match device.sticky {
        Some(code) if call != Call::Query => Err(code),
        _ => Ok(()),
    }
}

/// Notes a call on a device and does its work.
pub fn perform<T>(
    ordinal: u64,
    name: &'static str,
    call: Call,
    f: impl FnOnce(&mut Device) -> Result<T, Code>,
) -> Result<T, Code> {
    on_device(ordinal, |device| {
        note(device, name, call)?;
        f(device)
    })
}

/// The code to return; a panic of this library becomes "unknown error", never unwinding into C.
pub fn finish(f: impl FnOnce() -> Result<(), Code>) -> Code {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => code::UNKNOWN,
    }
}

/// Writes a result through a caller's pointer.
///
/// # Safety
/// `to` must be null or valid for a write.
pub unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// Entry points: each gets a body that returns `Result<(), Code>`.
macro_rules! entry {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) { $($body:tt)* })*) => {$(
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
            // SAFETY: the contract of the driver function of this name: pointers are valid for what it does.
            $crate::driver::finish(|| unsafe { $($body)* })
        }
    )*};
}
pub(crate) use entry;
