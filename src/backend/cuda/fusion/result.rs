//! What the kernels found for a row, as the engine tells it.

use super::rows::{Encoded, Roles};
use crate::backend::FuseRow;
use crate::backend::cuda::forward::LogitsPlace;
use crate::error::{Error, Result};
use crate::fusion::cumulant::one_hot;
use crate::fusion::{Decision, FusionRule, MAX_EXPERTS};
use crate::model::Role;

/// `FuseResult` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(in crate::backend::cuda) struct DeviceResult {
    loss: f64,
    forward: f64,
    reverse: f64,
    pub(in crate::backend::cuda) alpha: [f64; MAX_EXPERTS],
    log_sum_fused: f64,
    log_sum_base: f64,
    log_sum_small: f64,
    log_sum_expert: [f64; MAX_EXPERTS],
    forward_target: [f64; MAX_EXPERTS],
    reverse_target: [f64; MAX_EXPERTS],
    not_finite: u64,
    pub(in crate::backend::cuda) token: u32,
    argmax_fused: u32,
    argmax_base: u32,
    track: u32,
    candidate: u32,
    argmax_expert: [u32; MAX_EXPERTS],
    logit_base: f32,
    logit_small: f32,
    logit_expert: [f32; MAX_EXPERTS],
    empty: u32,
    pub(in crate::backend::cuda) begun: u64,
    pub(in crate::backend::cuda) large_done: u64,
    pub(in crate::backend::cuda) joined: u64,
    pub(in crate::backend::cuda) done: u64,
}

/// What the kernel found, as the engine tells it.
///
/// # Errors
/// [`Error::NotFinite`] and [`Error::NoCandidate`] for this row.
pub(in crate::backend::cuda) fn decode(
    roles: &Roles,
    row: &FuseRow<'_>,
    encoded: &Encoded,
    result: &DeviceResult,
    place: &LogitsPlace,
) -> Result<Decision> {
    let experts = encoded.row.experts as usize;
    if result.not_finite != u64::MAX {
        let (token, model) = ((result.not_finite / 16) as u32, (result.not_finite % 16) as usize);
        let role = roles.0.get(model).copied().unwrap_or(encoded.base);
        return Err(Error::NotFinite { role, step: row.step, token, value: f32::NAN });
    }
    if result.empty != 0 || result.token as usize >= place.vocab_size {
        return Err(Error::NoCandidate { step: row.step });
    }
    let logits = std::iter::once(result.logit_base).chain((experts > 0).then_some(result.logit_small));
    let excluded =
        logits.chain(result.logit_expert[..experts].iter().copied()).any(|x| x == f32::NEG_INFINITY);
    let logprob = |x: f64, log_sum: f64| if excluded { f64::NEG_INFINITY } else { x - log_sum };
    let (base, small) = (f64::from(result.logit_base), f64::from(result.logit_small));
    let base_logprob = logprob(base, result.log_sum_base);

    let mut decision =
        Decision { token: result.token, argmax_fused: result.argmax_fused, ..Decision::default() };
    match encoded.base {
        Role::Large => {
            decision.logprob_large = Some(base_logprob);
            decision.argmax_large = Some(result.argmax_base);
        }
        Role::Small => decision.logprob_small = Some(base_logprob),
        Role::Expert(_) => {
            decision.logprob_expert.push(base_logprob);
            decision.argmax_expert.push(result.argmax_base);
        }
    }
    if experts == 0 {
        decision.logprob_fused = base_logprob;
        return Ok(decision);
    }
    (decision.expert, decision.alpha) = match (row.rule, &encoded.alpha) {
        (FusionRule::Dynamic(rule), None) => {
            let track = result.track as usize;
            let candidate = rule.points(track).get(result.candidate as usize).copied().unwrap_or(0.0);
            let found = result.alpha.get(track).copied().unwrap_or(0.0);
            // The kernel has candidates as f32.
            let alpha = if found == f64::from(candidate as f32) { candidate } else { found };
            (Some(track), one_hot(experts, track, alpha))
        }
        (_, alpha) => (row.held.map(|(expert, _)| expert), alpha.clone().unwrap_or_default()),
    };
    let differences =
        result.logit_expert[..experts].iter().zip(&decision.alpha).filter(|(_, alpha)| **alpha != 0.0);
    let shift: f64 = differences.map(|(&expert, &alpha)| alpha * (f64::from(expert) - small)).sum();
    decision.logprob_fused = logprob(base + shift, result.log_sum_fused);
    decision.loss = Some(result.loss);
    decision.kl_fused_large = Some(result.forward.max(0.0));
    decision.kl_large_fused = Some(result.reverse.max(0.0));
    decision.kl_expert_small = result.forward_target[..experts].iter().map(|kl| kl.max(0.0)).collect();
    decision.kl_small_expert = result.reverse_target[..experts].iter().map(|kl| kl.max(0.0)).collect();
    decision.logprob_small = Some(logprob(small, result.log_sum_small));
    let of_experts = result.logit_expert.iter().zip(&result.log_sum_expert).take(experts);
    decision.logprob_expert = of_experts.map(|(&x, &log_sum)| logprob(f64::from(x), log_sum)).collect();
    decision.argmax_expert = result.argmax_expert[..experts].iter().copied().collect();
    Ok(decision)
}
