//! The weights of a group on the GPU: one arena, the same layout for every set.
//!
//! Models that share weights are one set. The sets of a group lie one after another, so that a kernel finds set z at
//! `address + z · stride`, with no table of pointers. Rows of a matrix begin at multiples of eight numbers, which is
//! sixteen bytes or more in every dtype; the padding is zero. Queries, keys and values are one matrix, and so are
//! gate and up: what has one input is read by one launch.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::device::Gpu;
use super::memory::Buffer;
use super::upload::Uploader;
use crate::config::LlamaConfig;
use crate::error::Result;
use crate::weights::{Dtype, LlamaWeights, Tensor};

/// Tensors begin at multiples of this, in bytes.
const ALIGNMENT: usize = 256;

/// Rows of matrices, and of activations that are their input, begin at multiples of this, in numbers.
pub(crate) const ROW_ALIGNMENT: usize = 8;

/// Numbers of a row with its padding.
pub(crate) fn stride(numbers: usize) -> usize {
    numbers.next_multiple_of(ROW_ALIGNMENT)
}

/// Where the tensors of a layer lie: bytes from the beginning of their set. Vectors are f32. Those of RMSNorm have zeros up
/// to their stride, and then the set's ε.
#[derive(Clone, Debug)]
pub(crate) struct LayerLayout {
    /// `(hidden_size,)`
    pub(crate) input_layernorm: usize,
    /// Queries, keys, values: `((heads + 2 · kv_heads) · head_dim, hidden_size)`.
    pub(crate) qkv: usize,
    /// `((heads + 2 · kv_heads) · head_dim,)`
    pub(crate) qkv_bias: Option<usize>,
    /// `(hidden_size, heads · head_dim)`
    pub(crate) o_proj: usize,
    /// `(hidden_size,)`
    pub(crate) o_bias: Option<usize>,
    /// `(hidden_size,)`
    pub(crate) post_attention_layernorm: usize,
    /// Gate, up: `(2 · intermediate_size, hidden_size)`.
    pub(crate) gate_up: usize,
    /// `(2 · intermediate_size,)`
    pub(crate) gate_up_bias: Option<usize>,
    /// `(hidden_size, intermediate_size)`
    pub(crate) down_proj: usize,
    /// `(hidden_size,)`
    pub(crate) down_bias: Option<usize>,
}

/// Where the tensors of a set lie: bytes from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Of the matrices.
    pub(crate) dtype: Dtype,
    /// `(vocab_size, hidden_size)`
    pub(crate) embed_tokens: usize,
    /// One a layer.
    pub(crate) layers: Vec<LayerLayout>,
    /// `(hidden_size,)`
    pub(crate) norm: usize,
    /// `(shared vocab_size, hidden_size)`; the embedding where all sets have the two tied.
    pub(crate) lm_head: usize,
    /// Of one set.
    pub(crate) bytes: usize,
}

/// Counts where the next tensor goes.
struct Cursor {
    dtype: Dtype,
    bytes: usize,
}

impl Cursor {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.bytes;
        self.bytes += bytes.next_multiple_of(ALIGNMENT);
        at
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> usize {
        self.take(rows * stride(cols) * self.dtype.size())
    }

    fn vector(&mut self, len: usize) -> usize {
        self.take(len * size_of::<f32>())
    }

    fn norm(&mut self, len: usize) -> usize {
        self.vector(stride(len) + 1)
    }

    fn bias(&mut self, len: usize, any: bool) -> Option<usize> {
        any.then(|| self.vector(len))
    }
}

impl Layout {
    /// The layout that fits every one of `sets`, which have one architecture.
    pub(crate) fn new(config: &LlamaConfig, sets: &[&LlamaWeights], vocab_size: usize) -> Self {
        let tied = sets.iter().all(|set| set.lm_head.is_same(&set.embed_tokens));
        let embeddings = sets.iter().filter_map(|set| set.embed_tokens.shape().first()).max();
        let queries = config.num_attention_heads * config.head_dim;
        let qkv = queries + 2 * config.num_key_value_heads * config.head_dim;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let any = |layer: usize, pick: fn(&crate::weights::LayerWeights) -> bool| {
            sets.iter().any(|set| set.layers.get(layer).is_some_and(pick))
        };
        let mut cursor = Cursor { dtype: common_dtype(sets), bytes: 0 };
        let embed_tokens = cursor.matrix(embeddings.copied().unwrap_or(vocab_size), hidden);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| LayerLayout {
                input_layernorm: cursor.norm(hidden),
                qkv: cursor.matrix(qkv, hidden),
                qkv_bias: cursor.bias(
                    qkv,
                    any(layer, |layer| {
                        [&layer.q_proj, &layer.k_proj, &layer.v_proj]
                            .iter()
                            .any(|linear| linear.bias.is_some())
                    }),
                ),
                o_proj: cursor.matrix(hidden, queries),
                o_bias: cursor.bias(hidden, any(layer, |layer| layer.o_proj.bias.is_some())),
                post_attention_layernorm: cursor.norm(hidden),
                gate_up: cursor.matrix(2 * intermediate, hidden),
                gate_up_bias: cursor.bias(
                    2 * intermediate,
                    any(layer, |layer| layer.gate_proj.bias.is_some() || layer.up_proj.bias.is_some()),
                ),
                down_proj: cursor.matrix(hidden, intermediate),
                down_bias: cursor.bias(hidden, any(layer, |layer| layer.down_proj.bias.is_some())),
            })
            .collect();
        let norm = cursor.norm(hidden);
        let lm_head = if tied { embed_tokens } else { cursor.matrix(vocab_size, hidden) };
        Self { dtype: cursor.dtype, embed_tokens, layers, norm, lm_head, bytes: cursor.bytes }
    }

    /// Whether the output projection is the embedding.
    fn is_tied(&self) -> bool {
        self.lm_head == self.embed_tokens
    }
}

/// The dtype that holds every matrix exactly: their own where it is one, else f32.
fn common_dtype(sets: &[&LlamaWeights]) -> Dtype {
    let matrices = sets.iter().flat_map(|set| set.tensors()).filter(|tensor| tensor.shape().len() == 2);
    let mut dtypes = matrices.map(Tensor::dtype);
    let first = dtypes.next().unwrap_or(Dtype::F32);
    if dtypes.all(|dtype| dtype == first) { first } else { Dtype::F32 }
}

/// The weights of a group.
pub(crate) struct DeviceWeights {
    /// Where things are.
    pub(crate) layout: Layout,
    arena: Buffer<u8>,
}

impl DeviceWeights {
    /// Copies `sets`, of which `layout` is, to the GPU, each with its `rms_norm_eps`; `progress` gets bytes as they go.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where they don't fit, [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn upload(
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        layout: Layout,
        sets: &[(&LlamaWeights, f32)],
        vocab_size: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let mut arena = gpu.zeros::<u8>(stream, layout.bytes * sets.len(), "weights")?;
        let mut uploader = Uploader::new(gpu, stream, progress)?;
        for (index, &(set, eps)) in sets.iter().enumerate() {
            let mut target = SetTarget {
                uploader: &mut uploader,
                arena: &mut arena,
                first: index * layout.bytes,
                dtype: layout.dtype,
                eps: Tensor::from_f32(Dtype::F32, &[1], &[eps])?,
            };
            target.put(set, &layout, vocab_size)?;
        }
        uploader.finish()?;
        Ok(Self { layout, arena })
    }

    /// Of the byte `offset` of set 0.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.arena.address() + offset as u64
    }

    /// The same, 0 where there is none: how kernels know a missing bias.
    pub(crate) fn optional(&self, offset: Option<usize>) -> u64 {
        offset.map_or(0, |offset| self.address(offset))
    }

    /// Bytes from one set to the next.
    pub(crate) fn set_stride(&self) -> u64 {
        self.layout.bytes as u64
    }
}

/// Where one set's tensors go.
struct SetTarget<'a, 'u> {
    uploader: &'a mut Uploader<'u>,
    arena: &'a mut Buffer<u8>,
    first: usize,
    dtype: Dtype,
    /// ε, `(1,)`
    eps: Tensor,
}

impl SetTarget<'_, '_> {
    fn put(&mut self, set: &LlamaWeights, layout: &Layout, vocab_size: usize) -> Result<()> {
        self.matrices(layout.embed_tokens, &[&set.embed_tokens], usize::MAX)?;
        for (layer, at) in set.layers.iter().zip(&layout.layers) {
            let qkv = [&layer.q_proj, &layer.k_proj, &layer.v_proj];
            self.norm(at.input_layernorm, &layer.input_layernorm)?;
            self.matrices(at.qkv, &qkv.map(|linear| &linear.weight), usize::MAX)?;
            self.biases(at.qkv_bias, &qkv)?;
            self.matrices(at.o_proj, &[&layer.o_proj.weight], usize::MAX)?;
            self.biases(at.o_bias, &[&layer.o_proj])?;
            self.norm(at.post_attention_layernorm, &layer.post_attention_layernorm)?;
            let gate_up = [&layer.gate_proj, &layer.up_proj];
            self.matrices(at.gate_up, &gate_up.map(|linear| &linear.weight), usize::MAX)?;
            self.biases(at.gate_up_bias, &gate_up)?;
            self.matrices(at.down_proj, &[&layer.down_proj.weight], usize::MAX)?;
            self.biases(at.down_bias, &[&layer.down_proj])?;
        }
        self.norm(layout.norm, &set.norm)?;
        if layout.is_tied() { Ok(()) } else { self.matrices(layout.lm_head, &[&set.lm_head], vocab_size) }
    }

    /// Matrices with one number of columns, one below the other; of each at most `rows` rows.
    fn matrices(&mut self, offset: usize, tensors: &[&Tensor], rows: usize) -> Result<()> {
        let mut at = self.first + offset;
        for tensor in tensors {
            let (height, width) = match *tensor.shape() {
                [height, width] => (height.min(rows), width),
                _ => (0, 0),
            };
            self.uploader.rows(self.arena, at, tensor, (height, width), (self.dtype, stride(width)))?;
            at += height * stride(width) * self.dtype.size();
        }
        Ok(())
    }

    fn vector(&mut self, offset: usize, tensor: &Tensor) -> Result<()> {
        let len = tensor.shape().iter().product();
        self.uploader.rows(self.arena, self.first + offset, tensor, (1, len), (Dtype::F32, len))
    }

    fn norm(&mut self, offset: usize, weight: &Tensor) -> Result<()> {
        self.vector(offset, weight)?;
        let len: usize = weight.shape().iter().product();
        let at = self.first + offset + stride(len) * size_of::<f32>();
        self.uploader.rows(self.arena, at, &self.eps, (1, 1), (Dtype::F32, 1))
    }

    /// The biases of projections that are one matrix; a missing one among them stays zero.
    fn biases(&mut self, offset: Option<usize>, linears: &[&crate::weights::Linear]) -> Result<()> {
        let Some(mut offset) = offset else { return Ok(()) };
        for linear in linears {
            if let Some(bias) = &linear.bias {
                self.vector(offset, bias)?;
            }
            offset += linear.weight.shape().first().copied().unwrap_or(0) * size_of::<f32>();
        }
        Ok(())
    }
}
