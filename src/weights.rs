//! Safetensors → [`LlamaWeights`]: memory-mapped, used as stored, names, shapes and dtypes checked.

mod checkpoint;
mod random;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use crate::config::LlamaConfig;
use crate::error::{Error, Result};

pub(crate) use checkpoint::Checkpoint;

// Weights are used where they lie in the file, and safetensors is little-endian.
#[cfg(target_endian = "big")]
compile_error!("dlf-engine needs a little-endian machine");

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

/// The bytes of one safetensors file.
pub enum Storage {
    /// A file, mapped read-only.
    Mapped(memmap2::Mmap),
    /// Bytes in the binary.
    Static(&'static [u8]),
    /// Bytes in memory: the copy of a tensor that the file stores at an odd address, or weights made by a test or
    /// a benchmark. Eight-byte words, so that every dtype is aligned.
    Owned(Vec<u64>),
}

/// A tensor as stored: a row-major view into a file. Rows are the outputs of a projection, `(out, in)`.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Arc<Storage>,
    bytes: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The numbers of a [`Tensor`].
#[derive(Clone, Copy, Debug)]
pub enum TensorData<'a> {
    /// f32.
    F32(&'a [f32]),
    /// f16.
    F16(&'a [f16]),
    /// bf16.
    Bf16(&'a [bf16]),
}

/// `y = W x + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `(out, in)`.
    pub weight: Tensor,
    /// `(out,)`.
    pub bias: Option<Tensor>,
}

/// The tensors of one decoder layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `(hidden_size,)`.
    pub input_layernorm: Tensor,
    /// `(num_attention_heads · head_dim, hidden_size)`.
    pub q_proj: Linear,
    /// `(num_key_value_heads · head_dim, hidden_size)`.
    pub k_proj: Linear,
    /// `(num_key_value_heads · head_dim, hidden_size)`.
    pub v_proj: Linear,
    /// `(hidden_size, num_attention_heads · head_dim)`.
    pub o_proj: Linear,
    /// `(hidden_size,)`.
    pub post_attention_layernorm: Tensor,
    /// `(intermediate_size, hidden_size)`.
    pub gate_proj: Linear,
    /// `(intermediate_size, hidden_size)`.
    pub up_proj: Linear,
    /// `(hidden_size, intermediate_size)`.
    pub down_proj: Linear,
}

/// The weights of a Llama model.
#[derive(Clone, Debug)]
pub struct LlamaWeights {
    /// `(vocab_size, hidden_size)`.
    pub embed_tokens: Tensor,
    /// One a layer.
    pub layers: Vec<LayerWeights>,
    /// `(hidden_size,)`.
    pub norm: Tensor,
    /// `(vocab_size, hidden_size)`; the embedding itself where the two are tied.
    pub lm_head: Tensor,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Dtype {
    /// `f32`, `f16` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl Tensor {
    /// Takes `bytes` of `storage`, which must hold exactly a tensor of `dtype` and `shape`. Where they lie at an
    /// address that `dtype` can't be read from, they are copied.
    ///
    /// The reason is returned where they don't fit.
    pub(crate) fn new(
        storage: &Arc<Storage>,
        bytes: Range<usize>,
        dtype: Dtype,
        shape: Vec<usize>,
    ) -> Result<Self, String> {
        let needed = byte_count(dtype, &shape).ok_or_else(|| format!("the shape {shape:?} overflows"))?;
        let data = storage
            .bytes()
            .get(bytes.clone())
            .ok_or_else(|| format!("bytes {bytes:?} of {}", storage.bytes().len()))?;
        if data.len() != needed {
            return Err(format!("{} bytes where {dtype} {shape:?} needs {needed}", data.len()));
        }
        // f16 and bf16 need the same alignment: their size.
        if data.as_ptr().addr().is_multiple_of(dtype.size()) {
            return Ok(Self { storage: Arc::clone(storage), bytes, dtype, shape });
        }
        let mut words = vec![0_u64; needed.div_ceil(8)];
        bytemuck::cast_slice_mut::<_, u8>(&mut words)[..needed].copy_from_slice(data);
        Ok(Self { storage: Arc::new(Storage::Owned(words)), bytes: 0..needed, dtype, shape })
    }

    /// A tensor in memory: `values`, row-major, rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::Parameter`] where `values` is not as long as `shape` says.
    pub fn from_f32(dtype: Dtype, shape: &[usize], values: &[f32]) -> Result<Self> {
        let count = shape.iter().try_fold(1_usize, |count, &size| count.checked_mul(size));
        if count != Some(values.len()) {
            return Err(Error::Parameter {
                name: "tensor",
                expected: format!("as many values as the shape {shape:?} has"),
                found: values.len().to_string(),
            });
        }
        let mut values = values.iter();
        Ok(Self::fill(dtype, shape, || values.next().copied().unwrap_or_default()))
    }

    /// A tensor in memory, row-major, from as many calls of `next` as it has numbers.
    fn fill(dtype: Dtype, shape: &[usize], mut next: impl FnMut() -> f32) -> Self {
        let count: usize = shape.iter().product();
        let len = count * dtype.size();
        let mut words = vec![0_u64; len.div_ceil(8)];
        let bytes = &mut bytemuck::cast_slice_mut::<_, u8>(&mut words)[..len];
        match dtype {
            Dtype::F32 => bytemuck::cast_slice_mut(bytes).fill_with(next),
            Dtype::F16 => bytemuck::cast_slice_mut(bytes).fill_with(|| f16::from_f32(next())),
            Dtype::Bf16 => bytemuck::cast_slice_mut(bytes).fill_with(|| bf16::from_f32(next())),
        }
        Self { storage: Arc::new(Storage::Owned(words)), bytes: 0..len, dtype, shape: shape.to_vec() }
    }

    /// The dtype as stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The shape, `(out, in)` for a projection.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The stored numbers, row-major.
    pub fn data(&self) -> TensorData<'_> {
        // Length and alignment were checked when the tensor was made, and the storage never changes.
        let bytes = self.as_bytes();
        match self.dtype {
            Dtype::F32 => TensorData::F32(bytemuck::cast_slice(bytes)),
            Dtype::F16 => TensorData::F16(bytemuck::cast_slice(bytes)),
            Dtype::Bf16 => TensorData::Bf16(bytemuck::cast_slice(bytes)),
        }
    }

    /// The stored bytes: little-endian, row-major.
    pub fn as_bytes(&self) -> &[u8] {
        &self.storage.bytes()[self.bytes.clone()]
    }

    /// Whether the two are the same bytes in memory: a tied embedding, or weights that models share.
    pub fn is_same(&self, other: &Self) -> bool {
        std::ptr::eq(self.as_bytes(), other.as_bytes())
    }
}

impl TensorData<'_> {
    /// The numbers, widened to f32: for tests and small tensors.
    pub fn to_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values.to_vec(),
            Self::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
            Self::Bf16(values) => values.iter().map(|value| value.to_f32()).collect(),
        }
    }
}

/// Bytes of a tensor; `None` where that is no number of this machine.
fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |count, &size| count.checked_mul(size))
}

impl Storage {
    /// All bytes of the file.
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
            Self::Owned(words) => bytemuck::cast_slice(words),
        }
    }
}

impl fmt::Debug for Storage {
    /// Says how many bytes there are, and not which.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Mapped(_) => "Mapped",
            Self::Static(_) => "Static",
            Self::Owned(_) => "Owned",
        };
        write!(f, "{kind}({} bytes)", self.bytes().len())
    }
}

impl Linear {
    /// The weight and the bias.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

impl LayerWeights {
    /// The projections: q, k, v, o, gate, up, down.
    pub fn projections(&self) -> [&Linear; 7] {
        [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ]
    }
}

impl LlamaWeights {
    /// Maps the weights of `dir`: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// The files must not be changed while they are mapped.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Weights`] where a file is malformed, [`Error::Tensor`] where a tensor is missing,
    /// is not one of a Llama's, or has another shape or dtype than `config` asks for.
    pub fn load(dir: &Path, config: &LlamaConfig) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::open_model(dir)?, config)
    }

    /// Like [`load`](Self::load), from a safetensors file in memory; `path` is for messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_safetensors(path: &Path, bytes: &'static [u8], config: &LlamaConfig) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::from_static(path, bytes)?, config)
    }

    fn from_checkpoint(mut checkpoint: Checkpoint, config: &LlamaConfig) -> Result<Self> {
        let &LlamaConfig { hidden_size, vocab_size, .. } = config;
        let embed_tokens = checkpoint.take("model.embed_tokens.weight", &[vocab_size, hidden_size])?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| take_layer(&mut checkpoint, layer, config))
            .collect::<Result<_>>()?;
        let norm = checkpoint.take("model.norm.weight", &[hidden_size])?;
        const LM_HEAD: &str = "lm_head.weight";
        let lm_head = if !config.tie_word_embeddings {
            checkpoint.take(LM_HEAD, &[vocab_size, hidden_size])?
        } else {
            // Some files store the tied tensor twice. Where the two differ, the files contradict each other.
            if checkpoint.contains(LM_HEAD) {
                let stored = checkpoint.take(LM_HEAD, &[vocab_size, hidden_size])?;
                if stored.as_bytes() != embed_tokens.as_bytes() {
                    return Err(checkpoint.tensor_error(
                        LM_HEAD,
                        "the embedding, which tie_word_embeddings says it is",
                        "another tensor",
                    ));
                }
            }
            embed_tokens.clone()
        };
        checkpoint.refuse_rest(|name| {
            // Old conversions store the frequencies, which follow from the configuration.
            name.ends_with(".self_attn.rotary_emb.inv_freq")
        })?;
        Ok(Self { embed_tokens, layers, norm, lm_head })
    }

    /// Bytes that the weights take, as stored; a tied embedding counts once.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.as_bytes().len()).sum()
    }

    /// Numbers that the weights have; a tied embedding counts once.
    pub fn num_parameters(&self) -> usize {
        self.tensors().map(|tensor| tensor.shape().iter().product::<usize>()).sum()
    }

    /// Every tensor, once.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let head = (!self.lm_head.is_same(&self.embed_tokens)).then_some(&self.lm_head);
        [&self.embed_tokens, &self.norm]
            .into_iter()
            .chain(self.layers.iter().flat_map(layer_tensors))
            .chain(head)
    }
}

fn layer_tensors(layer: &LayerWeights) -> impl Iterator<Item = &Tensor> {
    let projections = layer.projections().into_iter().flat_map(Linear::tensors);
    [&layer.input_layernorm, &layer.post_attention_layernorm].into_iter().chain(projections)
}

fn take_layer(checkpoint: &mut Checkpoint, layer: usize, config: &LlamaConfig) -> Result<LayerWeights> {
    let &LlamaConfig { hidden_size, intermediate_size, attention_bias, mlp_bias, .. } = config;
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let mut tensor =
        |name: &str, shape: &[usize]| checkpoint.take(&format!("model.layers.{layer}.{name}"), shape);
    let mut linear = |name: &str, rows: usize, columns: usize, bias: bool| -> Result<Linear> {
        let weight = tensor(&format!("{name}.weight"), &[rows, columns])?;
        let bias = if bias { Some(tensor(&format!("{name}.bias"), &[rows])?) } else { None };
        Ok(Linear { weight, bias })
    };
    let q_proj = linear("self_attn.q_proj", queries, hidden_size, attention_bias)?;
    let k_proj = linear("self_attn.k_proj", keys, hidden_size, attention_bias)?;
    let v_proj = linear("self_attn.v_proj", keys, hidden_size, attention_bias)?;
    let o_proj = linear("self_attn.o_proj", hidden_size, queries, attention_bias)?;
    let gate_proj = linear("mlp.gate_proj", intermediate_size, hidden_size, mlp_bias)?;
    let up_proj = linear("mlp.up_proj", intermediate_size, hidden_size, mlp_bias)?;
    let down_proj = linear("mlp.down_proj", hidden_size, intermediate_size, mlp_bias)?;
    let input_layernorm = tensor("input_layernorm.weight", &[hidden_size])?;
    let post_attention_layernorm = tensor("post_attention_layernorm.weight", &[hidden_size])?;
    Ok(LayerWeights {
        input_layernorm,
        q_proj,
        k_proj,
        v_proj,
        o_proj,
        post_attention_layernorm,
        gate_proj,
        up_proj,
        down_proj,
    })
}
