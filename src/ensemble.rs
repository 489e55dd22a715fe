//! `Ensemble`: the models, their roles, and what they must agree on.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::LlamaModel;

/// The models that decode together. Immutable; cheap to share by [`Arc`].
#[derive(Debug)]
pub struct Ensemble {
    models: Vec<Arc<LlamaModel>>,
    vocab_size: usize,
}

impl Ensemble {
    /// An ensemble of models without tokenizers: prompts and results are token ids.
    ///
    /// # Errors
    /// [`Error::Parameter`] where there is no model.
    pub fn from_models(models: Vec<LlamaModel>) -> Result<Self> {
        let vocab_size = models.iter().map(|model| model.config.vocab_size).min();
        let vocab_size = vocab_size.ok_or_else(|| Error::Parameter {
            name: "models",
            expected: "at least one".to_owned(),
            found: "none".to_owned(),
        })?;
        Ok(Self { models: models.into_iter().map(Arc::new).collect(), vocab_size })
    }

    /// The models: large, small, then the experts in the order they were given; those that a method doesn't need
    /// may be missing. [`Row::model`](crate::backend::Row::model) is an index into this.
    pub fn models(&self) -> &[Arc<LlamaModel>] {
        &self.models
    }

    /// The number of token ids that all models share; logits past it are dropped before any softmax.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}
