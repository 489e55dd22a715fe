//! `SamplingParams`, and what they mean: the definition of the sampler.

mod philox;
mod sampler;

pub use sampler::Sampler;

use crate::error::{Error, Result};

/// How a token is drawn from the fused logits. The α search never sees these: it works on temperature-1 logits.
///
/// Order: logit bias and bans, repetition penalty, presence and frequency penalties, temperature, top-k, top-p,
/// min-p, then one draw by the Gumbel-max trick with noise keyed by (seed, step, token id). The order is
/// transformers' own.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// The k most probable tokens, and those as probable as the last of them; 0 is all.
    pub top_k: usize,
    /// The fewest most probable tokens whose probability reaches this, the lower id first where two tie; 1 is
    /// all.
    pub top_p: f32,
    /// Tokens at least this fraction as probable as the most probable one; 0 is all.
    pub min_p: f32,
    /// Divides positive logits and multiplies negative ones of tokens seen so far (prompt included); 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted from the logits of generated tokens once for every time they were generated.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids; −inf bans one.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same text, whatever else is in the batch.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Whether a bias or a penalty changes the logits.
    pub(crate) fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Whether some tokens are never drawn: top-k, top-p or min-p.
    pub(crate) fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::Parameter`] names the first that is out of its range.
    pub fn validate(&self) -> Result<()> {
        let check = |valid: bool, name, expected: &str, found: f32| {
            let error = || Error::Parameter { name, expected: expected.to_owned(), found: found.to_string() };
            if valid { Ok(()) } else { Err(error()) }
        };
        let &Self {
            temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, ..
        } = self;
        check(temperature.is_finite() && temperature >= 0.0, "temperature", "0 or more", temperature)?;
        check(top_p > 0.0 && top_p <= 1.0, "top_p", "more than 0, at most 1", top_p)?;
        check((0.0..=1.0).contains(&min_p), "min_p", "0 to 1", min_p)?;
        let positive = repetition_penalty.is_finite() && repetition_penalty > 0.0;
        check(positive, "repetition_penalty", "more than 0", repetition_penalty)?;
        check(presence_penalty.is_finite(), "presence_penalty", "a finite number", presence_penalty)?;
        check(frequency_penalty.is_finite(), "frequency_penalty", "a finite number", frequency_penalty)?;
        for &(_, bias) in &self.logit_bias {
            check(bias < f32::INFINITY, "logit_bias", "a number below infinity", bias)?;
        }
        Ok(())
    }
}
