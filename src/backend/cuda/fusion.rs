//! The launch of the fusion kernel: rows in, decisions out. One launch for all rows, whatever the number of experts
//! and candidates.

use std::sync::Arc;

use cudarc::driver::{CudaStream, DeviceRepr, ValidAsZeroBits};

use super::device::{Gpu, Grid, Kernel};
use super::forward::LogitsPlace;
use super::memory::Buffer;
use crate::backend::{Choice, FuseRow};
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::cumulant::one_hot;
use crate::fusion::{Decision, FusionRule, MAX_CANDIDATES, MAX_EXPERTS, Objective, PerExpert, SearchMode};
use crate::model::Role;

/// Tokens of a slice of the vocabulary.
const SLICE: usize = 1024;
/// Rounds of 32 lanes that there are kernels for.
const ROUNDS: [usize; 4] = [1, 2, 4, 9];
const WARP: usize = 32;
const WARPS: usize = 8;
const COMBINED: u32 = MAX_EXPERTS as u32;
const NO_DIRECTION: u32 = COMBINED + 1;
const NOBODY: u32 = u32::MAX;

/// `FuseLane` in fusion.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Lane {
    alpha: f32,
    base: u32,
    direction: u32,
}

/// `FuseRow` in fusion.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct DeviceRow {
    slot: u32,
    base_model: u32,
    experts: u32,
    first_lane: u32,
    lane_count: u32,
    tracks: u32,
    track: [u32; MAX_EXPERTS],
    candidates: [u32; MAX_EXPERTS],
    target: [u32; MAX_EXPERTS],
    coefficient: [f32; MAX_EXPERTS],
    objective: u32,
    forced: u32,
    scale: f32,
    seed: [u32; 2],
    step: [u32; 2],
}

/// `FuseResult` in fusion.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct DeviceResult {
    loss: f64,
    forward: f64,
    reverse: f64,
    log_sum_fused: f64,
    log_sum_base: f64,
    log_sum_small: f64,
    log_sum_expert: [f64; MAX_EXPERTS],
    forward_target: [f64; MAX_EXPERTS],
    reverse_target: [f64; MAX_EXPERTS],
    not_finite: u64,
    token: u32,
    argmax_fused: u32,
    argmax_base: u32,
    track: u32,
    candidate: u32,
    argmax_expert: [u32; MAX_EXPERTS],
    logit_base: f32,
    logit_small: f32,
    logit_expert: [f32; MAX_EXPERTS],
    empty: u32,
}

/// `Partial` in fusion.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Partial([u32; 6]);

/// `FuseArgs` in fusion.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct FuseArgs {
    logits: u64,
    rows: u64,
    lanes: u64,
    partial: u64,
    tickets: u64,
    not_finite: u64,
    results: u64,
    model_stride: u64,
    vocab_stride: u32,
    vocab_size: u32,
    small_model: u32,
    first_expert: u32,
    slice: u32,
    lane_stride: u32,
}

// SAFETY: plain numbers in the layout of C, which is that of the kernel's structs.
unsafe impl DeviceRepr for Lane {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceRow {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceResult {}
// SAFETY: as above.
unsafe impl DeviceRepr for Partial {}
// SAFETY: as above.
unsafe impl DeviceRepr for FuseArgs {}
// SAFETY: zeros are zeros.
unsafe impl ValidAsZeroBits for Lane {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceRow {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceResult {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Partial {}

/// Fuses rows of logits that lie on the GPU.
pub(crate) struct DeviceFuser {
    kernels: [Kernel; 4],
    place: LogitsPlace,
    small_model: usize,
    first_expert: usize,
    slices: usize,
    /// Rows of a launch at most.
    capacity: usize,
    lane_stride: usize,
    rows: Buffer<DeviceRow>,
    lanes: Buffer<Lane>,
    partial: Buffer<Partial>,
    tickets: Buffer<u32>,
    not_finite: Buffer<u64>,
    results: Buffer<DeviceResult>,
}

/// Whether the kernel decides a row by itself; else the host does, from the same logits.
///
/// It does where the choice is forced, greedy or by temperature alone, over the grid or at a given α.
pub(crate) fn is_on_device(row: &FuseRow<'_>) -> bool {
    let searches = match (row.rule, row.held) {
        (FusionRule::Dynamic(rule), None) => rule.mode == SearchMode::Grid,
        _ => true,
    };
    let chooses = match row.choice {
        Choice::Forced(_) => true,
        Choice::Sample { params, banned, .. } => {
            banned.is_empty()
                && params.logit_bias.is_empty()
                && params.top_k == 0
                && params.top_p >= 1.0
                && params.min_p == 0.0
                && params.repetition_penalty == 1.0
                && params.presence_penalty == 0.0
                && params.frequency_penalty == 0.0
        }
    };
    searches && chooses
}

impl DeviceFuser {
    /// Room for one row for each slot of `place`.
    ///
    /// # Errors
    /// [`Error::Device`] where the GPU has too little memory, [`Error::Cuda`].
    pub(crate) fn new(
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        ensemble: &Ensemble,
        place: LogitsPlace,
    ) -> Result<Self> {
        let experts = ensemble.num_experts();
        let lane_stride = (experts * (MAX_CANDIDATES + 3)).max(1);
        let slices = place.vocab_size.div_ceil(SLICE).max(1);
        let capacity = place.slots.max(1);
        let [a, b, c, d] = ROUNDS.map(|rounds| gpu.kernel("fusion", &format!("fuse_{rounds}")));
        let kernels = [a?, b?, c?, d?];
        let most = shared_bytes(experts, lane_stride);
        // Beside what the kernel declares by itself.
        if most > 44 << 10 {
            gpu.allow_shared(&kernels[3], most)?;
        }
        let mut not_finite = gpu.zeros(stream, capacity, "fusion")?;
        gpu.write(stream, &mut not_finite, 0, &vec![u64::MAX; capacity])?;
        Ok(Self {
            kernels,
            place,
            small_model: ensemble.index(Role::Small).unwrap_or(0),
            first_expert: ensemble.index(Role::Expert(0)).unwrap_or(0),
            slices,
            capacity,
            lane_stride,
            rows: gpu.zeros(stream, capacity, "fusion")?,
            lanes: gpu.zeros(stream, capacity * lane_stride, "fusion")?,
            partial: gpu.zeros(stream, capacity * slices * lane_stride, "fusion")?,
            tickets: gpu.zeros(stream, capacity, "fusion")?,
            not_finite,
            results: gpu.zeros(stream, capacity, "fusion")?,
        })
    }

    /// Decides `rows`, for each of which [`is_on_device`] holds: one decision or error a row.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub(crate) fn fuse(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        ensemble: &Ensemble,
        rows: &[FuseRow<'_>],
    ) -> Result<Vec<Result<Decision>>> {
        let mut decisions = Vec::with_capacity(rows.len());
        for part in rows.chunks(self.capacity) {
            let encoded: Vec<Result<Encoded>> = part.iter().map(|row| self.encode(ensemble, row)).collect();
            let results = self.launch(gpu, stream, encoded.iter().filter_map(|row| row.as_ref().ok()))?;
            let mut results = results.iter();
            for (row, encoded) in part.iter().zip(encoded) {
                decisions.push(encoded.and_then(|encoded| {
                    let result = results.next().ok_or(Error::NoCandidate { step: row.step })?;
                    decode(ensemble, row, &encoded, result, &self.place)
                }));
            }
        }
        Ok(decisions)
    }

    fn launch<'a>(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        encoded: impl Iterator<Item = &'a Encoded>,
    ) -> Result<Vec<DeviceResult>> {
        let (mut rows, mut lanes) = (Vec::new(), Vec::new());
        let (mut most_lanes, mut experts) = (1, 0);
        for encoded in encoded {
            let row = DeviceRow { first_lane: lanes.len() as u32, ..encoded.row };
            most_lanes = most_lanes.max(encoded.lanes.len());
            experts = experts.max(row.experts as usize);
            rows.push(row);
            lanes.extend_from_slice(&encoded.lanes);
        }
        let mut results = vec![DeviceResult::default(); rows.len()];
        if rows.is_empty() {
            return Ok(results);
        }
        gpu.write(stream, &mut self.rows, 0, &rows)?;
        gpu.write(stream, &mut self.lanes, 0, &lanes)?;
        let args = FuseArgs {
            logits: self.place.address,
            rows: self.rows.address(),
            lanes: self.lanes.address(),
            partial: self.partial.address(),
            tickets: self.tickets.address(),
            not_finite: self.not_finite.address(),
            results: self.results.address(),
            model_stride: (self.place.slots * self.place.vocab_stride) as u64,
            vocab_stride: self.place.vocab_stride as u32,
            vocab_size: self.place.vocab_size as u32,
            small_model: self.small_model as u32,
            first_expert: self.first_expert as u32,
            slice: SLICE as u32,
            lane_stride: self.lane_stride as u32,
        };
        let rounds = most_lanes.div_ceil(WARP);
        let index = ROUNDS.iter().position(|&most| rounds <= most).unwrap_or(ROUNDS.len() - 1);
        let grid = Grid {
            blocks: (self.slices as u32, rows.len() as u32, 1),
            threads: ((WARPS * WARP) as u32, 1, 1),
            shared: shared_bytes(experts, most_lanes) as u32,
        };
        // SAFETY: rows name slots and models that exist (`encode` checks), at most `capacity` of them with at most
        // `lane_stride` lanes each, for which the buffers have room; 9 rounds are enough for 8 experts of 32
        // candidates and 3 more lanes. Tickets are zero and `not_finite` all ones between launches: the kernel
        // leaves them so.
        unsafe { gpu.launch(stream, &self.kernels[index], grid, &args) }?;
        gpu.read(stream, &self.results, 0, &mut results)?;
        Ok(results)
    }

    /// Lays out the lanes of a row.
    fn encode(&self, ensemble: &Ensemble, row: &FuseRow<'_>) -> Result<Encoded> {
        if row.slot >= self.place.slots {
            return Err(Error::Parameter {
                name: "slot",
                expected: format!("a slot below {}", self.place.slots),
                found: row.slot.to_string(),
            });
        }
        let (base, alone) = match *row.rule {
            FusionRule::Large => (Role::Large, true),
            FusionRule::Small => (Role::Small, true),
            FusionRule::Expert(t) => (Role::Expert(t), true),
            FusionRule::Dynamic(_) | FusionRule::Static(_) => (Role::Large, false),
        };
        let experts = if alone { 0 } else { ensemble.num_experts() };
        let missing = |what: &str| Error::MissingModel { method: row.rule.name(), what: what.to_owned() };
        let base_model = ensemble.index(base).ok_or_else(|| missing(&format!("the {base} model")))?;
        if !alone && (experts == 0 || ensemble.index(Role::Small).is_none()) {
            return Err(missing("a small model and an expert"));
        }
        let mut encoded = Encoded {
            row: DeviceRow {
                slot: row.slot as u32,
                base_model: base_model as u32,
                experts: experts as u32,
                forced: NOBODY,
                ..DeviceRow::default()
            },
            lanes: Vec::with_capacity(self.lane_stride),
            base,
            alpha: None,
        };
        match (row.rule, row.held) {
            (FusionRule::Dynamic(_), Some((expert, alpha))) => {
                encoded.fixed(experts, one_hot(experts, expert, alpha));
            }
            (FusionRule::Dynamic(rule), None) => {
                for t in 0..experts {
                    encoded.track(t as u32, rule.grid(t).map_or(&[], |grid| grid.candidates()));
                }
            }
            (FusionRule::Static(alpha), _) => {
                let one_for_all = |t| if alpha.len() == 1 { alpha.first() } else { alpha.get(t) };
                let alpha = (0..experts).map(|t| one_for_all(t).copied().unwrap_or(0.0)).collect();
                encoded.fixed(experts, alpha);
            }
            _ => encoded.lanes.push(Lane { alpha: 0.0, base: 0, direction: NO_DIRECTION }),
        }
        encoded.row.objective = match row.rule {
            FusionRule::Dynamic(rule) => match rule.objective {
                Objective::Both => 0,
                Objective::Forward => 1,
                Objective::Reverse => 2,
            },
            _ => 0,
        };
        encoded.targets(experts);
        encoded.choose(row, base, self.place.vocab_size)?;
        encoded.row.lane_count = encoded.lanes.len() as u32;
        Ok(encoded)
    }
}

/// Dynamic shared memory of a launch: the tiles, or the states of all warps, or the merged lanes.
fn shared_bytes(experts: usize, lanes: usize) -> usize {
    let tiles = WARPS * (5 + 2 * experts) * WARP * size_of::<f32>();
    let states = WARPS * lanes * size_of::<Partial>();
    let merged = lanes * 32;
    tiles.max(states).max(merged)
}

/// A row as the kernel reads it.
struct Encoded {
    row: DeviceRow,
    lanes: Vec<Lane>,
    /// The model that is steered, or runs alone.
    base: Role,
    /// α of each expert where it is given.
    alpha: Option<PerExpert<f64>>,
}

impl Encoded {
    /// A direction and its candidates.
    fn track(&mut self, direction: u32, candidates: &[f64]) {
        let track = self.row.tracks as usize;
        self.row.track[track] = self.lanes.len() as u32;
        self.row.candidates[track] = candidates.len() as u32;
        self.row.tracks += 1;
        self.lanes.push(Lane { alpha: 0.0, base: 0, direction });
        self.lanes.extend(candidates.iter().map(|&alpha| Lane { alpha: alpha as f32, base: 0, direction }));
    }

    /// L + Σ α_t D_t.
    fn fixed(&mut self, experts: usize, alpha: PerExpert<f64>) {
        for (coefficient, &alpha) in self.row.coefficient.iter_mut().zip(&alpha).take(experts) {
            *coefficient = alpha as f32;
        }
        self.track(COMBINED, &[1.0]);
        self.alpha = Some(alpha);
    }

    /// The lanes that the divergences of the experts come from.
    fn targets(&mut self, experts: usize) {
        for t in 0..experts {
            self.row.target[t] = self.lanes.len() as u32;
            let direction = t as u32;
            self.lanes.push(Lane { alpha: 0.0, base: 1, direction });
            self.lanes.push(Lane { alpha: 0.0, base: 2 + direction, direction });
        }
    }

    fn choose(&mut self, row: &FuseRow<'_>, base: Role, vocab_size: usize) -> Result<()> {
        match row.choice {
            Choice::Forced(id) if id as usize >= vocab_size => {
                return Err(Error::TokenOutOfRange { role: base, id, vocab_size });
            }
            Choice::Forced(id) => self.row.forced = id,
            Choice::Sample { params, .. } => {
                let halves = |x: u64| [x as u32, (x >> 32) as u32];
                self.row.seed = halves(params.seed);
                self.row.step = halves(row.step as u64);
                self.row.scale = if params.temperature == 0.0 { 0.0 } else { 1.0 / params.temperature };
            }
        }
        Ok(())
    }
}

/// What the kernel found, as the engine tells it.
fn decode(
    ensemble: &Ensemble,
    row: &FuseRow<'_>,
    encoded: &Encoded,
    result: &DeviceResult,
    place: &LogitsPlace,
) -> Result<Decision> {
    let experts = encoded.row.experts as usize;
    if result.not_finite != u64::MAX {
        let (token, model) = ((result.not_finite / 16) as u32, (result.not_finite % 16) as usize);
        let role = ensemble.models().get(model).map_or(encoded.base, |model| model.role);
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
            let grid = rule.grid(track).map_or(&[][..], |grid| grid.candidates());
            let alpha = grid.get(result.candidate as usize).copied().unwrap_or(0.0);
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

#[cfg(test)]
mod tests;
