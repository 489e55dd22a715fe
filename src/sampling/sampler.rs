//! The sampler: from fused logits to a token.

use std::cmp::Ordering;

use super::SamplingParams;
use super::philox::philox;

/// Draws tokens. Holds nothing but working memory: a draw is a function of its arguments.
#[derive(Clone, Debug, Default)]
pub struct Sampler {
    /// Occurrences of each id among the tokens that a penalty looks at; zero between calls.
    counts: Vec<u32>,
    /// The ids that are left.
    kept: Vec<u32>,
}

impl Sampler {
    /// The token for fused logits `(vocab_size,)`, which are overwritten by penalised ones; `None` where none is
    /// left. −∞ excludes an id.
    ///
    /// `history` is the prompt, `prompt` tokens of it, and what was generated since; `banned` ids get −∞. Ids
    /// past the vocabulary are ignored.
    pub fn choose(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        history: &[u32],
        prompt: usize,
        banned: &[u32],
        step: usize,
    ) -> Option<u32> {
        for &(id, bias) in &params.logit_bias {
            if let Some(x) = logits.get_mut(id as usize) {
                *x += bias;
            }
        }
        for &id in banned {
            if let Some(x) = logits.get_mut(id as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
        self.penalise(logits, params, history, prompt);
        let (top, max) = argmax(logits)?;
        // A bias may have made one infinite: nothing is as probable.
        if params.temperature == 0.0 || max == f32::INFINITY {
            return Some(top);
        }
        let scale = 1.0 / f64::from(params.temperature);
        let draw = Draw { logits, scale, max: f64::from(max), params, step };
        if !params.truncates() {
            return draw.token(0..logits.len() as u32);
        }
        self.kept.clear();
        self.kept.extend((0..logits.len() as u32).filter(|&id| logits[id as usize] > f32::NEG_INFINITY));
        if params.top_k > 0 {
            keep_top_k(&mut self.kept, logits, params.top_k);
        }
        if params.top_p < 1.0 {
            keep_top_p(&mut self.kept, &draw, f64::from(params.top_p));
        }
        if params.min_p > 0.0 {
            let min_p = f64::from(params.min_p);
            self.kept.retain(|&id| draw.weight(id) >= min_p);
        }
        draw.token(self.kept.iter().copied())
    }

    /// Repetition penalty over the whole history, then presence and frequency over the generated part.
    fn penalise(&mut self, logits: &mut [f32], params: &SamplingParams, history: &[u32], prompt: usize) {
        self.counts.resize(logits.len().max(self.counts.len()), 0);
        if params.repetition_penalty != 1.0 {
            for_each_count(&mut self.counts[..logits.len()], history, |id, _| {
                let x = &mut logits[id];
                *x = if *x < 0.0 { *x * params.repetition_penalty } else { *x / params.repetition_penalty };
            });
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            let generated = history.get(prompt..).unwrap_or_default();
            for_each_count(&mut self.counts[..logits.len()], generated, |id, count| {
                logits[id] -= params.presence_penalty + params.frequency_penalty * count as f32;
            });
        }
    }
}

/// Calls `f` once for each id in `tokens` with the number of times it is there. `counts` is zero before and
/// after.
fn for_each_count(counts: &mut [u32], tokens: &[u32], mut f: impl FnMut(usize, u32)) {
    for &id in tokens {
        if let Some(count) = counts.get_mut(id as usize) {
            *count += 1;
        }
    }
    for &id in tokens {
        if let Some(count) = counts.get_mut(id as usize)
            && *count > 0
        {
            f(id as usize, std::mem::take(count));
        }
    }
}

/// The lowest id with the largest logit, and that; `None` where all are −∞.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let id = logits.iter().position(|&x| x == max)?;
    (max > f32::NEG_INFINITY).then_some((id as u32, max))
}

/// The most probable first; the lower id first where two tie.
fn by_logit(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    |&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Keeps the `k` largest logits, and all that tie with the last of them.
fn keep_top_k(kept: &mut Vec<u32>, logits: &[f32], k: usize) {
    if k < kept.len() {
        let (_, &mut last, _) = kept.select_nth_unstable_by(k - 1, by_logit(logits));
        let threshold = logits[last as usize];
        kept.retain(|&id| logits[id as usize] >= threshold);
    }
}

/// Keeps a token where those before it, in order of probability, have less than `p` together.
fn keep_top_p(kept: &mut Vec<u32>, draw: &Draw<'_>, p: f64) {
    let enough = p * kept.iter().map(|&id| draw.weight(id)).sum::<f64>();
    // Few tokens hold most of the mass: sort no more than are needed.
    let mut sorted = 0;
    let (mut count, mut before) = (0, 0.0);
    while count < kept.len() && before < enough {
        if count == sorted {
            let end = (4 * sorted).max(64).min(kept.len());
            let rest = &mut kept[sorted..];
            if end - sorted < rest.len() {
                rest.select_nth_unstable_by(end - sorted - 1, by_logit(draw.logits));
            }
            kept[sorted..end].sort_unstable_by(by_logit(draw.logits));
            sorted = end;
        }
        before += draw.weight(kept[count]);
        count += 1;
    }
    kept.truncate(count);
}

/// One draw from softmax(x/τ) over a set of ids.
struct Draw<'a> {
    logits: &'a [f32],
    /// 1/τ.
    scale: f64,
    max: f64,
    params: &'a SamplingParams,
    step: usize,
}

impl Draw<'_> {
    /// (x − max x)/τ
    fn exponent(&self, id: u32) -> f64 {
        (f64::from(self.logits[id as usize]) - self.max) * self.scale
    }

    /// The probability relative to the most probable token.
    fn weight(&self, id: u32) -> f64 {
        self.exponent(id).exp()
    }

    /// argmax x/τ + g, the lowest id where two tie.
    fn token(&self, ids: impl Iterator<Item = u32>) -> Option<u32> {
        let mut noise = Noise::new(self.params.seed, self.step as u64);
        let mut best: Option<(f64, u32)> = None;
        for id in ids {
            let x = self.exponent(id);
            let ahead = |y: f64| best.is_none_or(|(key, winner)| y > key || (y == key && id < winner));
            if x == f64::NEG_INFINITY || !ahead(x + Noise::LARGEST) {
                continue;
            }
            let key = x + noise.gumbel(id);
            if ahead(key) {
                best = Some((key, id));
            }
        }
        best.map(|(_, id)| id)
    }
}

/// Gumbel noise for each token id of one step: g = −ln(−ln u) with u = (w + ½)/2³², where w is word `id % 4` of
/// Philox4x32-10 at counter (id / 4, step's low half, step's high half, 0) with the seed's halves as the key.
struct Noise {
    seed: [u32; 2],
    step: [u32; 2],
    /// The last four words, and their `id / 4`.
    words: Option<(u32, [u32; 4])>,
}

impl Noise {
    /// No g is larger: −ln(−ln(1 − 2⁻³³)) is 22.874.
    const LARGEST: f64 = 22.875;

    fn new(seed: u64, step: u64) -> Self {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        Self { seed: halves(seed), step: halves(step), words: None }
    }

    fn gumbel(&mut self, id: u32) -> f64 {
        let counter = id / 4;
        let words = match self.words {
            Some((last, words)) if last == counter => words,
            _ => philox([counter, self.step[0], self.step[1], 0], self.seed),
        };
        self.words = Some((counter, words));
        let u = (f64::from(words[(id % 4) as usize]) + 0.5) / 4_294_967_296.0;
        -(-u.ln()).ln()
    }
}
