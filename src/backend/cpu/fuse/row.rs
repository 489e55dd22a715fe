//! One row's way from sums to a decision.

use std::sync::MutexGuard;

use super::fused::FusedRow;
use super::models::{Models, NotFinite};
use super::sums::{Ladder, Sought, Sums, Tilt};
use crate::backend::cpu::simd::Isa;
use crate::backend::{Choice, FuseRow};
use crate::error::{Error, Result};
use crate::fusion::cumulant::{Best, Divergences, choose, loss, one_hot};
use crate::fusion::refine::{Measured, Refinement};
use crate::fusion::{Decision, DynamicRule, FusionRule, Logits, Objective, PerExpert, SearchMode};
use crate::model::Role;
use crate::sampling::Sampler;

/// What the sums that come next are for.
// One a row, and kept from call to call: a box would be made anew for each refined row.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, Default)]
enum Stage {
    /// One model alone.
    #[default]
    Alone,
    /// The rule's own candidates.
    Search,
    /// One α of each expert, chosen already.
    Measure { expert: Option<usize>, alpha: PerExpert<f64> },
    /// One α of an expert, between its candidates.
    Refine { expert: usize, alpha: f64, refinement: Refinement },
}

/// The numbers of the chosen distribution.
#[derive(Clone, Debug)]
struct Chosen {
    expert: Option<usize>,
    alpha: PerExpert<f64>,
    /// Loss and divergences, where there is an α.
    terms: Option<(f64, Divergences)>,
    /// log Σ exp of the fused logits.
    log_sum: f64,
}

/// A row between its first sums and its decision.
#[derive(Debug, Default)]
pub(super) struct RowState {
    stage: Stage,
    next: Option<Sought>,
    /// The sums of a search whose minimum is being measured.
    searched: Option<Sums>,
    result: Option<Result<Decision>>,
    fused: Vec<f32>,
    sampler: Sampler,
}

impl RowState {
    /// What must be summed first, and over how many tokens; nothing where the row fails at once.
    pub(super) fn open(&mut self, row: &FuseRow<'_>, logits: &Logits<'_>) -> (Option<Sought>, usize) {
        self.next = None;
        self.searched = None;
        self.result = None;
        let models = match Models::new(logits, row.rule) {
            Ok(models) => models,
            Err(error) => {
                self.result = Some(Err(error));
                return (None, 0);
            }
        };
        let experts = models.experts.len();
        let held =
            |expert, alpha| Stage::Measure { expert: Some(expert), alpha: one_hot(experts, expert, alpha) };
        self.stage = match (row.rule, row.held) {
            (FusionRule::Dynamic(_), Some((expert, alpha))) => held(expert, alpha),
            (FusionRule::Dynamic(_), None) => Stage::Search,
            (FusionRule::Static(alpha), _) => {
                let one_for_all = |t| if alpha.len() == 1 { alpha.first() } else { alpha.get(t) };
                let alpha = (0..experts).map(|t| one_for_all(t).copied().unwrap_or(0.0)).collect();
                Stage::Measure { expert: None, alpha }
            }
            (FusionRule::Large | FusionRule::Small | FusionRule::Expert(_), _) => Stage::Alone,
        };
        (Some(Sought { tilts: self.tilts(row.rule, experts), targets: true }), models.width())
    }

    /// The directions and candidates of the stage.
    fn tilts(&self, rule: &FusionRule, experts: usize) -> PerExpert<Tilt> {
        match &self.stage {
            Stage::Alone => PerExpert::new(),
            Stage::Search => {
                let tilt = |t| Tilt::expert(experts, t, Ladder::through(grid(rule, t)));
                (0..experts).map(tilt).collect()
            }
            Stage::Measure { alpha, .. } => std::iter::once(Tilt::fixed(alpha)).collect(),
            Stage::Refine { expert, alpha, .. } => {
                std::iter::once(Tilt::expert(experts, *expert, Ladder::single(*alpha))).collect()
            }
        }
    }

    /// What must be summed next, if anything.
    pub(super) fn next(&mut self) -> Option<Sought> {
        self.next.take()
    }

    /// The decision.
    pub(super) fn close(&mut self, step: usize) -> Result<Decision> {
        self.result.take().unwrap_or(Err(Error::NoCandidate { step }))
    }

    /// Takes the sums of the row's slices: either the row is decided or it needs others.
    pub(super) fn advance<'g>(
        &mut self,
        isa: Isa,
        row: &FuseRow<'_>,
        models: Result<Models<'_>>,
        sought: &Sought,
        parts: impl Iterator<Item = MutexGuard<'g, Option<Result<Sums, NotFinite>>>>,
    ) {
        self.result = match self.try_advance(isa, row, models, sought, parts) {
            Ok(decision) => decision.map(Ok),
            Err(error) => Some(Err(error)),
        };
    }

    fn try_advance<'g>(
        &mut self,
        isa: Isa,
        row: &FuseRow<'_>,
        models: Result<Models<'_>>,
        sought: &Sought,
        parts: impl Iterator<Item = MutexGuard<'g, Option<Result<Sums, NotFinite>>>>,
    ) -> Result<Option<Decision>> {
        let models = models?;
        let experts = models.experts.len();
        let mut sums = Sums::empty(&sought.tilts, experts);
        for mut part in parts {
            match part.take() {
                Some(Ok(part)) => sums.append(&part),
                Some(Err(not_finite)) => return Err(not_finite.at(row.step)),
                None => {}
            }
        }
        if let Some(searched) = self.searched.take() {
            sums = Sums { directions: sums.directions, ..searched };
        }
        if sums.base.sum == 0.0 {
            return Err(Error::NoCandidate { step: row.step });
        }
        let targets = sums.divergences();
        let chosen = match std::mem::take(&mut self.stage) {
            Stage::Alone => {
                let log_sum = sums.base.log_sum();
                Some(Chosen { expert: None, alpha: PerExpert::new(), terms: None, log_sum })
            }
            Stage::Measure { expert, alpha } => Some(measured(row.rule, &sums, &targets, expert, alpha)),
            Stage::Search => {
                let (objective, mode) = search_of(row.rule);
                let best = choose(objective, &sums.directions, |t| grid(row.rule, t), &targets);
                let best = best.ok_or(Error::NoCandidate { step: row.step })?;
                let candidates = grid(row.rule, best.expert);
                let refinement = (mode == SearchMode::Refine).then(|| {
                    Refinement::new(objective, &sums.directions[best.expert], candidates, &targets, &best)
                });
                match refinement.flatten() {
                    Some(refinement) => self.refine(row.rule, experts, best.expert, refinement),
                    None => Some(picked(&sums, &best, experts, candidates[best.candidate])),
                }
            }
            Stage::Refine { expert, mut refinement, .. } => {
                refinement.take(&sums.directions[0].candidates[0]);
                self.refine(row.rule, experts, expert, refinement)
            }
        };
        let Some(chosen) = chosen else {
            self.searched = Some(sums);
            return Ok(None);
        };
        self.decide(isa, row, &models, &sums, &targets, chosen).map(Some)
    }

    /// The minimum that was found; `None` where more sums are wanted, which are then sought next.
    fn refine(
        &mut self,
        rule: &FusionRule,
        experts: usize,
        expert: usize,
        mut refinement: Refinement,
    ) -> Option<Chosen> {
        let Some(alpha) = refinement.ask() else {
            return Some(refined(experts, expert, &refinement.least()));
        };
        self.stage = Stage::Refine { expert, alpha, refinement };
        self.next = Some(Sought { tilts: self.tilts(rule, experts), targets: false });
        None
    }

    /// Chooses the token, and fills in the story.
    fn decide(
        &mut self,
        isa: Isa,
        row: &FuseRow<'_>,
        models: &Models<'_>,
        sums: &Sums,
        targets: &[Divergences],
        chosen: Chosen,
    ) -> Result<Decision> {
        // Only the sampler reads the row.
        let width = if is_sampled(&row.choice) { models.width() } else { 0 };
        self.fused.resize(width, 0.0);
        let kernel = FusedRow { models, alpha: &chosen.alpha, masked: sums.masked, row: &mut self.fused };
        let argmax_fused = isa.run(kernel);
        let token = match row.choice {
            Choice::Forced(id) if (id as usize) < models.width() => id,
            Choice::Forced(id) => {
                return Err(Error::TokenOutOfRange { role: models.base.0, id, vocab_size: models.width() });
            }
            Choice::Sample { .. } if width == 0 => argmax_fused,
            Choice::Sample { params, history, generated, banned } => {
                let prompt = history.len().saturating_sub(generated);
                let token = self.sampler.choose(&mut self.fused, params, history, prompt, banned, row.step);
                token.ok_or(Error::NoCandidate { step: row.step })?
            }
        };
        let t = token as usize;
        let excluded = sums.masked && models.excludes(t);
        let logprob = |x: f64, log_sum: f64| if excluded { f64::NEG_INFINITY } else { x - log_sum };
        let small = models.small.get(t).copied().map_or(0.0, f64::from);
        let shift = chosen.alpha.iter().zip(&models.experts).filter(|(alpha, _)| **alpha != 0.0);
        let shift = shift.map(|(alpha, expert)| alpha * (f64::from(expert[t]) - small)).sum::<f64>();
        let base = f64::from(models.base.1[t]);

        let mut decision = Decision {
            token,
            argmax_fused,
            logprob_fused: logprob(base + shift, chosen.log_sum),
            expert: chosen.expert,
            alpha: chosen.alpha,
            loss: chosen.terms.map(|(loss, _)| loss),
            kl_fused_large: chosen.terms.map(|(_, kl)| kl.forward.max(0.0)),
            kl_large_fused: chosen.terms.map(|(_, kl)| kl.reverse.max(0.0)),
            kl_expert_small: targets.iter().map(|kl| kl.forward.max(0.0)).collect(),
            kl_small_expert: targets.iter().map(|kl| kl.reverse.max(0.0)).collect(),
            ..Decision::default()
        };
        let base_logprob = logprob(base, sums.base.log_sum());
        match models.base.0 {
            Role::Large => {
                decision.logprob_large = Some(base_logprob);
                decision.argmax_large = Some(sums.base_top.token);
            }
            Role::Small => decision.logprob_small = Some(base_logprob),
            Role::Expert(_) => {
                decision.logprob_expert.push(base_logprob);
                decision.argmax_expert.push(sums.base_top.token);
            }
        }
        if let Some((small_lane, _)) = sums.targets.first() {
            decision.logprob_small = Some(logprob(small, small_lane.log_sum()));
            let experts = models.experts.iter().zip(&sums.targets);
            let logprobs = experts.map(|(expert, (_, lane))| logprob(f64::from(expert[t]), lane.log_sum()));
            decision.logprob_expert = logprobs.collect();
            decision.argmax_expert = sums.expert_tops.iter().map(|top| top.token).collect();
        }
        Ok(decision)
    }
}

/// Whether the token isn't just forced, or the argmax of the fused logits.
fn is_sampled(choice: &Choice<'_>) -> bool {
    match choice {
        Choice::Forced(_) => false,
        Choice::Sample { params, banned, .. } => {
            params.temperature != 0.0 || params.changes_logits() || !banned.is_empty()
        }
    }
}

/// The candidates of an expert under the dynamic rule.
fn grid(rule: &FusionRule, expert: usize) -> &[f64] {
    match rule {
        FusionRule::Dynamic(rule) => rule.points(expert),
        _ => &[],
    }
}

/// Objective and mode: those of the dynamic rule, or the paper's.
fn search_of(rule: &FusionRule) -> (Objective, SearchMode) {
    match rule {
        FusionRule::Dynamic(DynamicRule { objective, mode, .. }) => (*objective, *mode),
        _ => Default::default(),
    }
}

/// The grid's choice.
fn picked(sums: &Sums, best: &Best, experts: usize, alpha: f64) -> Chosen {
    Chosen {
        expert: Some(best.expert),
        alpha: one_hot(experts, best.expert, alpha),
        terms: Some((best.loss, best.divergences)),
        log_sum: sums.directions[best.expert].candidates[best.candidate].log_sum(),
    }
}

/// The minimum between candidates.
fn refined(experts: usize, expert: usize, least: &Measured) -> Chosen {
    Chosen {
        expert: Some(expert),
        alpha: one_hot(experts, expert, least.point.alpha),
        terms: Some((least.point.loss, least.point.divergences)),
        log_sum: least.log_sum,
    }
}

/// The distribution at an α that was chosen before.
fn measured(
    rule: &FusionRule,
    sums: &Sums,
    targets: &[Divergences],
    expert: Option<usize>,
    alpha: PerExpert<f64>,
) -> Chosen {
    let (base, fused) = (&sums.directions[0].base, &sums.directions[0].candidates[0]);
    let divergences = Divergences::new(base, fused, 1.0);
    let loss = loss(search_of(rule).0, &divergences, targets);
    Chosen { expert, alpha, terms: Some((loss, divergences)), log_sum: fused.log_sum() }
}
