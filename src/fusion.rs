//! Dynamic logits fusion: the rules that combine the models' logits, and what a step decided.
//!
//! With `D_t = E_t − S`, `P = softmax(L)`, `Q = softmax(S)`, `Q_t = softmax(E_t)` and
//! `P̃ = softmax(L + Σ_t α_t D_t)`, the dynamic rule takes the α that minimises (equation 6 of the paper)
//!
//! ```text
//! loss(α) = Σ_t [ (KL(P̃‖P) − KL(Q_t‖Q))² + (KL(P‖P̃) − KL(Q‖Q_t))² ]
//! ```
//!
//! over a grid of candidates, one expert active at a time. [`mod@reference`] is this, written literally in f64;
//! the backends compute it in one pass over the vocabulary.

pub mod cumulant;
pub mod reference;
pub mod refine;
mod rows;

use std::fmt;
use std::str::FromStr;

use arrayvec::ArrayVec;

use crate::error::{Error, Result};
pub use crate::model::MAX_EXPERTS;
pub use rows::{LogitsRows, ModelLogits};

/// The largest number of candidates of α.
pub const MAX_CANDIDATES: usize = 32;

/// One value for each expert of the ensemble, in the order they were given.
pub type PerExpert<T> = ArrayVec<T, MAX_EXPERTS>;

/// The candidates of α for one expert: finite, strictly increasing, 1 to [`MAX_CANDIDATES`] of them.
#[derive(Clone, Debug, PartialEq)]
pub struct AlphaGrid {
    candidates: ArrayVec<f64, MAX_CANDIDATES>,
    /// The candidates, and others between them where they are more than [`FINE_STEP`] apart.
    fine: ArrayVec<f64, MAX_CANDIDATES>,
    /// Start, stop and step, as they were given.
    bounds: [f64; 3],
    inclusive: bool,
}

/// How far apart points may be between which the continuous minimum is sought: a cell several times as wide holds more
/// bends of A than the sums at its ends tell of.
const FINE_STEP: f64 = 0.1;

impl AlphaGrid {
    /// `start, start + step, …` up to `stop`, which is itself a candidate only where `inclusive`.
    ///
    /// Candidates are rounded to twelve decimals, so that the fourth of `0:2:0.1` is 0.3 and not
    /// 0.30000000000000004.
    ///
    /// # Errors
    /// [`Error::Parameter`] where a bound is not finite, the step not positive, or the count not 1 to 32.
    pub fn new(start: f64, stop: f64, step: f64, inclusive: bool) -> Result<Self> {
        let found = format!("{start}:{stop}:{step}{}", if inclusive { ":inclusive" } else { "" });
        let invalid = |expected: &str, found: String| Error::Parameter {
            name: "alpha grid",
            expected: expected.to_owned(),
            found,
        };
        if !(start.is_finite() && stop.is_finite() && step.is_finite())
            || start.abs() > 1e6
            || stop.abs() > 1e6
        {
            return Err(invalid("finite bounds and step within ±1e6", found));
        }
        if step <= 0.0 {
            return Err(invalid("a positive step", found));
        }
        // A step of 0.1 is not exact in binary: a millionth of a step decides what counts as reaching `stop`.
        let reach = (stop - start) / step;
        let count = if inclusive { (reach + 1e-6).floor() + 1.0 } else { (reach - 1e-6).ceil() };
        if count < 1.0 {
            return Err(invalid("STOP after START", found));
        }
        if count > MAX_CANDIDATES as f64 {
            return Err(invalid("1 to 32 candidates", format!("{found}, which has {count}")));
        }
        let round = |x: f64| (x * 1e12).round() / 1e12;
        let count = count as usize;
        let parts = if count > 1 { (MAX_CANDIDATES - 1) / (count - 1) } else { 1 };
        let parts = ((step / FINE_STEP - 1e-6).ceil().max(1.0) as usize).min(parts);
        let point = |k: usize| round(start + k as f64 * (step / parts as f64));
        let candidates = (0..count).map(|k| round(start + k as f64 * step)).collect();
        let fine = (0..(count - 1) * parts + 1).map(point).collect();
        Ok(Self { candidates, fine, bounds: [start, stop, step], inclusive })
    }

    /// The candidates, in increasing order.
    pub fn candidates(&self) -> &[f64] {
        &self.candidates
    }

    /// Where a search for the continuous minimum looks first, in increasing order: the candidates, and points between
    /// them where they are more than 0.1 apart, as far as [`MAX_CANDIDATES`] go.
    pub fn fine(&self) -> &[f64] {
        &self.fine
    }
}

/// `START:STOP:STEP`, or `START:STOP:STEP:inclusive`.
impl FromStr for AlphaGrid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (numbers, inclusive) = match text.strip_suffix(":inclusive") {
            Some(numbers) => (numbers, true),
            None => (text, false),
        };
        let invalid = |found: &str| Error::Parameter {
            name: "alpha grid",
            expected: "START:STOP:STEP[:inclusive]".to_owned(),
            found: format!("{found:?}"),
        };
        let bounds: Vec<f64> =
            numbers.split(':').map(|n| n.parse().map_err(|_| invalid(n))).collect::<Result<_>>()?;
        let [start, stop, step] = bounds[..] else { return Err(invalid(text)) };
        Self::new(start, stop, step, inclusive)
    }
}

/// As it is parsed.
impl fmt::Display for AlphaGrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [start, stop, step] = self.bounds;
        write!(f, "{start}:{stop}:{step}{}", if self.inclusive { ":inclusive" } else { "" })
    }
}

impl Default for AlphaGrid {
    /// The paper's twenty candidates 0.0, 0.1, … 1.9: `0:2:0.1`.
    fn default() -> Self {
        let candidates: ArrayVec<f64, MAX_CANDIDATES> = (0..20).map(|k| f64::from(k) / 10.0).collect();
        Self { fine: candidates.clone(), candidates, bounds: [0.0, 2.0, 0.1], inclusive: false }
    }
}

/// Which of the two KL terms the loss has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Objective {
    /// Both, as in the paper.
    #[default]
    Both,
    /// Only (KL(P̃‖P) − KL(Q_t‖Q))².
    Forward,
    /// Only (KL(P‖P̃) − KL(Q‖Q_t))².
    Reverse,
}

/// How the minimum is sought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SearchMode {
    /// The best candidate of the grid, as in the paper.
    #[default]
    Grid,
    /// The continuous minimum around the best of [`AlphaGrid::fine`], from the same pass's sums.
    Refine,
}

/// The paper's rule: α found anew by matching KL divergences.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicRule {
    /// One grid for every expert of the ensemble, or a single one that serves all.
    pub grids: PerExpert<AlphaGrid>,
    /// Grid or continuous minimum.
    pub mode: SearchMode,
    /// Which KL terms are matched.
    pub objective: Objective,
    /// The search runs at steps 0, `every`, 2·`every`, …; in between α is held. At least 1.
    pub every: usize,
}

impl Default for DynamicRule {
    fn default() -> Self {
        Self {
            grids: std::iter::once(AlphaGrid::default()).collect(),
            mode: SearchMode::Grid,
            objective: Objective::Both,
            every: 1,
        }
    }
}

impl DynamicRule {
    /// The grid of expert `expert`.
    pub fn grid(&self, expert: usize) -> Option<&AlphaGrid> {
        if self.grids.len() == 1 { self.grids.first() } else { self.grids.get(expert) }
    }

    /// The α of expert `expert` that are summed for; none where it has no grid.
    pub fn points(&self, expert: usize) -> &[f64] {
        let of = match self.mode {
            SearchMode::Grid => AlphaGrid::candidates,
            SearchMode::Refine => AlphaGrid::fine,
        };
        self.grid(expert).map_or(&[], of)
    }
}

/// How the logits of an ensemble become one distribution.
// There is one for each request, and it is passed by reference: a box would save nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum FusionRule {
    /// α by matching KL divergences, one expert active a step.
    Dynamic(DynamicRule),
    /// P̃ = softmax(L + Σ α_t D_t) with fixed α, one for each expert or one for all: proxy tuning.
    Static(PerExpert<f64>),
    /// The large model alone.
    Large,
    /// The small model alone.
    Small,
    /// One expert alone.
    Expert(usize),
}

impl Default for FusionRule {
    fn default() -> Self {
        Self::Dynamic(DynamicRule::default())
    }
}

impl FusionRule {
    /// The method's name, as the command line has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dynamic(_) => "dynamic",
            Self::Static(_) => "static",
            Self::Large => "large",
            Self::Small => "small",
            Self::Expert(_) => "expert",
        }
    }

    /// Whether the rule combines all models (dynamic and static do) or runs one alone.
    pub fn is_fused(&self) -> bool {
        matches!(self, Self::Dynamic(_) | Self::Static(_))
    }

    /// Checks that the rule's models are there, and that it has a grid or an α for each of `experts` experts.
    ///
    /// # Errors
    /// [`Error::MissingModel`], and [`Error::Parameter`] where the number of grids or of α is neither 1 nor that of
    /// the experts, or an α is not finite.
    pub fn check(&self, large: bool, small: bool, experts: usize) -> Result<()> {
        let missing = |what: &str| Err(Error::MissingModel { method: self.name(), what: what.to_owned() });
        let per_expert = |name: &'static str, found: usize| match found {
            1 => Ok(()),
            found if found == experts => Ok(()),
            found => {
                let expected =
                    if experts == 1 { "1".to_owned() } else { format!("1 or {experts}, one an expert") };
                Err(Error::Parameter { name, expected, found: found.to_string() })
            }
        };
        match self {
            Self::Large if !large => missing("a large model"),
            Self::Small if !small => missing("a small model"),
            Self::Expert(0) if experts == 0 => missing("an expert"),
            Self::Expert(expert) if *expert >= experts => {
                missing(&format!("expert {expert}, and there are {experts}, counted from 0"))
            }
            Self::Large | Self::Small | Self::Expert(_) => Ok(()),
            Self::Dynamic(_) | Self::Static(_) if !large => missing("a large model"),
            Self::Dynamic(_) | Self::Static(_) if !small => missing("a small model"),
            Self::Dynamic(_) | Self::Static(_) if experts == 0 => missing("an expert"),
            Self::Dynamic(rule) if rule.every == 0 => Err(Error::Parameter {
                name: "alpha every",
                expected: "at least 1".to_owned(),
                found: "0".to_owned(),
            }),
            Self::Dynamic(rule) => per_expert("number of alpha grids", rule.grids.len()),
            Self::Static(alphas) => match alphas.iter().find(|alpha| !alpha.is_finite()) {
                Some(alpha) => Err(Error::Parameter {
                    name: "alpha",
                    expected: "a finite number".to_owned(),
                    found: alpha.to_string(),
                }),
                None => per_expert("number of alphas", alphas.len()),
            },
        }
    }
}

/// The logits of one row, each `(vocab_size,)` f32 over the vocabulary that the models share. Where lengths
/// differ, the tokens past the shortest are dropped.
#[derive(Clone, Debug, Default)]
pub struct Logits<'a> {
    /// L.
    pub large: Option<&'a [f32]>,
    /// S.
    pub small: Option<&'a [f32]>,
    /// E_t, in the ensemble's order.
    pub experts: PerExpert<&'a [f32]>,
}

/// What one step decided, and the numbers it decided by. KL terms are in nats, log-probabilities are those of
/// the temperature-1 distributions over the shared vocabulary.
///
/// A rule that runs one model alone has no α, no loss and no KL terms, and only that model's
/// log-probability and argmax: for an expert, the one entry of `logprob_expert` and `argmax_expert`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// The chosen token, or the one that was to be scored.
    pub token: u32,
    /// argmax P̃, the lowest id where several tie.
    pub argmax_fused: u32,
    /// log P̃(token), before penalties, temperature and truncation.
    pub logprob_fused: f64,
    /// The active expert of the dynamic rule.
    pub expert: Option<usize>,
    /// α of each expert: zero but for the active one under the dynamic rule.
    pub alpha: PerExpert<f64>,
    /// loss(α), summed over all experts.
    pub loss: Option<f64>,
    /// KL(P̃‖P).
    pub kl_fused_large: Option<f64>,
    /// KL(P‖P̃).
    pub kl_large_fused: Option<f64>,
    /// KL(Q_t‖Q) of each expert.
    pub kl_expert_small: PerExpert<f64>,
    /// KL(Q‖Q_t) of each expert.
    pub kl_small_expert: PerExpert<f64>,
    /// log P(token).
    pub logprob_large: Option<f64>,
    /// log Q(token).
    pub logprob_small: Option<f64>,
    /// log Q_t(token) of each expert.
    pub logprob_expert: PerExpert<f64>,
    /// argmax P.
    pub argmax_large: Option<u32>,
    /// argmax Q_t of each expert.
    pub argmax_expert: PerExpert<u32>,
}

impl Decision {
    /// Whether the choice differs from the large model's own argmax; `None` where no large model ran.
    pub fn changed(&self) -> Option<bool> {
        self.argmax_large.map(|argmax| argmax != self.token)
    }
}
