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
