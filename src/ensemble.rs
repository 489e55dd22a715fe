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
    /// Puts `models` together: large, small, then the experts, which share the first `vocab_size` token ids.
    ///
    /// # Errors
    /// [`Error::Parameter`] where a model has fewer ids.
    pub fn new(models: Vec<Arc<LlamaModel>>, vocab_size: usize) -> Result<Self> {
        match models.iter().find(|model| model.config.vocab_size < vocab_size) {
            None => Ok(Self { models, vocab_size }),
            Some(model) => Err(Error::Parameter {
                name: "vocab_size",
                expected: format!("at most the {} ids of the {} model", model.config.vocab_size, model.role),
                found: vocab_size.to_string(),
            }),
        }
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
