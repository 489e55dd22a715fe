//! Fusion alone, over logits that the caller owns.

use engine::backend::cpu::{CpuFusion, available_threads};
use engine::backend::{Choice, FuseRow};
use engine::fusion::{Decision, LogitsRows, MAX_EXPERTS, ModelLogits};

use crate::border::{Failure, dlf_status, dlf_tokens, free, guard, out, outs, required, slice, status_of};
use crate::decision::{DLF_NO_EXPERT, DLF_NO_TOKEN, dlf_decision};
use crate::rule::{dlf_rule, dlf_sampling, rule, sampling};

/// Fuses logits of any engine: threads and working memory. One call at a time.
pub struct dlf_fuser {
    fusion: CpuFusion,
    decisions: Vec<engine::Result<Decision>>,
}

/// Logits of the models for the same rows, one matrix a model: `(rows, vocab_size)` f32, row-major, row `r` beginning
/// at `r * stride`. They are read in place.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_logits {
    /// The large model; null where the rule doesn't need it.
    pub large: *const f32,
    /// The small model; null where the rule doesn't need it.
    pub small: *const f32,
    /// One pointer an expert.
    pub experts: *const *const f32,
    /// How many; at most `DLF_MAX_EXPERTS`.
    pub num_experts: usize,
    /// Rows of each matrix.
    pub rows: usize,
    /// The token ids that all models share.
    pub vocab_size: usize,
    /// From row to row, in values; 0 is `vocab_size`.
    pub stride: usize,
}

/// One row to decide. Begin with `dlf_row_default`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_row {
    /// The row of the matrices.
    pub row: usize,
    /// The step, counted from the first token after the prompt: it keys the noise of sampling and names errors.
    pub step: usize,
    /// The active expert of an earlier search whose alpha is held, or `DLF_NO_EXPERT` to search.
    pub held_expert: i32,
    /// Its alpha.
    pub held_alpha: f64,
    /// A token that is given and only scored, or `DLF_NO_TOKEN` to choose one.
    pub forced: u32,
    /// The tokens before this one, prompt included, which penalties look at.
    pub history: dlf_tokens,
    /// How many of them were generated.
    pub num_generated: usize,
    /// Tokens that must not be chosen.
    pub banned: dlf_tokens,
}

/// A row at step 0 that searches alpha and chooses a token.
#[unsafe(no_mangle)]
pub extern "C" fn dlf_row_default(row: usize) -> dlf_row {
    dlf_row {
        row,
        step: 0,
        held_expert: DLF_NO_EXPERT,
        held_alpha: 0.0,
        forced: DLF_NO_TOKEN,
        history: dlf_tokens::NONE,
        num_generated: 0,
        banned: dlf_tokens::NONE,
    }
}

/// Makes a fuser of `threads` threads, the caller's included; 0 is one a core. Decisions don't depend on their number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_fuser_new(threads: usize, fuser: *mut *mut dlf_fuser) -> dlf_status {
    guard(|| {
        let fuser = out(fuser, "fuser")?;
        let threads = if threads == 0 { available_threads() } else { threads };
        let new = Box::new(dlf_fuser { fusion: CpuFusion::new(threads)?, decisions: Vec::new() });
        // SAFETY: checked by `out`.
        unsafe { fuser.write(Box::into_raw(new)) };
        Ok(())
    })
}

/// Frees a fuser; null is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_fuser_free(fuser: *mut dlf_fuser) {
    // SAFETY: the caller's promise.
    unsafe { free(fuser) };
}

/// Fuses rows of logits and chooses their tokens. No model is run.
///
/// `rule` null is the paper's rule, `sampling` null is greedy, `rows` null is every row of the logits in order, where
/// `num_rows` must be `logits->rows`. `decisions` has room for `num_rows`. A row that fails says so in its status and
/// leaves the others theirs; the call then returns the status of the first that did.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_fuse(
    fuser: *mut dlf_fuser,
    logits: *const dlf_logits,
    rule: *const dlf_rule,
    sampling: *const dlf_sampling,
    rows: *const dlf_row,
    num_rows: usize,
    decisions: *mut dlf_decision,
) -> dlf_status {
    guard(|| {
        let fuser = out(fuser, "fuser")?;
        // SAFETY: not null and aligned; it is the caller's promise that nobody else uses it.
        let fuser = unsafe { &mut *fuser };
        let decisions = outs(decisions, num_rows, "decisions")?;
        // SAFETY: the caller's promise.
        unsafe { fuse(fuser, logits, rule, sampling, rows, num_rows, decisions) }
    })
}

/// # Safety
/// The pointers are null or valid; `decisions` has room for `num_rows`.
unsafe fn fuse(
    fuser: &mut dlf_fuser,
    logits: *const dlf_logits,
    rule_given: *const dlf_rule,
    sampling_given: *const dlf_sampling,
    rows: *const dlf_row,
    num_rows: usize,
    decisions: *mut dlf_decision,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let (logits, rule) = unsafe { (required(logits, "logits")?, rule(rule_given)?) };
    // SAFETY: the caller's promise.
    let (params, models) = unsafe { (sampling(sampling_given)?, models(logits)?) };
    let in_order: Vec<dlf_row>;
    let rows = if rows.is_null() {
        if num_rows != logits.rows {
            let message = format!("num_rows is {num_rows} without rows, and the logits have {}", logits.rows);
            return Err(Failure::invalid(message));
        }
        in_order = (0..num_rows).map(|row| dlf_row_default(row)).collect();
        &in_order[..]
    } else {
        // SAFETY: the caller's promise.
        unsafe { slice(rows, num_rows, "rows") }?
    };
    let mut to_fuse = Vec::with_capacity(rows.len());
    for row in rows {
        let choice = match row.forced {
            DLF_NO_TOKEN => Choice::Sample {
                params: &params,
                // SAFETY: the caller's promise.
                history: unsafe { row.history.get("history") }?,
                generated: row.num_generated,
                // SAFETY: the caller's promise.
                banned: unsafe { row.banned.get("banned") }?,
            },
            token => Choice::Forced(token),
        };
        let held = match row.held_expert {
            DLF_NO_EXPERT => None,
            expert => match usize::try_from(expert) {
                Ok(expert) => Some((expert, row.held_alpha)),
                Err(_) => return Err(Failure::invalid(format!("held_expert is {expert}"))),
            },
        };
        to_fuse.push(FuseRow { slot: row.row, step: row.step, rule: &rule, held, choice });
    }
    fuser.fusion.fuse(&models, &to_fuse, &mut fuser.decisions)?;
    let mut first = None;
    for (index, decision) in fuser.decisions.drain(..).enumerate() {
        let plain = match &decision {
            Ok(decision) => decision.into(),
            Err(error) => dlf_decision::failed(status_of(error)),
        };
        // SAFETY: there is room for `num_rows`, and as many rows were fused.
        unsafe { decisions.add(index).write(plain) };
        first = first.or(decision.err().map(|error| (index, error)));
    }
    let failure = first.map(|(index, error)| {
        let status = status_of(&error);
        Failure { status, message: format!("row {index}: {error}") }
    });
    failure.map_or(Ok(()), Err)
}

/// # Safety
/// What `logits` points to is valid.
unsafe fn models(logits: &dlf_logits) -> Result<ModelLogits<LogitsRows<'_>>, Failure> {
    if logits.num_experts > MAX_EXPERTS {
        let message = format!("num_experts: at most {MAX_EXPERTS}, found {}", logits.num_experts);
        return Err(Failure::invalid(message));
    }
    let stride = if logits.stride == 0 { logits.vocab_size } else { logits.stride };
    let len = LogitsRows::span(logits.rows, logits.vocab_size, stride)?;
    let matrix = |values: *const f32, what: &str| {
        // SAFETY: the caller's promise.
        let values = unsafe { slice(values, len, what) }?;
        Ok::<_, Failure>(LogitsRows::with_stride(values, logits.rows, logits.vocab_size, stride)?)
    };
    let optional = |values: *const f32, what| (!values.is_null()).then(|| matrix(values, what)).transpose();
    // SAFETY: the caller's promise.
    let experts = unsafe { slice(logits.experts, logits.num_experts, "experts") }?;
    Ok(ModelLogits {
        large: optional(logits.large, "large")?,
        small: optional(logits.small, "small")?,
        experts: experts.iter().map(|&expert| matrix(expert, "an expert")).collect::<Result<_, _>>()?,
    })
}
