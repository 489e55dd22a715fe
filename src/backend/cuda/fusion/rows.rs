//! A row as the kernel reads it, and its result as the engine tells it.

use crate::backend::cuda::forward::LogitsPlace;
use crate::backend::{Choice, FuseRow};
use crate::error::{Error, Result};
use crate::fusion::cumulant::one_hot;
use crate::fusion::{Decision, FusionRule, MAX_CANDIDATES, MAX_EXPERTS, Objective, PerExpert, SearchMode};
use crate::model::Role;

const COMBINED: u32 = MAX_EXPERTS as u32;
const NO_DIRECTION: u32 = COMBINED + 1;
const NOBODY: u32 = u32::MAX;

/// `FuseLane` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(in crate::backend::cuda) struct Lane {
    alpha: f32,
    base: u32,
    direction: u32,
}

/// `FuseRow` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(in crate::backend::cuda) struct DeviceRow {
    pub(in crate::backend::cuda) slot: u32,
    base_model: u32,
    pub(in crate::backend::cuda) experts: u32,
    pub(in crate::backend::cuda) first_lane: u32,
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

/// `FuseResult` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(in crate::backend::cuda) struct DeviceResult {
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

/// The models whose logits are fused, in the order in which the kernel is told where they lie; experts one after
/// another.
#[derive(Clone, Debug)]
pub(in crate::backend::cuda) struct Roles(pub(in crate::backend::cuda) Vec<Role>);

impl Roles {
    /// The place of a role.
    pub(in crate::backend::cuda) fn index(&self, role: Role) -> Option<usize> {
        self.0.iter().position(|&other| other == role)
    }

    pub(in crate::backend::cuda) fn num_experts(&self) -> usize {
        self.0.iter().filter(|role| matches!(role, Role::Expert(_))).count()
    }
}

/// Lanes of a row at most.
pub(in crate::backend::cuda) fn most_lanes(experts: usize) -> usize {
    (experts * (MAX_CANDIDATES + 3)).max(1)
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
            banned.is_empty() && !params.changes_logits() && !params.truncates()
        }
    };
    searches && chooses
}

/// Lays out the lanes of a row.
///
/// # Errors
/// [`Error::Parameter`] for a slot that there isn't, [`Error::MissingModel`], [`Error::TokenOutOfRange`].
pub(in crate::backend::cuda) fn encode(
    roles: &Roles,
    place: &LogitsPlace,
    row: &FuseRow<'_>,
) -> Result<Encoded> {
    if row.slot >= place.slots {
        return Err(Error::Parameter {
            name: "slot",
            expected: format!("a slot below {}", place.slots),
            found: row.slot.to_string(),
        });
    }
    let (base, alone) = match *row.rule {
        FusionRule::Large => (Role::Large, true),
        FusionRule::Small => (Role::Small, true),
        FusionRule::Expert(t) => (Role::Expert(t), true),
        FusionRule::Dynamic(_) | FusionRule::Static(_) => (Role::Large, false),
    };
    let experts = if alone { 0 } else { roles.num_experts() };
    let missing = |what: &str| Error::MissingModel { method: row.rule.name(), what: what.to_owned() };
    let base_model = roles.index(base).ok_or_else(|| missing(&format!("the {base} model")))?;
    if !alone && (experts == 0 || roles.index(Role::Small).is_none()) {
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
        lanes: Vec::with_capacity(most_lanes(experts)),
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
    encoded.choose(row, base, place.vocab_size)?;
    encoded.row.lane_count = encoded.lanes.len() as u32;
    Ok(encoded)
}

/// A row as the kernel reads it.
#[derive(Clone, Debug)]
pub(in crate::backend::cuda) struct Encoded {
    pub(in crate::backend::cuda) row: DeviceRow,
    pub(in crate::backend::cuda) lanes: Vec<Lane>,
    /// The model that is steered, or runs alone.
    base: Role,
    /// α of each expert where it is given.
    alpha: Option<PerExpert<f64>>,
}

impl Encoded {
    /// Whether this is `earlier` one step later, and otherwise the same.
    pub(in crate::backend::cuda) fn follows(&self, earlier: &Self) -> bool {
        let [low, high] = earlier.row.step;
        let (low, carry) = low.overflowing_add(1);
        let row = DeviceRow { step: [low, high.wrapping_add(u32::from(carry))], ..earlier.row };
        let same = self.row == row && self.base == earlier.base && self.lanes == earlier.lanes;
        // What the lanes hold as f32, the trace tells as f64.
        same && self.alpha == earlier.alpha
    }

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
