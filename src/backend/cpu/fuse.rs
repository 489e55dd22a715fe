//! Fusion on the CPU: rows of logits become decisions.
//!
//! A row is searched in slices of the vocabulary, each in one pass for all candidates of all experts
//! (`slice`, `walk`); the slices' sums are merged in order, a few dozen operations in f64 choose α, and
//! one more pass over the row's fused logits finds their argmax; they are written only where a sampler
//! reads them. Nothing is allocated after the first call of a size, and results depend neither on the
//! number of threads nor on the other rows.

mod fused;
mod models;
mod row;
mod slice;
mod sums;
mod walk;
mod wide;

use std::sync::Mutex;

use models::{Models, NotFinite};
use row::RowState;
use slice::{SLICE, Search};
use sums::{Sought, Sums};

use super::lock;
use super::simd::Isa;
use crate::backend::FuseRow;
use crate::error::Result;
use crate::fusion::{Decision, Logits};

/// Runs a task for each of 0, 1, … below a count, in any order and on any threads, and returns when all are
/// done.
pub type Parallel<'a> = dyn FnMut(usize, &(dyn Fn(usize) + Sync)) + 'a;

/// One after the other, on the calling thread.
pub fn sequential(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    (0..tasks).for_each(task);
}

/// Fuses rows of logits. Keeps its working memory from call to call.
#[derive(Debug)]
pub struct Fuser {
    isa: Isa,
    slices: Vec<Mutex<Option<Result<Sums, NotFinite>>>>,
    rows: Vec<Mutex<RowState>>,
    sought: Vec<Option<Sought>>,
}

impl Default for Fuser {
    fn default() -> Self {
        Self::new()
    }
}

impl Fuser {
    /// With the best instructions that this CPU has.
    pub fn new() -> Self {
        Self::with_isa(Isa::detect())
    }

    /// One for each instruction set that this CPU has, from the plainest to the best, which [`new`](Self::new) takes.
    /// They differ by rounding.
    pub fn every() -> impl Iterator<Item = Self> {
        Isa::every().map(Self::with_isa)
    }

    /// The name of its instructions.
    pub fn instructions(&self) -> &'static str {
        self.isa.name()
    }

    /// With instructions that the machine is known to have.
    pub(super) fn with_isa(isa: Isa) -> Self {
        Self { isa, slices: Vec::new(), rows: Vec::new(), sought: Vec::new() }
    }

    /// Decides each of `rows`; `logits` gives the logits of the row with that index. `decisions` is cleared and
    /// gets one entry a row:
    ///
    /// - [`Error::MissingModel`](crate::Error::MissingModel) where the rule reads logits that aren't there,
    /// - [`Error::NotFinite`](crate::Error::NotFinite) where a model that it reads computed NaN or +∞, naming
    ///   the lowest such token,
    /// - [`Error::NoCandidate`](crate::Error::NoCandidate) where every token is excluded,
    /// - [`Error::TokenOutOfRange`](crate::Error::TokenOutOfRange) where a forced token is.
    pub fn fuse<'a>(
        &mut self,
        parallel: &mut Parallel<'_>,
        rows: &[FuseRow<'_>],
        logits: &(dyn Fn(usize) -> Logits<'a> + Sync),
        decisions: &mut Vec<Result<Decision>>,
    ) {
        decisions.clear();
        self.rows.resize_with(rows.len().max(self.rows.len()), Default::default);
        self.sought.clear();
        let mut slices = 1;
        for (i, row) in rows.iter().enumerate() {
            let (sought, width) = lock(&self.rows[i]).open(row, &logits(i));
            self.sought.push(sought);
            slices = slices.max(width.div_ceil(SLICE));
        }
        self.slices.resize_with((rows.len() * slices).max(self.slices.len()), Default::default);

        // One round, but for the refined search, which measures the minimum that it found, and rarely a second time.
        while self.sought.iter().any(Option::is_some) {
            let (isa, sought, states, sums) = (self.isa, &self.sought, &self.rows, &self.slices);
            parallel(rows.len() * slices, &|task| {
                let (i, slice) = (task / slices, task % slices);
                if let Some(sought) = &sought[i] {
                    *lock(&sums[task]) = search(isa, rows[i], &logits(i), slice, sought);
                }
            });
            parallel(rows.len(), &|i| {
                if let Some(sought) = &sought[i] {
                    let models = Models::new(&logits(i), rows[i].rule);
                    let parts = sums[i * slices..(i + 1) * slices].iter().map(lock);
                    lock(&states[i]).advance(isa, &rows[i], models, sought, parts);
                }
            });
            for (sought, state) in self.sought.iter_mut().zip(&self.rows) {
                *sought = sought.take().and_then(|_| lock(state).next());
            }
        }
        decisions
            .extend(self.rows[..rows.len()].iter().zip(rows).map(|(state, row)| lock(state).close(row.step)));
    }
}

/// Searches one slice of a row; `None` past the row's width.
fn search(
    isa: Isa,
    row: FuseRow<'_>,
    logits: &Logits<'_>,
    slice: usize,
    sought: &Sought,
) -> Option<Result<Sums, NotFinite>> {
    let models = Models::new(logits, row.rule).ok()?;
    let range = (slice * SLICE).min(models.width())..((slice + 1) * SLICE).min(models.width());
    (!range.is_empty()).then(|| isa.run(Search { models: &models, range, sought }))
}
