//! Rotary position embedding: the frequencies of a position, for every rope type.
//!
//! Dimensions `i` and `i + head_dim / 2` of a head form a pair, as in Hugging Face's `rotate_half`; position `p`
//! turns pair `i` by the angle `p · f_i`, where `f_i = θ^(−2i / head_dim)` before scaling.
//!
//! Each operation rounds to f32 where transformers' does; powers, cosines and sines are computed in f64 and
//! rounded, so the numbers are the same on every machine and at most a rounding away from any good libm's.

use crate::config::{LlamaConfig, RopeConfig, RopeScaling};

/// The frequencies of one model.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `(head_dim / 2,)`, for positions that need no dynamic scaling.
    inv_freq: Vec<f32>,
    attention_scaling: f32,
    dynamic: Option<Dynamic>,
}

/// What dynamic scaling needs to find the base of a position.
#[derive(Clone, Copy, Debug)]
struct Dynamic {
    theta: f64,
    factor: f64,
    original_max_position_embeddings: usize,
    head_dim: usize,
}

impl Rope {
    /// The frequencies of a model with this configuration.
    pub fn new(config: &LlamaConfig) -> Self {
        let RopeConfig { theta, scaling } = &config.rope;
        let mut inv_freq = inv_freq(*theta, config.head_dim);
        let (mut attention_scaling, mut dynamic) = (1.0, None);
        match *scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => inv_freq.iter_mut().for_each(|f| *f /= factor as f32),
            RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
                let head_dim = config.head_dim;
                dynamic = Some(Dynamic { theta: *theta, factor, original_max_position_embeddings, head_dim });
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f64;
                for f in &mut inv_freq {
                    *f = llama3(*f, factor as f32, low_freq_factor, high_freq_factor, context);
                }
            }
            RopeScaling::Yarn { attention_factor, .. } => {
                attention_scaling = attention_factor as f32;
                inv_freq = yarn(*theta, config.head_dim, scaling);
            }
        }
        Self { inv_freq, attention_scaling, dynamic }
    }

    /// Writes the cosines and sines of `position`, `(head_dim / 2,)` each, times YaRN's attention factor.
    ///
    /// Dynamic scaling takes the context that ends with this position, which is what transformers does when it
    /// decodes token by token; a prompt longer than the original context gets the same numbers here as if it had
    /// been decoded.
    pub fn cos_sin(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        let mut write = |inv_freq: &[f32]| {
            for ((f, cos), sin) in inv_freq.iter().zip(cos.iter_mut()).zip(sin.iter_mut()) {
                let (s, c) = f64::from(position as f32 * f).sin_cos();
                *cos = c as f32 * self.attention_scaling;
                *sin = s as f32 * self.attention_scaling;
            }
        };
        match &self.dynamic {
            Some(dynamic) if position >= dynamic.original_max_position_embeddings => {
                write(&inv_freq(dynamic.theta_at(position + 1), dynamic.head_dim));
            }
            _ => write(&self.inv_freq),
        }
    }

    /// The frequencies of positions that need no dynamic scaling: `(head_dim / 2,)`.
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }
}

impl Dynamic {
    /// The base for a context of `length` tokens.
    fn theta_at(&self, length: usize) -> f64 {
        let stretch = self.factor * length as f64 / self.original_max_position_embeddings as f64;
        let dim = self.head_dim as f64;
        self.theta * (stretch - (self.factor - 1.0)).powf(dim / (dim - 2.0))
    }
}

/// θ^(2i / head_dim), rounded to f32.
fn pos_freq(theta: f64, head_dim: usize, i: usize) -> f32 {
    let exponent = (2 * i) as f32 / head_dim as f32;
    f64::from(theta as f32).powf(f64::from(exponent)) as f32
}

fn inv_freq(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / pos_freq(theta, head_dim, i)).collect()
}

/// Llama 3.1's scaling of one frequency.
fn llama3(f: f32, factor: f32, low: f64, high: f64, context: f64) -> f32 {
    let wavelength = std::f64::consts::TAU as f32 / f;
    if wavelength > (context / low) as f32 {
        f / factor
    } else if wavelength < (context / high) as f32 {
        f
    } else {
        let smooth = (context as f32 / wavelength - low as f32) / (high - low) as f32;
        (1.0 - smooth) * f / factor + smooth * f
    }
}

/// YaRN: pairs that turn more than `beta_fast` times over the original context are kept, those that turn less than
/// `beta_slow` times are divided by `factor`, with a ramp between them.
fn yarn(theta: f64, head_dim: usize, scaling: &RopeScaling) -> Vec<f32> {
    let &RopeScaling::Yarn {
        factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, ..
    } = scaling
    else {
        return inv_freq(theta, head_dim);
    };
    let (dim, context) = (head_dim as f64, original_max_position_embeddings as f64);
    let pair_that_turns =
        |rotations: f64| dim * (context / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair_that_turns(beta_fast), pair_that_turns(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001; // as transformers does, against a division by zero
    }
    (0..head_dim / 2)
        .map(|i| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let pos_freq = pos_freq(theta, head_dim, i);
            let kept = 1.0 - ramp;
            1.0 / (factor as f32 * pos_freq) * (1.0 - kept) + 1.0 / pos_freq * kept
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequencies, and cosines and sines of position 100, of transformers 5.23's `LlamaRotaryEmbedding` with
    /// `head_dim` 16 and θ 10000 (llama3: 500000).
    struct Golden {
        scaling: RopeScaling,
        theta: f64,
        inv_freq: [f32; 8],
        cos: [f32; 8],
        sin: [f32; 8],
    }

    #[rustfmt::skip]
    fn goldens() -> Vec<Golden> {
        let theta = 10_000.0;
        vec![
            Golden {
                scaling: RopeScaling::Default, theta,
                inv_freq: [1.0, 3.1622776e-1, 1.0e-1, 3.162278e-2, 1.0e-2, 3.1622779e-3, 1.0e-3, 3.162278e-4],
                cos: [8.623189e-1, 9.786828e-1, -8.390715e-1, -9.997861e-1, 5.4030234e-1, 9.5041525e-1, 9.950042e-1, 9.9950004e-1],
                sin: [-5.0636566e-1, 2.0537758e-1, -5.440211e-1, -2.0683808e-2, 8.4147096e-1, 3.1098363e-1, 9.983342e-2, 3.1617507e-2],
            },
            Golden {
                scaling: RopeScaling::Linear { factor: 2.5 }, theta,
                inv_freq: [4.0e-1, 1.264911e-1, 4.0e-2, 1.2649111e-2, 3.9999997e-3, 1.2649111e-3, 4.0000002e-4, 1.2649111e-4],
                cos: [-6.6693807e-1, 9.9657905e-1, -6.536436e-1, 3.0113736e-1, 9.21061e-1, 9.9201065e-1, 9.992001e-1, 9.9992e-1],
                sin: [7.4511313e-1, 8.264486e-2, -7.568025e-1, 9.535808e-1, 3.8941833e-1, 1.2615408e-1, 3.9989337e-2, 1.2648774e-2],
            },
            Golden {
                scaling: RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 8192 },
                theta: 500_000.0,
                inv_freq: [1.0, 1.9392276e-1, 3.760603e-2, 7.292665e-3, 5.24846e-4, 3.4281024e-5, 6.6478697e-6, 1.2891732e-6],
                cos: [8.623189e-1, 8.563066e-1, -8.144531e-1, 7.4566334e-1, 9.98623e-1, 9.999941e-1, 9.9999976e-1, 1.0],
                sin: [-5.0636566e-1, 5.1646775e-1, -5.802294e-1, 6.663229e-1, 5.246051e-2, 3.4280957e-3, 6.647869e-4, 1.2891731e-4],
            },
            Golden {
                scaling: RopeScaling::Yarn { factor: 4.0, original_max_position_embeddings: 2048, beta_fast: 32.0, beta_slow: 1.0, truncate: true, attention_factor: 1.138629436111989 },
                theta,
                inv_freq: [1.0, 3.1622776e-1, 1.0e-1, 2.5693506e-2, 6.2499996e-3, 1.3834966e-3, 2.5e-4, 7.905695e-5],
                cos: [9.8186165e-1, 1.1143571, -9.553915e-1, -9.572333e-1, 9.233865e-1, 1.1277498, 1.1382736, 1.1385939],
                sin: [-5.765628e-1, 2.3384896e-1, -6.1943847e-1, 6.1658853e-1, 6.66209e-1, 1.5702693e-1, 2.8462771e-2, 9.001563e-3],
            },
            Golden {
                scaling: RopeScaling::Yarn { factor: 40.0, original_max_position_embeddings: 4096, beta_fast: 16.0, beta_slow: 2.0, truncate: false, attention_factor: 1.0857263992561355 },
                theta,
                inv_freq: [1.0, 3.1622776e-1, 1.0e-1, 3.162278e-2, 5.7901046e-3, 1.2395246e-4, 2.5e-5, 7.9056945e-6],
                cos: [9.3624234e-1, 1.0625818, -9.110021e-1, -1.0854942, 9.087579e-1, 1.0856429, 1.085723, 1.085726],
                sin: [-5.497745e-1, 2.2298385e-1, -5.9065807e-1, -2.2456957e-2, 5.941051e-1, 1.34575e-2, 2.714313e-3, 8.5834204e-4],
            },
        ]
    }

    /// θ 10000, factor 4, original context 64: position 1 (frequencies kept) and 100 (context of 101).
    #[rustfmt::skip]
    const DYNAMIC_COS_100: [f32; 8] =
        [8.623189e-1, 5.3830434e-2, 6.830471e-1, -3.1634936e-1, 8.7546855e-1, 9.909794e-1, 9.993585e-1, 9.9995446e-1];
    #[rustfmt::skip]
    const DYNAMIC_SIN_100: [f32; 8] =
        [-5.0636566e-1, 9.9855006e-1, 7.303743e-1, 9.486428e-1, 4.8327512e-1, 1.3401441e-1, 3.5814527e-2, 9.5463535e-3];

    fn rope(theta: f64, scaling: RopeScaling) -> Rope {
        let config = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4}"#;
        let mut config = LlamaConfig::from_json(std::path::Path::new("config.json"), config, None).unwrap();
        config.rope = RopeConfig { theta, scaling };
        Rope::new(&config)
    }

    fn cos_sin(rope: &Rope, position: usize) -> ([f32; 8], [f32; 8]) {
        let (mut cos, mut sin) = ([0.0; 8], [0.0; 8]);
        rope.cos_sin(position, &mut cos, &mut sin);
        (cos, sin)
    }

    /// A frequency one rounding off (6e-8) turns position 100 by up to 6e-6 and torch's own functions add a
    /// rounding or two: 2e-5 leaves room for no other error.
    fn assert_close(actual: &[f32], expected: &[f32]) {
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 2e-5, "{actual:?}\n{expected:?}");
        }
    }

    #[test]
    fn every_type_agrees_with_transformers() {
        for golden in goldens() {
            let rope = rope(golden.theta, golden.scaling.clone());
            for (f, expected) in rope.inv_freq().iter().zip(golden.inv_freq) {
                // Four roundings: a power, a quotient, and two where the type interpolates.
                assert!((f - expected).abs() <= 2.4e-7 * expected, "{:?}: {f} {expected}", golden.scaling);
            }
            let (cos, sin) = cos_sin(&rope, 100);
            assert_close(&cos, &golden.cos);
            assert_close(&sin, &golden.sin);
        }
    }

    #[test]
    fn dynamic_grows_past_the_original_context_only() {
        let scaling = RopeScaling::Dynamic { factor: 4.0, original_max_position_embeddings: 64 };
        let (dynamic, default) = (rope(10_000.0, scaling), rope(10_000.0, RopeScaling::Default));
        for position in [0, 1, 63] {
            assert_eq!(cos_sin(&dynamic, position), cos_sin(&default, position));
        }
        assert_ne!(cos_sin(&dynamic, 64), cos_sin(&default, 64));
        let (cos, sin) = cos_sin(&dynamic, 100);
        assert_close(&cos, &DYNAMIC_COS_100);
        assert_close(&sin, &DYNAMIC_SIN_100);
    }

    #[test]
    fn position_zero_turns_nothing() {
        let (cos, sin) = cos_sin(&rope(10_000.0, RopeScaling::Default), 0);
        assert_eq!((cos, sin), ([1.0; 8], [0.0; 8]));
    }
}
