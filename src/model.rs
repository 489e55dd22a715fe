//! One model of an ensemble: its role, configuration and weights.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::adapter::LoraAdapter;
use crate::config::LlamaConfig;
use crate::weights::LlamaWeights;

/// The largest number of experts in one ensemble.
pub const MAX_EXPERTS: usize = 8;

/// What a model is in its ensemble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The model that is steered: logits L.
    Large,
    /// The model that the experts were fine-tuned from: logits S.
    Small,
    /// The fine-tuned small model number `t`, counted from 0: logits E_t.
    Expert(usize),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Large => f.write_str("large"),
            Self::Small => f.write_str("small"),
            Self::Expert(index) => write!(f, "expert {index}"),
        }
    }
}

/// A loaded model. Immutable and shared: everything that changes while decoding belongs to a sequence.
#[derive(Clone, Debug)]
pub struct LlamaModel {
    /// What the model is in its ensemble.
    pub role: Role,
    /// The name that traces and tables show: `large`, `small`, or the expert's.
    pub name: String,
    /// The directory it was loaded from.
    pub path: PathBuf,
    /// Its validated `config.json`.
    pub config: Arc<LlamaConfig>,
    /// Its weights. An expert that is a LoRA adapter points to the small model's.
    pub weights: Arc<LlamaWeights>,
    /// The low-rank update on top of [`weights`](Self::weights), for a LoRA expert.
    pub adapter: Option<Arc<LoraAdapter>>,
}
