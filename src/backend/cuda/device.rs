//! One GPU: its context, its kernels, and the one way to call the driver.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::result::device;
use cudarc::driver::sys::{self, CUdevice_attribute, CUevent_flags};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use super::images;
use super::pending::Pending;
use crate::error::{Error, Result};

/// The oldest driver that takes the images, whose PTX is of version 8.1: CUDA 12.1, branch r530.
const OLDEST_DRIVER: i32 = 12_010;

/// The oldest GPU that the images are for: Ampere.
const OLDEST_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// One GPU. Cheap to share; everything on it runs in streams that the caller makes.
pub struct Gpu {
    ordinal: usize,
    name: String,
    compute_capability: (i32, i32),
    multiprocessors: usize,
    shared_bytes: usize,
    context: Arc<CudaContext>,
    kernels: Mutex<HashMap<String, Kernel>>,
    launches: AtomicU64,
    pending: Pending,
    /// The first failure: after it the context can't be trusted, and every call reports it.
    failure: OnceLock<(String, String)>,
}

/// A kernel of the images, which is loaded when it is first needed. Cheap to share.
#[derive(Clone, Debug)]
pub(crate) struct Kernel(Arc<Loading>);

#[derive(Debug)]
struct Loading {
    module: &'static str,
    image: &'static str,
    symbol: String,
    /// Locked while it is loaded, so that others wait for it.
    function: Mutex<Option<CudaFunction>>,
}

impl Kernel {
    /// Its name in the image.
    pub(crate) fn symbol(&self) -> &str {
        &self.0.symbol
    }
}

/// How many blocks and threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Blocks: x, y, z.
    pub(crate) blocks: (u32, u32, u32),
    /// Threads of a block: x, y, z.
    pub(crate) threads: (u32, u32, u32),
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared: u32,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.compute_capability;
        write!(f, "cuda:{} ({}, compute capability {major}.{minor})", self.ordinal, self.name)
    }
}

/// The first GPU that the engine runs on; `None` where there is no driver or no GPU.
///
/// # Errors
/// Why it runs on none of those that there are, in words.
pub(crate) fn first_usable() -> Result<Option<usize>, String> {
    if !driver_is_present() {
        return Ok(None);
    }
    let count = match CudaContext::device_count() {
        Ok(0) | Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(None),
        Ok(count) => count,
        Err(error) => return Err(describe(&error)),
    };
    check_driver()?;
    let mut first = None;
    for ordinal in 0..count {
        match check_age(ordinal) {
            Ok(()) => return Ok(usize::try_from(ordinal).ok()),
            Err(reason) => first = first.or(Some(reason)),
        }
    }
    first.map_or(Ok(None), Err)
}

/// Fails where the driver is too old for the images.
fn check_driver() -> Result<(), String> {
    let found = driver_version().map_err(|error| describe(&error))?;
    if found >= OLDEST_DRIVER {
        return Ok(());
    }
    let (found, oldest) = (version(found), version(OLDEST_DRIVER));
    Err(format!("the driver is for CUDA {found}, and {oldest} is needed (r530 or newer)"))
}

/// Fails where a GPU is too old for the images. It needs no context, which would take memory.
fn check_age(ordinal: i32) -> Result<(), String> {
    let look = || {
        let device = device::get(ordinal)?;
        let (major, minor) = (
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        );
        // SAFETY: the device was given out by the driver just now.
        let number = |attribute| unsafe { device::get_attribute(device, attribute) };
        Ok((device::get_name(device)?, (number(major)?, number(minor)?)))
    };
    let (name, (major, minor)) = look().map_err(|error| describe(&error))?;
    let oldest = OLDEST_COMPUTE_CAPABILITY;
    if (major, minor) >= oldest {
        return Ok(());
    }
    Err(format!(
        "{name} has compute capability {major}.{minor}, and {}.{} is needed (Ampere or newer)",
        oldest.0, oldest.1
    ))
}

/// Whether the driver's library can be loaded. Without it, any other call of cudarc panics.
fn driver_is_present() -> bool {
    // SAFETY: it only tries to open the library, whose initialisers are the driver's own.
    unsafe { sys::is_culib_present() }
}

impl Gpu {
    /// Opens the GPU of this number.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no driver, or it is too old, or there is no such GPU, or it is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let refuse = |reason: String| Error::Device { requested: format!("cuda:{ordinal}"), reason };
        if !driver_is_present() {
            return Err(refuse("no NVIDIA driver is installed (libcuda.so was not found)".to_owned()));
        }
        check_driver().map_err(refuse)?;
        let count = CudaContext::device_count().map_err(|error| refuse(describe(&error)))?;
        let number = i32::try_from(ordinal).ok().filter(|&number| number < count);
        let number = number.ok_or_else(|| refuse(format!("there {}", gpus(count))))?;
        check_age(number).map_err(refuse)?;
        let context = CudaContext::new(ordinal).map_err(|error| refuse(describe(&error)))?;
        // SAFETY: no memory is allocated yet. Without tracking, the order of work is ours to keep: all that touches
        // one buffer runs in one stream, or streams wait for each other by events.
        unsafe { context.disable_event_tracking() };
        Self::inspect(ordinal, context).map(Arc::new).map_err(|error| refuse(describe(&error)))
    }

    fn inspect(ordinal: usize, context: Arc<CudaContext>) -> Result<Self, DriverError> {
        let number = |attribute| context.attribute(attribute).map(|n| usize::try_from(n).unwrap_or(0));
        Ok(Self {
            ordinal,
            name: context.name()?,
            compute_capability: context.compute_capability()?,
            multiprocessors: number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            context,
            kernels: Mutex::default(),
            launches: AtomicU64::new(0),
            pending: Pending::default(),
            failure: OnceLock::new(),
        })
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.compute_capability
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Shared memory that one block can have, in bytes.
    pub fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.call(|| "cuMemGetInfo".to_owned(), || self.context.mem_get_info())
    }

    /// Kernels launched so far, those in graphs included.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Counts launches; wraps around, so that some can be taken back.
    pub(crate) fn count_launches(&self, more: u64) {
        self.launches.fetch_add(more, Ordering::Relaxed);
    }

    /// A new stream.
    pub(crate) fn stream(&self) -> Result<Arc<CudaStream>> {
        self.call(|| "cuStreamCreate".to_owned(), || self.context.new_stream())
    }

    /// Waits for all work in `stream`.
    pub(crate) fn synchronize(&self, stream: &CudaStream) -> Result<()> {
        self.call(|| "cuStreamSynchronize".to_owned(), || stream.synchronize())?;
        self.pending.ended(stream);
        Ok(())
    }

    /// A point in `stream` that can be waited for.
    pub(crate) fn record(&self, stream: &CudaStream) -> Result<CudaEvent> {
        self.call(|| "cuEventRecord".to_owned(), || stream.record_event(None))
    }

    /// A point in `stream` whose time the GPU keeps: see [`seconds`](Self::seconds).
    pub(crate) fn stamp(&self, stream: &CudaStream) -> Result<CudaEvent> {
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        self.call(|| "cuEventRecord".to_owned(), || stream.record_event(flags))
    }

    /// Seconds from one [`stamp`](Self::stamp) to another, which are waited for; `None` where the GPU has no time, as
    /// one that is only imitated.
    pub(crate) fn seconds(&self, start: &CudaEvent, end: &CudaEvent) -> Result<Option<f64>> {
        let ms = self.call(|| "cuEventElapsedTime".to_owned(), || start.elapsed_ms(end))?;
        Ok((ms > 0.0).then(|| f64::from(ms) / 1e3))
    }

    /// Lets what comes into `stream` wait for `event`.
    pub(crate) fn wait(&self, stream: &CudaStream, event: &CudaEvent) -> Result<()> {
        self.call(|| "cuStreamWaitEvent".to_owned(), || stream.wait(event))
    }

    /// Waits for `event`.
    pub(crate) fn wait_for(&self, event: &CudaEvent) -> Result<()> {
        self.call(|| "cuEventSynchronize".to_owned(), || event.synchronize())
    }

    /// The kernel `symbol` of the image `module`.
    ///
    /// # Errors
    /// [`Error::Cuda`] where no such kernel is built in.
    pub(crate) fn kernel(&self, module: &'static str, symbol: &str) -> Result<Kernel> {
        self.kernel_of(module, images::image(module), symbol)
    }

    /// The kernel `symbol` of `image`, which is called `module`.
    ///
    /// # Errors
    /// Those of [`kernel`](Self::kernel).
    pub(crate) fn kernel_of(
        &self,
        module: &'static str,
        image: Option<&'static str>,
        symbol: &str,
    ) -> Result<Kernel> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(symbol) {
            return Ok(kernel.clone());
        }
        let Some(image) = image.filter(|image| images::kernels(image).any(|(name, _)| name == symbol)) else {
            return Err(self.error(&format!("{symbol} of {module}"), "no such kernel is built in"));
        };
        let loading = Loading { module, image, symbol: symbol.to_owned(), function: Mutex::default() };
        let kernel = Kernel(Arc::new(loading));
        kernels.insert(symbol.to_owned(), kernel.clone());
        Ok(kernel)
    }

    /// Loads a kernel, for which the driver may have to compile it, unless it has been loaded. Several threads may do so.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver doesn't take the image (with the log of its compiler).
    pub(crate) fn load(&self, kernel: &Kernel) -> Result<CudaFunction> {
        let Loading { module, image, symbol, function } = &*kernel.0;
        let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = &*function {
            return Ok(function.clone());
        }
        let image = images::cut(image, symbol).unwrap_or_default();
        let loaded = self.call_with(
            || format!("cuModuleLoadData of {symbol} in {module}"),
            || self.context.load_module(Ptx::from_src(&image))?.load_function(symbol),
            || jit_log(&image),
        )?;
        Ok(function.insert(loaded).clone())
    }

    /// Loads kernels at the same time, each in a thread of its own, while `meanwhile` runs.
    ///
    /// # Errors
    /// What `meanwhile` fails with, or as [`load`](Self::load).
    pub(crate) fn load_all<T>(
        &self,
        kernels: &[&Kernel],
        meanwhile: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        std::thread::scope(|scope| {
            // Where no thread can be had, the kernel is loaded when it is first launched.
            let load = |kernel| {
                let builder = std::thread::Builder::new().name("loading a kernel".to_owned());
                builder.spawn_scoped(scope, move || self.load(kernel).map(drop)).ok()
            };
            let threads: Vec<_> = kernels.iter().copied().filter_map(load).collect();
            let done = meanwhile();
            // A thread that couldn't load its kernel has left the failure where every later call finds it.
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(()))).and(done)
        })
    }

    /// Lets a kernel have more than the 48 KiB of dynamic shared memory that every kernel may have.
    pub(crate) fn allow_shared(&self, kernel: &Kernel, bytes: usize) -> Result<()> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        let function = self.load(kernel)?;
        let operation =
            || format!("cuFuncSetAttribute of {}: {bytes} bytes of shared memory", kernel.0.symbol);
        self.call(operation, || function.set_attribute(attribute, value))
    }

    /// Puts a launch of `kernel` into `stream`.
    ///
    /// # Safety
    /// `args` must be what the kernel takes, and every address in it must be that of device memory of at least the
    /// extent that the kernel's contract names, alive until the launch has run.
    pub(crate) unsafe fn launch<A: DeviceRepr>(
        &self,
        stream: &CudaStream,
        kernel: &Kernel,
        grid: Grid,
        args: &A,
    ) -> Result<()> {
        let config =
            LaunchConfig { grid_dim: grid.blocks, block_dim: grid.threads, shared_mem_bytes: grid.shared };
        let function = self.load(kernel)?;
        let operation = || format!("launch of {} with {:?}", kernel.0.symbol, grid);
        self.count_launches(1);
        self.call(operation, || {
            let mut builder = stream.launch_builder(&function);
            builder.arg(args);
            // SAFETY: the caller's promise.
            unsafe { builder.launch(config) }.map(|_| ())
        })?;
        self.pending.launched(stream, kernel);
        Ok(())
    }

    /// What is on the GPU.
    pub(super) fn pending(&self) -> &Pending {
        &self.pending
    }

    /// Calls the driver. Any error is the last word: later calls repeat it and do nothing.
    pub(crate) fn call<T>(
        &self,
        operation: impl Fn() -> String,
        call: impl FnOnce() -> Result<T, DriverError>,
    ) -> Result<T> {
        self.call_with(operation, call, || None)
    }

    fn call_with<T>(
        &self,
        operation: impl Fn() -> String,
        call: impl FnOnce() -> Result<T, DriverError>,
        detail: impl FnOnce() -> Option<String>,
    ) -> Result<T> {
        if let Some((operation, reason)) = self.failure.get() {
            return Err(self.error(operation, reason));
        }
        // An error of a drop, which had nowhere to go, is kept by cudarc for the next call.
        call().map_err(|error| {
            let detail = detail().map_or_else(String::new, |detail| format!(": {detail}"));
            let reason = || format!("{}{detail}{}", describe(&error), self.pending);
            let (operation, reason) = self.failure.get_or_init(|| (operation(), reason()));
            self.error(operation, reason)
        })
    }

    fn error(&self, operation: &str, reason: &str) -> Error {
        Error::Cuda { device: self.ordinal, operation: operation.to_owned(), reason: reason.to_owned() }
    }

    /// The context, for what has no method of its own here.
    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }
}

/// The code's name and what the driver says of it.
fn describe(error: &DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("error {}", error.0 as u32),
    }
}

fn gpus(count: i32) -> String {
    match count {
        0 => "is no NVIDIA GPU".to_owned(),
        1 => "is one NVIDIA GPU, cuda:0".to_owned(),
        n => format!("are {n} NVIDIA GPUs, cuda:0 to cuda:{}", n - 1),
    }
}

/// The CUDA version of the driver: 12010 is 12.1.
fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: it writes one int to the address, and needs no context.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// What the driver's compiler says about an image that it refused.
fn jit_log(image: &str) -> Option<String> {
    const LOG_BYTES: usize = 4096;
    let image = CString::new(image).ok()?;
    let mut log = vec![0_u8; LOG_BYTES];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), LOG_BYTES as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image ends with a zero, the two options have one value each, and the log is as long as it says.
    // A context is current, since one was when the load failed; a module that loads after all is unloaded.
    unsafe {
        let loaded = sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        );
        if loaded.result().is_ok() {
            let _ = sys::cuModuleUnload(module);
        }
    }
    let text = CStr::from_bytes_until_nul(&log).ok()?.to_string_lossy().trim().to_owned();
    (!text.is_empty()).then_some(text)
}
