//! A device: its memory, streams, events, modules and records. Work on streams is queued and runs when somebody
//! waits for it.

use crate::counters::Counters;
use crate::exec::{Accumulate, Fault, Settings, Shape};
use crate::faults::{Injection, Mutation};
use crate::graph::{Capture, Graph};
use crate::memory::{Memory, State};
use crate::profile::Profile;
use crate::program::{Kernel, Module};
use crate::sanitizer::{Kind, Options, Report};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::Arc;

/// A driver error code (`CUresult`).
pub type Code = i32;

/// `CUDA_ERROR_*` that this driver returns.
pub mod code {
    #![allow(missing_docs)]
    pub const INVALID_VALUE: i32 = 1;
    pub const OUT_OF_MEMORY: i32 = 2;
    pub const NO_DEVICE: i32 = 100;
    pub const INVALID_DEVICE: i32 = 101;
    pub const INVALID_CONTEXT: i32 = 201;
    pub const NO_BINARY_FOR_GPU: i32 = 209;
    pub const INVALID_PTX: i32 = 218;
    pub const UNSUPPORTED_PTX_VERSION: i32 = 222;
    pub const FILE_NOT_FOUND: i32 = 301;
    pub const INVALID_HANDLE: i32 = 400;
    pub const NOT_FOUND: i32 = 500;
    pub const NOT_READY: i32 = 600;
    pub const ILLEGAL_ADDRESS: i32 = 700;
    pub const LAUNCH_TIMEOUT: i32 = 702;
    pub const MISALIGNED_ADDRESS: i32 = 716;
    pub const ILLEGAL_INSTRUCTION: i32 = 715;
    pub const LAUNCH_FAILED: i32 = 719;
    pub const COOPERATIVE_LAUNCH_TOO_LARGE: i32 = 720;
    pub const NOT_SUPPORTED: i32 = 801;
    pub const CAPTURE_UNSUPPORTED: i32 = 900;
    pub const CAPTURE_INVALIDATED: i32 = 901;
    pub const CAPTURE_UNMATCHED: i32 = 903;
    pub const CAPTURE_UNJOINED: i32 = 904;
    pub const CAPTURE_ISOLATION: i32 = 905;
    pub const UNKNOWN: i32 = 999;
}

/// Where a copy to the device reads.
#[derive(Debug, Clone)]
pub enum Source {
    /// Bytes taken at the call: pageable memory.
    Snapshot(Vec<u8>),
    /// Memory read when the copy runs: pinned memory, or a copy in a graph.
    Pointer(*const u8, usize),
}

/// A unit of work on a stream.
#[derive(Clone)]
pub enum Work {
    /// A kernel.
    Launch(Arc<Kernel>, Shape),
    /// Host to device.
    ToDevice(u64, Source),
    /// Device to host.
    ToHost(*mut u8, u64, usize),
    /// Device to device: destination, source, bytes.
    Between(u64, u64, usize),
    /// Address, pattern, bytes of the pattern, repetitions.
    Fill(u64, u32, usize, usize),
    /// An allocation in stream order becomes live.
    Allocate(u64),
    /// An allocation is freed in stream order.
    Free(u64),
    /// An event, and which of its recordings.
    Record(u64, u64),
    /// Wait for that recording.
    Wait(u64, u64),
    /// A host function.
    Host(unsafe extern "C" fn(*mut c_void), *mut c_void),
    /// A graph.
    Graph(Arc<Graph>),
}

// SAFETY: the pointers are the caller's promise that the memory outlives the work, as for the real driver; the
// device's lock keeps two threads from running work at once.
unsafe impl Send for Work {}
// SAFETY: work is not changed through a shared reference.
unsafe impl Sync for Work {}

/// A stream.
#[derive(Default)]
pub struct Stream {
    /// Work with its place in the order of all calls.
    pub queue: VecDeque<(u64, Work)>,
    /// Whether it keeps order with the null stream.
    pub blocking: bool,
    /// Capture in which it takes part, and the nodes that its next node follows.
    pub capture: Option<(u64, Vec<usize>)>,
}

/// An event.
#[derive(Debug, Clone, Default)]
pub struct Event {
    /// Recordings asked for.
    pub issued: u64,
    /// Recordings reached.
    pub reached: u64,
    /// A recording in a capture: the capture and the nodes before it.
    pub captured: Option<(u64, Vec<usize>)>,
    /// Whether it was made without timing.
    pub untimed: bool,
    /// Whether it was destroyed while its recording was still queued; those who wait for it go on waiting.
    pub destroyed: bool,
}

/// A kernel of a loaded module, with its attributes.
pub struct Function {
    /// The kernel.
    pub kernel: Arc<Kernel>,
    /// Its module.
    pub module: u64,
    /// Dynamic shared memory that it may be launched with.
    pub max_dynamic_shared: u32,
}

/// What the tests can read of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub dynamic_shared: u32,
    /// Whether it came from a graph.
    pub from_graph: bool,
    /// What it did.
    pub counters: Counters,
}

/// Bytes that crossed between host and device, and other totals of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Totals {
    /// Bytes copied to the device.
    pub to_device_bytes: u64,
    /// Copies to the device.
    pub to_device_copies: u64,
    /// Bytes copied to the host.
    pub to_host_bytes: u64,
    /// Copies to the host.
    pub to_host_copies: u64,
    /// Bytes copied within the device.
    pub between_bytes: u64,
    /// Kernel launches run.
    pub launches: u64,
    /// Graph launches run.
    pub graph_launches: u64,
    /// Bytes of live device allocations.
    pub live_bytes: u64,
    /// Bytes of device memory in use, rounded as the card does.
    pub used_bytes: u64,
    /// The most of `used_bytes` so far.
    pub peak_bytes: u64,
    /// Device and pinned memory freed while a graph was there that could be launched: one whose addresses it may hold.
    pub freed_under_graphs: u64,
    /// What was made and is still there.
    pub alive: Alive,
}

/// What was made on a device and is still there. The context's release ends it all: who looks for leaks holds the
/// context himself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Alive {
    /// Times that the primary context was retained and not released.
    pub contexts: u64,
    /// Streams, without the null stream.
    pub streams: u64,
    /// Events, also destroyed ones that somebody still waits for.
    pub events: u64,
    /// Modules.
    pub modules: u64,
    /// Captures under way.
    pub captures: u64,
    /// Graphs as captured.
    pub graphs: u64,
    /// Graphs ready to run.
    pub executables: u64,
    /// Device allocations.
    pub allocations: u64,
    /// Bytes of pinned memory.
    pub pinned_bytes: u64,
}

/// A device.
pub struct Device {
    /// What it imitates.
    pub profile: Profile,
    /// Which device it is.
    pub ordinal: u64,
    /// Its memory.
    pub memory: Memory,
    /// Streams; 0 is the null stream.
    pub streams: HashMap<u64, Stream>,
    /// Events.
    pub events: HashMap<u64, Event>,
    /// Modules.
    pub modules: HashMap<u64, Module>,
    /// Functions.
    pub functions: HashMap<u64, Function>,
    /// Graphs as captured.
    pub graphs: HashMap<u64, Arc<Graph>>,
    /// Graphs ready to run.
    pub executables: HashMap<u64, Arc<Graph>>,
    /// Captures under way.
    pub captures: HashMap<u64, Capture>,
    /// Pinned memory: address to bytes.
    pub pinned: HashMap<u64, Vec<u64>>,
    /// Settings of launches.
    pub settings: Settings,
    /// Whether a finding fails the launch.
    pub strict: bool,
    /// Whether a launch is waited for, as with CUDA_LAUNCH_BLOCKING=1.
    pub blocking: bool,
    /// Launches run.
    pub launches: Vec<Launch>,
    /// Findings.
    pub reports: Vec<Report>,
    /// The error that all later calls return.
    pub sticky: Option<Code>,
    /// Calls by name.
    pub calls: HashMap<&'static str, u64>,
    /// Errors to inject.
    pub injections: Vec<Injection>,
    /// Functions in whose place an error was returned.
    pub struck: Vec<&'static str>,
    /// Changes to images as they are loaded.
    pub mutations: Vec<Mutation>,
    /// Kernels of which a 32-bit number among the parameters, at this byte, is one more than it was told.
    pub nudges: Vec<(String, usize)>,
    /// Totals.
    pub totals: Totals,
    /// Users of the primary context.
    pub users: u32,
    random: u64,
    sequence: u64,
    next_id: u64,
    launch_number: u32,
}

// SAFETY: raw pointers inside are to memory that the driver owns or that callers promise to keep; a device is
// used under its lock.
unsafe impl Send for Device {}

impl Device {
    /// A device of `profile` with `memory` bytes.
    pub fn new(profile: Profile, memory: u64, ordinal: u64) -> Self {
        let accumulate = Accumulate::Exact;
        let settings = Settings { options: Options::ALL, seed: 0, accumulate, budget: 4 << 30 };
        let mut device = Device {
            profile,
            ordinal,
            memory: Memory::new(memory, ordinal),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            executables: HashMap::new(),
            captures: HashMap::new(),
            pinned: HashMap::new(),
            settings,
            strict: true,
            blocking: std::env::var_os("CUDA_LAUNCH_BLOCKING").is_some_and(|value| value == "1"),
            launches: Vec::new(),
            reports: Vec::new(),
            sticky: None,
            calls: HashMap::new(),
            injections: Vec::new(),
            struck: Vec::new(),
            mutations: Vec::new(),
            nudges: Vec::new(),
            totals: Totals::default(),
            users: 0,
            random: 0,
            sequence: 0,
            next_id: 1,
            launch_number: 0,
        };
        device.streams.insert(0, Stream { blocking: true, ..Stream::default() });
        device
    }

    /// Forgets all that belongs to a context; records stay.
    pub fn reset(&mut self) {
        let fresh = Device::new(self.profile, self.memory.capacity, self.ordinal);
        let old = std::mem::replace(self, fresh);
        self.memory.continue_from(&old.memory);
        self.settings = old.settings;
        self.strict = old.strict;
        self.launches = old.launches;
        self.reports = old.reports;
        self.calls = old.calls;
        self.injections = old.injections;
        self.struck = old.struck;
        self.blocking = old.blocking;
        self.mutations = old.mutations;
        self.nudges = old.nudges;
        self.totals = old.totals;
        self.random = old.random;
        self.next_id = old.next_id;
        self.launch_number = old.launch_number;
    }

    /// What is there now.
    pub fn alive(&self) -> Alive {
        let words = self.pinned.values().map(|words| words.len() as u64);
        Alive {
            contexts: self.users.into(),
            streams: self.streams.len() as u64 - 1,
            events: self.events.len() as u64,
            modules: self.modules.len() as u64,
            captures: self.captures.len() as u64,
            graphs: self.graphs.len() as u64,
            executables: self.executables.len() as u64,
            allocations: self.memory.live().0,
            pinned_bytes: 8 * words.sum::<u64>(),
        }
    }

    /// Notes that memory is freed, which a graph may not outlive.
    pub fn note_free(&mut self) {
        self.totals.freed_under_graphs += u64::from(!self.executables.is_empty());
    }

    /// A number that no other handle has.
    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Sets the seed of all permutations.
    pub fn set_seed(&mut self, seed: u64) {
        self.settings.seed = seed;
        self.random = seed;
    }

    /// Queues work on a stream, or adds it to the capture in which the stream takes part.
    pub fn enqueue(&mut self, stream: u64, work: Work) -> Result<(), Code> {
        let capture = self.streams.get(&stream).ok_or(code::INVALID_HANDLE)?.capture.clone();
        if let Some((id, after)) = capture {
            let capture = self.captures.get_mut(&id).ok_or(code::CAPTURE_INVALIDATED)?;
            let node = capture.add(work, after)?;
            if let Some(stream) = self.streams.get_mut(&stream) {
                stream.capture = Some((id, vec![node]));
            }
            return Ok(());
        }
        self.sequence += 1;
        let sequence = self.sequence;
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.queue.push_back((sequence, work));
        }
        Ok(())
    }

    /// Whether a stream takes part in a capture.
    pub fn capturing(&self, stream: u64) -> bool {
        self.streams.get(&stream).is_some_and(|s| s.capture.is_some())
    }

    /// Streams whose first work may run now.
    fn ready(&self) -> Vec<(u64, u64)> {
        let oldest = |blocking_only: bool| {
            let streams =
                self.streams.iter().filter(move |(id, s)| **id != 0 && (!blocking_only || s.blocking));
            streams.filter_map(|(_, s)| s.queue.front().map(|w| w.0)).min()
        };
        let blocking = oldest(true);
        let null = self.streams.get(&0).and_then(|s| s.queue.front().map(|w| w.0));
        let mut out = Vec::new();
        for (&id, stream) in &self.streams {
            let Some((sequence, work)) = stream.queue.front() else { continue };
            let held = if id == 0 {
                blocking.is_some_and(|b| b < *sequence)
            } else {
                stream.blocking && null.is_some_and(|n| n < *sequence)
            };
            let waiting = matches!(work, Work::Wait(event, number)
                if self.events.get(event).is_some_and(|e| e.reached < *number));
            if !held && !waiting {
                out.push((*sequence, id));
            }
        }
        out.sort_unstable();
        out
    }

    /// Runs one unit of work; false if none can run.
    pub fn step(&mut self) -> bool {
        let ready = self.ready();
        let choice = if self.settings.seed == 0 {
            0
        } else {
            crate::exec::draw(&mut self.random) as usize % ready.len().max(1)
        };
        let Some(&(_, id)) = ready.get(choice) else { return false };
        let work = self.streams.get_mut(&id).and_then(|s| s.queue.pop_front());
        if let Some((_, work)) = work {
            self.perform(work, false);
        }
        true
    }

    /// Runs work until `done`, or until none can run.
    pub fn run_until(&mut self, done: impl Fn(&Device) -> bool) -> Result<(), Code> {
        while !done(self) {
            if !self.step() {
                break;
            }
        }
        self.sticky.map_or(Ok(()), Err)
    }

    /// Runs all work of a stream.
    pub fn drain(&mut self, stream: u64) -> Result<(), Code> {
        self.run_until(|d| d.streams.get(&stream).is_none_or(|s| s.queue.is_empty()))
    }

    /// Runs all work.
    pub fn drain_all(&mut self) -> Result<(), Code> {
        self.run_until(|d| d.streams.values().all(|s| s.queue.is_empty()))
    }

    /// Notes a finding of a driver call and fails the context.
    fn finding(&mut self, kind: Kind, call: &str, message: String, code: Code) {
        let kernel = call.to_string();
        let report = Report { kind, kernel, block: [0; 3], thread: [0; 3], line: 0, source: None, message };
        crate::driver::errors::remember(&report.to_string());
        self.reports.push(report);
        if kind != Kind::Uninitialised || self.strict {
            self.sticky.get_or_insert(code);
        }
    }

    /// The range of a copy, or a finding.
    fn range(
        &mut self,
        call: &str,
        address: u64,
        len: usize,
    ) -> Option<(*mut crate::memory::Allocation, usize)> {
        if let Some(found) = self.memory.find(address, len as u64) {
            let offset = (address - found.base) as usize;
            return Some((found, offset));
        }
        let place = self.memory.describe(address);
        let kind = if place.contains("freed") { Kind::Freed } else { Kind::OutOfBounds };
        self.finding(kind, call, format!("{len} bytes at {address:#x}, {place}"), code::ILLEGAL_ADDRESS);
        None
    }

    /// Runs one unit of work.
    pub fn perform(&mut self, work: Work, from_graph: bool) {
        if self.sticky.is_some() && !matches!(work, Work::Record(..) | Work::Free(_) | Work::Allocate(_)) {
            return;
        }
        match work {
            Work::Launch(kernel, shape) => self.launch(&kernel, shape, from_graph),
            Work::ToDevice(to, source) => self.copy_in(to, &source),
            Work::ToHost(to, from, len) => self.copy_out(to, from, len),
            Work::Between(to, from, len) => self.between(to, from, len),
            Work::Fill(to, pattern, width, count) => {
                if let Some((found, offset)) = self.range("cuMemset", to, width * count) {
                    let bytes: Vec<u8> = pattern.to_le_bytes()[..width].repeat(count);
                    // SAFETY: the range was checked, and allocations do not move.
                    unsafe { (*found).write(offset, &bytes) };
                }
            }
            Work::Allocate(base) => {
                if let Some(allocation) = self.memory.at(base) {
                    allocation.state = State::Live;
                }
            }
            Work::Free(base) => {
                self.memory.free(base);
            }
            Work::Record(event, number) => {
                if let Some(found) = self.events.get_mut(&event) {
                    found.reached = found.reached.max(number);
                    if found.destroyed && found.reached >= found.issued {
                        self.events.remove(&event);
                    }
                }
            }
            Work::Wait(..) => {}
            // SAFETY: the caller of cuLaunchHostFunc promised that the function may be called with this argument.
            Work::Host(function, data) => unsafe { function(data) },
            Work::Graph(graph) => {
                self.totals.graph_launches += 1;
                for node in graph.order(self.settings.seed, &mut self.random) {
                    self.perform(graph.nodes[node].work.clone(), true);
                }
            }
        }
    }

    fn copy_in(&mut self, to: u64, source: &Source) {
        let (from, len) = match source {
            Source::Snapshot(bytes) => (bytes.as_ptr(), bytes.len()),
            Source::Pointer(from, len) => (*from, *len),
        };
        if let Some((found, offset)) = self.range("cuMemcpyHtoD", to, len) {
            // SAFETY: the caller's promise for the host side, a checked range for the device.
            unsafe {
                let bytes = std::slice::from_raw_parts(from, len);
                (*found).write(offset, bytes);
            }
            self.totals.to_device_bytes += len as u64;
            self.totals.to_device_copies += 1;
        }
    }

    fn copy_out(&mut self, to: *mut u8, from: u64, len: usize) {
        let Some((found, offset)) = self.range("cuMemcpyDtoH", from, len) else { return };
        // SAFETY: a checked range for the device, the caller's promise for the host side.
        unsafe {
            if self.settings.options.uninitialised && (*found).unwritten(offset, len) {
                let text = format!("{len} bytes copied to the host from {from:#x}");
                self.finding(Kind::Uninitialised, "cuMemcpyDtoH", text, code::LAUNCH_FAILED);
            }
            let data = (*found).data().add(offset);
            std::ptr::copy_nonoverlapping(data, to, len);
        }
        self.totals.to_host_bytes += len as u64;
        self.totals.to_host_copies += 1;
    }

    fn between(&mut self, to: u64, from: u64, len: usize) {
        let Some((source, source_offset)) = self.range("cuMemcpyDtoD", from, len) else { return };
        let Some((target, target_offset)) = self.range("cuMemcpyDtoD", to, len) else { return };
        // SAFETY: checked ranges; the snapshot allows both to be one allocation.
        unsafe {
            let (bytes, flags) = (*source).snapshot(source_offset, len);
            (*target).restore(target_offset, &bytes, &flags);
        }
        self.totals.between_bytes += len as u64;
    }

    fn launch(&mut self, kernel: &Arc<Kernel>, mut shape: Shape, from_graph: bool) {
        self.launch_number = self.launch_number % ((1 << 30) - 1) + 1;
        shape.number = self.launch_number;
        let threads = shape.block.iter().product();
        let shared = kernel.shared_bytes as u32 + shape.dynamic_shared;
        let resident = self.profile.resident_blocks(threads, shared) * self.profile.multiprocessors;
        let (grid, block, dynamic_shared) = (shape.grid, shape.block, shape.dynamic_shared);
        let (settings, processors) = (self.settings, self.profile.multiprocessors);
        let outcome = crate::exec::launch::run(
            kernel,
            shape,
            &mut self.memory,
            settings,
            processors,
            resident as usize,
        );
        self.totals.launches += 1;
        let name = kernel.name.clone();
        let counters = outcome.counters;
        self.launches.push(Launch { kernel: name, grid, block, dynamic_shared, from_graph, counters });
        if let Some(first) = outcome.reports.first() {
            crate::driver::errors::remember(&first.to_string());
            if self.strict {
                self.sticky.get_or_insert(code::LAUNCH_FAILED);
            }
        }
        if let Some(fault) = outcome.fault {
            self.sticky = Some(match fault {
                Fault::IllegalAddress => code::ILLEGAL_ADDRESS,
                Fault::Misaligned => code::MISALIGNED_ADDRESS,
                Fault::Trap => code::ILLEGAL_INSTRUCTION,
                Fault::Timeout => code::LAUNCH_TIMEOUT,
            });
        }
        self.reports.extend(outcome.reports);
    }
}
