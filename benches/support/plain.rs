//! The search for α as a tensor framework would run it, one operation after another: what the fused pass is measured
//! against, by `cargo bench` and by `dlf-engine bench fusion`.

/// Logits of a large model, a small one that resembles it, and experts that resemble the small one.
pub(crate) struct Models {
    pub(crate) large: Vec<f32>,
    pub(crate) small: Vec<f32>,
    pub(crate) experts: Vec<Vec<f32>>,
}

impl Models {
    /// Random ones.
    pub(crate) fn new(vocab_size: usize, experts: usize) -> Self {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        // The sum of four uniforms is near enough to a normal distribution.
        let mut noise = |scale: f32| {
            let mut uniform = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
            };
            (uniform() + uniform() + uniform() + uniform()) * scale * 1.7
        };
        let large: Vec<f32> = (0..vocab_size).map(|_| noise(3.0)).collect();
        let small: Vec<f32> = large.iter().map(|x| 0.8 * x + noise(1.5)).collect();
        let experts = (0..experts).map(|_| small.iter().map(|x| x + noise(1.0)).collect()).collect();
        Self { large, small, experts }
    }
}

fn log_softmax(x: &[f32], out: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = x.iter().map(|x| (x - max).exp()).sum();
    let log_sum = max + sum.ln();
    for (out, x) in out.iter_mut().zip(x) {
        *out = x - log_sum;
    }
}

fn kl(log_p: &[f32], log_q: &[f32]) -> f32 {
    log_p.iter().zip(log_q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// The search as one writes it down: for each candidate of each expert a log-softmax and two KL sums.
pub(crate) fn search(models: &Models, candidates: &[f64]) -> (usize, f64) {
    let width = models.large.len();
    let [mut log_p, mut log_q, mut log_qt, mut x, mut fused] = [(); 5].map(|()| vec![0.0_f32; width]);
    log_softmax(&models.large, &mut log_p);
    log_softmax(&models.small, &mut log_q);
    let targets: Vec<(f32, f32)> = models
        .experts
        .iter()
        .map(|expert| {
            log_softmax(expert, &mut log_qt);
            (kl(&log_qt, &log_q), kl(&log_q, &log_qt))
        })
        .collect();
    let (mut best, mut least) = ((0, 0.0), f32::INFINITY);
    for (t, expert) in models.experts.iter().enumerate() {
        for &alpha in candidates {
            for (i, x) in x.iter_mut().enumerate() {
                *x = models.large[i] + alpha as f32 * (expert[i] - models.small[i]);
            }
            log_softmax(&x, &mut fused);
            let (forward, reverse) = (kl(&fused, &log_p), kl(&log_p, &fused));
            let loss = targets.iter().map(|t| (forward - t.0).powi(2) + (reverse - t.1).powi(2)).sum();
            if loss < least {
                (best, least) = ((t, alpha), loss);
            }
        }
    }
    best
}
