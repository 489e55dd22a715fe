//! How the sampler's kernel chooses a row's token, where fusion alone can't.

use super::WARP;
use crate::sampling::SamplingParams;

/// Threads of a block.
pub(super) const SAMPLER: usize = 512;
/// Tokens of a block: four for each of its threads.
pub(super) const SAMPLED_SLICE: usize = 4 * SAMPLER;
/// Its warps, each of which tells what it saw in 128 neighbouring tokens.
pub(super) const SAMPLED_CHUNKS: usize = SAMPLER / WARP;

/// `Chunk` in sample.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub(super) struct Chunk([u32; 4]);

/// `SampleRow` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(in crate::backend::cuda) struct DeviceSample {
    pub(in crate::backend::cuda) history: u64,
    pub(in crate::backend::cuda) biases: u64,
    pub(in crate::backend::cuda) history_len: u32,
    pub(in crate::backend::cuda) prompt_len: u32,
    pub(in crate::backend::cuda) bias_count: u32,
    pub(in crate::backend::cuda) active: u32,
    pub(in crate::backend::cuda) scale: f32,
    pub(in crate::backend::cuda) top_k: u32,
    pub(in crate::backend::cuda) top_p: f32,
    pub(in crate::backend::cuda) min_p: f32,
    pub(in crate::backend::cuda) repetition: f32,
    pub(in crate::backend::cuda) presence: f32,
    pub(in crate::backend::cuda) frequency: f32,
    pub(in crate::backend::cuda) unused: u32,
}

/// Biases, penalties and truncation of a row, with its lists.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sampled {
    /// With no addresses.
    row: DeviceSample,
    /// What penalties look at.
    history: Vec<u32>,
    /// Ids, each once, and the bits of what is added.
    biases: Vec<[u32; 2]>,
}

impl Sampled {
    /// `None` where the fusion kernel itself can choose: greedily, or by temperature alone.
    pub(super) fn new(
        params: &SamplingParams,
        history: &[u32],
        generated: usize,
        banned: &[u32],
    ) -> Option<Self> {
        let truncates = params.temperature > 0.0 && params.truncates();
        if banned.is_empty() && !params.changes_logits() && !truncates {
            return None;
        }
        let penalises = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let history = if penalises { history.to_vec() } else { Vec::new() };
        let biases = biases(params, banned);
        let row = DeviceSample {
            history_len: history.len() as u32,
            prompt_len: history.len().saturating_sub(generated) as u32,
            bias_count: biases.len() as u32,
            active: 1,
            scale: scale(params),
            // More than all ids is all of them.
            top_k: params.top_k.min(u32::MAX as usize) as u32,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            ..DeviceSample::default()
        };
        Some(Self { row, history, biases })
    }

    /// Makes this the row of the next step, when `token` was chosen: as `advance` in step.cu does.
    pub(super) fn advance(&mut self, token: u32) {
        if self.remembers() {
            self.history.push(token);
            self.row.history_len += 1;
        }
    }

    /// Whether its tokens are remembered.
    fn remembers(&self) -> bool {
        let DeviceSample { repetition, presence, frequency, .. } = self.row;
        repetition != 1.0 || presence != 0.0 || frequency != 0.0
    }

    /// Appends the lists to those of the rows before, with room for `room` more tokens, and tells where they will lie
    /// when `lists` lie at `address`.
    pub(super) fn lay_out(&self, room: usize, lists: &mut Vec<u32>, address: u64) -> DeviceSample {
        let mut row = self.row;
        let here = |lists: &Vec<u32>| address + size_of_val(&lists[..]) as u64;
        row.biases = here(lists);
        lists.extend(self.biases.as_flattened());
        if self.remembers() {
            row.history = here(lists);
            lists.extend_from_slice(&self.history);
            // Biases, which come next, are pairs, and lie at whole ones.
            lists.resize((lists.len() + room).next_multiple_of(2), 0);
        }
        row
    }
}

/// What the sampler's noise is measured against: 1/τ, or 0 for greedy. Finite, also times a logit: beyond 10³⁰ no noise
/// tells two different logits apart.
pub(super) fn scale(params: &SamplingParams) -> f32 {
    if params.temperature == 0.0 { 0.0 } else { (1.0 / params.temperature).min(1e30) }
}

/// The biases and bans, one of each id: several of one id are summed before they are added.
fn biases(params: &SamplingParams, banned: &[u32]) -> Vec<[u32; 2]> {
    let bans = banned.iter().map(|&id| (id, f32::NEG_INFINITY));
    let mut all: Vec<(u32, f32)> = params.logit_bias.iter().copied().chain(bans).collect();
    all.sort_by_key(|&(id, _)| id);
    let same = all.chunk_by(|a, b| a.0 == b.0);
    same.map(|biases| [biases[0].0, biases.iter().map(|&(_, bias)| bias).sum::<f32>().to_bits()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_and_a_ban_of_one_id_are_one() {
        let params =
            SamplingParams { logit_bias: vec![(7, 1.0), (3, 0.5), (7, 0.25)], ..SamplingParams::default() };
        let bits = f32::to_bits;
        let expected = vec![[3, bits(f32::NEG_INFINITY)], [7, bits(1.25)]];
        assert_eq!(biases(&params, &[3]), expected);
    }

    #[test]
    fn lists_lie_where_rows_say() {
        let params = SamplingParams {
            repetition_penalty: 1.2,
            logit_bias: vec![(1, 2.0)],
            ..SamplingParams::default()
        };
        let sampled = Sampled::new(&params, &[5, 6, 7], 1, &[]).unwrap();
        let mut lists = Vec::new();
        let first = sampled.lay_out(2, &mut lists, 4096);
        let second = sampled.lay_out(0, &mut lists, 4096);
        assert_eq!((first.biases, first.history, first.history_len, first.prompt_len), (4096, 4104, 3, 2));
        assert_eq!((second.biases, second.history), (4096 + 4 * 8, 4096 + 4 * 10));
        assert_eq!(lists[2..5], [5, 6, 7]);
        assert_eq!(lists.len() % 2, 0);
        let mut next = sampled.clone();
        next.advance(9);
        assert_eq!(Some(next), Sampled::new(&params, &[5, 6, 7, 9], 2, &[]));
        assert_eq!(Sampled::new(&SamplingParams::default(), &[1], 1, &[]), None);
    }
}
