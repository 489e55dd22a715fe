//! The test's side of the virtual GPU, in safe Rust.
//!
//! ```no_run
//! let driver = virtual_gpu::host::Driver::load().unwrap(); // before any cudarc call
//! let gpu = driver.device("h100").unwrap();
//! // cudarc::driver::CudaContext::new(gpu.ordinal()) … launch kernels …
//! assert_eq!(gpu.reports(), []);
//! assert_eq!(gpu.launches()[0].counters.shared_waves, 32);
//! ```

use crate::control::{Listing, Setting};
use crate::counters::Counters;
pub use crate::device::{Alive, Launch, Totals};
pub use crate::driver::Call;
use crate::exec::Accumulate;
use crate::profile::{Profile, VARIABLE};
pub use crate::sanitizer::{Kind, Options, Report};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Why the driver is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// `libvirtual_gpu.so` is not where cargo puts it; the places looked at.
    NotFound(Vec<PathBuf>),
    /// The dynamic linker refused it, or a function is missing.
    Link(String),
    /// No such profile, asked for here or in the environment; those that there are.
    UnknownProfile(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::NotFound(places) => write!(f, "libvirtual_gpu.so is in none of {places:?}"),
            Error::Link(text) => write!(f, "cannot link libvirtual_gpu.so: {text}"),
            Error::UnknownProfile(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}

/// The functions of [`crate::control`] in the loaded driver.
struct Functions {
    add_device: unsafe extern "C" fn(*const c_char, u64) -> i64,
    configure: unsafe extern "C" fn(u64, u32, u64) -> i64,
    inject: unsafe extern "C" fn(u64, u32, u64, i32) -> i64,
    inject_into: unsafe extern "C" fn(u64, *const c_char, u64, i32) -> i64,
    mutate: unsafe extern "C" fn(u64, *const c_char, u64) -> i64,
    nudge: unsafe extern "C" fn(u64, *const c_char, u64) -> i64,
    launch_count: unsafe extern "C" fn(u64) -> i64,
    launch: unsafe extern "C" fn(u64, u64, *mut u8, usize, *mut [u32; 8], *mut Counters) -> i64,
    report_count: unsafe extern "C" fn(u64) -> i64,
    report: unsafe extern "C" fn(u64, u64, *mut [u32; 9], *mut u8, usize) -> i64,
    totals: unsafe extern "C" fn(u64, *mut Totals) -> i64,
    calls: unsafe extern "C" fn(u64, *const c_char) -> i64,
    text: unsafe extern "C" fn(u64, u32, *mut u8, usize) -> i64,
    loads: unsafe extern "C" fn(u64, u64, *mut u32, usize) -> i64,
}

static DRIVER: OnceLock<Result<Functions, Error>> = OnceLock::new();

/// The loaded driver. From the moment it is loaded, cudarc's `libcuda.so` is this one.
#[derive(Clone, Copy)]
pub struct Driver(&'static Functions);

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

impl Driver {
    /// Loads `libvirtual_gpu.so` from beside the running executable, where cargo puts it, once a process. To be
    /// called before anything that loads `libcuda.so`.
    ///
    /// # Errors
    /// When it is not there or cannot be linked.
    pub fn load() -> Result<Driver, Error> {
        let loaded = DRIVER.get_or_init(|| {
            let path = Self::path()?;
            Functions::link(&path)
        });
        loaded.as_ref().map(Driver).map_err(Clone::clone)
    }

    /// Where the driver lies: to link it as `libcuda.so` for a child process.
    ///
    /// # Errors
    /// When it is in none of the places where cargo puts it.
    pub fn path() -> Result<PathBuf, Error> {
        let exe = std::env::current_exe().unwrap_or_default();
        let name = "libvirtual_gpu.so";
        let places: Vec<PathBuf> =
            exe.ancestors().skip(1).take(3).flat_map(|d| [d.join(name), d.join("deps").join(name)]).collect();
        places.iter().find(|p| p.is_file()).cloned().ok_or(Error::NotFound(places))
    }

    /// Adds a device with the memory of its profile (`a100`, `rtx4090`, `h100`).
    ///
    /// # Errors
    /// When there is no such profile.
    pub fn device(self, profile: &str) -> Result<Gpu, Error> {
        self.device_with_memory(profile, 0)
    }

    /// Adds a device with `bytes` of memory.
    ///
    /// # Errors
    /// When there is no such profile.
    pub fn device_with_memory(self, profile: &str, bytes: u64) -> Result<Gpu, Error> {
        let profile = Profile::named(profile).map_err(Error::UnknownProfile)?;
        Profile::chosen(std::env::var_os(VARIABLE).as_deref()).map_err(Error::UnknownProfile)?;
        let name = CString::new(profile.key).unwrap_or_default();
        // SAFETY: the function has this signature, and the string ends in a zero.
        let ordinal = unsafe { (self.0.add_device)(name.as_ptr(), bytes) };
        let ordinal =
            u64::try_from(ordinal).map_err(|_| Error::Link("vcuda_add_device has failed".into()))?;
        Ok(Gpu { driver: self, ordinal })
    }

    /// The device with that number, which the program under test uses.
    pub fn existing(self, ordinal: usize) -> Gpu {
        Gpu { driver: self, ordinal: ordinal as u64 }
    }
}

impl Functions {
    fn link(path: &Path) -> Result<Functions, Error> {
        let failed = |e: libloading::Error| Error::Link(e.to_string());
        // SAFETY: the library is this crate's own and runs no code when it is loaded; the symbols have these types
        // in `control`; the handle is kept for ever.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL).map_err(failed)?;
            let functions = Functions {
                add_device: *library.get(b"vcuda_add_device\0").map_err(failed)?,
                configure: *library.get(b"vcuda_configure\0").map_err(failed)?,
                inject: *library.get(b"vcuda_inject\0").map_err(failed)?,
                inject_into: *library.get(b"vcuda_inject_into\0").map_err(failed)?,
                mutate: *library.get(b"vcuda_mutate\0").map_err(failed)?,
                nudge: *library.get(b"vcuda_nudge\0").map_err(failed)?,
                launch_count: *library.get(b"vcuda_launch_count\0").map_err(failed)?,
                launch: *library.get(b"vcuda_launch\0").map_err(failed)?,
                report_count: *library.get(b"vcuda_report_count\0").map_err(failed)?,
                report: *library.get(b"vcuda_report\0").map_err(failed)?,
                totals: *library.get(b"vcuda_totals\0").map_err(failed)?,
                calls: *library.get(b"vcuda_calls\0").map_err(failed)?,
                text: *library.get(b"vcuda_text\0").map_err(failed)?,
                loads: *library.get(b"vcuda_loads\0").map_err(failed)?,
            };
            std::mem::forget(library);
            Ok(functions)
        }
    }
}

/// A virtual device. Every test should add its own: a finding fails the device's context for good.
#[derive(Debug, Clone, Copy)]
pub struct Gpu {
    driver: Driver,
    ordinal: u64,
}

impl Gpu {
    /// The number for `CudaContext::new`.
    pub fn ordinal(&self) -> usize {
        self.ordinal as usize
    }

    fn set(&self, setting: Setting, value: u64) {
        // SAFETY: plain numbers.
        unsafe { (self.driver.0.configure)(self.ordinal, setting as u32, value) };
    }

    /// Switches the sanitizers; all are on at first.
    pub fn sanitizers(&self, options: Options) {
        self.set(Setting::Sanitizers, options.bits().into());
    }

    /// Permutes blocks, warps, lanes of atomics, streams and graph nodes by `seed`; 0 runs all in order.
    pub fn seed(&self, seed: u64) {
        self.set(Setting::Seed, seed);
    }

    /// Whether findings that real hardware lets pass (races, uninitialised reads, …) fail the launch, as they do at
    /// first, or are only listed.
    pub fn strict(&self, strict: bool) {
        self.set(Setting::Strict, strict.into());
    }

    /// How tensor cores sum.
    pub fn accumulate(&self, mode: Accumulate) {
        self.set(Setting::Accumulate, mode as u64);
    }

    /// Warp instructions after which a launch counts as hung.
    pub fn budget(&self, instructions: u64) {
        self.set(Setting::Budget, instructions);
    }

    /// Forgets launches, findings, calls and totals.
    pub fn clear(&self) {
        self.set(Setting::Clear, 0);
    }

    /// Forgets the error that the context is stuck with, which the real driver never does: for tests that read
    /// memory after a fault.
    pub fn recover(&self) {
        self.set(Setting::Recover, 0);
    }

    /// Makes the `nth` call from now (from 1) of a kind return `code` (a `CUresult`) in place of its work, once.
    pub fn inject(&self, call: Call, nth: u64, code: i32) {
        // SAFETY: plain numbers.
        unsafe { (self.driver.0.inject)(self.ordinal, call as u32, nth, code) };
    }

    /// Makes the `nth` call from now (from 1) of the driver function `name` return `code` in place of its work, once.
    pub fn inject_into(&self, name: &str, nth: u64, code: i32) {
        let Ok(name) = CString::new(name) else { return };
        // SAFETY: the string ends in a zero.
        unsafe { (self.driver.0.inject_into)(self.ordinal, name.as_ptr(), nth, code) };
    }

    /// The functions in whose place an error was returned, in order.
    pub fn struck(&self) -> Vec<String> {
        self.text(Listing::Struck).lines().map(str::to_owned).collect()
    }

    /// Waits for each launch, as the driver does with `CUDA_LAUNCH_BLOCKING=1`: what a kernel does wrong is then an error
    /// of its launch.
    pub fn blocking(&self, blocking: bool) {
        self.set(Setting::Blocking, blocking.into());
    }

    /// Changes images that are loaded from now on: in `kernel`, the `nth` line (from 0) that holds `find` (parts in
    /// this order, with `*` between them) gets `replacement` in place of the last part, or goes where that is empty. For tests that a test would notice.
    pub fn mutate(&self, kernel: &str, find: &str, nth: u64, replacement: &str) {
        let Ok(change) = CString::new(format!("{kernel}\x1f{find}\x1f{replacement}")) else { return };
        // SAFETY: the string ends in a zero.
        unsafe { (self.driver.0.mutate)(self.ordinal, change.as_ptr(), nth) };
    }

    /// Adds one to the 32-bit number at byte `at` of the parameters of every launch of `kernel`: a bound that is off
    /// by one, where the number is one.
    pub fn nudge(&self, kernel: &str, at: usize) {
        let Ok(kernel) = CString::new(kernel) else { return };
        // SAFETY: the string ends in a zero.
        unsafe { (self.driver.0.nudge)(self.ordinal, kernel.as_ptr(), at as u64) };
    }

    /// How many changes of [`mutate`](Self::mutate) and [`nudge`](Self::nudge) found their place.
    pub fn mutations(&self) -> u64 {
        self.calls("mutation")
    }

    /// The launches run so far, in order.
    pub fn launches(&self) -> Vec<Launch> {
        // SAFETY: plain numbers.
        let count = unsafe { (self.driver.0.launch_count)(self.ordinal) };
        (0..count.max(0) as u64).filter_map(|n| self.launch(n)).collect()
    }

    fn launch(&self, index: u64) -> Option<Launch> {
        let (mut name, mut shape, mut counters) = (vec![0; 1024], [0; 8], Counters::default());
        // SAFETY: the buffers have the sizes told.
        let len = unsafe {
            (self.driver.0.launch)(
                self.ordinal,
                index,
                name.as_mut_ptr(),
                name.len(),
                &mut shape,
                &mut counters,
            )
        };
        name.truncate(usize::try_from(len).ok()?);
        let [gx, gy, gz, bx, by, bz, dynamic_shared, from_graph] = shape;
        Some(Launch {
            kernel: String::from_utf8_lossy(&name).into_owned(),
            grid: [gx, gy, gz],
            block: [bx, by, bz],
            dynamic_shared,
            from_graph: from_graph != 0,
            counters,
        })
    }

    /// The findings so far, in order.
    pub fn reports(&self) -> Vec<Report> {
        // SAFETY: plain numbers.
        let count = unsafe { (self.driver.0.report_count)(self.ordinal) };
        (0..count.max(0) as u64).filter_map(|n| self.report(n)).collect()
    }

    fn report(&self, index: u64) -> Option<Report> {
        let (mut text, mut place) = (vec![0; 4096], [0; 9]);
        // SAFETY: the buffers have the sizes told.
        let len =
            unsafe { (self.driver.0.report)(self.ordinal, index, &mut place, text.as_mut_ptr(), text.len()) };
        text.truncate(usize::try_from(len).ok()?);
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut parts = text.splitn(3, '\x1f');
        let [kernel, file, message] = [parts.next()?, parts.next()?, parts.next()?];
        let [kind, bx, by, bz, tx, ty, tz, line, source_line] = place;
        Some(Report {
            kind: *Kind::ALL.get(kind as usize)?,
            kernel: kernel.to_string(),
            block: [bx, by, bz],
            thread: [tx, ty, tz],
            line,
            source: (!file.is_empty()).then(|| (file.to_string(), source_line)),
            message: message.to_string(),
        })
    }

    /// Bytes copied, launches, memory in use.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        // SAFETY: the pointer is valid.
        unsafe { (self.driver.0.totals)(self.ordinal, &mut totals) };
        totals
    }

    /// How often the driver function `name` was called on this device; of all functions if `name` is empty.
    pub fn calls(&self, name: &str) -> u64 {
        let Ok(name) = CString::new(name) else { return 0 };
        // SAFETY: the string ends in a zero.
        unsafe { (self.driver.0.calls)(self.ordinal, name.as_ptr()) }.max(0) as u64
    }

    /// The driver functions that were called on this device, and how often.
    pub fn called(&self) -> BTreeMap<String, u64> {
        let entry = |line: &str| {
            let (name, count) = line.split_once(' ')?;
            Some((name.to_owned(), count.parse().ok()?))
        };
        self.text(Listing::Called).lines().filter_map(entry).collect()
    }

    /// The graphs that are ready to run.
    pub fn graphs(&self) -> Vec<Vec<Node>> {
        let node = |line: &str| {
            let (work, after) = line.split_once(':').unwrap_or((line, ""));
            let after = after.split_whitespace().filter_map(|node| node.parse().ok()).collect();
            Node { work: work.to_owned(), after }
        };
        let text = self.text(Listing::Graphs);
        text.split_terminator("\n\n").map(|graph| graph.lines().map(node).collect()).collect()
    }

    /// Live allocations of device memory: address and bytes.
    pub fn allocations(&self) -> Vec<(u64, u64)> {
        let entry = |line: &str| {
            let (base, size) = line.split_once(' ')?;
            Some((base.parse().ok()?, size.parse().ok()?))
        };
        self.text(Listing::Allocations).lines().filter_map(entry).collect()
    }

    /// From now on counts what kernels load of the allocation that begins at `base`.
    pub fn watch(&self, base: u64) {
        self.set(Setting::Watch, base);
    }

    /// The bytes that kernels have loaded of each 32-byte sector of the allocation at `base` since it was
    /// [watched](Self::watch): different bytes of a warp's request count once, those of other requests again.
    pub fn loads(&self, base: u64) -> Vec<u32> {
        // SAFETY: nothing is written where there is room for nothing, and then as much as there is room for.
        unsafe {
            let count = (self.driver.0.loads)(self.ordinal, base, [].as_mut_ptr(), 0).max(0);
            let mut sectors = vec![0; count as usize];
            (self.driver.0.loads)(self.ordinal, base, sectors.as_mut_ptr(), sectors.len());
            sectors
        }
    }

    fn text(&self, listing: Listing) -> String {
        // SAFETY: as in `loads`.
        let text = unsafe {
            let length = (self.driver.0.text)(self.ordinal, listing as u32, [].as_mut_ptr(), 0).max(0);
            let mut text = vec![0; length as usize];
            (self.driver.0.text)(self.ordinal, listing as u32, text.as_mut_ptr(), text.len());
            text
        };
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// A node of a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The kernel's name, or what else it is.
    pub work: String,
    /// Numbers of the nodes that it waits for.
    pub after: Vec<usize>,
}
