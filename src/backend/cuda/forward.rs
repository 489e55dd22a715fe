//! The forward pass of a group: the large model by itself, or the small one and its experts in lockstep.
//!
//! Six launches a layer, whatever the number of models: RMSNorm with queries, keys, values, RoPE and the cache;
//! attention over splits of the positions; its merge; the output projection into the residual stream; RMSNorm with
//! gate, up and SiLU; the down projection into the residual stream. `blockIdx.z` is the set of weights.
//! A x of adapters is computed by the launch that adds B A x.

mod attend;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::buffers::{Buffers, Extent, Sizes, rotations};
use super::device::{Gpu, Grid};
use super::kernels::{
    EmbedArgs, IntoArgs, Kernels, LmHeadArgs, MOST_ROWS, Product, Projections, QkvArgs, SPLIT, SPLIT_WARPS,
    SplitArgs, StepRows, Tiling, WARPS, staging,
};
use super::lora::{DeviceAdapters, Stage};
use super::memory::Buffer;
use super::plan::{LISTS, Members, Plan};
use super::weights::{DeviceWeights, LayerLayout, Layout, stride};
use crate::adapter::LoraAdapter;
use crate::backend::{Batch, Limits, Row};
use crate::config::LlamaConfig;
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::rope::Rope;
use crate::weights::LlamaWeights;

/// Where the logits of all models go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogitsPlace {
    /// `(models, slots, vocab_stride)` f32
    pub(crate) address: u64,
    /// Where the address of each model's logits lies, for fusion.
    pub(crate) table: u64,
    pub(crate) vocab_size: usize,
    pub(crate) vocab_stride: usize,
    /// Slots of a model.
    pub(crate) slots: usize,
}

/// What the launches of a turn follow from: turns of one shape differ only in what lies in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GroupShape {
    rows: usize,
    most_rows: usize,
    most_wanted: usize,
    /// Rows that attend by themselves, and tiles of the others.
    attending: (usize, usize),
    pub(crate) splits: usize,
}

/// Models of one architecture on one GPU: weights, cache and activations.
pub(crate) struct Group {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    config: Arc<LlamaConfig>,
    members: Members,
    weights: DeviceWeights,
    adapters: Option<DeviceAdapters>,
    cache: Buffer<u8>,
    /// Bytes of one model's cache, and of one layer of it.
    cache_stride: (usize, usize),
    angles: Angles,
    buffers: Buffers,
    plan: Plan,
    /// Of the last batch.
    rows: Vec<Row>,
    /// The lists of the plan as one copy takes them.
    words: Vec<u32>,
    /// Rows of a turn at most.
    capacity: usize,
    /// Positions of a sequence at most.
    positions: usize,
    /// Blocks of a table at most.
    table_stride: usize,
}

/// The addresses of what a turn's rows are.
#[derive(Clone, Copy, Debug)]
struct Lists {
    token: u64,
    position: u64,
    table: u64,
    model: u64,
    adapter: u64,
    wanted: u64,
    wanted_slot: u64,
    set_first: u64,
    wanted_first: u64,
    alone: u64,
    tile_first: u64,
    tile_rows: u64,
}

fn u32_of(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Group {
    /// Copies `models` of `ensemble` (indices) to the GPU and reserves their memory; `None` without models.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where they don't fit, [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        ensemble: &Ensemble,
        models: impl Iterator<Item = usize>,
        limits: Limits,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<Self>> {
        let members = Members::new(ensemble, models);
        let all = ensemble.models();
        let Some(&first) = members.models.first() else { return Ok(None) };
        let config = Arc::clone(&all[first].config);
        let stream = gpu.stream()?;
        let sets: Vec<(&LlamaWeights, f32)> = members
            .owners
            .iter()
            .map(|&owner| (&*all[owner].weights, all[owner].config.rms_norm_eps))
            .collect();
        let of_sets: Vec<&LlamaWeights> = sets.iter().map(|(weights, _)| *weights).collect();
        let layout = Layout::new(&config, &of_sets, ensemble.vocab_size());
        let dtype = layout.dtype;
        let group = config.num_attention_heads / config.num_key_value_heads.max(1);
        let kernels = Kernels::new(gpu, dtype, group, config.head_dim)?;
        let extent = Extent::of(ensemble, &members, limits);
        let first = kernels.first(members.most_of_a_set(), extent.capacity);
        let weights = gpu.load_all(&first, || {
            DeviceWeights::upload(gpu, &stream, layout, &sets, ensemble.vocab_size(), progress)
        })?;
        let lora: Vec<&LoraAdapter> =
            members.models.iter().filter_map(|&model| all[model].adapter.as_deref()).collect();
        let adapters = DeviceAdapters::upload(gpu, &stream, &config, &lora, sets.len())?;

        let Extent { positions, capacity, table_stride, layer_bytes } = extent;
        let model_bytes = layer_bytes * config.num_hidden_layers;
        let cache = gpu.zeros(&stream, model_bytes * members.models.len(), "the key-value cache")?;
        let angles = Angles::new(gpu, &stream, &rotations(ensemble, &members), positions)?;
        let rank = adapters.as_ref().map_or(0, |adapters| adapters.rank);
        let sizes = Sizes::new(&config, dtype, (capacity, positions, table_stride, rank));
        let buffers = Buffers::new(gpu, &stream, sizes)?;
        Ok(Some(Self {
            kernels,
            gpu: Arc::clone(gpu),
            stream,
            config,
            members,
            weights,
            adapters,
            cache,
            cache_stride: (model_bytes, layer_bytes),
            angles,
            buffers,
            plan: Plan::default(),
            rows: Vec::new(),
            words: Vec::new(),
            capacity,
            positions,
            table_stride,
        }))
    }

    /// The stream that this group runs in.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Waits for what is in it.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.gpu.synchronize(&self.stream)
    }

    /// Whether this group runs a model of the ensemble.
    pub(crate) fn has(&self, model: usize) -> bool {
        self.members.place(model).is_some()
    }

    /// Positions of a sequence at most.
    pub(crate) fn positions(&self) -> usize {
        self.positions
    }

    /// Puts this group's rows of `batch` into its stream.
    pub(crate) fn forward(&mut self, batch: &Batch<'_>, logits: LogitsPlace) -> Result<()> {
        let mut rows = std::mem::take(&mut self.rows);
        rows.clear();
        rows.extend(batch.rows.iter().filter(|row| self.members.place(row.model).is_some()));
        // The tables of angles end there, and so does what the model was trained for.
        if let Some(row) = rows.iter().find(|row| row.position >= self.positions) {
            return Err(Error::Parameter {
                name: "row",
                expected: format!("a position below {}", self.positions),
                found: format!("{row:?}"),
            });
        }
        if rows.len() > self.capacity {
            // A row needs earlier positions only: turns by position have what they need in the cache, even where
            // tables share blocks.
            rows.sort_by_key(|row| row.position);
        }
        self.plan.clear();
        for turn in rows.chunks_mut(self.capacity) {
            self.plan.fill(&self.members, batch, turn, logits.slots, self.table_stride);
            self.plan.tile(if self.kernels.attention_wide.is_some() { MOST_ROWS } else { usize::MAX });
            self.upload()?;
            self.run(self.splits(self.plan.last_position() as usize), logits)?;
        }
        self.rows = rows;
        Ok(())
    }

    /// Whether the last batch took one turn: the lists, which are the last turn's, can then be moved to the next step.
    pub(crate) fn is_whole(&self) -> bool {
        self.rows.len() == self.plan.rows()
    }

    /// Splits of attention up to `position`.
    pub(crate) fn splits(&self, position: usize) -> usize {
        // Powers of two, so that a recorded step serves for many positions. Splits without a position end at once.
        let most = self.positions.div_ceil(SPLIT);
        (position / SPLIT + 1).next_power_of_two().min(most)
    }

    /// What the launches of the last turn follow from; `None` where it had no rows.
    pub(crate) fn shape(&self, last_position: usize) -> Option<GroupShape> {
        let plan = &self.plan;
        (plan.rows() > 0).then(|| GroupShape {
            rows: plan.rows(),
            most_rows: plan.most_rows(),
            most_wanted: plan.most_wanted(),
            attending: (plan.alone.len(), plan.tile_first.len()),
            splits: self.splits(last_position),
        })
    }

    /// The rows of the last turn on the GPU, for whoever moves them to the next step.
    pub(crate) fn step_rows(&self) -> StepRows {
        let lists = self.lists();
        StepRows {
            token: lists.token,
            position: lists.position,
            wanted_slot: lists.wanted_slot,
            rows: self.plan.rows() as u64,
        }
    }

    /// Puts the layers for the rows that were uploaded last into this group's stream.
    pub(crate) fn run(&self, splits: usize, logits: LogitsPlace) -> Result<()> {
        let lists = self.lists();
        self.embed(lists)?;
        for layer in 0..self.config.num_hidden_layers {
            self.attention(lists, layer, splits)?;
            self.feed_forward(lists, layer)?;
        }
        self.output(lists, logits)
    }

    /// Numbers of a list. The lists of sets are as short as the sets are few, but may be longer than few rows.
    fn room(&self) -> usize {
        self.capacity.max(super::plan::MAX_GROUP + 1)
    }

    /// Copies the plan to the GPU, in one go and the tables.
    fn upload(&mut self) -> Result<()> {
        let room = self.room();
        let Self { gpu, stream, plan, buffers, words, .. } = self;
        let lists = plan.lists();
        words.clear();
        words.resize(room * lists.len(), 0);
        for (list, to) in lists.iter().zip(words.chunks_mut(room)) {
            to[..list.len()].copy_from_slice(list);
        }
        gpu.write(stream, &mut buffers.lists, 0, words)?;
        gpu.write(stream, &mut buffers.tables, 0, &plan.tables)
    }

    /// Where the lists lie.
    fn lists(&self) -> Lists {
        let list =
            |index: usize| self.buffers.lists.address() + (index * self.room() * size_of::<u32>()) as u64;
        let lists: [u64; LISTS] = std::array::from_fn(list);
        let [token, position, table, model, adapter, wanted, wanted_slot, set_first, wanted_first, ..] =
            lists;
        let [.., alone, tile_first, tile_rows] = lists;
        Lists {
            token,
            position,
            table,
            model,
            adapter,
            wanted,
            wanted_slot,
            set_first,
            wanted_first,
            alone,
            tile_first,
            tile_rows,
        }
    }

    fn embed(&self, lists: Lists) -> Result<()> {
        let (progress, counters) = self.adapters.as_ref().map_or((0, 0), DeviceAdapters::counters);
        let args = EmbedArgs {
            hidden: self.buffers.hidden.address(),
            table: self.weights.address(self.weights.layout.embed_tokens),
            token: lists.token,
            set_first: lists.set_first,
            set_stride: self.weights.set_stride(),
            stride: u32_of(stride(self.config.hidden_size)),
            counters: u32_of(counters),
            progress,
        };
        let blocks = (u32_of(self.plan.most_rows()), 1, self.sets());
        let grid = Grid { blocks, threads: (128, 1, 1), shared: 0 };
        // SAFETY: `hidden` has a row for each of the plan's rows, which are at most `capacity`; tokens were checked
        // to be in the vocabulary, whose rows the table has.
        unsafe { self.gpu.launch(&self.stream, &self.kernels.embed, grid, &args) }
    }

    /// hidden += o_proj(attention(norm(hidden)))
    fn attention(&self, lists: Lists, layer: usize, splits: usize) -> Result<()> {
        let config = &self.config;
        let (heads, kv_heads, head_dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let at = &self.weights.layout.layers[layer];
        let cache = self.cache.address() + (layer * self.cache_stride.1) as u64;
        let outputs = (heads + 2 * kv_heads) * head_dim;
        let normed = Input {
            x: self.buffers.hidden.address(),
            cols: config.hidden_size,
            norm: Some(at.input_layernorm),
        };
        let product = self.product(lists, normed, (at.qkv, at.qkv_bias, outputs), Some((layer, Stage::Qkv)));
        let units = ((heads + 2 * kv_heads) * head_dim / 2).div_ceil(2);
        self.project(&self.kernels.qkv, product, units, self.all_rows(), |product| QkvArgs {
            product,
            queries: self.buffers.queries.address(),
            cache,
            cos: self.angles.cos.address(),
            sin: self.angles.sin.address(),
            position: lists.position,
            table: lists.table,
            model: lists.model,
            block_tables: self.buffers.tables.address(),
            model_stride: self.cache_stride.0 as u64,
            angle_stride: self.angles.stride,
            query_stride: u32_of(stride(heads * head_dim)),
            table_stride: u32_of(self.table_stride),
            heads: u32_of(heads),
            kv_heads: u32_of(kv_heads),
            head_dim: u32_of(head_dim),
        })?;
        self.attend(lists, cache, splits)?;
        let attended = Input { x: self.buffers.attended.address(), cols: heads * head_dim, norm: None };
        self.add(lists, layer, Stage::O, attended, (at.o_proj, at.o_bias))
    }

    /// hidden += down_proj(silu(gate_proj(x)) · up_proj(x)) with x = norm(hidden)
    fn feed_forward(&self, lists: Lists, layer: usize) -> Result<()> {
        let at: &LayerLayout = &self.weights.layout.layers[layer];
        let (hidden, size) = (self.config.hidden_size, self.config.intermediate_size);
        let normed =
            Input { x: self.buffers.hidden.address(), cols: hidden, norm: Some(at.post_attention_layernorm) };
        let product = self.product(
            lists,
            normed,
            (at.gate_up, at.gate_up_bias, 2 * size),
            Some((layer, Stage::GateUp)),
        );
        let to = (self.buffers.activated.address(), u32_of(stride(size)));
        self.project(&self.kernels.gate_up, product, size.div_ceil(2), self.all_rows(), |product| {
            IntoArgs { product, to: to.0, to_stride: to.1 }
        })?;
        let activated = Input { x: self.buffers.activated.address(), cols: size, norm: None };
        self.add(lists, layer, Stage::Down, activated, (at.down_proj, at.down_bias))
    }

    /// hidden += W x + b
    fn add(
        &self,
        lists: Lists,
        layer: usize,
        stage: Stage,
        input: Input,
        (weights, bias): (usize, Option<usize>),
    ) -> Result<()> {
        let hidden = self.config.hidden_size;
        let product = self.product(lists, input, (weights, bias, hidden), Some((layer, stage)));
        let to = (self.buffers.hidden.address(), u32_of(stride(hidden)));
        self.project(&self.kernels.residual, product, hidden.div_ceil(4), self.all_rows(), |product| {
            IntoArgs { product, to: to.0, to_stride: to.1 }
        })
    }

    /// The logits that are wanted, over the shared vocabulary.
    fn output(&self, lists: Lists, logits: LogitsPlace) -> Result<()> {
        let layout = &self.weights.layout;
        let normed = Input {
            x: self.buffers.hidden.address(),
            cols: self.config.hidden_size,
            norm: Some(layout.norm),
        };
        let mut product = self.product(lists, normed, (layout.lm_head, None, logits.vocab_size), None);
        product.set_first = lists.wanted_first;
        product.rows = lists.wanted;
        let units = logits.vocab_size.div_ceil(4);
        let rows = Rows { all: self.plan.wanted.len(), most: self.plan.most_wanted() };
        self.project(&self.kernels.lm_head, product, units, rows, |product| LmHeadArgs {
            product,
            logits: logits.address,
            slot: lists.wanted_slot,
            vocab_stride: u32_of(logits.vocab_stride),
        })
    }

    /// W x of all rows, with the adapters' part where `lora` names a stage.
    fn product(
        &self,
        lists: Lists,
        input: Input,
        (weights, bias, n): (usize, Option<usize>, usize),
        lora: Option<(usize, Stage)>,
    ) -> Product {
        let lora = lora.and_then(|(layer, stage)| Some((self.adapters.as_ref()?, layer, stage)));
        Product {
            x: input.x,
            weights: self.weights.address(weights),
            bias: self.weights.optional(bias),
            norm: self.weights.optional(input.norm),
            set_first: lists.set_first,
            rows: 0,
            lora_b: lora.map_or(0, |(adapters, layer, stage)| adapters.b(layer, stage)),
            lora_t: self.buffers.low_rank.address(),
            adapter: lists.adapter,
            set_stride: self.weights.set_stride(),
            lora_stride: lora.map_or(0, |(adapters, ..)| adapters.stride()),
            n: u32_of(n),
            cols: u32_of(input.cols),
            stride: u32_of(stride(input.cols)),
            chunk: 0,
            rank: lora.map_or(0, |(adapters, ..)| u32_of(adapters.rank)),
            segments: lora.map_or(0, |(.., stage)| u32_of(stage.projections().len())),
            producers: 0,
            lora_a: lora.map_or(0, |(adapters, layer, stage)| adapters.a(layer, stage)),
            progress: lora.map_or(0, |(adapters, layer, stage)| adapters.progress(layer, stage)),
            ranges: 1,
            range_sums: 0,
        }
    }

    /// Launches a projection: on tensor cores where a set has more than sixteen rows.
    fn project<A: cudarc::driver::DeviceRepr>(
        &self,
        projections: &Projections,
        mut product: Product,
        units: usize,
        rows: Rows,
        args: impl Fn(Product) -> A,
    ) -> Result<()> {
        // No logits are wanted before the end of a prompt.
        if rows.most == 0 {
            return Ok(());
        }
        if let Some(kernel) = projections.wide(rows.most) {
            let to = self.buffers.split.address();
            let blocks = (u32_of(rows.all), 1 + product.low_rank().div_ceil(SPLIT_WARPS), 1);
            let grid = Grid { blocks, threads: (128, 1, 1), shared: 0 };
            // SAFETY: a row for each index of the lists; `split` has as many, as wide as the widest input (see
            // `Sizes::new`), and `low_rank` has three parts of `rank` numbers a row.
            unsafe {
                self.gpu.launch(&self.stream, &self.kernels.split_rows, grid, &SplitArgs { product, to })
            }?;
            let tiling = Tiling::new(rows.most, units, product.cols as usize, self.sets() as usize);
            product.x = to;
            product.ranges = u32_of(tiling.ranges);
            product.progress = self.buffers.tickets.address();
            product.range_sums = self.buffers.range_sums.address();
            // SAFETY: as below, and `split` has been written for these rows. Several ranges need 1024 columns, and then
            // there are no more blocks and tiles than `range_sums` and `tickets` have room for (`Sizes::new`,
            // `Tiling::new`); this group's launches use these one after the other, and each leaves the tickets at zero.
            return unsafe { self.gpu.launch(&self.stream, kernel, tiling.grid(), &args(product)) };
        }
        let tiles = units.div_ceil(WARPS);
        let (kernel, most) = projections.few(rows.most);
        let (chunk, shared) = staging(most, product.stride as usize);
        product.chunk = u32_of(chunk);
        product.producers = product.producers_for(rows.most, self.gpu.multiprocessors());
        let blocks = tiles.min(2 * self.gpu.multiprocessors()).max(1);
        let grid = Grid {
            blocks: (u32_of(blocks) + product.producers, 1, self.sets()),
            threads: (u32_of(WARPS) * 32, 1, 1),
            shared: u32_of(shared),
        };
        // SAFETY: the buffers have `capacity` rows of the widths that the kernels' contracts name, and the plan has no
        // more rows; matrices have `n` rows of `stride` columns (see `Layout`). What a launch with producers counts with
        // is its own, and `embed` has set it to zero.
        unsafe { self.gpu.launch(&self.stream, kernel, grid, &args(product)) }
    }

    fn all_rows(&self) -> Rows {
        Rows { all: self.plan.rows(), most: self.plan.most_rows() }
    }

    fn sets(&self) -> u32 {
        u32_of(self.members.owners.len())
    }
}

/// How many rows a projection computes: of all sets, and of the set that has the most.
#[derive(Clone, Copy, Debug)]
struct Rows {
    all: usize,
    most: usize,
}

/// What a projection reads: `(rows, stride of cols)`, normalised first where `norm` is where the weight lies.
#[derive(Clone, Copy, Debug)]
struct Input {
    x: u64,
    cols: usize,
    norm: Option<usize>,
}

/// cos and sin of every position, `(sets, positions, head_dim / 2)`: the same numbers as the CPU's.
struct Angles {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    /// Bytes from one set to the next; 0 where there is one table for all.
    stride: u64,
}

impl Angles {
    /// A table for each of `configs`.
    fn new(gpu: &Gpu, stream: &Arc<CudaStream>, configs: &[&LlamaConfig], positions: usize) -> Result<Self> {
        let (mut all_cos, mut all_sin) = (Vec::new(), Vec::new());
        for config in configs {
            let (rope, half) = (Rope::new(config), config.head_dim / 2);
            for position in 0..positions {
                let at = all_cos.len();
                all_cos.resize(at + half, 0.0);
                all_sin.resize(at + half, 0.0);
                rope.cos_sin(position, &mut all_cos[at..], &mut all_sin[at..]);
            }
        }
        let stride = if configs.len() > 1 { all_cos.len() / configs.len() * size_of::<f32>() } else { 0 };
        Ok(Self {
            cos: gpu.upload(stream, &all_cos, "rotary angles")?,
            sin: gpu.upload(stream, &all_sin, "rotary angles")?,
            stride: stride as u64,
        })
    }
}
