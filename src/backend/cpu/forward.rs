//! The forward pass of a group of models that have one architecture: the large model by itself, or the small one
//! and its experts in lockstep.
//!
//! Layer by layer, one region of tasks covers the rows of all models. Models that share weights, which are the
//! small one and its LoRA experts, share one pass over them.

use std::sync::{Arc, Mutex};

use arrayvec::ArrayVec;

use super::attention::{Attention, Partials, Tile};
use super::cache::KvCache;
use super::matmul::Numbers;
use super::matrix::{Matrix, Shared};
use super::pool::Pool;
use super::projection::{Delta, Deltas, Epilogue, MAX_GROUP, MAX_PRODUCTS, Product, Region, Weight};
use super::rowwise::{RmsNorm, rotate};
use super::simd::{Isa, padded};
use super::{Scratch, lock};
use crate::adapter::Projection;
use crate::backend::{Batch, Row};
use crate::config::LlamaConfig;
use crate::ensemble::Ensemble;
use crate::kv_cache::BLOCK_SIZE;
use crate::model::LlamaModel;
use crate::rope::Rope;
use crate::weights::{LayerWeights, Linear, Tensor};

/// The most rows that run together: longer batches run in turns, so that activations need little memory.
const MOST_ROWS: usize = 512;

/// Rows of a task that does something to each row by itself.
const ROWS_PER_TASK: usize = 8;

/// Rows that `models` models of up to `rows` rows each run in one turn.
pub(crate) fn most_rows(rows: usize, models: usize) -> usize {
    MOST_ROWS.min(rows * models)
}

/// Models of one architecture, and their activations.
pub(crate) struct Group {
    /// Indices into the ensemble.
    models: ArrayVec<usize, MAX_GROUP>,
    /// What all agree on: shapes.
    config: Arc<LlamaConfig>,
    /// Of each model.
    ropes: ArrayVec<Rope, MAX_GROUP>,
    /// The rank of the largest adapter, in whole vectors.
    rank: usize,
    /// Batch rows of this group, in the order they run.
    order: Vec<usize>,
    plan: Plan,
    activations: Activations,
    partials: Partials,
}

/// What a forward pass uses besides its own activations.
pub(crate) struct Machine<'a> {
    /// The models.
    pub(crate) ensemble: &'a Ensemble,
    /// The threads.
    pub(crate) pool: &'a mut Pool,
    /// The instruction set.
    pub(crate) isa: Isa,
    /// One a thread.
    pub(crate) scratch: &'a [Mutex<Scratch>],
    /// One a model.
    pub(crate) caches: &'a mut [KvCache],
    /// Activations as [`Region::run`] packs them.
    pub(crate) packed: &'a mut [f32],
    /// `(models, slots, vocab_size)`
    pub(crate) logits: &'a mut [f32],
    /// Slots of each model.
    pub(crate) slots: usize,
}

/// Consecutive rows of one model, or of models that share weights.
#[derive(Clone, Copy, Debug)]
struct Span {
    model: usize,
    rows: (usize, usize),
}

/// The rows of one turn.
#[derive(Default)]
struct Plan {
    rows: Vec<Row>,
    /// One for each model that has rows.
    models: ArrayVec<Span, MAX_GROUP>,
    /// One for each distinct set of weights.
    weights: ArrayVec<Span, MAX_GROUP>,
    tiles: Vec<Tile>,
    /// The rows whose logits are wanted.
    wanted: Vec<usize>,
    /// Where their logits go: rows of `(models · slots, vocab_size)`.
    wanted_slots: Vec<usize>,
    /// The wanted rows of each distinct set of weights.
    wanted_weights: ArrayVec<Span, MAX_GROUP>,
}

/// `(rows, …)` each.
struct Activations {
    /// The residual stream: `hidden_size`.
    hidden: Matrix,
    /// After RMSNorm: `hidden_size`.
    normed: Matrix,
    /// Queries, keys, values, side by side.
    qkv: Matrix,
    /// What attention computed: `num_attention_heads · head_dim`.
    attended: Matrix,
    /// silu(gate) · up: `intermediate_size`.
    activated: Matrix,
    /// A x of up to three projections, side by side.
    low_rank: Matrix,
    /// `head_dim / 2`
    cos: Matrix,
    /// `head_dim / 2`
    sin: Matrix,
}

impl Group {
    /// Room for `rows` rows of each of `models`, which are indices into the ensemble. None without models.
    pub(crate) fn new(ensemble: &Ensemble, models: impl Iterator<Item = usize>, rows: usize) -> Option<Self> {
        let models: ArrayVec<usize, MAX_GROUP> = models.take(MAX_GROUP).collect();
        let config = Arc::clone(&ensemble.models().get(*models.first()?)?.config);
        let rows = most_rows(rows, models.len());
        let adapters = models.iter().filter_map(|&model| ensemble.models()[model].adapter.as_deref());
        let deltas =
            adapters.flat_map(|adapter| &adapter.layers).flat_map(|layer| layer.deltas.iter().flatten());
        let rank = padded(deltas.filter_map(|delta| delta.a.shape().first().copied()).max().unwrap_or(0));
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let matrix = |cols| Matrix::new(rows, cols);
        let activations = Activations {
            hidden: matrix(config.hidden_size),
            normed: matrix(config.hidden_size),
            qkv: matrix(queries + 2 * keys),
            attended: matrix(queries),
            activated: matrix(config.intermediate_size),
            low_rank: matrix(3 * rank),
            cos: matrix(config.head_dim / 2),
            sin: matrix(config.head_dim / 2),
        };
        let plan = Plan {
            rows: Vec::with_capacity(rows),
            tiles: Vec::with_capacity(rows),
            wanted: Vec::with_capacity(rows),
            wanted_slots: Vec::with_capacity(rows),
            ..Plan::default()
        };
        let ropes = models.iter().map(|&model| Rope::new(&ensemble.models()[model].config)).collect();
        let partials = Partials::default();
        Some(Self { models, config, ropes, rank, order: Vec::new(), plan, activations, partials })
    }

    /// Runs this group's rows of `batch`.
    pub(crate) fn forward(&mut self, machine: &mut Machine<'_>, batch: &Batch<'_>) {
        let ensemble = machine.ensemble;
        self.order.clear();
        self.order.extend((0..batch.rows.len()).filter(|&i| self.models.contains(&batch.rows[i].model)));
        let most_rows = self.plan.rows.capacity().clamp(1, MOST_ROWS);
        if self.order.len() > most_rows {
            // A row needs earlier positions only: turns by position have what they need in the cache, even where
            // tables share blocks.
            self.order.sort_unstable_by_key(|&i| (batch.rows[i].position, i));
        }
        let mut order = std::mem::take(&mut self.order);
        for turn in order.chunks_mut(most_rows) {
            // Models that share weights stand side by side.
            turn.sort_unstable_by_key(|&i| (owner(ensemble, batch.rows[i].model), i));
            self.plan.fill(ensemble, &self.config, machine.slots, turn.iter().map(|&i| batch.rows[i]));
            self.turn(machine, batch);
        }
        self.order = order;
    }

    /// Runs the rows of the plan.
    fn turn(&mut self, machine: &mut Machine<'_>, batch: &Batch<'_>) {
        self.embed(machine);
        for layer in 0..self.config.num_hidden_layers {
            self.attention(machine, batch, layer);
            self.feed_forward(machine, layer);
        }
        self.output(machine);
    }

    /// Embeddings, and the angles of every position.
    fn embed(&mut self, machine: &mut Machine<'_>) {
        let isa = machine.isa;
        let hidden_size = self.config.hidden_size;
        let Activations { hidden, cos, sin, .. } = &mut self.activations;
        let (stride, angles) = (hidden.stride(), cos.stride());
        for (i, row) in self.plan.rows.iter().enumerate() {
            let embedding = Numbers::of(&machine.ensemble.models()[row.model].weights.embed_tokens);
            let token = row.token as usize;
            let to = &mut hidden.data_mut()[i * stride..i * stride + hidden_size];
            embedding.part(token * hidden_size..(token + 1) * hidden_size).convert(isa, to);
            let at = i * angles..i * angles + self.config.head_dim / 2;
            let mut ropes = self.models.iter().zip(&self.ropes);
            if let Some((_, rope)) = ropes.find(|(model, _)| **model == row.model) {
                rope.cos_sin(row.position, &mut cos.data_mut()[at.clone()], &mut sin.data_mut()[at]);
            }
        }
    }

    /// hidden += o_proj(attention(norm(hidden)))
    fn attention(&mut self, machine: &mut Machine<'_>, batch: &Batch<'_>, layer: usize) {
        let ensemble = machine.ensemble;
        let queries = self.config.num_attention_heads * self.config.head_dim;
        let keys = self.config.num_key_value_heads * self.config.head_dim;
        self.norm(machine, |model| &model.weights.layers[layer].input_layernorm);
        let stage = Stage { group: (&self.plan, self.rank), ensemble, layer };
        let Activations { hidden, normed, qkv, attended, low_rank, cos, sin, .. } = &mut self.activations;

        let deltas =
            stage.low_rank(machine, normed, low_rank, &[Projection::Q, Projection::K, Projection::V]);
        let products: ArrayVec<_, MAX_PRODUCTS> = stage
            .layers()
            .flat_map(|(weights, rows)| {
                let product = |first, cols, column| Product { first, second: None, rows, cols, column };
                [
                    product(Weight::of(&weights.q_proj, Projection::Q), queries, 0),
                    product(Weight::of(&weights.k_proj, Projection::K), keys, queries),
                    product(Weight::of(&weights.v_proj, Projection::V), keys, queries + keys),
                ]
            })
            .collect();
        machine.region(normed, low_rank, &products, &deltas, Epilogue::Store, qkv);

        let append = Append { config: &self.config, plan: &self.plan, batch, layer, qkv, cos, sin };
        append.run(machine);
        let attention = Attention {
            isa: machine.isa,
            config: &self.config,
            layer,
            qkv,
            cos,
            sin,
            tiles: &self.plan.tiles,
            tables: batch.tables,
            caches: machine.caches,
            out_stride: attended.stride(),
            out: attended.shared(),
        };
        attention.run(machine.pool, machine.scratch, &mut self.partials);

        stage.add(machine, attended, low_rank, Projection::O, |weights| &weights.o_proj, hidden);
    }

    /// hidden += down_proj(silu(gate_proj(x)) · up_proj(x)) with x = norm(hidden)
    fn feed_forward(&mut self, machine: &mut Machine<'_>, layer: usize) {
        let ensemble = machine.ensemble;
        self.norm(machine, |model| &model.weights.layers[layer].post_attention_layernorm);
        let stage = Stage { group: (&self.plan, self.rank), ensemble, layer };
        let Activations { hidden, normed, activated, low_rank, .. } = &mut self.activations;

        let deltas = stage.low_rank(machine, normed, low_rank, &[Projection::Gate, Projection::Up]);
        let products: ArrayVec<_, MAX_PRODUCTS> = stage
            .layers()
            .map(|(weights, rows)| Product {
                first: Weight::of(&weights.gate_proj, Projection::Gate),
                second: Some(Weight::of(&weights.up_proj, Projection::Up)),
                rows,
                cols: self.config.intermediate_size,
                column: 0,
            })
            .collect();
        machine.region(normed, low_rank, &products, &deltas, Epilogue::SiluMul, activated);

        stage.add(machine, activated, low_rank, Projection::Down, |weights| &weights.down_proj, hidden);
    }

    /// The logits that are wanted, over the shared vocabulary.
    fn output(&mut self, machine: &mut Machine<'_>) {
        let plan = &self.plan;
        if plan.wanted.is_empty() {
            return;
        }
        let (ensemble, isa) = (machine.ensemble, machine.isa);
        let Activations { hidden, normed, low_rank, .. } = &mut self.activations;
        let stride = hidden.stride();
        for (to, &row) in plan.wanted.iter().enumerate() {
            let model = &ensemble.models()[plan.rows[row].model];
            let (weight, eps) = (&model.weights.norm, model.config.rms_norm_eps);
            let x = &hidden.data()[row * stride..(row + 1) * stride];
            rms_norm(isa, x, weight, eps, &mut normed.data_mut()[to * stride..(to + 1) * stride]);
        }
        let vocab_size = ensemble.vocab_size();
        let products: ArrayVec<_, MAX_GROUP> = plan
            .wanted_weights
            .iter()
            .map(|span| Product {
                first: Weight::bare(&ensemble.models()[span.model].weights.lm_head),
                second: None,
                rows: span.rows,
                cols: vocab_size,
                column: 0,
            })
            .collect();
        let region = Region {
            isa,
            x: normed,
            products: &products,
            deltas: &[],
            low_rank,
            epilogue: Epilogue::Store,
            out: Shared::new(machine.logits),
            out_stride: vocab_size,
            out_rows: Some(&plan.wanted_slots),
        };
        region.run(machine.pool, machine.scratch, machine.packed);
    }

    /// normed = RMSNorm(hidden), with the weight that `weight` names.
    fn norm<'e>(&mut self, machine: &mut Machine<'e>, weight: impl Fn(&'e LlamaModel) -> &'e Tensor + Sync) {
        let (ensemble, isa) = (machine.ensemble, machine.isa);
        let Activations { hidden, normed, .. } = &mut self.activations;
        let (rows, stride) = (&self.plan.rows, hidden.stride());
        let normed = normed.shared();
        machine.pool.run(rows.len().div_ceil(ROWS_PER_TASK), |_, task| {
            let first = task * ROWS_PER_TASK;
            for (i, row) in rows.iter().enumerate().skip(first).take(ROWS_PER_TASK) {
                // SAFETY: a row belongs to one task.
                let to = unsafe { normed.part(i * stride, stride) };
                let model = &ensemble.models()[row.model];
                let x = &hidden.data()[i * stride..(i + 1) * stride];
                rms_norm(isa, x, weight(model), model.config.rms_norm_eps, to);
            }
        });
    }
}

impl Machine<'_> {
    /// Runs the products of one stage.
    fn region(
        &mut self,
        x: &Matrix,
        low_rank: &Matrix,
        products: &[Product<'_>],
        deltas: &[Delta<'_>],
        epilogue: Epilogue,
        out: &mut Matrix,
    ) {
        let (isa, out_stride, out_rows) = (self.isa, out.stride(), None);
        let region =
            Region { isa, x, products, deltas, low_rank, epilogue, out: out.shared(), out_stride, out_rows };
        region.run(self.pool, self.scratch, self.packed);
    }
}

/// RMSNorm of one padded row.
fn rms_norm(isa: Isa, x: &[f32], weight: &Tensor, eps: f32, y: &mut [f32]) {
    match Numbers::of(weight) {
        Numbers::F32(weight) => isa.run(RmsNorm { x, weight, eps, y }),
        Numbers::F16(weight) => isa.run(RmsNorm { x, weight, eps, y }),
        Numbers::Bf16(weight) => isa.run(RmsNorm { x, weight, eps, y }),
    }
}

/// The first model that has the weights of `model`.
fn owner(ensemble: &Ensemble, model: usize) -> usize {
    let weights = &ensemble.models()[model].weights;
    ensemble.models().iter().position(|other| Arc::ptr_eq(&other.weights, weights)).unwrap_or(model)
}

/// Appends `row` to the last span if it is of the same model, or starts one.
fn extend(spans: &mut ArrayVec<Span, MAX_GROUP>, model: usize, row: usize) {
    match spans.last_mut() {
        Some(span) if span.model == model => span.rows.1 = row + 1,
        _ => spans.push(Span { model, rows: (row, row + 1) }),
    }
}

impl Plan {
    /// Takes over the rows of a turn.
    fn fill(
        &mut self,
        ensemble: &Ensemble,
        config: &LlamaConfig,
        slots: usize,
        rows: impl Iterator<Item = Row>,
    ) {
        self.rows.clear();
        self.rows.extend(rows);
        self.models.clear();
        self.weights.clear();
        self.tiles.clear();
        self.wanted.clear();
        self.wanted_slots.clear();
        self.wanted_weights.clear();
        let most_rows = Tile::most_rows(config);
        for (i, row) in self.rows.iter().enumerate() {
            let owner = owner(ensemble, row.model);
            extend(&mut self.models, row.model, i);
            extend(&mut self.weights, owner, i);
            if let Some(slot) = row.slot {
                extend(&mut self.wanted_weights, owner, self.wanted.len());
                self.wanted.push(i);
                self.wanted_slots.push(row.model * slots + slot);
            }
            match self.tiles.last_mut() {
                Some(tile)
                    if tile.rows < most_rows
                        && (tile.model, tile.table) == (row.model, row.table)
                        && tile.position + tile.rows == row.position =>
                {
                    tile.rows += 1;
                }
                _ => self.tiles.push(Tile {
                    row: i,
                    rows: 1,
                    position: row.position,
                    model: row.model,
                    table: row.table,
                }),
            }
        }
    }
}

/// One layer of all models.
#[derive(Clone, Copy)]
struct Stage<'a> {
    group: (&'a Plan, usize),
    ensemble: &'a Ensemble,
    layer: usize,
}

impl<'a> Stage<'a> {
    /// The distinct weights of this layer, and the rows that use them.
    fn layers(self) -> impl Iterator<Item = (&'a LayerWeights, (usize, usize))> {
        let spans = self.group.0.weights.iter();
        spans.map(move |span| (&self.ensemble.models()[span.model].weights.layers[self.layer], span.rows))
    }

    /// hidden += W x + ΔW x, with the weights of one projection.
    fn add(
        self,
        machine: &mut Machine<'_>,
        x: &Matrix,
        low_rank: &mut Matrix,
        projection: Projection,
        linear: impl Fn(&'a LayerWeights) -> &'a Linear,
        hidden: &mut Matrix,
    ) {
        let deltas = self.low_rank(machine, x, low_rank, &[projection]);
        let products: ArrayVec<_, MAX_PRODUCTS> = self
            .layers()
            .map(|(weights, rows)| Product {
                first: Weight::of(linear(weights), projection),
                second: None,
                rows,
                cols: hidden.cols(),
                column: 0,
            })
            .collect();
        machine.region(x, low_rank, &products, &deltas, Epilogue::Add, hidden);
    }

    /// Computes A x for the adapters that change `projections`, side by side in `low_rank`, and lists the updates.
    fn low_rank(
        self,
        machine: &mut Machine<'_>,
        x: &Matrix,
        low_rank: &mut Matrix,
        projections: &[Projection],
    ) -> Deltas<'a> {
        let (plan, rank) = self.group;
        let mut deltas = Deltas::new();
        for span in &plan.models {
            let adapter = self.ensemble.models()[span.model].adapter.as_deref();
            let Some(layer) = adapter.and_then(|adapter| adapter.layers.get(self.layer)) else { continue };
            for (i, &projection) in projections.iter().enumerate() {
                if let Some(delta) = layer.delta(projection) {
                    deltas.push(Delta { projection, rows: span.rows, delta, column: i * rank });
                }
            }
        }
        if deltas.is_empty() {
            return deltas;
        }
        // Ranks differ: what an earlier stage left must not stand where this one needs padding.
        let used = plan.rows.len() * low_rank.stride();
        low_rank.data_mut()[..used].fill(0.0);
        let products: ArrayVec<_, MAX_PRODUCTS> = deltas
            .iter()
            .map(|delta| Product {
                first: Weight::bare(&delta.delta.a),
                second: None,
                rows: delta.rows,
                cols: delta.delta.a.shape().first().copied().unwrap_or(0),
                column: delta.column,
            })
            .collect();
        let none = Matrix::new(0, 0);
        machine.region(x, &none, &products, &[], Epilogue::Store, low_rank);
        deltas
    }
}

/// Appends the keys, rotated, and the values of all rows to the caches.
struct Append<'a> {
    config: &'a LlamaConfig,
    plan: &'a Plan,
    batch: &'a Batch<'a>,
    layer: usize,
    qkv: &'a Matrix,
    cos: &'a Matrix,
    sin: &'a Matrix,
}

impl Append<'_> {
    /// A task is one model and head, so no two ever write to the same place.
    fn run(&self, machine: &mut Machine<'_>) {
        let heads = self.config.num_key_value_heads;
        let layouts: ArrayVec<_, MAX_GROUP> =
            self.plan.models.iter().map(|span| machine.caches[span.model].layout()).collect();
        let mut memories: ArrayVec<_, { MAX_GROUP + 1 }> =
            machine.caches.iter_mut().map(KvCache::shared).collect();
        let memories = &memories.as_mut_slice()[..];
        let scratch = machine.scratch;
        let task = |thread: usize, index: usize| {
            let (span, head) = (index / heads, index % heads);
            let (Span { model, rows }, layout) = (self.plan.models[span], layouts[span]);
            let rotated = &mut lock(&scratch[thread]).head;
            for i in rows.0..rows.1 {
                let row = self.plan.rows[i];
                let block = self.batch.tables[row.table].blocks[row.position / BLOCK_SIZE] as usize;
                let (keys, values) = layout.block(self.layer, block, head);
                // SAFETY: the keys and the values of a model and a head belong to one task.
                let (keys, values) = unsafe {
                    let memory = &memories[model];
                    (memory.part(keys.start, keys.len()), memory.part(values.start, values.len()))
                };
                self.append(i, head, row.position % BLOCK_SIZE, rotated, keys, values);
            }
        };
        let tasks = self.plan.models.len() * heads;
        if self.plan.rows.len() < ROWS_PER_TASK {
            (0..tasks).for_each(|index| task(0, index));
        } else {
            machine.pool.run(tasks, task);
        }
    }

    /// Appends row `i` at `position` of its block.
    fn append(
        &self,
        i: usize,
        head: usize,
        position: usize,
        rotated: &mut [f32],
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let head_dim = self.config.head_dim;
        let first_key = self.config.num_attention_heads * head_dim + head * head_dim;
        let first_value = first_key + self.config.num_key_value_heads * head_dim;
        let row = self.qkv.row(i);
        let rotated = &mut rotated[..head_dim];
        rotate(&row[first_key..first_key + head_dim], self.cos.row(i), self.sin.row(i), 1.0, rotated);
        for (key, column) in rotated.iter().zip(keys.chunks_exact_mut(BLOCK_SIZE)) {
            column[position] = *key;
        }
        let start = position * padded(head_dim);
        values[start..start + head_dim].copy_from_slice(&row[first_value..first_value + head_dim]);
    }
}
