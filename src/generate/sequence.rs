//! One request while it is decoded: its tokens in every model, and how far each model has read.

use crate::backend::{Choice, FuseRow};
use crate::fusion::{Decision, FusionRule};
use crate::generate::text::Text;
use crate::generate::{FinishReason, Request, Step, StepTime};

/// A sequence in one model: the role's own prompt, then the continuation that all models share.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) model: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// Index of its block table.
    pub(crate) table: usize,
    /// How many of `tokens` the model has read.
    pub(crate) computed: usize,
}

impl Stream {
    /// Rows whose logits nobody wants and that are still to be read: the prompt but for its last token.
    pub(crate) fn silent_rows(&self) -> usize {
        (self.prompt_len - 1).saturating_sub(self.computed)
    }
}

/// A request in flight.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: usize,
    pub(crate) request: Request,
    /// One a model that the rule uses; the penalties look at the first one's tokens.
    pub(crate) streams: Vec<Stream>,
    /// Tokens that end the text, sorted.
    pub(crate) end_token_ids: Vec<u32>,
    /// Tokens decided so far, forced ones included: the next step's number.
    pub(crate) decided: usize,
    /// The active expert and α of the last search.
    pub(crate) held: Option<(usize, f64)>,
    pub(crate) text: Text,
    /// Whether its last step is decided.
    pub(crate) ended: bool,
}

impl Sequence {
    /// Steps whose inputs are known, once every model has read its prompt: the forced tokens that are left, or
    /// the next token.
    pub(crate) fn steps_ready(&self) -> usize {
        self.request.forced.len().saturating_sub(self.decided).max(1)
    }

    /// How many of the next `most` steps can be fused together: all of them search for α, or none does.
    pub(crate) fn steps_alike(&self, most: usize) -> usize {
        let searches = self.searches(self.decided);
        (self.decided..self.decided + most).take_while(|&step| self.searches(step) == searches).count()
    }

    /// Whether α is sought anew at `step`.
    fn searches(&self, step: usize) -> bool {
        match &self.request.rule {
            FusionRule::Dynamic(rule) => step.is_multiple_of(rule.every),
            _ => true,
        }
    }

    /// The row that fuses step `step`, whose logits are in `slot`.
    pub(crate) fn fuse_row(&self, step: usize, slot: usize) -> FuseRow<'_> {
        let choice = match self.request.forced.get(step) {
            Some(&token) => Choice::Forced(token),
            None => {
                let generated = step - self.request.forced.len();
                Choice::Sample {
                    params: &self.request.sampling,
                    history: self.streams.first().map_or(&[], |stream| &stream.tokens),
                    generated,
                    banned: if generated < self.request.min_new_tokens { &self.end_token_ids } else { &[] },
                }
            }
        };
        let held = if self.searches(step) { None } else { self.held };
        FuseRow { slot, step, rule: &self.request.rule, held, choice }
    }

    /// Takes in the decision of the next step, and the most probable tokens where they were asked for.
    pub(crate) fn advance(
        &mut self,
        decision: Decision,
        top: Vec<(u32, f64)>,
        time: Option<StepTime>,
    ) -> Step {
        let (index, token) = (self.decided, decision.token);
        let forced = index < self.request.forced.len();
        if self.searches(index) {
            self.held = decision.expert.and_then(|t| decision.alpha.get(t).map(|&alpha| (t, alpha)));
        }
        if !forced {
            self.streams.iter_mut().for_each(|stream| stream.tokens.push(token));
        }
        self.decided += 1;

        // Nothing ends the text before `min_new_tokens` tokens are there.
        let may_end = self.decided > self.request.forced.len() + self.request.min_new_tokens;
        let mut finish = None;
        if may_end && self.end_token_ids.binary_search(&token).is_ok() {
            finish = Some(FinishReason::Stop);
        } else if self.decided >= self.request.forced.len() + self.request.max_new_tokens {
            finish = Some(FinishReason::Length);
        }
        let decoded = self.text.push(token, may_end, finish.is_some());
        if decoded.stopped {
            finish = Some(FinishReason::Stop);
        }
        self.ended = finish.is_some();
        Step {
            request: self.id,
            index,
            token,
            forced,
            piece: decoded.piece,
            text: decoded.text,
            decision,
            top,
            finish,
            time,
        }
    }
}
