//! A backend that plays logits from a script: what the `Generator` does with a backend, seen without a model.

use std::collections::BTreeMap;
use std::time::Duration;

use dlf_engine::Result;
use dlf_engine::backend::{Backend, Batch, Choice, ForwardTime, FuseRow, Limits};
use dlf_engine::fusion::Decision;

/// The next token of a sequence is a function of all its tokens, read back through the block tables: a wrong
/// position, table or shared block gives a wrong token.
pub(crate) struct Scripted {
    pub(crate) limits: Limits,
    /// Tokens by (model, block, offset), as a cache has them.
    cache: BTreeMap<(usize, u32, usize), u32>,
    /// By (model, slot): what the model would say next.
    said: BTreeMap<(usize, usize), u32>,
    /// The models whose slots must agree.
    models: usize,
    pub(crate) next: fn(&[u32]) -> u32,
}

impl Scripted {
    pub(crate) fn new(limits: Limits, models: usize, next: fn(&[u32]) -> u32) -> Self {
        Self { limits, cache: BTreeMap::new(), said: BTreeMap::new(), models, next }
    }
}

impl Backend for Scripted {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<ForwardTime> {
        const BLOCK: usize = dlf_engine::kv_cache::BLOCK_SIZE;
        let mut rows_of = vec![0; self.models];
        for row in batch.rows {
            rows_of[row.model] += 1;
            let block = batch.tables[row.table].blocks[row.position / BLOCK];
            assert!((block as usize) < self.limits.blocks);
            self.cache.insert((row.model, block, row.position % BLOCK), row.token);
        }
        assert!(!batch.rows.is_empty());
        assert!(rows_of.iter().all(|&rows| rows <= self.limits.rows), "{rows_of:?}");
        for row in batch.rows {
            let Some(slot) = row.slot else { continue };
            assert!(slot < self.limits.slots);
            let blocks = &batch.tables[row.table].blocks;
            let tokens: Vec<u32> =
                (0..=row.position).map(|p| self.cache[&(row.model, blocks[p / BLOCK], p % BLOCK)]).collect();
            self.said.insert((row.model, slot), (self.next)(&tokens));
        }
        Ok(ForwardTime::default())
    }

    fn fuse(&mut self, rows: &[FuseRow<'_>], decisions: &mut Vec<Result<Decision>>) -> Result<Duration> {
        decisions.clear();
        for row in rows {
            let said = self.said[&(0, row.slot)];
            let token = match row.choice {
                Choice::Forced(token) => token,
                Choice::Sample { banned, .. } if banned.contains(&said) => said + 1,
                Choice::Sample { .. } => said,
            };
            let mut decision = Decision { token, argmax_fused: said, ..Decision::default() };
            // α tells at which step it was searched.
            let (expert, alpha) = row.held.unwrap_or((0, row.step as f64));
            decision.expert = Some(expert);
            decision.alpha.push(alpha);
            decisions.push(Ok(decision));
        }
        Ok(Duration::ZERO)
    }

    fn launches(&self) -> u64 {
        0
    }

    fn logits(&self, _model: usize, _slot: usize) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }
}
