//! Safetensors → [`LlamaWeights`]: memory-mapped, used as stored, names, shapes and dtypes checked.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

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
#[derive(Debug)]
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

impl Tensor {
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
        let bytes = self.storage.bytes().get(self.bytes.clone()).unwrap_or_default();
        match self.dtype {
            Dtype::F32 => TensorData::F32(bytemuck::try_cast_slice(bytes).unwrap_or_default()),
            Dtype::F16 => TensorData::F16(bytemuck::try_cast_slice(bytes).unwrap_or_default()),
            Dtype::Bf16 => TensorData::Bf16(bytemuck::try_cast_slice(bytes).unwrap_or_default()),
        }
    }
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
