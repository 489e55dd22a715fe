//! `config.json` and `generation_config.json` → [`LlamaConfig`], validated.
//!
//! What the files leave out has the default of transformers' `LlamaConfig`. What they ask for and this engine
//! doesn't compute is refused by name.

use std::path::Path;

use crate::error::{Error, Result};
use crate::json::{MAX_CONFIG_BYTES, Object, read_text, show};

/// Above any real model, and low enough that no product of a few sizes overflows.
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
pub(crate) const MAX_VOCAB: usize = 1 << 24;
const MAX_CONTEXT: usize = 1 << 30;

/// The θ of models whose config names none.
const LLAMA_2_THETA: f64 = 10_000.0;
const LLAMA_2_CONTEXT: usize = 4096;

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

impl LlamaConfig {
    /// Reads `config.json` and, where it exists, `generation_config.json` of `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] where `config.json` can't be read, [`Error::Config`] where a field is malformed,
    /// [`Error::Unsupported`] where the model is not a Llama that this engine computes.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let Some(config) = read_text(&path, MAX_CONFIG_BYTES)? else {
            let reason = "no such file; a model is a directory with one";
            return Err(Error::io(path, std::io::Error::new(std::io::ErrorKind::NotFound, reason)));
        };
        let generation = read_text(&dir.join("generation_config.json"), MAX_CONFIG_BYTES)?;
        Self::from_json(&path, &config, generation.as_deref())
    }

    /// Like [`load`](Self::load), from the files' texts; `path` is that of `config.json`, for messages.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Unsupported`], as [`load`](Self::load).
    pub fn from_json(path: &Path, config: &str, generation: Option<&str>) -> Result<Self> {
        let config = Object::parse(path, config)?;
        let generation = generation
            .map(|text| Object::parse(&path.with_file_name("generation_config.json"), text))
            .transpose()?;
        refuse_unsupported(&config)?;

        let hidden_size = config.required_size("hidden_size", MAX_WIDTH)?;
        let num_attention_heads = config.required_size("num_attention_heads", MAX_HEADS)?;
        let num_key_value_heads =
            config.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of the {num_attention_heads} attention heads");
            return Err(config.invalid("num_key_value_heads", &expected, num_key_value_heads.to_string()));
        }
        let head_dim = head_dim(&config, hidden_size, num_attention_heads)?;
        let max_position_embeddings = config.size("max_position_embeddings", MAX_CONTEXT)?.unwrap_or(2048);
        refuse_sliding_window(&config, max_position_embeddings)?;
        let positive = |x: f64| x > 0.0 && x < 1.0;
        Ok(Self {
            hidden_size,
            intermediate_size: config.required_size("intermediate_size", MAX_WIDTH)?,
            num_hidden_layers: config.required_size("num_hidden_layers", MAX_LAYERS)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: config.required_size("vocab_size", MAX_VOCAB)?,
            max_position_embeddings,
            rms_norm_eps: config.number("rms_norm_eps", "a number between 0 and 1", positive)?.unwrap_or(1e-6)
                as f32,
            rope: RopeConfig::from_json(&config, head_dim, max_position_embeddings)?,
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: config.bool("attention_bias")?.unwrap_or(false),
            mlp_bias: config.bool("mlp_bias")?.unwrap_or(false),
            bos_token_id: bos_token_id(&config, generation.as_ref())?,
            eos_token_ids: eos_token_ids(&config, generation.as_ref())?,
        })
    }

    /// The longest context, in tokens: `max_position_embeddings`, times the factor of dynamic RoPE, which is
    /// there to go past it.
    pub fn context(&self) -> usize {
        match self.rope.scaling {
            RopeScaling::Dynamic { factor, .. } => (self.max_position_embeddings as f64 * factor) as usize,
            _ => self.max_position_embeddings,
        }
    }

    /// Bytes that one token adds to the key-value cache: keys and values of every layer, in f32.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * size_of::<f32>()
    }
}

/// Refuses by name what would be computed wrongly.
fn refuse_unsupported(config: &Object) -> Result<()> {
    let unsupported = |what: String| Err(Error::Unsupported { path: config.path().to_owned(), what });

    let architectures = config.get("architectures");
    let names: Vec<&str> = match architectures {
        None => Vec::new(),
        Some(value) => value
            .as_array()
            .and_then(|names| names.iter().map(serde_json::Value::as_str).collect())
            .ok_or_else(|| config.invalid("architectures", "a list of names", show(value)))?,
    };
    // The second spelling is that of the first Llama conversions.
    const KNOWN: [&str; 3] = ["LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"];
    if let Some(other) = names.iter().find(|name| !KNOWN.contains(name)) {
        return unsupported(format!(
            "the architecture {other}, neither LlamaForCausalLM nor MistralForCausalLM,"
        ));
    }
    match config.str("model_type")? {
        Some("llama" | "mistral") => {}
        Some(other) => return unsupported(format!("the model type {other}, neither llama nor mistral,")),
        None if names.is_empty() => {
            return Err(config.invalid("model_type", "llama or mistral", "nothing"));
        }
        None => {}
    }
    if let Some(code) = config.object("auto_map")?.as_ref().and_then(|map| map.get("AutoModelForCausalLM")) {
        return unsupported(format!("a model with code of its own (auto_map: {})", show(code)));
    }
    for field in ["quantization_config", "compression_config"] {
        if let Some(quantization) = config.object(field)? {
            let method = quantization.str("quant_method")?.unwrap_or("of unnamed method");
            return unsupported(format!("quantization {method} ({field})"));
        }
    }
    if let Some(other) = config.str("hidden_act")?.filter(|&name| name != "silu" && name != "swish") {
        return unsupported(format!("the activation {other} (hidden_act)"));
    }
    Ok(())
}

/// A window that is shorter than the context would be needed to compute the model's text.
fn refuse_sliding_window(config: &Object, max_position_embeddings: usize) -> Result<()> {
    let unsupported = |what: String| Err(Error::Unsupported { path: config.path().to_owned(), what });
    if config.bool("use_sliding_window")? != Some(false)
        && let Some(window) = config.size("sliding_window", MAX_CONTEXT)?
        && window < max_position_embeddings
    {
        return unsupported(format!("sliding window attention (sliding_window: {window})"));
    }
    if let Some(types) = config.get("layer_types") {
        let all_full =
            types.as_array().is_some_and(|types| types.iter().all(|kind| kind == "full_attention"));
        if !all_full {
            return unsupported(format!(
                "attention other than full_attention (layer_types: {})",
                show(types)
            ));
        }
    }
    Ok(())
}

fn head_dim(config: &Object, hidden_size: usize, num_attention_heads: usize) -> Result<usize> {
    const MAX_HEAD_DIM: usize = 1 << 12;
    let head_dim = match config.size("head_dim", MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            let expected = format!("a multiple of the {num_attention_heads} attention heads");
            return Err(config.invalid("hidden_size", &expected, hidden_size.to_string()));
        }
    };
    if head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM {
        Ok(head_dim)
    } else {
        let expected = format!("an even number up to {MAX_HEAD_DIM}");
        Err(config.invalid("head_dim", &expected, head_dim.to_string()))
    }
}

fn bos_token_id(config: &Object, generation: Option<&Object>) -> Result<Option<u32>> {
    let given = match config.token_id("bos_token_id")? {
        Some(id) => Some(id),
        None => generation.map(|generation| generation.token_id("bos_token_id")).transpose()?.flatten(),
    };
    // LlamaConfig's default, for files that leave it out; `null` says that there is none.
    Ok(given.or(if config.has("bos_token_id") { None } else { Some(1) }))
}

fn eos_token_ids(config: &Object, generation: Option<&Object>) -> Result<Vec<u32>> {
    let mut ids = config.token_ids("eos_token_id")?;
    if let Some(generation) = generation {
        ids.extend(generation.token_ids("eos_token_id")?);
    }
    if ids.is_empty() && !config.has("eos_token_id") {
        ids.push(2);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

impl RopeConfig {
    /// Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`.
    fn from_json(config: &Object, head_dim: usize, max_position_embeddings: usize) -> Result<Self> {
        // transformers prefers the older key where both are there.
        let scaling = config.object("rope_scaling")?.filter(|scaling| !scaling.fields().is_empty());
        let rope = match scaling {
            Some(scaling) => Some(scaling),
            None => config.object("rope_parameters")?,
        };
        if let Some(rope) = &rope
            && let Some((kind, _)) = rope.fields().iter().find(|(_, value)| value.is_object())
        {
            let what = format!("RoPE that differs between layers (rope_parameters.{kind})");
            return Err(Error::Unsupported { path: config.path().to_owned(), what });
        }
        let either = |field: &str, expected: &str, accept: fn(f64) -> bool| -> Result<Option<f64>> {
            if let Some(rope) = &rope
                && let Some(value) = rope.number(field, expected, accept)?
            {
                return Ok(Some(value));
            }
            config.number(field, expected, accept)
        };
        let theta = either("rope_theta", "a number above 1", |x| x > 1.0 && x <= 1e30)?;
        let rotary = either("partial_rotary_factor", "a number", f64::is_finite)?.unwrap_or(1.0);
        if rotary != 1.0 {
            let what = format!("a partial_rotary_factor of {rotary}");
            return Err(Error::Unsupported { path: config.path().to_owned(), what });
        }
        let scaling = match &rope {
            Some(rope) => RopeScaling::from_json(config, rope, head_dim, max_position_embeddings)?,
            None => RopeScaling::Default,
        };
        let old_form = config.get("rope_parameters").is_none();
        let theta = match theta {
            Some(theta) => theta,
            None if old_form && scaling.may_leave_out_theta(max_position_embeddings) => LLAMA_2_THETA,
            None => {
                let field = if old_form { "rope_theta" } else { "rope_parameters.rope_theta" };
                let expected = "a number above 1 (write 10000.0 if the model, like Llama 1 and 2, was trained with that)";
                return Err(config.invalid(field, expected, "nothing"));
            }
        };
        Ok(Self { theta, scaling })
    }
}

impl RopeScaling {
    /// Whether this may be a Llama 1 or 2, whose configs name no θ, or one of their continuations: rotation was learnt on
    /// at most 4096 positions. Later models have another θ, and without it would write nonsense that looks like text.
    fn may_leave_out_theta(&self, max_position_embeddings: usize) -> bool {
        let learnt = match *self {
            Self::Llama3 { .. } => return false,
            Self::Default | Self::Dynamic { .. } => max_position_embeddings as f64,
            Self::Linear { factor } => max_position_embeddings as f64 / factor,
            Self::Yarn { original_max_position_embeddings, .. } => original_max_position_embeddings as f64,
        };
        learnt <= LLAMA_2_CONTEXT as f64
    }

    fn from_json(
        config: &Object,
        rope: &Object,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self> {
        let name = match rope.str("rope_type")? {
            Some(name) => name,
            None => rope.str("type")?.unwrap_or("default"),
        };
        let growth = || rope.required_number("factor", "a number from 1", |x| (1.0..=1e6).contains(&x));
        match name {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear { factor: growth()? }),
            "dynamic" if head_dim == 2 => {
                Err(config.invalid("head_dim", "at least 4 with dynamic RoPE", "2"))
            }
            // Like transformers, which grows from max_position_embeddings whatever else is given.
            "dynamic" => Ok(Self::Dynamic {
                factor: growth()?,
                original_max_position_embeddings: max_position_embeddings,
            }),
            "llama3" => {
                let positive =
                    |field| rope.required_number(field, "a number above 0", |x| x > 0.0 && x <= 1e6);
                let (low_freq_factor, high_freq_factor) =
                    (positive("low_freq_factor")?, positive("high_freq_factor")?);
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("a number above low_freq_factor, {low_freq_factor}");
                    return Err(rope.invalid("high_freq_factor", &expected, high_freq_factor.to_string()));
                }
                Ok(Self::Llama3 {
                    factor: growth()?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original_context(
                        config,
                        rope,
                        max_position_embeddings,
                    )?,
                })
            }
            "yarn" => Self::yarn(config, rope, max_position_embeddings),
            other => {
                let what = format!("the rope type {other}");
                Err(Error::Unsupported { path: config.path().to_owned(), what })
            }
        }
    }

    fn yarn(config: &Object, rope: &Object, max_position_embeddings: usize) -> Result<Self> {
        let original = original_context(config, rope, max_position_embeddings)?;
        let factor = rope
            .number("factor", "a number from 1", |x| (1.0..=1e6).contains(&x))?
            .unwrap_or(max_position_embeddings as f64 / original as f64);
        // Zero counts as absent for these four, as in transformers.
        let optional = |field| -> Result<Option<f64>> {
            let value = rope.number(field, "a number from 0", |x| (0.0..=1e6).contains(&x))?;
            Ok(value.filter(|&value| value != 0.0))
        };
        // Equation 22 of the paper, with DeepSeek's weights of it.
        let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let attention_factor = match (
            rope.number("attention_factor", "a number above 0", |x| x > 0.0 && x <= 1e6)?,
            optional("mscale")?,
            optional("mscale_all_dim")?,
        ) {
            (Some(given), _, _) => given,
            (None, Some(weight), Some(all_dim)) => mscale(weight) / mscale(all_dim),
            _ => mscale(1.0),
        };
        Ok(Self::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast: optional("beta_fast")?.unwrap_or(32.0),
            beta_slow: optional("beta_slow")?.unwrap_or(1.0),
            truncate: rope.bool("truncate")?.unwrap_or(true),
            attention_factor,
        })
    }
}

/// The context before scaling: a field of its own, or one of the RoPE parameters, or the whole context.
fn original_context(config: &Object, rope: &Object, max_position_embeddings: usize) -> Result<usize> {
    const FIELD: &str = "original_max_position_embeddings";
    if let Some(size) = config.size(FIELD, MAX_CONTEXT)? {
        return Ok(size);
    }
    Ok(rope.size(FIELD, MAX_CONTEXT)?.unwrap_or(max_position_embeddings))
}

#[cfg(test)]
mod tests;
