//! Random weights, for tests and benchmarks that need a shape and no sense.

use super::{Dtype, LayerWeights, Linear, LlamaWeights, Tensor};
use crate::config::LlamaConfig;

/// splitmix64.
struct Noise(u64);

impl Noise {
    /// Uniform in `[-1, 1)`, 24 bits.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f32 * (2.0 / 16_777_216.0) - 1.0
    }

    fn tensor(&mut self, dtype: Dtype, shape: &[usize], centre: f32, reach: f32) -> Tensor {
        Tensor::fill(dtype, shape, || centre + reach * self.next())
    }

    /// Uniform, with the variance that keeps that of the input: 1 / in.
    fn weight(&mut self, dtype: Dtype, rows: usize, columns: usize) -> Tensor {
        self.tensor(dtype, &[rows, columns], 0.0, (3.0 / columns as f32).sqrt())
    }

    fn norm(&mut self, dtype: Dtype, size: usize) -> Tensor {
        self.tensor(dtype, &[size], 1.0, 0.25)
    }
}

impl LlamaWeights {
    /// Weights of the shape that `config` says, the same for the same `seed`.
    ///
    /// Uniform with variance `1 / in`, norms around 1, biases within ±0.1: activations stay near 1 and logits have a
    /// spread of about 1.
    pub fn random(config: &LlamaConfig, dtype: Dtype, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let &LlamaConfig { hidden_size, intermediate_size, vocab_size, attention_bias, mlp_bias, .. } =
            config;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let embed_tokens = noise.weight(dtype, vocab_size, hidden_size);
        let layer = |noise: &mut Noise| {
            let mut linear = |rows, columns, bias| Linear {
                weight: noise.weight(dtype, rows, columns),
                bias: if bias { Some(noise.tensor(dtype, &[rows], 0.0, 0.1)) } else { None },
            };
            let q_proj = linear(queries, hidden_size, attention_bias);
            let k_proj = linear(keys, hidden_size, attention_bias);
            let v_proj = linear(keys, hidden_size, attention_bias);
            let o_proj = linear(hidden_size, queries, attention_bias);
            let gate_proj = linear(intermediate_size, hidden_size, mlp_bias);
            let up_proj = linear(intermediate_size, hidden_size, mlp_bias);
            let down_proj = linear(hidden_size, intermediate_size, mlp_bias);
            LayerWeights {
                input_layernorm: noise.norm(dtype, hidden_size),
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                post_attention_layernorm: noise.norm(dtype, hidden_size),
                gate_proj,
                up_proj,
                down_proj,
            }
        };
        let layers = (0..config.num_hidden_layers).map(|_| layer(&mut noise)).collect();
        let norm = noise.norm(dtype, hidden_size);
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            noise.weight(dtype, vocab_size, hidden_size)
        };
        Self { embed_tokens, layers, norm, lm_head }
    }
}
