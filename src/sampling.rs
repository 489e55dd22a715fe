//! `SamplingParams`, and what they mean: the definition of the sampler.

/// How a token is drawn from the fused logits. The α search never sees these: it works on temperature-1 logits.
///
/// Order: logit bias and bans, repetition penalty, presence and frequency penalties, temperature, top-k, top-p,
/// min-p, then one draw by the Gumbel-max trick with noise keyed by (seed, step, token id). The order is
/// transformers' own.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// The k most probable tokens; 0 is all.
    pub top_k: usize,
    /// The smallest set of tokens whose probability reaches this; 1 is all.
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
