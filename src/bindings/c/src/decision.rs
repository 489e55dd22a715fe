//! A decision as plain numbers.

use engine::fusion::{Decision, MAX_EXPERTS};

use crate::border::dlf_status;

/// The most experts of one ensemble.
pub const DLF_MAX_EXPERTS: usize = 8;
/// No token.
pub const DLF_NO_TOKEN: u32 = 0xFFFF_FFFF;
/// No expert.
pub const DLF_NO_EXPERT: i32 = -1;

const _: () = assert!(DLF_MAX_EXPERTS == MAX_EXPERTS, "the header's constant is the engine's");

/// What one step decided, and the numbers it decided by: log-probabilities and KL terms in nats, of the
/// distributions at temperature 1. What the rule doesn't have is NaN, `DLF_NO_TOKEN` or `DLF_NO_EXPERT`; so are the
/// entries past the last expert. A rule that runs one expert alone has its values in entry 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_decision {
    /// `DLF_OK`, or why this row has no decision.
    pub status: dlf_status,
    /// The chosen token, or the one that was to be scored.
    pub token: u32,
    /// The most probable token of the fused distribution.
    pub argmax_fused: u32,
    /// The most probable token of the large model.
    pub argmax_large: u32,
    /// The most probable token of each expert.
    pub argmax_expert: [u32; DLF_MAX_EXPERTS],
    /// The active expert of the dynamic rule.
    pub expert: i32,
    /// alpha of each expert.
    pub alpha: [f64; DLF_MAX_EXPERTS],
    /// The loss at that alpha.
    pub loss: f64,
    /// KL(fused || large).
    pub kl_fused_large: f64,
    /// KL(large || fused).
    pub kl_large_fused: f64,
    /// KL(expert || small) of each expert.
    pub kl_expert_small: [f64; DLF_MAX_EXPERTS],
    /// KL(small || expert) of each expert.
    pub kl_small_expert: [f64; DLF_MAX_EXPERTS],
    /// log-probability of the token in the fused distribution, before penalties, temperature and truncation.
    pub logprob_fused: f64,
    /// In the large model.
    pub logprob_large: f64,
    /// In the small model.
    pub logprob_small: f64,
    /// In each expert.
    pub logprob_expert: [f64; DLF_MAX_EXPERTS],
}

impl dlf_decision {
    /// A row without a decision.
    pub(crate) fn failed(status: dlf_status) -> Self {
        Self {
            status,
            token: DLF_NO_TOKEN,
            argmax_fused: DLF_NO_TOKEN,
            argmax_large: DLF_NO_TOKEN,
            argmax_expert: [DLF_NO_TOKEN; DLF_MAX_EXPERTS],
            expert: DLF_NO_EXPERT,
            alpha: [f64::NAN; DLF_MAX_EXPERTS],
            loss: f64::NAN,
            kl_fused_large: f64::NAN,
            kl_large_fused: f64::NAN,
            kl_expert_small: [f64::NAN; DLF_MAX_EXPERTS],
            kl_small_expert: [f64::NAN; DLF_MAX_EXPERTS],
            logprob_fused: f64::NAN,
            logprob_large: f64::NAN,
            logprob_small: f64::NAN,
            logprob_expert: [f64::NAN; DLF_MAX_EXPERTS],
        }
    }
}

impl From<&Decision> for dlf_decision {
    fn from(decision: &Decision) -> Self {
        Self {
            status: dlf_status::DLF_OK,
            token: decision.token,
            argmax_fused: decision.argmax_fused,
            argmax_large: decision.argmax_large.unwrap_or(DLF_NO_TOKEN),
            argmax_expert: padded(&decision.argmax_expert, DLF_NO_TOKEN),
            expert: decision.expert.and_then(|t| i32::try_from(t).ok()).unwrap_or(DLF_NO_EXPERT),
            alpha: padded(&decision.alpha, f64::NAN),
            loss: decision.loss.unwrap_or(f64::NAN),
            kl_fused_large: decision.kl_fused_large.unwrap_or(f64::NAN),
            kl_large_fused: decision.kl_large_fused.unwrap_or(f64::NAN),
            kl_expert_small: padded(&decision.kl_expert_small, f64::NAN),
            kl_small_expert: padded(&decision.kl_small_expert, f64::NAN),
            logprob_fused: decision.logprob_fused,
            logprob_large: decision.logprob_large.unwrap_or(f64::NAN),
            logprob_small: decision.logprob_small.unwrap_or(f64::NAN),
            logprob_expert: padded(&decision.logprob_expert, f64::NAN),
        }
    }
}

fn padded<T: Copy>(values: &[T], none: T) -> [T; DLF_MAX_EXPERTS] {
    let mut all = [none; DLF_MAX_EXPERTS];
    all.iter_mut().zip(values).for_each(|(all, &value)| *all = value);
    all
}
