//! `Ensemble`: the models, their roles, and what they must agree on.

use std::sync::Arc;

use crate::model::LlamaModel;

/// The models that decode together. Immutable; cheap to share by [`Arc`].
#[derive(Debug)]
pub struct Ensemble {
    models: Vec<Arc<LlamaModel>>,
    vocab_size: usize,
}

impl Ensemble {
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
