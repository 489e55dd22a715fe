//! `Ensemble`: the models, their roles, and what they must agree on.

mod agreement;
mod load;

use std::sync::Arc;

pub use load::{EnsembleSpec, ExpertSpec};

use crate::error::{Error, Result};
use crate::fusion::FusionRule;
use crate::model::{LlamaModel, MAX_EXPERTS, Role};
#[cfg(feature = "tokenizer")]
use crate::tokenizer::Tokenizer;

/// The models that decode together. Immutable; cheap to share by [`Arc`].
#[derive(Debug)]
pub struct Ensemble {
    models: Vec<Arc<LlamaModel>>,
    /// One a model.
    #[cfg(feature = "tokenizer")]
    tokenizers: Vec<Option<Tokenizer>>,
    vocab_size: usize,
    eos_token_ids: Vec<u32>,
}

/// What an ensemble keeps in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of all weights and adapters; those that models share count once.
    pub weight_bytes: usize,
    /// Bytes that one token of every model adds to the key-value caches.
    pub kv_bytes_per_token: usize,
}

impl Ensemble {
    /// An ensemble of models without tokenizers: prompts and results are token ids.
    ///
    /// The models are in the order of [`models`](Self::models).
    ///
    /// # Errors
    /// [`Error::Parameter`] where there is no model, too many experts, or the roles are out of order;
    /// [`Error::Mismatch`] where an expert has another architecture than the small model.
    pub fn from_models(models: Vec<LlamaModel>) -> Result<Self> {
        check_roles(&models)?;
        agreement::check_architectures(&models)?;
        let vocab_size = models.iter().map(|model| model.config.vocab_size).min().unwrap_or_default();
        let mut eos_token_ids: Vec<u32> =
            models.iter().flat_map(|model| model.config.eos_token_ids.iter().copied()).collect();
        eos_token_ids.retain(|&id| (id as usize) < vocab_size);
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        Ok(Self {
            #[cfg(feature = "tokenizer")]
            tokenizers: models.iter().map(|_| None).collect(),
            models: models.into_iter().map(Arc::new).collect(),
            vocab_size,
            eos_token_ids,
        })
    }

    /// The same ensemble with tokenizers, one a model, `None` where a model has none.
    ///
    /// # Errors
    /// [`Error::Mismatch`] where two of them have different tokens under one id of the shared vocabulary, or one has a
    /// special token there and the other ordinary text (the message has the first such id), or where they put
    /// different tokens around a prompt; [`Error::Parameter`] where they are not one a model.
    #[cfg(feature = "tokenizer")]
    pub fn with_tokenizers(mut self, tokenizers: Vec<Option<Tokenizer>>) -> Result<Self> {
        if tokenizers.len() != self.models.len() {
            return Err(Error::Parameter {
                name: "tokenizers",
                expected: format!("{}, one a model", self.models.len()),
                found: tokenizers.len().to_string(),
            });
        }
        agreement::check_tokens(&self.models, &tokenizers, self.vocab_size)?;
        self.tokenizers = tokenizers;
        Ok(self)
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

    /// The ids that end a sequence: those of all models, within the shared vocabulary, in order.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The index of the model with this role.
    pub fn index(&self, role: Role) -> Option<usize> {
        self.models.iter().position(|model| model.role == role)
    }

    /// How many experts there are.
    pub fn num_experts(&self) -> usize {
        self.models.iter().filter(|model| matches!(model.role, Role::Expert(_))).count()
    }

    /// The name of expert `expert`.
    pub fn expert_name(&self, expert: usize) -> Option<&str> {
        let index = self.index(Role::Expert(expert))?;
        self.models.get(index).map(|model| model.name.as_str())
    }

    /// The longest context of the model with this index, in tokens; 0 where there is none.
    pub fn context(&self, model: usize) -> usize {
        self.models.get(model).map_or(0, |model| model.config.context())
    }

    /// The tokenizer of the model with this index. A LoRA expert has the small model's unless it brings its own.
    #[cfg(feature = "tokenizer")]
    pub fn tokenizer(&self, model: usize) -> Option<&Tokenizer> {
        self.tokenizers.get(model).and_then(Option::as_ref)
    }

    /// The first tokenizer that there is: within the shared vocabulary, ids mean the same to all.
    #[cfg(feature = "tokenizer")]
    pub fn tokenizer_of_any(&self) -> Option<&Tokenizer> {
        self.tokenizers.iter().flatten().next()
    }

    /// What the models keep in memory.
    pub fn memory(&self) -> Memory {
        let mut seen: Vec<*const crate::weights::LlamaWeights> = Vec::new();
        let mut memory = Memory::default();
        for model in &self.models {
            memory.kv_bytes_per_token += model.config.kv_bytes_per_token();
            memory.weight_bytes += model.adapter.as_ref().map_or(0, |adapter| adapter.bytes());
            let weights = Arc::as_ptr(&model.weights);
            if !seen.contains(&weights) {
                seen.push(weights);
                memory.weight_bytes += model.weights.bytes();
            }
        }
        memory
    }

    /// The indices of the models that `rule` runs; empty where the ensemble lacks one of them.
    pub fn models_for(&self, rule: &FusionRule) -> Vec<usize> {
        let alone = |role| self.index(role).into_iter().collect();
        match rule {
            FusionRule::Large => alone(Role::Large),
            FusionRule::Small => alone(Role::Small),
            FusionRule::Expert(expert) => alone(Role::Expert(*expert)),
            FusionRule::Dynamic(_) | FusionRule::Static(_) if self.check_rule(rule).is_ok() => {
                (0..self.models.len()).collect()
            }
            FusionRule::Dynamic(_) | FusionRule::Static(_) => Vec::new(),
        }
    }

    /// Checks that the ensemble has what `rule` needs.
    ///
    /// # Errors
    /// Those of [`FusionRule::check`].
    pub fn check_rule(&self, rule: &FusionRule) -> Result<()> {
        let has = |role| self.index(role).is_some();
        rule.check(has(Role::Large), has(Role::Small), self.num_experts())
    }
}

/// Checks that there are models, and that they are in order: large, small, experts from 0 on.
fn check_roles(models: &[LlamaModel]) -> Result<()> {
    let invalid = |expected: String| {
        let found: Vec<String> = models.iter().map(|model| model.role.to_string()).collect();
        Err(Error::Parameter { name: "models", expected, found: format!("[{}]", found.join(", ")) })
    };
    if models.is_empty() {
        return invalid("at least one model".to_owned());
    }
    let roles: Vec<Role> = models.iter().map(|model| model.role).collect();
    let rest = roles.strip_prefix(&[Role::Large]).unwrap_or(&roles);
    let rest = rest.strip_prefix(&[Role::Small]).unwrap_or(rest);
    if rest.len() > MAX_EXPERTS {
        return invalid(format!("at most {MAX_EXPERTS} experts"));
    }
    if rest.iter().enumerate().any(|(index, &role)| role != Role::Expert(index)) {
        return invalid("large, small, then experts counted from 0".to_owned());
    }
    Ok(())
}
