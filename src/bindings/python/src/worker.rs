//! The threads that compute.
//!
//! A generation runs in a thread, which Python's asks for one step at a time: signals are looked at while it waits, and
//! other threads of Python run. A thread keeps its backend, because opening one sends the weights to a GPU: it waits for the
//! next generation that it can serve. One waits at most; generations at the same time have a thread each.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use engine::backend::Limits;
use engine::{BackendOptions, Ensemble, Generator, Request, Step};
use pyo3::PyResult;
use pyo3::exceptions::PyRuntimeError;

type Steps = engine::Result<Step>;

/// The thread that waits, if one does.
#[derive(Default)]
pub(crate) struct Workers(Arc<Mutex<Option<Worker>>>);

/// A thread and what it can serve. Dropped, the thread ends once it has nothing to do.
struct Worker {
    options: BackendOptions,
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

/// A generation, and the worker itself, which then waits again.
struct Job {
    request: Request,
    steps: SyncSender<Steps>,
    worker: Worker,
}

impl Workers {
    /// The steps of `request`, computed by the thread that waits, or by a new one where that can't.
    pub(crate) fn start(
        &self,
        models: &Arc<Ensemble>,
        mut options: BackendOptions,
        request: Request,
    ) -> PyResult<Receiver<Steps>> {
        let worker = match self.take() {
            Some(worker) if worker.serves(&options) => worker,
            other => {
                if let Some(worker) = other {
                    // What serves both needs no third one when the shorter comes again.
                    if worker.is_like(&options) {
                        options.limits = larger(options.limits, worker.options.limits);
                    }
                    worker.end();
                }
                Worker::new(models, options, Arc::downgrade(&self.0))?
            }
        };
        // A step ahead of who reads, no more.
        let (steps, receiver) = sync_channel(1);
        let jobs = worker.jobs.clone();
        let gone = |_| PyRuntimeError::new_err("the thread that computes has ended");
        jobs.send(Job { request, steps, worker }).map_err(gone)?;
        Ok(receiver)
    }

    /// Ends the thread that waits.
    pub(crate) fn release(&self) {
        if let Some(worker) = self.take() {
            worker.end();
        }
    }

    fn take(&self) -> Option<Worker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Worker {
    fn new(
        models: &Arc<Ensemble>,
        options: BackendOptions,
        idle: Weak<Mutex<Option<Self>>>,
    ) -> PyResult<Self> {
        let (jobs, received) = channel();
        let models = Arc::clone(models);
        let compute = move || run(&models, options, &received, &idle);
        let thread = std::thread::Builder::new().name("dlf-engine".to_owned()).spawn(compute);
        let thread = thread.map_err(|error| PyRuntimeError::new_err(format!("no thread: {error}")))?;
        Ok(Self { options, jobs, thread })
    }

    fn is_like(&self, options: &BackendOptions) -> bool {
        self.options.device == options.device && self.options.threads == options.threads
    }

    fn serves(&self, options: &BackendOptions) -> bool {
        let limits = self.options.limits;
        self.is_like(options) && larger(limits, options.limits) == limits
    }

    /// Waits until its memory is free.
    fn end(self) {
        drop(self.jobs);
        // One that panicked is as gone.
        drop(self.thread.join());
    }
}

fn larger(a: Limits, b: Limits) -> Limits {
    Limits { rows: a.rows.max(b.rows), slots: a.slots.max(b.slots), blocks: a.blocks.max(b.blocks) }
}

/// Opens a backend and computes one generation after the other, until nobody can send any more or the device fails.
fn run(
    models: &Arc<Ensemble>,
    options: BackendOptions,
    jobs: &Receiver<Job>,
    idle: &Weak<Mutex<Option<Worker>>>,
) {
    let mut generator: Option<Generator> = None;
    while let Ok(Job { request, steps, worker }) = jobs.recv() {
        let open =
            || options.open(Arc::clone(models)).map(|backend| Generator::new(Arc::clone(models), backend));
        let opened = match generator.take() {
            Some(generator) => Ok(generator),
            None => open(),
        };
        let mut ready = match opened {
            Ok(generator) => generator,
            Err(error) => return drop(steps.send(Err(error))),
        };
        if let Err(error) = generate(&mut ready, request, &steps) {
            return drop(steps.send(Err(error)));
        }
        generator = Some(ready);
        // Before the reader learns of the end, so that what it starts next finds this thread waiting.
        if let Some(idle) = idle.upgrade() {
            *idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(worker);
        }
    }
}

/// Sends the steps of a request until it ends or nobody reads.
///
/// # Errors
/// What ends all generations of this device.
fn generate(generator: &mut Generator, request: Request, steps: &SyncSender<Steps>) -> engine::Result<()> {
    let id = match generator.push(request) {
        Ok(id) => id,
        // Of this request alone, and the next one may be right.
        Err(error) => {
            drop(steps.send(Err(error)));
            return Ok(());
        }
    };
    for step in generator.by_ref() {
        let of_device = step.as_ref().is_err_and(|error| !matches!(error, engine::Error::Request { .. }));
        if of_device {
            return step.map(drop);
        }
        if steps.send(step).is_err() {
            generator.cancel(id);
            break;
        }
    }
    Ok(())
}
