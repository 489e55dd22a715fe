//! The most probable tokens of a step's fused distribution.

use crate::backend::Backend;
use crate::ensemble::Ensemble;
use crate::error::Result;
use crate::fusion::{Decision, FusionRule};
use crate::model::Role;

/// The `wanted` most probable tokens with log P̃, the most probable first.
///
/// The first is the decision's argmax, which was found in f32; no other gets a larger value than it. The fused
/// logits are formed in f64 from the models' own, which are still in `slot`.
pub(super) fn most_probable(
    backend: &dyn Backend,
    ensemble: &Ensemble,
    rule: &FusionRule,
    slot: usize,
    decision: &Decision,
    wanted: usize,
) -> Result<Vec<(u32, f64)>> {
    if wanted == 0 {
        return Ok(Vec::new());
    }
    let Decision { token, argmax_fused: argmax, logprob_fused: logprob, .. } = *decision;
    if wanted == 1 && token == argmax {
        return Ok(vec![(token, logprob)]);
    }
    let fused = fused(backend, ensemble, rule, slot, decision)?;
    let of = |id: u32| fused.get(id as usize).copied().unwrap_or(f64::NEG_INFINITY);
    // log P̃(x) = log P̃(token) + f(x) − f(token): no sum over the vocabulary, and exact for the token itself.
    let log_sum = if logprob.is_finite() { of(token) - logprob } else { log_sum_exp(&fused) };
    let logprob_of = |id: u32| if id == token { logprob } else { of(id) - log_sum };
    let most = logprob_of(argmax);
    let mut ids: Vec<u32> =
        (0..fused.len() as u32).filter(|&id| id != argmax && of(id).is_finite()).collect();
    let larger_first = |a: &u32, b: &u32| of(*b).total_cmp(&of(*a)).then(a.cmp(b));
    let others = wanted - 1;
    if others < ids.len() {
        ids.select_nth_unstable_by(others, larger_first);
        ids.truncate(others);
    }
    ids.sort_unstable_by(larger_first);
    let others = ids.into_iter().map(|id| (id, logprob_of(id).min(most)));
    Ok(std::iter::once((argmax, most)).chain(others).collect())
}

/// L + Σ α_t (E_t − S), or the logits of the one model that the rule runs; −∞ where a model excludes the token.
fn fused(
    backend: &dyn Backend,
    ensemble: &Ensemble,
    rule: &FusionRule,
    slot: usize,
    decision: &Decision,
) -> Result<Vec<f64>> {
    let mut used = ensemble.models_for(rule).into_iter();
    let Some(first) = used.next() else { return Ok(Vec::new()) };
    let widen = |logits: Vec<f32>| logits.into_iter().map(f64::from);
    let mut fused: Vec<f64> = widen(backend.logits(first, slot)?).collect();
    let mut small = Vec::new();
    for model in used {
        let logits = backend.logits(model, slot)?;
        let alpha = match ensemble.models().get(model).map(|model| model.role) {
            Some(Role::Expert(expert)) => decision.alpha.get(expert).copied().unwrap_or_default(),
            _ => 0.0,
        };
        for ((fused, x), s) in
            fused.iter_mut().zip(&logits).zip(small.iter().chain(std::iter::repeat(&0.0f32)))
        {
            if *x == f32::NEG_INFINITY {
                *fused = f64::NEG_INFINITY;
            } else if alpha != 0.0 && *fused > f64::NEG_INFINITY {
                *fused += alpha * (f64::from(*x) - f64::from(*s));
            }
        }
        if small.is_empty() {
            small = logits;
        }
    }
    Ok(fused)
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}
