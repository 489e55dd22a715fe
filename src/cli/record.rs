//! The record of one token: a line of a trace, an entry of a score.

use serde::Serialize;
use serde_json::Value;

use super::input::Source;
use crate::ensemble::Ensemble;
use crate::generate::Step;

/// What is known of one decided token. Arrays have one entry an expert; what the method doesn't compute is null or
/// an empty array. `ms` is null on a device without a clock. `argmax_*_text` are the texts of single tokens, and miss where there is no tokenizer.
#[derive(Debug, Serialize)]
pub(crate) struct TokenRecord<'a> {
    prompt_index: usize,
    step: usize,
    /// What was asked, in the first record of a prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<Value>,
    /// The experts' names in the order of all arrays, in the first record of a prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<Vec<&'a str>>,
    token_id: u32,
    text: &'a str,
    /// The name of the active expert.
    expert: Option<&'a str>,
    alpha: &'a [f64],
    /// What α was chosen from, as `--alpha-grid` takes it; none where it wasn't searched for.
    alpha_grid: Option<&'a str>,
    loss: Option<f64>,
    kl_fused_large: Option<f64>,
    kl_large_fused: Option<f64>,
    kl_expert_small: &'a [f64],
    kl_small_expert: &'a [f64],
    logprob_fused: f64,
    logprob_large: Option<f64>,
    logprob_small: Option<f64>,
    logprob_expert: &'a [f64],
    argmax_large: Option<u32>,
    argmax_large_text: Option<String>,
    argmax_expert: &'a [u32],
    argmax_expert_text: Vec<String>,
    changed: Option<bool>,
    ms: Option<f64>,
}

impl<'a> TokenRecord<'a> {
    pub(crate) fn new(
        prompt_index: usize,
        step: &'a Step,
        ensemble: &'a Ensemble,
        alpha_grid: Option<&'a str>,
    ) -> Self {
        let decision = &step.decision;
        let text = |&id: &u32| own_text(ensemble, id);
        Self {
            prompt_index,
            step: step.index,
            prompt: None,
            experts: None,
            token_id: step.token,
            text: &step.piece,
            expert: decision.expert.and_then(|t| ensemble.expert_name(t)),
            alpha: &decision.alpha,
            alpha_grid,
            loss: decision.loss,
            kl_fused_large: decision.kl_fused_large,
            kl_large_fused: decision.kl_large_fused,
            kl_expert_small: &decision.kl_expert_small,
            kl_small_expert: &decision.kl_small_expert,
            logprob_fused: decision.logprob_fused,
            logprob_large: decision.logprob_large,
            logprob_small: decision.logprob_small,
            logprob_expert: &decision.logprob_expert,
            argmax_large: decision.argmax_large,
            argmax_large_text: decision.argmax_large.as_ref().and_then(text),
            argmax_expert: &decision.argmax_expert,
            argmax_expert_text: decision.argmax_expert.iter().filter_map(text).collect(),
            changed: decision.changed(),
            ms: step.time.map(|time| time.total().as_secs_f64() * 1e3),
        }
    }

    /// The record of a trace: the first of a prompt has what holds for all.
    pub(crate) fn with_beginning(self, prompt: Option<&Source>, ensemble: &'a Ensemble) -> Self {
        if self.step > 0 {
            return self;
        }
        let experts = (0..).map_while(|t| ensemble.expert_name(t)).collect();
        Self { prompt: prompt.map(Source::to_json), experts: Some(experts), ..self }
    }
}

/// Token `id` by itself: its bytes as text, or the name of a special token.
fn own_text(ensemble: &Ensemble, id: u32) -> Option<String> {
    let tokenizer = ensemble.tokenizer_of_any()?;
    let piece = tokenizer.piece(id);
    Some(if piece.is_empty() {
        tokenizer.token(id).unwrap_or_default()
    } else {
        String::from_utf8_lossy(piece).into_owned()
    })
}
