//! What a rule reads of a row's logits, and how blocks of it are read.

use std::ops::Range;

use crate::backend::cpu::simd::{LANES, Vector};
use crate::error::{Error, Result};
use crate::fusion::{FusionRule, Logits, PerExpert};
use crate::model::Role;

/// Tokens whose intermediate values are kept in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// Vectors in a block.
pub(super) const VECTORS: usize = BLOCK / LANES;

/// What a rule reads of a row: the logits that are steered, and the small model and experts that steer them, if
/// any do. All of one length.
#[derive(Clone, Debug)]
pub(super) struct Models<'a> {
    pub(super) base: (Role, &'a [f32]),
    /// Empty where the base runs alone.
    pub(super) small: &'a [f32],
    pub(super) experts: PerExpert<&'a [f32]>,
}

impl<'a> Models<'a> {
    /// # Errors
    /// [`Error::MissingModel`] where `logits` lacks a model that `rule` reads.
    pub(super) fn new(logits: &Logits<'a>, rule: &FusionRule) -> Result<Self> {
        let missing = |what: &str| Error::MissingModel { method: rule.name(), what: what.to_owned() };
        let alone = |role, logits: Option<&'a [f32]>| {
            let base = logits.ok_or_else(|| missing(&format!("the {role} model")))?;
            Ok(Self { base: (role, base), small: &[], experts: PerExpert::new() })
        };
        match *rule {
            FusionRule::Large => alone(Role::Large, logits.large),
            FusionRule::Small => alone(Role::Small, logits.small),
            FusionRule::Expert(t) => alone(Role::Expert(t), logits.experts.get(t).copied()),
            FusionRule::Dynamic(_) | FusionRule::Static(_) => {
                let large = logits.large.ok_or_else(|| missing("a large model"))?;
                let small = logits.small.ok_or_else(|| missing("a small model"))?;
                let shortest = logits.experts.iter().map(|e| e.len()).min();
                let width = shortest.ok_or_else(|| missing("an expert"))?.min(large.len()).min(small.len());
                Ok(Self {
                    base: (Role::Large, &large[..width]),
                    small: &small[..width],
                    experts: logits.experts.iter().map(|expert| &expert[..width]).collect(),
                })
            }
        }
    }

    /// The number of tokens.
    pub(super) fn width(&self) -> usize {
        self.base.1.len()
    }

    /// Whether the base runs alone.
    pub(super) fn is_alone(&self) -> bool {
        self.experts.is_empty()
    }

    /// Every model with its role, in the order in which errors are looked for.
    pub(super) fn all(&self) -> impl Iterator<Item = (Role, &'a [f32])> {
        let small = (!self.is_alone()).then_some((Role::Small, self.small));
        let experts = self.experts.iter().enumerate().map(|(t, &expert)| (Role::Expert(t), expert));
        std::iter::once(self.base).chain(small).chain(experts)
    }

    /// Whether a model's −∞ excludes `token`.
    pub(super) fn excludes(&self, token: usize) -> bool {
        self.all().any(|(_, logits)| logits[token] == f32::NEG_INFINITY)
    }

    /// Looks at every logit of `range`: whether some token is excluded.
    ///
    /// # Errors
    /// The first NaN or +∞.
    pub(super) fn inspect(&self, range: Range<usize>) -> Result<bool, NotFinite> {
        let mut masked = false;
        for token in range {
            for (role, logits) in self.all() {
                let value = logits[token];
                if value.is_nan() || value == f32::INFINITY {
                    return Err(NotFinite { role, token: token as u32, value });
                }
                masked |= value == f32::NEG_INFINITY;
            }
        }
        Ok(masked)
    }
}

/// A logit that no model may compute.
#[derive(Clone, Copy, Debug)]
pub(super) struct NotFinite {
    pub(super) role: Role,
    pub(super) token: u32,
    pub(super) value: f32,
}

impl NotFinite {
    pub(super) fn at(self, step: usize) -> Error {
        let Self { role, token, value } = self;
        Error::NotFinite { role, step, token, value }
    }
}

/// A block of every model's logits in whole vectors.
#[derive(Clone, Debug)]
pub(super) struct Tile<'a> {
    pub(super) base: &'a [Vector],
    pub(super) small: &'a [Vector],
    pub(super) experts: PerExpert<&'a [Vector]>,
}

impl<'a> Tile<'a> {
    /// The logits themselves; only for a range of whole vectors that excludes no token.
    pub(super) fn direct(models: &Models<'a>, range: Range<usize>) -> Self {
        let view = |logits: &'a [f32]| logits[range.clone()].as_chunks().0;
        Self {
            base: view(models.base.1),
            small: if models.is_alone() { &[] } else { view(models.small) },
            experts: models.experts.iter().map(|expert| view(expert)).collect(),
        }
    }
}

/// A copy of a block of at most `N` vectors in which tokens that don't count have no weight in any model and no
/// difference.
pub(super) struct TileCopy<const N: usize> {
    base: [Vector; N],
    small: [Vector; N],
    experts: PerExpert<[Vector; N]>,
    vectors: usize,
    alone: bool,
    /// Whether some token of the range is excluded.
    pub(super) masked: bool,
}

impl<const N: usize> TileCopy<N> {
    /// The lowest finite f32: its exponential is 0 relative to anything else, and the difference of two is 0.
    const NOTHING: f32 = f32::MIN;

    pub(super) fn new(models: &Models<'_>, range: Range<usize>) -> Self {
        let blank = [[Self::NOTHING; LANES]; N];
        let mut copy = Self {
            base: blank,
            small: blank,
            experts: models.experts.iter().map(|_| blank).collect(),
            vectors: range.len().div_ceil(LANES),
            alone: models.is_alone(),
            masked: false,
        };
        for (i, token) in range.enumerate() {
            if models.excludes(token) {
                copy.masked = true;
                continue;
            }
            let (vector, lane) = (i / LANES, i % LANES);
            copy.base[vector][lane] = models.base.1[token];
            if !copy.alone {
                copy.small[vector][lane] = models.small[token];
            }
            for (copy, expert) in copy.experts.iter_mut().zip(&models.experts) {
                copy[vector][lane] = expert[token];
            }
        }
        copy
    }

    pub(super) fn tile(&self) -> Tile<'_> {
        Tile {
            base: &self.base[..self.vectors],
            small: if self.alone { &[] } else { &self.small[..self.vectors] },
            experts: self.experts.iter().map(|expert| &expert[..self.vectors]).collect(),
        }
    }
}
