//! Fusion alone, for another engine: logits that the caller owns become decisions, and no model is run.

use super::fuse::Fuser;
use super::pool::Pool;
use crate::backend::{Choice, FuseRow};
use crate::error::{Error, Result};
use crate::fusion::{Decision, FusionRule, Logits, LogitsRows, ModelLogits};

/// Fuses logits in this process's memory: [`Backend::fuse`](crate::backend::Backend::fuse) without a backend. Keeps
/// its threads and working memory from call to call, and copies no logits.
///
/// ```
/// use dlf_engine::backend::cpu::CpuFusion;
/// use dlf_engine::backend::{Choice, FuseRow};
/// use dlf_engine::fusion::{FusionRule, LogitsRows, ModelLogits};
/// use dlf_engine::SamplingParams;
///
/// # fn main() -> dlf_engine::Result<()> {
/// let (large, small, expert) = ([1.0, 2.0, 0.5], [1.0, 1.0, 1.0], [1.0, 1.0, 4.0]);
/// let logits = ModelLogits {
///     large: Some(LogitsRows::new(&large, 3)?),
///     small: Some(LogitsRows::new(&small, 3)?),
///     experts: std::iter::once(LogitsRows::new(&expert, 3)?).collect(),
/// };
/// let greedy = SamplingParams::default();
/// let choice = Choice::Sample { params: &greedy, history: &[], generated: 0, banned: &[] };
/// let row = FuseRow { slot: 0, step: 0, rule: &FusionRule::default(), held: None, choice };
/// let mut decisions = Vec::new();
/// CpuFusion::new(1)?.fuse(&logits, &[row], &mut decisions)?;
/// let decision = decisions.remove(0)?;
/// assert_eq!((decision.argmax_large, decision.token), (Some(1), 2));
/// # Ok(())
/// # }
/// ```
pub struct CpuFusion {
    pool: Pool,
    fuser: Fuser,
}

impl CpuFusion {
    /// Starts the threads, the caller's being one of them. Decisions don't depend on their number.
    ///
    /// # Errors
    /// [`Error::Parameter`] where `threads` is 0, [`Error::Device`] where the system refuses one.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self { pool: Pool::new(threads)?, fuser: Fuser::new() })
    }

    /// Decides each of `rows`: [`FuseRow::slot`] is the row of the matrices that it reads. `decisions` is cleared and
    /// gets one entry a row, with the errors of [`Fuser::fuse`], so that one broken row doesn't cost the others
    /// theirs. Where models have vocabularies of different sizes, the ids past the smallest are dropped.
    ///
    /// # Errors
    /// Before anything is computed: those of [`FusionRule::check`], [`SamplingParams::validate`], and
    /// [`Error::Parameter`] where a row isn't in every matrix or holds an expert that isn't there.
    ///
    /// [`SamplingParams::validate`]: crate::SamplingParams::validate
    pub fn fuse(
        &mut self,
        logits: &ModelLogits<LogitsRows<'_>>,
        rows: &[FuseRow<'_>],
        decisions: &mut Vec<Result<Decision>>,
    ) -> Result<()> {
        decisions.clear();
        let models = logits.large.iter().chain(&logits.small).chain(&logits.experts);
        let fewest = models.map(LogitsRows::rows).min().unwrap_or(0);
        for row in rows {
            check_row(row, logits, fewest)?;
        }
        let of_row = |row: usize| {
            let row = rows[row].slot;
            Logits {
                large: logits.large.and_then(|large| large.row(row)),
                small: logits.small.and_then(|small| small.row(row)),
                experts: logits.experts.iter().filter_map(|expert| expert.row(row)).collect(),
            }
        };
        let pool = &mut self.pool;
        let mut parallel =
            |tasks: usize, task: &(dyn Fn(usize) + Sync)| pool.run(tasks, |_, index| task(index));
        self.fuser.fuse(&mut parallel, rows, &of_row, decisions);
        Ok(())
    }
}

/// Checks what a backend has checked when it comes to fusion; `fewest` is the number of rows that all models have.
pub(crate) fn check_row<L>(row: &FuseRow<'_>, logits: &ModelLogits<L>, fewest: usize) -> Result<()> {
    let experts = logits.experts.len();
    row.rule.check(logits.large.is_some(), logits.small.is_some(), experts)?;
    if let Choice::Sample { params, .. } = row.choice {
        params.validate()?;
    }
    if row.slot >= fewest {
        return Err(Error::Parameter {
            name: "row",
            expected: format!("a row of every model's logits, below {fewest}"),
            found: row.slot.to_string(),
        });
    }
    match (row.rule, row.held) {
        (FusionRule::Dynamic(_), Some((expert, alpha))) if expert >= experts || !alpha.is_finite() => {
            Err(Error::Parameter {
                name: "held alpha",
                expected: format!("a finite number for an expert below {experts}"),
                found: format!("{alpha} for expert {expert}"),
            })
        }
        _ => Ok(()),
    }
}
