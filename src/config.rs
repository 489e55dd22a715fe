//! `config.json` and `generation_config.json` → [`LlamaConfig`], validated.

/// The shape of a Llama model. Names are those of Hugging Face's `config.json`.
///
/// Validated: every size is at least 1 and sane, `head_dim` is even, `num_attention_heads` is a multiple of
/// `num_key_value_heads`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; given, or `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Rows of the embedding, which may be more than the tokenizer has ids.
    pub vocab_size: usize,
    /// The longest context, in tokens.
    pub max_position_embeddings: usize,
    /// ε of RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o projections have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Ends of sequence: those of `config.json` and of `generation_config.json`.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary position embedding: base and scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base θ.
    pub theta: f64,
    /// How frequencies are changed for contexts longer than the model was trained on.
    pub scaling: RopeScaling,
}

/// The rope types of transformers that a Llama may have.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware: θ grows with the position once it is past the original context.
    Dynamic {
        /// The growth.
        factor: f64,
        /// The context up to which nothing changes.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, those between interpolated.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths longer than the original context over this are divided.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context over this are kept.
        high_freq_factor: f64,
        /// The original context.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// The divisor of interpolated frequencies.
        factor: f64,
        /// The original context.
        original_max_position_embeddings: usize,
        /// Full rotations over the original context above which a dimension is extrapolated.
        beta_fast: f64,
        /// Full rotations below which it is interpolated.
        beta_slow: f64,
        /// Whether the bounds of the ramp are rounded to whole dimensions.
        truncate: bool,
        /// What cos and sin are multiplied with.
        attention_factor: f64,
    },
}
