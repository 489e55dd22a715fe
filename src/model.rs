//! One model of an ensemble: its role, configuration and weights.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapter::{ADAPTER_CONFIG, LoraAdapter};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::weights::{Dtype, LlamaWeights};

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

impl LlamaModel {
    /// Loads the model in `dir`.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::load`] and [`LlamaWeights::load`]; [`Error::Unsupported`] where the directory holds an
    /// adapter, which needs a model under it.
    pub fn load(role: Role, name: &str, dir: &Path) -> Result<Self> {
        if is_adapter(dir) {
            let what = match role {
                Role::Expert(_) => "a LoRA adapter without the small model that it changes".to_owned(),
                role => format!("a LoRA adapter as the {role} model"),
            };
            return Err(Error::Unsupported { path: dir.join(ADAPTER_CONFIG), what });
        }
        let config = LlamaConfig::load(dir)?;
        let weights = LlamaWeights::load(dir, &config)?;
        Ok(Self {
            role,
            name: name.to_owned(),
            path: dir.to_owned(),
            config: Arc::new(config),
            weights: Arc::new(weights),
            adapter: None,
        })
    }

    /// Loads the adapter in `dir` over this model, whose weights the two then share.
    ///
    /// # Errors
    /// Those of [`LoraAdapter::load`].
    pub fn with_adapter(&self, role: Role, name: &str, dir: &Path) -> Result<Self> {
        let adapter = LoraAdapter::load(dir, &self.config)?;
        Ok(Self {
            role,
            name: name.to_owned(),
            path: dir.to_owned(),
            adapter: Some(Arc::new(adapter)),
            ..self.clone()
        })
    }

    /// Numbers that the model has of its own: its weights, or its adapter's where it has one.
    pub fn num_parameters(&self) -> usize {
        self.adapter
            .as_ref()
            .map_or_else(|| self.weights.num_parameters(), |adapter| adapter.num_parameters())
    }

    /// Bytes of what [`num_parameters`](Self::num_parameters) counts, as stored.
    pub fn weight_bytes(&self) -> usize {
        self.adapter.as_ref().map_or_else(|| self.weights.bytes(), |adapter| adapter.bytes())
    }

    /// The dtype of the embedding, which stands for that of the model.
    pub fn dtype(&self) -> Dtype {
        self.weights.embed_tokens.dtype()
    }
}

/// Whether `dir` holds an adapter. Some adapters come with a copy of the base model's config.json, so that says
/// nothing; transformers, too, takes a directory with both for an adapter.
pub(crate) fn is_adapter(dir: &Path) -> bool {
    dir.join(ADAPTER_CONFIG).is_file()
}
