//! The threads: a fixed set of workers that run the tasks of one region at a time.
//!
//! A decode step has some 150 regions of a few microseconds to a millisecond, so starting one must cost about a
//! microsecond: workers spin for a moment before they sleep, tasks are claimed by one atomic, and nobody waits for
//! a worker that claimed nothing. Each thread has a part of the tasks, and takes them in order, since neighbours read
//! neighbouring weights, which it has asked memory for already; a thread without tasks takes the last one of another.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::lock;
use crate::error::{Error, Result};

/// How often a worker looks for work before it sleeps: some 50 µs.
const SPINS: u32 = 2_000;

/// How often the caller looks for the end of a region before it offers its core to others: on a busy machine the
/// worker that it waits for may need it.
const SPINS_BEFORE_YIELD: u32 = 10_000;

/// A task: called with the index of the thread that runs it, below [`Pool::threads`], and its own.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The unclaimed tasks of a thread's part: the first in the upper half, the end in the lower. A claim is one
/// compare-and-swap. Alone in its cache lines, since its thread writes it for every task.
#[derive(Default)]
#[repr(align(128))]
struct Part(AtomicU64);

impl Part {
    /// Opens the part.
    fn open(&self, tasks: Range<usize>) {
        self.0.store((tasks.start as u64) << 32 | tasks.end as u64, Ordering::Release);
    }

    /// Claims the first task, or the last one.
    fn claim(&self, first: bool) -> Option<usize> {
        let mut tasks = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (tasks >> 32, tasks & u64::from(u32::MAX));
            if start == end {
                return None;
            }
            // Should a region have ended and another have begun since the load, with the same tasks unclaimed, then the
            // claim is one of that.
            let (index, left) = if first { (start, tasks + (1 << 32)) } else { (end - 1, tasks - 1) };
            match self.0.compare_exchange_weak(tasks, left, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(index as usize),
                Err(now) => tasks = now,
            }
        }
    }
}

/// What all threads see.
struct Shared {
    /// One for each thread.
    parts: Vec<Part>,
    /// How many regions were opened: what idle workers look at. Written once their parts are open.
    regions: AtomicUsize,
    /// Written by the caller while no task is unclaimed or running, read by whoever has claimed one.
    task: UnsafeCell<Option<*const Task<'static>>>,
    /// Tasks that are finished.
    finished: AtomicUsize,
    /// The first panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Which workers sleep.
    asleep: Vec<AtomicBool>,
    /// Set once, by Drop.
    stop: AtomicBool,
}

// SAFETY: `task` is written only between regions (every task claimed and finished, which `finished` orders) and
// read only after a successful claim (which `parts` orders); its pointer is to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Shared {}

/// Worker threads, and the thread that calls [`run`](Self::run).
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    ///
    /// # Errors
    /// [`Error::Parameter`] where `threads` is 0, [`Error::Device`] where a thread can't be started.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::Parameter {
                name: "threads",
                expected: "at least 1".to_owned(),
                found: threads.to_string(),
            });
        }
        let shared = Arc::new(Shared {
            parts: (0..threads).map(|_| Part::default()).collect(),
            regions: AtomicUsize::new(0),
            task: UnsafeCell::new(None),
            finished: AtomicUsize::new(0),
            panic: Mutex::new(None),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::with_capacity(threads - 1) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("dlf-worker-{index}"))
                .spawn(move || shared.work(index))
                .map_err(|source| Error::Device {
                    requested: "cpu".to_owned(),
                    reason: source.to_string(),
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// The number of threads, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(thread, index)` for every index below `tasks` and returns when all are finished: neighbours one after
    /// the other on the same thread, mostly. A panic in a task continues here once the others are finished.
    pub(crate) fn run(&mut self, tasks: usize, task: impl Fn(usize, usize) + Sync) {
        if self.workers.is_empty() || tasks <= 1 {
            for index in 0..tasks {
                task(0, index);
            }
            return;
        }
        assert!(tasks <= u32::MAX as usize, "a part has its bounds in 32 bits each");
        let shared = &*self.shared;
        let task: *const Task<'_> = &raw const task;
        // SAFETY: only the lifetime changes; this function doesn't return before every task is finished, and who
        // has not claimed one doesn't look at the pointer.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the last region is over: no task of it is unclaimed or running, so nobody reads.
        unsafe { *shared.task.get() = Some(task) };
        shared.finished.store(0, Ordering::Relaxed);
        let threads = shared.parts.len();
        for (i, part) in shared.parts.iter().enumerate() {
            part.open(i * tasks / threads..(i + 1) * tasks / threads);
        }
        shared.regions.fetch_add(1, Ordering::Release);
        // Of this fence and that of a worker which is about to sleep one is first: either the worker sees the region, or
        // this thread its flag.
        fence(Ordering::SeqCst);
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers) {
            if asleep.load(Ordering::Relaxed) {
                worker.thread().unpark();
            }
        }
        while shared.claim_and_run(0) {}
        let mut spins = 0;
        while shared.finished.load(Ordering::Acquire) < tasks {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches every panic of its tasks, so there is none to pass on.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Claims a task and runs it; false where none is unclaimed.
    fn claim_and_run(&self, thread: usize) -> bool {
        let (before, from) = self.parts.split_at(thread);
        let others = || from.iter().skip(1).chain(before);
        let own = from.first().and_then(|part| part.claim(true));
        let Some(index) = own.or_else(|| others().find_map(|part| part.claim(false))) else { return false };
        // SAFETY: this thread holds an unfinished task of the region, so nobody writes.
        let Some(task) = (unsafe { *self.task.get() }) else { return false };
        // SAFETY: the closure lives until every task is finished, and this one is not.
        let task = unsafe { &*task };
        let outcome = catch_unwind(AssertUnwindSafe(|| task(thread, index)));
        if let Err(panic) = outcome {
            lock(&self.panic).get_or_insert(panic);
        }
        self.finished.fetch_add(1, Ordering::Release);
        true
    }

    /// The life of a worker.
    fn work(&self, thread: usize) {
        let Some(asleep) = self.asleep.get(thread - 1) else { return };
        let (mut spins, mut seen) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            let regions = self.regions.load(Ordering::Acquire);
            if regions != seen {
                (spins, seen) = (0, regions);
                while self.claim_and_run(thread) {}
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                asleep.store(true, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if self.regions.load(Ordering::Relaxed) == seen && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                asleep.store(false, Ordering::Relaxed);
                spins = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads).unwrap();
            // Many short regions of changing size, so that late workers meet regions that are over.
            for round in 0..3_000 {
                let tasks = round % 17;
                let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |thread, index| {
                    assert!(thread < threads);
                    runs[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "round {round}");
            }
        }
    }

    #[test]
    fn a_thread_without_tasks_takes_those_of_another() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..100 {
            // Whichever thread has the first task holds it until all others have run: the other thread must take some of
            // its part.
            let finished = AtomicUsize::new(0);
            pool.run(7, |_, index| {
                while index == 0 && finished.load(Ordering::Relaxed) < 6 {
                    thread::yield_now();
                }
                finished.fetch_add(1, Ordering::Relaxed);
            });
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            // An idle worker sleeps, on a busy machine after a while.
            while !pool.shared.asleep[0].load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            // The first task ends only once the second runs: both threads are needed.
            let barrier = std::sync::Barrier::new(2);
            pool.run(2, |_, _| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn a_panic_continues_in_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..10 {
            let finished = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, |_, index| {
                    assert_ne!(index, 3, "the third task fails");
                    finished.fetch_add(1, Ordering::Relaxed);
                });
            }));
            assert!(outcome.is_err());
            assert_eq!(finished.load(Ordering::Relaxed), 7);
        }
    }

    #[test]
    fn no_threads_is_an_error() {
        assert!(matches!(Pool::new(0), Err(Error::Parameter { name: "threads", .. })));
    }
}
