//! What every backend makes sure of before a batch reaches memory.

use super::{Batch, Limits};
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::kv_cache::BLOCK_SIZE;

/// Checks batches. Keeps its working memory from call to call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checker {
    /// Which slots of `(models, slots)` a batch has named.
    named: Vec<bool>,
}

impl Checker {
    /// Checks everything that a row indexes with.
    ///
    /// # Errors
    /// [`Error::Parameter`] where a row names a model, table, block, token or slot that doesn't exist, or two rows
    /// the same slot: bugs of the caller that must not reach memory.
    pub(crate) fn check(&mut self, ensemble: &Ensemble, limits: Limits, batch: &Batch<'_>) -> Result<()> {
        self.named.clear();
        self.named.resize(ensemble.models().len() * limits.slots, false);
        for row in batch.rows {
            let invalid = |expected: &str| Error::Parameter {
                name: "row",
                expected: expected.to_owned(),
                found: format!("{row:?}"),
            };
            let model = ensemble.models().get(row.model).ok_or_else(|| invalid("a model of the ensemble"))?;
            if row.token as usize >= model.config.vocab_size {
                return Err(invalid("a token of the model's vocabulary"));
            }
            let table = batch.tables.get(row.table).ok_or_else(|| invalid("a table of the batch"))?;
            let blocks = table.blocks.get(..=row.position / BLOCK_SIZE);
            let blocks = blocks.ok_or_else(|| invalid("a position that has a block"))?;
            if blocks.iter().any(|&block| block as usize >= limits.blocks) {
                return Err(invalid("blocks within the cache"));
            }
            if let Some(slot) = row.slot {
                let named = self.named.get_mut(row.model * limits.slots + slot);
                match named.filter(|_| slot < limits.slots) {
                    Some(named) if !*named => *named = true,
                    _ => return Err(invalid("a slot of its own")),
                }
            }
        }
        Ok(())
    }
}
