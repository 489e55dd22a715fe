//! The engine thread: it owns the [`Generator`] and decodes what waits, many sequences together.
//!
//! ```text
//! handlers ── Job ──► waiting ──► active (at most `sequences`) ──► Generator
//!     ▲                                                              │
//!     └───────────────── Delivery, one channel a request ◄───────────┘
//! ```
//!
//! A sequence takes a place from when it is submitted until its last step; where no place is free, the client is
//! told so at once. A request whose receiver is gone is cancelled before the next step of the engine.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, ApiResult};
use super::metrics::Metrics;
use crate::backend::BackendOptions;
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::generate::{Generator, Request, Step};

/// What becomes of one sequence of a request.
pub(super) struct Delivery {
    /// Its number in the request.
    pub(super) sequence: usize,
    /// Its next step, or all of them at its end, or why there is none.
    pub(super) steps: ApiResult<Vec<Step>>,
}

/// One sequence.
struct Job {
    request: Request,
    sequence: usize,
    deliveries: UnboundedSender<Delivery>,
    /// Whether each step is delivered when it is decided; else all are kept until the last, so that nobody wakes up
    /// for nothing.
    stream: bool,
    steps: Vec<Step>,
    arrived: Instant,
    last_step: Option<Instant>,
    _place: OwnedSemaphorePermit,
}

/// The handlers' end.
pub(super) struct Engine {
    jobs: UnboundedSender<Job>,
    places: Arc<Semaphore>,
    /// Sequences that may be decoded or wait at one time.
    pub(super) capacity: usize,
    /// Blocks of the cache of each model.
    pub(super) blocks: usize,
}

impl Engine {
    /// Opens the backend on a thread of its own, which ends when the engine is dropped. `sequences` are decoded
    /// together, `queue` more may wait.
    pub(super) fn start(
        ensemble: Arc<Ensemble>,
        backend: BackendOptions,
        sequences: usize,
        queue: usize,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, JoinHandle<()>)> {
        let (jobs, incoming) = mpsc::unbounded_channel();
        let (opened, open) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                // A backend stays on the thread that opened it.
                let backend = match backend.open(Arc::clone(&ensemble)) {
                    Ok(backend) => backend,
                    Err(error) => {
                        // The receiver waits for this.
                        let _ = opened.send(Err(error));
                        return;
                    }
                };
                let _ = opened.send(Ok(()));
                let generator = Generator::new(ensemble, backend);
                let (waiting, active) = (VecDeque::new(), HashMap::new());
                Scheduler { generator, incoming, waiting, active, sequences, metrics }.run();
            })
            .map_err(|error| Error::Device {
                requested: "engine thread".to_owned(),
                reason: error.to_string(),
            })?;
        let died =
            |_| Err(Error::Device { requested: "engine thread".to_owned(), reason: "it died".to_owned() });
        open.recv().unwrap_or_else(died)?;
        let capacity = sequences.saturating_add(queue).min(Semaphore::MAX_PERMITS);
        let places = Arc::new(Semaphore::new(capacity));
        Ok((Self { jobs, places, capacity, blocks: backend.limits.blocks }, thread))
    }

    /// Whether the engine's thread is there.
    pub(super) fn runs(&self) -> bool {
        !self.jobs.is_closed()
    }

    /// Takes the sequences of one request, all or none.
    pub(super) fn submit(
        &self,
        requests: Vec<(usize, Request)>,
        stream: bool,
    ) -> ApiResult<UnboundedReceiver<Delivery>> {
        let (deliveries, receiver) = mpsc::unbounded_channel();
        let count = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        let places = Arc::clone(&self.places).try_acquire_many_owned(count);
        let mut places = places.map_err(|_| ApiError::busy())?;
        let arrived = Instant::now();
        for (sequence, request) in requests {
            let Some(place) = places.split(1) else { break };
            let deliveries = deliveries.clone();
            let steps = Vec::new();
            let job =
                Job { request, sequence, deliveries, stream, steps, arrived, last_step: None, _place: place };
            self.jobs.send(job).map_err(|_| ApiError::unavailable("the engine has stopped"))?;
        }
        Ok(receiver)
    }
}

/// The thread's own.
struct Scheduler {
    generator: Generator,
    incoming: UnboundedReceiver<Job>,
    waiting: VecDeque<Job>,
    /// By the generator's number.
    active: HashMap<usize, Job>,
    sequences: usize,
    metrics: Arc<Metrics>,
}

impl Scheduler {
    fn run(mut self) {
        while self.take_incoming() {
            self.drop_abandoned();
            self.admit();
            self.show();
            self.advance();
            self.show();
        }
    }

    /// Takes in what has come, and waits for something where there is nothing to do; false at the end.
    fn take_incoming(&mut self) -> bool {
        if self.active.is_empty() && self.waiting.is_empty() {
            match self.incoming.blocking_recv() {
                Some(job) => self.waiting.push_back(job),
                None => return false,
            }
        }
        while let Ok(job) = self.incoming.try_recv() {
            self.waiting.push_back(job);
        }
        true
    }

    /// Ends the sequences that nobody waits for any more.
    fn drop_abandoned(&mut self) {
        let Self { generator, waiting, active, metrics, .. } = self;
        let mut cancelled = 0;
        waiting.retain(|job| {
            let abandoned = job.deliveries.is_closed();
            cancelled += u64::from(abandoned);
            !abandoned
        });
        active.retain(|&number, job| {
            let abandoned = job.deliveries.is_closed();
            if abandoned {
                generator.cancel(number);
                cancelled += 1;
            }
            !abandoned
        });
        metrics.cancelled.fetch_add(cancelled, Ordering::Relaxed);
    }

    fn admit(&mut self) {
        while self.active.len() < self.sequences {
            let Some(mut job) = self.waiting.pop_front() else { break };
            let request = std::mem::replace(&mut job.request, Request::new(Vec::new(), 0));
            let prompt_tokens = request.prompts.first().map_or(0, Vec::len) + request.forced.len();
            match self.generator.push(request) {
                Ok(number) => {
                    self.metrics.prompt_tokens.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
                    self.active.insert(number, job);
                }
                Err(error) => job.deliver(Err(ApiError::from(&error))),
            }
        }
    }

    /// One step of the engine, and its deliveries.
    fn advance(&mut self) {
        while let Some(step) = self.generator.next() {
            match step {
                Ok(step) => self.deliver(step),
                Err(Error::Request { request, source }) => {
                    if let Some(job) = self.active.remove(&request) {
                        job.deliver(Err(ApiError::from(&*source)));
                    }
                }
                Err(error) => {
                    let error = ApiError::from(&error);
                    for (_, job) in self.active.drain() {
                        job.deliver(Err(error.clone()));
                    }
                }
            }
            if self.generator.ready() == 0 {
                break;
            }
        }
    }

    fn deliver(&mut self, step: Step) {
        let (number, finished) = (step.request, step.finish.is_some());
        let Some(job) = self.active.get_mut(&number) else { return };
        self.metrics.step(&step, job.arrived, job.last_step.replace(Instant::now()));
        job.steps.push(step);
        if job.stream || finished {
            let steps = std::mem::take(&mut job.steps);
            job.deliver(Ok(steps));
        }
        if finished && let Some(job) = self.active.remove(&number) {
            self.metrics.sequence_seconds.observe(job.arrived.elapsed().as_secs_f64());
        }
    }

    fn show(&self) {
        let Self { generator, metrics, .. } = self;
        metrics.running.store(self.active.len(), Ordering::Relaxed);
        metrics.waiting.store(self.waiting.len() + self.incoming.len(), Ordering::Relaxed);
        for (gauge, cache) in metrics.cache_used.iter().zip(generator.cache()) {
            gauge.store(cache.used, Ordering::Relaxed);
        }
    }
}

impl Job {
    /// A receiver that is gone is found by [`Scheduler::drop_abandoned`].
    fn deliver(&self, steps: ApiResult<Vec<Step>>) {
        let _ = self.deliveries.send(Delivery { sequence: self.sequence, steps });
    }
}

#[cfg(all(test, feature = "demo"))]
mod tests;
