//! The forward pass of a Llama in f64, plainly: what backends that sum in f32 are held against.
#![allow(unreachable_pub, reason = "a part of tests")]

use dlf_engine::model::LlamaModel;
use dlf_engine::rope::Rope;
use dlf_engine::weights::{Linear, Tensor};

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.data().to_f32().into_iter().map(f64::from).collect()
}

fn dot(w: &[f64], x: &[f64]) -> f64 {
    w.iter().zip(x).map(|(w, x)| w * x).sum()
}

/// W, b
struct Dense(Vec<f64>, Option<Vec<f64>>);

impl Dense {
    fn new(linear: &Linear) -> Self {
        Self(numbers(&linear.weight), linear.bias.as_ref().map(numbers))
    }

    /// W x + b
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.0.chunks_exact(x.len()).enumerate();
        rows.map(|(n, w)| dot(w, x) + self.1.as_ref().map_or(0.0, |bias| bias[n])).collect()
    }
}

/// x · w / √(mean x² + ε)
fn rms_norm(weight: &[f64], eps: f32, x: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + f64::from(eps)).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// Turns each head of a row by the angles that the backends have, which are f32.
fn rotate(heads: &mut [f64], cos: &[f32], sin: &[f32]) {
    for head in heads.chunks_exact_mut(2 * cos.len()) {
        let (left, right) = head.split_at_mut(cos.len());
        for (i, (a, b)) in left.iter_mut().zip(right).enumerate() {
            let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

/// Adds what `of_row` makes of each row, on two threads.
fn add(hidden: &mut [Vec<f64>], keep: fn(f64) -> f64, of_row: impl Fn(usize, &[f64]) -> Vec<f64> + Sync) {
    let half = hidden.len().div_ceil(2);
    std::thread::scope(|scope| {
        for (part, rows) in hidden.chunks_mut(half).enumerate() {
            let of_row = &of_row;
            scope.spawn(move || {
                for (i, row) in rows.iter_mut().enumerate() {
                    let more = of_row(part * half + i, row);
                    row.iter_mut().zip(more).for_each(|(x, y)| *x = keep(*x + y));
                }
            });
        }
    });
}

/// log softmax of the logits behind every token: `(tokens, vocab)`. Without adapters.
///
/// `keep` is applied to every number that a layer leaves behind for the next product: the identity, or a rounding.
pub fn log_probs(model: &LlamaModel, tokens: &[u32], keep: fn(f64) -> f64) -> Vec<Vec<f64>> {
    let config = &model.config;
    let (dim, group) = (config.head_dim, config.num_attention_heads / config.num_key_value_heads);
    let kept = |row: Vec<f64>| row.into_iter().map(keep).collect::<Vec<_>>();
    let rope = Rope::new(config);
    let angles: Vec<_> = (0..tokens.len())
        .map(|position| {
            let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
            rope.cos_sin(position, &mut cos, &mut sin);
            (cos, sin)
        })
        .collect();
    let table = numbers(&model.weights.embed_tokens);
    let width = config.hidden_size;
    let mut hidden: Vec<Vec<f64>> =
        tokens.iter().map(|&token| table[token as usize * width..][..width].to_vec()).collect();
    for layer in &model.weights.layers {
        let [wq, wk, wv, wo, w_gate, w_up, w_down] = layer.projections().map(Dense::new);
        let norms = [&layer.input_layernorm, &layer.post_attention_layernorm].map(numbers);
        let (mut keys, mut values, mut queries) = (Vec::new(), Vec::new(), Vec::new());
        for (row, (cos, sin)) in hidden.iter().zip(&angles) {
            let x = kept(rms_norm(&norms[0], config.rms_norm_eps, row));
            let (mut q, mut k) = (wq.times(&x), wk.times(&x));
            rotate(&mut q, cos, sin);
            rotate(&mut k, cos, sin);
            queries.push(kept(q));
            keys.push(kept(k));
            values.push(kept(wv.times(&x)));
        }
        add(&mut hidden, keep, |row, _| {
            let attended = queries[row].chunks_exact(dim).enumerate().flat_map(|(head, q)| {
                let at = head / group * dim;
                attend(q, row, |p| (&keys[p][at..at + dim], &values[p][at..at + dim]))
            });
            wo.times(&kept(attended.collect()))
        });
        add(&mut hidden, keep, |_, x| {
            let x = kept(rms_norm(&norms[1], config.rms_norm_eps, x));
            let (gate, up) = (w_gate.times(&x), w_up.times(&x));
            let silu = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
            w_down.times(&kept(silu.collect()))
        });
    }
    let (head, norm) = (numbers(&model.weights.lm_head), numbers(&model.weights.norm));
    let of_row = |row: &Vec<f64>| {
        let x = kept(rms_norm(&norm, config.rms_norm_eps, row));
        log_softmax(&head.chunks_exact(width).map(|w| dot(w, &x)).collect::<Vec<_>>())
    };
    hidden.iter().map(of_row).collect()
}

/// Attention of one query over the positions up to `row`.
fn attend<'a>(q: &[f64], row: usize, at: impl Fn(usize) -> (&'a [f64], &'a [f64])) -> Vec<f64> {
    let scores: Vec<f64> = (0..=row)
        .map(|p| q.iter().zip(at(p).0).map(|(q, k)| q * k).sum::<f64>() / (q.len() as f64).sqrt())
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
    let mut out = vec![0.0; q.len()];
    for (p, score) in scores.iter().enumerate() {
        let weight = (score - top).exp() / sum;
        out.iter_mut().zip(at(p).1).for_each(|(o, v)| *o += weight * v);
    }
    out
}

/// x − ln Σ eˣ
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
    logits.iter().map(|x| x - top - sum.ln()).collect()
}
