//! The rows of one turn of a group, as the kernels read them.

use arrayvec::ArrayVec;

use crate::backend::{Batch, Row};
use crate::ensemble::Ensemble;
use crate::model::MAX_EXPERTS;

/// Models that run together at most: the small one and its experts.
pub(crate) const MAX_GROUP: usize = MAX_EXPERTS + 1;

/// Lists of a plan.
pub(crate) const LISTS: usize = 12;

/// Rows of a tile of attention at most: the kernel's.
const TILE_ROWS: usize = 64;

/// A row without an adapter.
pub(crate) const NO_ADAPTER: u32 = u32::MAX;

/// The models of a group, and which of them share weights.
#[derive(Clone, Debug)]
pub(crate) struct Members {
    /// Indices into the ensemble, in its order.
    pub(crate) models: ArrayVec<usize, MAX_GROUP>,
    /// The set of each.
    set: ArrayVec<usize, MAX_GROUP>,
    /// The adapter of each, counted over the group.
    adapter: ArrayVec<u32, MAX_GROUP>,
    /// The first model of each set: an index into the ensemble.
    pub(crate) owners: ArrayVec<usize, MAX_GROUP>,
}

impl Members {
    /// Groups `models`, which are indices into the ensemble.
    pub(crate) fn new(ensemble: &Ensemble, models: impl Iterator<Item = usize>) -> Self {
        let mut members = Self {
            models: models.take(MAX_GROUP).collect(),
            set: ArrayVec::new(),
            adapter: ArrayVec::new(),
            owners: ArrayVec::new(),
        };
        let mut adapters = 0..;
        for &model in &members.models {
            let this = &ensemble.models()[model];
            // A set has one ε and one rotation, too.
            let shares = |&owner: &usize| {
                let (owner, config) = (&ensemble.models()[owner], &this.config);
                std::sync::Arc::ptr_eq(&owner.weights, &this.weights)
                    && (&owner.config.rope, owner.config.rms_norm_eps) == (&config.rope, config.rms_norm_eps)
            };
            let set = members.owners.iter().position(shares).unwrap_or(members.owners.len());
            if set == members.owners.len() {
                members.owners.push(model);
            }
            members.set.push(set);
            let adapter = this.adapter.as_ref().and_then(|_| adapters.next());
            members.adapter.push(adapter.unwrap_or(NO_ADAPTER));
        }
        members
    }

    /// Models of the set that has the most.
    pub(crate) fn most_of_a_set(&self) -> usize {
        let models_of = |set| self.set.iter().filter(|&&other| other == set).count();
        (0..self.owners.len()).map(models_of).max().unwrap_or(0)
    }

    /// The place of the model `model` of the ensemble in this group.
    pub(crate) fn place(&self, model: usize) -> Option<usize> {
        self.models.iter().position(|&member| member == model)
    }
}

/// The rows of one turn, ordered by set, model, table and position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// One a row.
    pub(crate) token: Vec<u32>,
    /// One a row.
    pub(crate) position: Vec<u32>,
    /// One a row: the row of `tables`.
    pub(crate) table: Vec<u32>,
    /// One a row: the place in the group, which chooses the cache.
    pub(crate) model: Vec<u32>,
    /// One a row, [`NO_ADAPTER`] where there is none.
    pub(crate) adapter: Vec<u32>,
    /// Rows of set z are `set_first[z]..set_first[z + 1]`.
    pub(crate) set_first: Vec<u32>,
    /// The rows whose logits are wanted.
    pub(crate) wanted: Vec<u32>,
    /// Where they go: a row of `(models of the ensemble · slots, vocab_stride)`.
    pub(crate) wanted_slot: Vec<u32>,
    /// Entries of `wanted` of set z are `wanted_first[z]..wanted_first[z + 1]`.
    pub(crate) wanted_first: Vec<u32>,
    /// The rows that attend by themselves.
    pub(crate) alone: Vec<u32>,
    /// The first row of each tile, of rows that attend together.
    pub(crate) tile_first: Vec<u32>,
    /// Rows of each tile.
    pub(crate) tile_rows: Vec<u32>,
    /// Block tables, `(tables, table_stride)`.
    pub(crate) tables: Vec<u32>,
    /// The table of the batch and the place in the group that each row of `tables` is from.
    known: Vec<(usize, usize)>,
}

impl Plan {
    /// Fills the plan with `rows` of `batch`; `slots` is the number of slots of a model.
    pub(crate) fn fill(
        &mut self,
        members: &Members,
        batch: &Batch<'_>,
        rows: &mut [Row],
        slots: usize,
        table_stride: usize,
    ) {
        self.clear();
        let place = |row: &Row| members.place(row.model).unwrap_or(0);
        rows.sort_by_key(|row| (members.set[place(row)], place(row), row.table, row.position));
        for row in rows.iter() {
            let (place, index) = (place(row), self.token.len() as u32);
            self.set_first.resize(members.set[place] + 1, index);
            self.wanted_first.resize(members.set[place] + 1, self.wanted.len() as u32);
            let table = self.table_of(batch, row.table, place, table_stride);
            self.token.push(row.token);
            self.position.push(row.position as u32);
            self.table.push(table);
            self.model.push(place as u32);
            self.adapter.push(members.adapter[place]);
            if let Some(slot) = row.slot {
                self.wanted.push(index);
                self.wanted_slot.push((row.model * slots + slot) as u32);
            }
        }
        self.set_first.resize(members.owners.len() + 1, self.token.len() as u32);
        self.wanted_first.resize(members.owners.len() + 1, self.wanted.len() as u32);
    }

    /// Says how the rows attend: those of a sequence together where they are more than `most`, in tiles by position.
    pub(crate) fn tile(&mut self, most: usize) {
        let mut first = 0;
        for sequence in self.table.chunk_by(|a, b| a == b) {
            let rows = first..first + sequence.len() as u32;
            first = rows.end;
            if sequence.len() <= most {
                self.alone.extend(rows);
                continue;
            }
            for start in rows.clone().step_by(TILE_ROWS) {
                self.tile_first.push(start);
                self.tile_rows.push((rows.end - start).min(TILE_ROWS as u32));
            }
        }
    }

    /// The lists that the kernels read, beside the tables.
    pub(crate) fn lists(&self) -> [&[u32]; LISTS] {
        [
            &self.token,
            &self.position,
            &self.table,
            &self.model,
            &self.adapter,
            &self.wanted,
            &self.wanted_slot,
            &self.set_first,
            &self.wanted_first,
            &self.alone,
            &self.tile_first,
            &self.tile_rows,
        ]
    }

    /// Forgets all rows.
    pub(crate) fn clear(&mut self) {
        let Self { token, position, table, model, adapter, set_first, wanted, .. } = self;
        for numbers in [token, position, table, model, adapter, set_first, wanted] {
            numbers.clear();
        }
        for numbers in [&mut self.wanted_slot, &mut self.wanted_first, &mut self.tables] {
            numbers.clear();
        }
        for numbers in [&mut self.alone, &mut self.tile_first, &mut self.tile_rows] {
            numbers.clear();
        }
        self.known.clear();
    }

    /// The row of `tables` that holds a table of the batch. Rows come sorted, so it is the last or a new one.
    fn table_of(&mut self, batch: &Batch<'_>, table: usize, place: usize, stride: usize) -> u32 {
        if self.known.last() != Some(&(table, place)) {
            self.known.push((table, place));
            let blocks = &batch.tables[table].blocks;
            self.tables.extend(blocks.iter().take(stride));
            // No row reads past its position; zero is a block that exists.
            self.tables.resize(self.known.len() * stride, 0);
        }
        (self.known.len() - 1) as u32
    }

    /// Rows.
    pub(crate) fn rows(&self) -> usize {
        self.token.len()
    }

    /// Rows of the set that has the most.
    pub(crate) fn most_rows(&self) -> usize {
        most(&self.set_first)
    }

    /// Wanted rows of the set that has the most.
    pub(crate) fn most_wanted(&self) -> usize {
        most(&self.wanted_first)
    }

    /// The last position of any row.
    pub(crate) fn last_position(&self) -> u32 {
        self.position.iter().copied().max().unwrap_or(0)
    }
}

fn most(first: &[u32]) -> usize {
    first.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_cache::BlockTable;

    fn row(model: usize, table: usize, position: usize, slot: Option<usize>) -> Row {
        Row { model, table, position, token: 7, slot }
    }

    #[test]
    fn rows_stand_by_set_and_table() {
        let members = Members {
            models: [1, 2, 3].into_iter().collect(),
            set: [0, 1, 0].into_iter().collect(),
            adapter: [NO_ADAPTER, NO_ADAPTER, 0].into_iter().collect(),
            owners: [1, 2].into_iter().collect(),
        };
        let tables: Vec<BlockTable> =
            (0..3).map(|table| BlockTable { blocks: vec![table * 10, table * 10 + 1] }).collect();
        let batch = Batch { rows: &[], tables: &tables };
        let mut rows = vec![
            row(1, 0, 16, None),
            row(1, 0, 17, Some(0)),
            row(2, 1, 4, Some(0)),
            row(3, 2, 5, None),
            row(3, 2, 6, Some(1)),
        ];
        let mut plan = Plan::default();
        plan.fill(&members, &batch, &mut rows, 4, 3);
        assert_eq!(plan.position, [16, 17, 5, 6, 4]);
        assert_eq!(plan.set_first, [0, 4, 5]);
        assert_eq!(plan.model, [0, 0, 2, 2, 1]);
        assert_eq!(plan.adapter, [NO_ADAPTER, NO_ADAPTER, 0, 0, NO_ADAPTER]);
        assert_eq!((&plan.wanted, &plan.wanted_slot), (&vec![1, 3, 4], &vec![4, 13, 8]));
        assert_eq!(plan.wanted_first, [0, 2, 3]);
        assert_eq!(plan.tables, [0, 1, 0, 20, 21, 0, 10, 11, 0]);
        assert_eq!(plan.table, [0, 0, 1, 1, 2]);
        assert_eq!((plan.most_rows(), plan.most_wanted(), plan.last_position()), (4, 2, 17));
        assert_eq!(members.most_of_a_set(), 2);
    }

    #[test]
    fn long_sequences_attend_in_tiles() {
        let members = Members {
            models: [1].into_iter().collect(),
            set: [0].into_iter().collect(),
            adapter: [NO_ADAPTER].into_iter().collect(),
            owners: [1].into_iter().collect(),
        };
        let tables: Vec<BlockTable> = (0..4).map(|table| BlockTable { blocks: vec![table; 9] }).collect();
        let mut rows = Vec::new();
        for (table, length) in [(0, 2), (1, 130), (2, 16), (3, 17)] {
            rows.extend((0..length).map(|position| row(1, table, position, None)));
        }
        let mut plan = Plan::default();
        plan.fill(&members, &Batch { rows: &[], tables: &tables }, &mut rows, 1, 9);
        plan.tile(16);
        assert_eq!((&plan.tile_first, &plan.tile_rows), (&vec![2, 66, 130, 148], &vec![64, 64, 2, 17]));
        assert_eq!(plan.alone, [0, 1].into_iter().chain(132..148).collect::<Vec<_>>());
        plan.fill(&members, &Batch { rows: &[], tables: &tables }, &mut rows, 1, 9);
        plan.tile(usize::MAX);
        assert_eq!((plan.alone.len(), plan.tile_first.len(), plan.tile_rows.len()), (165, 0, 0));
    }

    #[test]
    fn a_set_without_rows_is_empty() {
        let members = Members {
            models: [1, 2].into_iter().collect(),
            set: [0, 1].into_iter().collect(),
            adapter: [NO_ADAPTER, NO_ADAPTER].into_iter().collect(),
            owners: [1, 2].into_iter().collect(),
        };
        let tables = [BlockTable { blocks: vec![5] }];
        let batch = Batch { rows: &[], tables: &tables };
        let mut plan = Plan::default();
        plan.fill(&members, &batch, &mut [row(2, 0, 0, None)], 1, 1);
        assert_eq!(
            (plan.set_first.as_slice(), plan.wanted_first.as_slice()),
            ([0, 0, 1].as_slice(), [0, 0, 0].as_slice())
        );
        plan.fill(&members, &batch, &mut [], 1, 1);
        assert_eq!((plan.set_first.as_slice(), plan.rows(), plan.most_rows()), ([0, 0, 0].as_slice(), 0, 0));
    }
}
