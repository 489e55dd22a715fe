//! Shapes of published models, by name, with random weights.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};

use crate::config::LlamaConfig;
use crate::model::{LlamaModel, Role};
use crate::weights::{Dtype, LlamaWeights};

/// The widths of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    tied: bool,
}

/// From the `config.json` of each: hidden and intermediate size, layers, heads, key-value heads, width of a head,
/// vocabulary, and whether the output projection is the embedding.
const SHAPES: [Shape; 12] = [
    shape("llama-2-7b", [4096, 11008, 32, 32, 32, 128, 32000], false),
    shape("llama-2-13b", [5120, 13824, 40, 40, 40, 128, 32000], false),
    shape("llama-2-70b", [8192, 28672, 80, 64, 8, 128, 32000], false),
    shape("tinyllama-1.1b", [2048, 5632, 22, 32, 4, 64, 32000], false),
    shape("sheared-llama-1.3b", [2048, 5504, 24, 16, 16, 128, 32000], false),
    shape("llama-3.1-8b", [4096, 14336, 32, 32, 8, 128, 128_256], false),
    shape("llama-3.1-70b", [8192, 28672, 80, 64, 8, 128, 128_256], false),
    shape("llama-3.2-1b", [2048, 8192, 16, 32, 8, 64, 128_256], true),
    shape("llama-3.2-3b", [3072, 8192, 28, 24, 8, 128, 128_256], true),
    shape("smollm2-135m", [576, 1536, 30, 9, 3, 64, 49152], true),
    shape("smollm2-360m", [960, 2560, 32, 15, 5, 64, 49152], true),
    shape("smollm2-1.7b", [2048, 8192, 24, 32, 32, 64, 49152], true),
];

const fn shape(name: &'static str, sizes: [usize; 7], tied: bool) -> Shape {
    let [hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, vocab_size] = sizes;
    Shape { name, hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, vocab_size, tied }
}

/// A large model, and a small one with its experts where there is one: `LARGE` or `LARGE+SMALL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) large: Shape,
    pub(crate) small: Option<Shape>,
}

/// Reads `LARGE` or `LARGE+SMALL`.
pub(crate) fn pair(text: &str) -> Result<Pair> {
    let (large, small) = text.split_once('+').map_or((text, None), |(large, small)| (large, Some(small)));
    let pair = Pair { large: named(large)?, small: small.map(named).transpose()? };
    if let Some(small) = pair.small.filter(|small| small.vocab_size != pair.large.vocab_size) {
        bail!("{large} has {} ids and {} has {}", pair.large.vocab_size, small.name, small.vocab_size);
    }
    Ok(pair)
}

fn named(name: &str) -> Result<Shape> {
    let found = SHAPES.into_iter().find(|shape| shape.name.eq_ignore_ascii_case(name.trim()));
    found.map_or_else(
        || {
            let names: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
            bail!("no shape {name:?}; there are {}", names.join(", "))
        },
        Ok,
    )
}

impl Shape {
    /// Bytes of the weights.
    pub(crate) fn bytes(self, dtype: Dtype) -> usize {
        let queries = self.heads * self.head_dim;
        let keys = self.kv_heads * self.head_dim;
        let attention = self.hidden_size * (2 * queries + 2 * keys);
        let layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size;
        let embeddings = self.vocab_size * self.hidden_size * if self.tied { 1 } else { 2 };
        (self.layers * layer + embeddings + self.hidden_size) * dtype.size()
    }

    /// A model of this shape; `context` is how many positions it knows.
    pub(crate) fn model(self, role: Role, dtype: Dtype, context: usize) -> Result<LlamaModel> {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied, "max_position_embeddings": context.max(2048),
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        });
        let config = Arc::new(LlamaConfig::from_json(Path::new(self.name), &config.to_string(), None)?);
        let seed = match role {
            Role::Large => 1,
            Role::Small => 2,
            Role::Expert(t) => 3 + t as u64,
        };
        let weights = Arc::new(LlamaWeights::random(&config, dtype, seed));
        Ok(LlamaModel {
            role,
            name: role.to_string(),
            path: self.name.into(),
            config,
            weights,
            adapter: None,
        })
    }
}

impl Pair {
    /// `LARGE` or `LARGE+SMALL`.
    pub(crate) fn name(self) -> String {
        self.small
            .map_or_else(|| self.large.name.to_owned(), |small| format!("{}+{}", self.large.name, small.name))
    }

    /// Bytes of all weights with `experts` experts.
    pub(crate) fn bytes(self, dtype: Dtype, experts: usize) -> usize {
        self.large.bytes(dtype) + self.small.map_or(0, |small| small.bytes(dtype) * (1 + experts))
    }

    /// The models: a large one, and a small one with `experts` experts where there is one.
    ///
    /// # Errors
    /// Where they don't fit this machine's memory.
    pub(crate) fn models(self, dtype: Dtype, experts: usize, context: usize) -> Result<Vec<LlamaModel>> {
        let (needed, free) = (self.bytes(dtype, experts), free_memory());
        if let Some(free) = free.filter(|&free| needed > free) {
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            bail!(
                "{} takes {:.1} GiB as {dtype}, and {:.1} GiB of memory is free",
                self.name(),
                gib(needed),
                gib(free)
            );
        }
        let mut models = vec![self.large.model(Role::Large, dtype, context)?];
        if let Some(small) = self.small {
            models.push(small.model(Role::Small, dtype, context)?);
            for t in 0..experts {
                models.push(small.model(Role::Expert(t), dtype, context)?);
            }
        }
        Ok(models)
    }
}

/// Bytes of memory that programs can still have, where the system tells.
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_weights() {
        let smol = pair("SmolLM2-135M").unwrap().large;
        // The number on the model's card.
        assert_eq!(smol.bytes(Dtype::Bf16), 2 * 134_515_008);
        assert_eq!(pair("llama-2-13b").unwrap().large.bytes(Dtype::F16), 2 * 13_015_864_320);
        assert_eq!(pair("tinyllama-1.1b").unwrap().large.bytes(Dtype::F16), 2 * 1_100_048_384);
        let model = smol.model(Role::Large, Dtype::Bf16, 64).unwrap();
        // Norms are stored as the matrices are.
        assert_eq!(model.weights.bytes(), smol.bytes(Dtype::Bf16));
    }

    #[test]
    fn wrong_names_are_answered_with_the_right_ones() {
        assert!(pair("llama-9").unwrap_err().to_string().contains("llama-2-13b"));
        assert!(pair("llama-2-13b+smollm2-135m").unwrap_err().to_string().contains("49152"));
        assert!(
            pair("llama-2-70b").unwrap().models(Dtype::F32, 0, 16).unwrap_err().to_string().contains("GiB")
        );
    }
}
