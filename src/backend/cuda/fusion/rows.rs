//! A row as the kernels read it.

use super::result::DeviceResult;
use super::sample::{Sampled, scale};
use crate::backend::cuda::forward::LogitsPlace;
use crate::backend::{Choice, FuseRow};
use crate::error::{Error, Result};
use crate::fusion::cumulant::one_hot;
use crate::fusion::{FusionRule, MAX_CANDIDATES, MAX_EXPERTS, Objective, PerExpert, SearchMode};
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

/// `FuseLayout` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(in crate::backend::cuda) struct Layout {
    first: u32,
    lanes: u32,
    tracks: u32,
    track: [u32; MAX_EXPERTS],
    candidates: [u32; MAX_EXPERTS],
    target: [u32; MAX_EXPERTS],
}

/// `FuseRow` in fusion.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(in crate::backend::cuda) struct DeviceRow {
    pub(in crate::backend::cuda) slot: u32,
    pub(in crate::backend::cuda) base_model: u32,
    pub(in crate::backend::cuda) experts: u32,
    pub(in crate::backend::cuda) first_lane: u32,
    pub(in crate::backend::cuda) held: u32,
    pub(in crate::backend::cuda) every: u32,
    pub(in crate::backend::cuda) coefficient: [f32; MAX_EXPERTS],
    pub(in crate::backend::cuda) objective: u32,
    pub(in crate::backend::cuda) refined: u32,
    pub(in crate::backend::cuda) forced: u32,
    pub(in crate::backend::cuda) scale: f32,
    pub(in crate::backend::cuda) seed: [u32; 2],
    pub(in crate::backend::cuda) step: [u32; 2],
    pub(in crate::backend::cuda) layout: [Layout; 2],
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

/// Lanes of a layout at most.
pub(in crate::backend::cuda) fn most_lanes(experts: usize) -> usize {
    (experts * (MAX_CANDIDATES + 3)).max(1)
}

/// Lanes of a row at most: those of a search, and those of given α.
pub(in crate::backend::cuda) fn most_lanes_of_row(experts: usize) -> usize {
    most_lanes(experts) + 2 + 2 * experts
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
        sampled: None,
        base,
        alpha: None,
    };
    match row.rule {
        FusionRule::Dynamic(rule) => {
            encoded.search(|t| rule.points(t));
            encoded.row.every = u32::try_from(rule.every).unwrap_or(u32::MAX);
            encoded.row.refined = u32::from(rule.mode == SearchMode::Refine);
            encoded.row.objective = match rule.objective {
                Objective::Both => 0,
                Objective::Forward => 1,
                Objective::Reverse => 2,
            };
            if rule.every > 1 || row.held.is_some() {
                encoded.given();
            }
            if let Some((expert, alpha)) = row.held {
                encoded.hold(one_hot(experts, expert, alpha));
            }
        }
        FusionRule::Static(alpha) => {
            let one_for_all = |t| if alpha.len() == 1 { alpha.first() } else { alpha.get(t) };
            let alpha = (0..experts).map(|t| one_for_all(t).copied().unwrap_or(0.0)).collect();
            encoded.given();
            encoded.hold(alpha);
        }
        _ => {
            encoded.lanes.push(Lane { alpha: 0.0, base: 0, direction: NO_DIRECTION });
            encoded.row.layout[0].lanes = 1;
            encoded.row.every = 1;
        }
    }
    encoded.choose(row, base, place.vocab_size)?;
    Ok(encoded)
}

/// A row as the kernels read it.
#[derive(Clone, Debug)]
pub(in crate::backend::cuda) struct Encoded {
    pub(in crate::backend::cuda) row: DeviceRow,
    pub(in crate::backend::cuda) lanes: Vec<Lane>,
    /// Where the sampler's kernel chooses the token.
    pub(super) sampled: Option<Sampled>,
    /// The model that is steered, or runs alone.
    pub(super) base: Role,
    /// α of each expert where it is given.
    pub(super) alpha: Option<PerExpert<f64>>,
}

impl Encoded {
    /// Lanes of a launch for this row, as it is and as it will be.
    pub(super) fn most_lanes(&self) -> usize {
        self.row.layout.iter().map(|layout| layout.lanes as usize).max().unwrap_or(0)
    }

    /// Makes this the row of the next step, as `advance` in step.cu does, where this step has found `found`.
    pub(in crate::backend::cuda) fn advance(&mut self, found: &DeviceResult) {
        let row = &mut self.row;
        let [low, high] = row.step;
        let step = (u64::from(high) << 32 | u64::from(low)).wrapping_add(1);
        row.step = halves(step);
        if row.held == 0 {
            let alpha = found.alpha.iter().take(row.experts as usize);
            row.coefficient.iter_mut().zip(alpha).for_each(|(to, &alpha)| *to = alpha as f32);
        }
        row.held = u32::from(row.every == 0 || !step.is_multiple_of(u64::from(row.every)));
        if let Some(sampled) = &mut self.sampled {
            sampled.advance(found.token);
        }
    }

    /// Whether the GPU does the same for both.
    pub(in crate::backend::cuda) fn is_as(&self, other: &Self) -> bool {
        let mut row = other.row;
        if row.held == 0 {
            // Nobody reads them.
            row.coefficient = self.row.coefficient;
        }
        let same = self.row == row && self.base == other.base;
        same && self.lanes == other.lanes && self.sampled == other.sampled
    }

    /// Begins a layout.
    fn layout(&mut self, index: usize) -> usize {
        self.row.layout[index].first = self.lanes.len() as u32;
        index
    }

    /// A direction and its candidates.
    fn track(&mut self, index: usize, direction: u32, candidates: &[f64]) {
        let layout = &mut self.row.layout[index];
        let track = layout.tracks as usize;
        layout.track[track] = self.lanes.len() as u32 - layout.first;
        layout.candidates[track] = candidates.len() as u32;
        layout.tracks += 1;
        self.lanes.push(Lane { alpha: 0.0, base: 0, direction });
        self.lanes.extend(candidates.iter().map(|&alpha| Lane { alpha: alpha as f32, base: 0, direction }));
    }

    /// The lanes that the divergences of the experts come from, and the end of a layout.
    fn targets(&mut self, index: usize) {
        let layout = &mut self.row.layout[index];
        for t in 0..self.row.experts {
            layout.target[t as usize] = self.lanes.len() as u32 - layout.first;
            self.lanes.push(Lane { alpha: 0.0, base: 1, direction: t });
            self.lanes.push(Lane { alpha: 0.0, base: 2 + t, direction: t });
        }
        layout.lanes = self.lanes.len() as u32 - layout.first;
    }

    /// The layout of a search.
    fn search<'g>(&mut self, grid: impl Fn(usize) -> &'g [f64]) {
        let index = self.layout(0);
        for t in 0..self.row.experts {
            self.track(index, t, grid(t as usize));
        }
        self.targets(index);
    }

    /// The layout of L + Σ α_t D_t with α that are given: by [`hold`](Self::hold), or by an earlier step.
    fn given(&mut self) {
        let index = self.layout(1);
        self.track(index, COMBINED, &[1.0]);
        self.targets(index);
    }

    /// Gives α.
    fn hold(&mut self, alpha: PerExpert<f64>) {
        for (coefficient, &alpha) in self.row.coefficient.iter_mut().zip(&alpha) {
            *coefficient = alpha as f32;
        }
        self.row.held = 1;
        self.alpha = Some(alpha);
    }

    fn choose(&mut self, row: &FuseRow<'_>, base: Role, vocab_size: usize) -> Result<()> {
        match row.choice {
            Choice::Forced(id) if id as usize >= vocab_size => {
                return Err(Error::TokenOutOfRange { role: base, id, vocab_size });
            }
            Choice::Forced(id) => self.row.forced = id,
            Choice::Sample { params, history, generated, banned } => {
                self.row.seed = halves(params.seed);
                self.row.step = halves(row.step as u64);
                self.sampled = Sampled::new(params, history, generated, banned);
                if self.sampled.is_none() {
                    self.row.scale = scale(params);
                }
            }
        }
        Ok(())
    }
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}
