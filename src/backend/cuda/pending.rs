//! What was put on a GPU and hasn't been waited for. A kernel runs after its launch has returned, so what it does wrong is
//! an error of a later call, which doesn't say whose it is: with this it says at least whose it can be.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::CudaStream;

use super::device::Kernel;

/// What one stream was given last.
#[derive(Clone)]
struct Work {
    stream: usize,
    first: Kernel,
    last: Kernel,
    launches: u64,
    /// Whether it was one graph.
    graph: bool,
}

/// What all streams of a GPU were given since they were waited for; of graphs, each stream's latest.
#[derive(Default)]
pub(super) struct Pending(Mutex<Vec<Work>>);

/// What a recording was given in the stream that it began in.
pub(super) struct Recorded(Option<Work>);

fn key(stream: &CudaStream) -> usize {
    stream.cu_stream() as usize
}

impl Pending {
    fn with<T>(&self, f: impl FnOnce(&mut Vec<Work>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A kernel was put into `stream`.
    pub(super) fn launched(&self, stream: &CudaStream, kernel: &Kernel) {
        let stream = key(stream);
        self.with(|all| match all.iter_mut().find(|work| work.stream == stream) {
            Some(work) if !work.graph => {
                work.last = kernel.clone();
                work.launches += 1;
            }
            found => {
                let (first, last) = (kernel.clone(), kernel.clone());
                let work = Work { stream, first, last, launches: 1, graph: false };
                match found {
                    Some(old) => *old = work,
                    None => all.push(work),
                }
            }
        });
    }

    /// Runs `record`, whose launches don't run: what there was before it is there after it, and what came into `stream`
    /// is told beside.
    pub(super) fn recorded<T>(&self, stream: &CudaStream, record: impl FnOnce() -> T) -> (T, Recorded) {
        let before = self.with(std::mem::take);
        let done = record();
        let recorded = self.with(|all| std::mem::replace(all, before));
        (done, Recorded(recorded.into_iter().find(|work| work.stream == key(stream))))
    }

    /// A graph of so many launches was put into the stream that it was recorded in.
    pub(super) fn launched_graph(&self, recorded: &Recorded, launches: u64) {
        let Some(work) = &recorded.0 else { return };
        let work = Work { launches, graph: true, ..work.clone() };
        self.with(|all| {
            all.retain(|other| other.stream != work.stream);
            all.push(work);
        });
    }

    /// `stream` was waited for.
    pub(super) fn ended(&self, stream: &CudaStream) {
        self.with(|all| all.retain(|work| work.stream != key(stream)));
    }
}

impl fmt::Display for Pending {
    /// The end of an error's reason; nothing where all was waited for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with(|all| {
            all.iter().enumerate().try_for_each(|(index, work)| {
                let Work { first, last, launches, graph, .. } = work;
                let (first, last) = (first.symbol(), last.symbol());
                f.write_str(if index == 0 { "; not waited for: " } else { ", " })?;
                match (graph, launches) {
                    (true, _) => write!(f, "a graph of {launches} kernels from {first} to {last}"),
                    (false, 1) => write!(f, "{last}"),
                    (false, _) => write!(f, "{launches} kernels from {first} to {last}"),
                }
            })
        })
    }
}
