//! Rules and sampling parameters.

use engine::fusion::{AlphaGrid, DynamicRule, MAX_EXPERTS, Objective, PerExpert, SearchMode};
use engine::{FusionRule, SamplingParams};

use crate::border::{Failure, optional, slice};

/// alpha by matching KL divergences, one expert active a step.
pub const DLF_DYNAMIC: u32 = 0;
/// Fixed alpha: proxy tuning.
pub const DLF_STATIC: u32 = 1;
/// The large model alone.
pub const DLF_LARGE: u32 = 2;
/// The small model alone.
pub const DLF_SMALL: u32 = 3;
/// One expert alone.
pub const DLF_EXPERT: u32 = 4;

/// The best candidate of the grid, as in the paper.
pub const DLF_SEARCH_GRID: u32 = 0;
/// The continuous minimum inside the best candidate's cells.
pub const DLF_SEARCH_REFINE: u32 = 1;

/// Both KL terms, as in the paper.
pub const DLF_OBJECTIVE_BOTH: u32 = 0;
/// Only KL(fused || large).
pub const DLF_OBJECTIVE_FORWARD: u32 = 1;
/// Only KL(large || fused).
pub const DLF_OBJECTIVE_REVERSE: u32 = 2;

/// The candidates of alpha: start, start + step, ... up to stop; 1 to 32 of them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_grid {
    /// The first.
    pub start: f64,
    /// The end.
    pub stop: f64,
    /// More than 0.
    pub step: f64,
    /// Whether `stop` is itself a candidate.
    pub inclusive: bool,
}

/// How the models' logits become one distribution. Begin with `dlf_rule_default`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_rule {
    /// `DLF_DYNAMIC`, `DLF_STATIC`, `DLF_LARGE`, `DLF_SMALL` or `DLF_EXPERT`.
    pub method: u32,
    /// `DLF_STATIC`: one alpha, or one for each expert; none is 1.0.
    pub alphas: *const f64,
    /// How many.
    pub num_alphas: usize,
    /// `DLF_EXPERT`: which, counted from 0.
    pub expert: usize,
    /// `DLF_DYNAMIC`: one grid, or one for each expert; none is the paper's 0.0, 0.1, ... 1.9.
    pub grids: *const dlf_grid,
    /// How many.
    pub num_grids: usize,
    /// `DLF_DYNAMIC`: `DLF_SEARCH_GRID` or `DLF_SEARCH_REFINE`.
    pub search: u32,
    /// `DLF_DYNAMIC`: `DLF_OBJECTIVE_BOTH`, `DLF_OBJECTIVE_FORWARD` or `DLF_OBJECTIVE_REVERSE`.
    pub objective: u32,
    /// `DLF_DYNAMIC`: alpha is sought every so many steps and held in between; at least 1. `dlf_fuse` goes by each
    /// row's `held_expert` instead.
    pub every: usize,
}

/// The paper's rule.
#[unsafe(no_mangle)]
pub extern "C" fn dlf_rule_default() -> dlf_rule {
    dlf_rule {
        method: DLF_DYNAMIC,
        alphas: std::ptr::null(),
        num_alphas: 0,
        expert: 0,
        grids: std::ptr::null(),
        num_grids: 0,
        search: DLF_SEARCH_GRID,
        objective: DLF_OBJECTIVE_BOTH,
        every: 1,
    }
}

/// # Safety
/// `rule` is null or valid, with all that it points to.
pub(crate) unsafe fn rule(rule: *const dlf_rule) -> Result<FusionRule, Failure> {
    // SAFETY: the caller's promise.
    let Some(rule) = (unsafe { optional(rule, "rule") })? else { return Ok(FusionRule::default()) };
    Ok(match rule.method {
        // SAFETY: the caller's promise.
        DLF_DYNAMIC => FusionRule::Dynamic(unsafe { dynamic(rule) }?),
        DLF_STATIC => {
            // SAFETY: the caller's promise.
            let alphas = unsafe { slice(rule.alphas, rule.num_alphas, "alphas") }?;
            FusionRule::Static(if alphas.is_empty() {
                std::iter::once(1.0).collect()
            } else {
                per_expert(alphas, "num_alphas")?
            })
        }
        DLF_LARGE => FusionRule::Large,
        DLF_SMALL => FusionRule::Small,
        DLF_EXPERT => FusionRule::Expert(rule.expert),
        other => return Err(unknown("method", other)),
    })
}

/// # Safety
/// What `rule` points to is valid.
unsafe fn dynamic(rule: &dlf_rule) -> Result<DynamicRule, Failure> {
    // SAFETY: the caller's promise.
    let given = unsafe { slice(rule.grids, rule.num_grids, "grids") }?;
    let mut grids = Vec::with_capacity(given.len());
    for grid in given {
        grids.push(AlphaGrid::new(grid.start, grid.stop, grid.step, grid.inclusive)?);
    }
    let default = DynamicRule::default();
    Ok(DynamicRule {
        grids: if grids.is_empty() { default.grids } else { per_expert(&grids, "num_grids")? },
        mode: match rule.search {
            DLF_SEARCH_GRID => SearchMode::Grid,
            DLF_SEARCH_REFINE => SearchMode::Refine,
            other => return Err(unknown("search", other)),
        },
        objective: match rule.objective {
            DLF_OBJECTIVE_BOTH => Objective::Both,
            DLF_OBJECTIVE_FORWARD => Objective::Forward,
            DLF_OBJECTIVE_REVERSE => Objective::Reverse,
            other => return Err(unknown("objective", other)),
        },
        every: rule.every,
    })
}

fn per_expert<T: Clone>(values: &[T], what: &str) -> Result<PerExpert<T>, Failure> {
    if values.len() > MAX_EXPERTS {
        return Err(Failure::invalid(format!("{what}: at most {MAX_EXPERTS}, found {}", values.len())));
    }
    Ok(values.iter().cloned().collect())
}

fn unknown(field: &str, found: u32) -> Failure {
    Failure::invalid(format!("rule: {field} {found} is none of its constants"))
}

/// Added to the logit of a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_bias {
    /// The token.
    pub token: u32,
    /// -infinity bans it.
    pub bias: f32,
}

/// How a token is drawn from the fused logits. Begin with `dlf_sampling_default`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// The k most probable tokens; 0 is all.
    pub top_k: usize,
    /// The fewest most probable tokens whose probability reaches this; 1 is all.
    pub top_p: f32,
    /// Tokens at least this fraction as probable as the most probable one; 0 is all.
    pub min_p: f32,
    /// Divides positive logits and multiplies negative ones of tokens seen so far, prompt included; 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted from the logits of generated tokens once for every time they were generated.
    pub frequency_penalty: f32,
    /// `num_logit_biases` biases.
    pub logit_biases: *const dlf_bias,
    /// How many.
    pub num_logit_biases: usize,
    /// The same seed gives the same text, whatever else is in the batch.
    pub seed: u64,
}

/// Greedy.
#[unsafe(no_mangle)]
pub extern "C" fn dlf_sampling_default() -> dlf_sampling {
    let greedy = SamplingParams::default();
    dlf_sampling {
        temperature: greedy.temperature,
        top_k: greedy.top_k,
        top_p: greedy.top_p,
        min_p: greedy.min_p,
        repetition_penalty: greedy.repetition_penalty,
        presence_penalty: greedy.presence_penalty,
        frequency_penalty: greedy.frequency_penalty,
        logit_biases: std::ptr::null(),
        num_logit_biases: 0,
        seed: greedy.seed,
    }
}

/// # Safety
/// `sampling` is null or valid, with all that it points to.
pub(crate) unsafe fn sampling(sampling: *const dlf_sampling) -> Result<SamplingParams, Failure> {
    // SAFETY: the caller's promise.
    let Some(given) = (unsafe { optional(sampling, "sampling") })? else {
        return Ok(SamplingParams::default());
    };
    // SAFETY: the caller's promise.
    let biases = unsafe { slice(given.logit_biases, given.num_logit_biases, "logit_biases") }?;
    let params = SamplingParams {
        temperature: given.temperature,
        top_k: given.top_k,
        top_p: given.top_p,
        min_p: given.min_p,
        repetition_penalty: given.repetition_penalty,
        presence_penalty: given.presence_penalty,
        frequency_penalty: given.frequency_penalty,
        logit_bias: biases.iter().map(|bias| (bias.token, bias.bias)).collect(),
        seed: given.seed,
    };
    params.validate()?;
    Ok(params)
}
