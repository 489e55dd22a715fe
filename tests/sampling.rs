//! The sampler against its definition, written plainly in f64, and against exact probabilities.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use dlf_engine::sampling::{Sampler, SamplingParams};

struct Rng(u64);

impl Rng {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f64 + 0.5) / (1_u64 << 31) as f64
    }
    fn logits(&mut self, width: usize, scale: f64) -> Vec<f32> {
        let mut logit = || (self.uniform() + self.uniform() + self.uniform() - 1.5) * scale;
        (0..width).map(|_| logit() as f32).collect()
    }
}

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 42, ..SamplingParams::default() }
}

fn choose(logits: &[f32], params: &SamplingParams, step: usize) -> Option<u32> {
    Sampler::default().choose(&mut logits.to_vec(), params, &[], 0, &[], step)
}

/// What is left, and with which probability: transformers' processors one after the other, by full sorts.
fn definition(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let x: Vec<f64> = logits.iter().map(|x| f64::from(*x) / f64::from(params.temperature)).collect();
    let mut order: Vec<usize> = (0..x.len()).filter(|i| x[*i] > f64::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
    if params.top_k > 0 && params.top_k < order.len() {
        let last = x[order[params.top_k - 1]];
        order.retain(|&i| x[i] >= last);
    }
    let softmax = |order: &[usize]| {
        let weights: Vec<f64> = order.iter().map(|&i| (x[i] - x[order[0]]).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect::<Vec<_>>()
    };
    let p = softmax(&order);
    if params.top_p < 1.0 {
        let mut before = 0.0;
        let kept = p.iter().take_while(|p| {
            let keep = before < f64::from(params.top_p);
            before += **p;
            keep
        });
        order.truncate(kept.count());
    }
    let p = softmax(&order);
    let kept = p.iter().filter(|q| **q >= f64::from(params.min_p) * p[0]).count();
    order.truncate(kept);
    let mut probabilities = vec![0.0; x.len()];
    for (&i, p) in order.iter().zip(softmax(&order)) {
        probabilities[i] = p;
    }
    probabilities
}

/// Draws at steps 0 … and compares the frequencies with `expected`: none where it is 0, and χ² below its mean
/// plus five standard deviations (a chance of about 1e-5; the seed is fixed).
fn check_frequencies(logits: &[f32], params: &SamplingParams, draws: usize) {
    let expected = definition(logits, params);
    let mut counts = vec![0_usize; logits.len()];
    let mut sampler = Sampler::default();
    for step in 0..draws {
        let token = sampler.choose(&mut logits.to_vec(), params, &[], 0, &[], step).unwrap();
        counts[token as usize] += 1;
    }
    let (mut chi_square, mut cells, mut rare) = (0.0, 0.0, (0.0, 0.0));
    for (count, p) in counts.iter().zip(&expected) {
        let (count, mean) = (*count as f64, p * draws as f64);
        if *p == 0.0 {
            assert_eq!(count, 0.0, "a token without probability was drawn");
        } else if mean < 10.0 {
            rare = (rare.0 + count, rare.1 + mean);
        } else {
            chi_square += (count - mean).powi(2) / mean;
            cells += 1.0;
        }
    }
    if rare.1 >= 10.0 {
        chi_square += (rare.0 - rare.1).powi(2) / rare.1;
        cells += 1.0;
    }
    let freedom: f64 = cells - 1.0;
    assert!(chi_square <= freedom + 5.0 * (2.0 * freedom).sqrt(), "χ² {chi_square} with {freedom} degrees");
}

#[test]
fn draws_follow_the_distribution() {
    let mut rng = Rng(1);
    for (width, scale) in [(2, 1.0), (7, 3.0), (111, 4.0), (1000, 6.0)] {
        let mut logits = rng.logits(width, scale);
        check_frequencies(&logits, &params(), 120_000);
        check_frequencies(&logits, &SamplingParams { temperature: 0.6, seed: 7, ..params() }, 120_000);
        logits[width / 2] = f32::NEG_INFINITY;
        check_frequencies(&logits, &SamplingParams { temperature: 2.5, ..params() }, 120_000);
    }
}

#[test]
fn filtered_draws_follow_the_filtered_distribution() {
    let logits = Rng(2).logits(300, 6.0);
    for filter in [
        SamplingParams { top_k: 5, ..params() },
        SamplingParams { top_p: 0.8, ..params() },
        SamplingParams { min_p: 0.1, ..params() },
        SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.05, temperature: 1.3, ..params() },
    ] {
        check_frequencies(&logits, &filter, 100_000);
    }
}

/// Every token that the definition keeps turns up under some seed, and no other: in whole vocabularies, at the
/// sizes where the partial sort grows.
#[test]
fn filters_keep_what_the_definition_keeps() {
    let mut rng = Rng(3);
    for case in 0..60 {
        let width = [1, 5, 63, 64, 65, 1000, 5000][case % 7];
        let mut logits = rng.logits(width, [0.01, 1.0, 8.0][case % 3]);
        if case % 2 == 0 {
            // Many ties.
            logits.iter_mut().for_each(|x| *x = (*x * 4.0).round() / 4.0);
        }
        let filter = SamplingParams {
            top_k: [0, 1, 3, 50, 10_000][case % 5],
            top_p: [1.0, 0.3, 0.95][case % 3],
            min_p: [0.0, 0.2][case % 2],
            temperature: 1.0 + (case % 4) as f32,
            ..params()
        };
        let expected = definition(&logits, &filter);
        let kept = expected.iter().filter(|p| **p > 0.0).count();
        let mut seen = vec![false; width];
        for step in 0..300 {
            let token = choose(&logits, &filter, step).unwrap() as usize;
            assert!(expected[token] > 0.0, "case {case}: {token} was filtered out");
            seen[token] = true;
        }
        let likely = expected.iter().zip(&seen).filter(|(p, _)| **p > 0.1);
        // A chance of 0.9³⁰⁰ = 2e-14 each.
        assert!(likely.clone().all(|(_, seen)| *seen), "case {case}: {kept} kept");
    }
}

#[test]
fn the_noise_depends_on_seed_step_and_id_alone() {
    let logits = Rng(4).logits(1000, 2.0);
    let draw = |seed, step| choose(&logits, &SamplingParams { seed, ..params() }, step).unwrap();
    let first: Vec<u32> = (0..50).map(|step| draw(1, step)).collect();
    assert_eq!(first, (0..50).map(|step| draw(1, step)).collect::<Vec<_>>());
    assert_ne!(first, (0..50).map(|step| draw(2, step)).collect::<Vec<_>>());
    assert!(first.windows(2).any(|pair| pair[0] != pair[1]));
    // Tokens appended at the end that can't win leave every draw as it is.
    let longer: Vec<f32> = logits.iter().copied().chain([-1e4; 77]).collect();
    let again = (0..50).map(|step| choose(&longer, &SamplingParams { seed: 1, ..params() }, step).unwrap());
    assert_eq!(first, again.collect::<Vec<_>>());
    // A filter that removes none of the winners leaves them as they are.
    let wide = SamplingParams { seed: 1, min_p: 1e-9, ..params() };
    assert_eq!(first, (0..50).map(|step| choose(&logits, &wide, step).unwrap()).collect::<Vec<_>>());
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let greedy = SamplingParams::default();
    assert_eq!(choose(&[1.0, 3.0, 3.0, 2.0], &greedy, 0), Some(1));
    assert_eq!(choose(&[f32::NEG_INFINITY; 3], &greedy, 0), None);
    assert_eq!(choose(&[f32::NEG_INFINITY; 3], &params(), 0), None);
    assert_eq!(choose(&[], &params(), 0), None);
    // A temperature this low is greedy but for exact ties.
    let cold = SamplingParams { temperature: 1e-30, ..params() };
    assert!((0..20).all(|step| choose(&[1.0, 3.0, 2.999, 2.0], &cold, step) == Some(1)));
}

#[test]
fn bans_and_biases() {
    let mut sampler = Sampler::default();
    let mut choose = |logits: &[f32], bias: &[(u32, f32)], banned: &[u32]| {
        let params = SamplingParams { logit_bias: bias.to_vec(), ..SamplingParams::default() };
        sampler.choose(&mut logits.to_vec(), &params, &[], 0, banned, 0)
    };
    assert_eq!(choose(&[1.0, 3.0, 2.0], &[], &[1]), Some(2));
    assert_eq!(choose(&[1.0, 3.0, 2.0], &[(1, f32::NEG_INFINITY)], &[2, 900]), Some(0));
    assert_eq!(choose(&[1.0, 3.0, 2.0], &[(0, 2.5), (77, 1.0)], &[]), Some(0));
    assert_eq!(choose(&[1.0, 3.0, 2.0], &[], &[0, 1, 2]), None);
}

#[test]
fn penalties_are_those_of_transformers_and_openai() {
    let logits = [2.0, -1.0, 0.5, 3.0];
    let mut sampler = Sampler::default();
    let mut penalised = |params: &SamplingParams, history: &[u32], prompt: usize| {
        let mut logits = logits.to_vec();
        sampler.choose(&mut logits, params, history, prompt, &[], 0).unwrap();
        logits
    };
    let history = [0, 0, 1, 3, 3, 3, 1000];
    let repetition = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    // Once for each id, prompt included: positive logits divided, negative ones multiplied.
    assert_eq!(penalised(&repetition, &history, 2), [1.0, -2.0, 0.5, 1.5]);
    let counted =
        SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..SamplingParams::default() };
    // Ids 1 (once) and 3 (three times) were generated; id 0 is in the prompt only.
    assert_eq!(penalised(&counted, &history, 2), [2.0, -1.75, 0.5, 1.75]);
    let both = SamplingParams { repetition_penalty: 2.0, ..counted };
    assert_eq!(penalised(&both, &history, 2), [1.0, -2.75, 0.5, 0.25]);
    // Nothing is left over from one call to the next.
    assert_eq!(penalised(&SamplingParams::default(), &history, 2), logits);
}

#[test]
fn parameters_are_checked() {
    assert!(SamplingParams::default().validate().is_ok());
    assert!(params().validate().is_ok());
    for (bad, name) in [
        (SamplingParams { temperature: -0.1, ..params() }, "temperature"),
        (SamplingParams { temperature: f32::NAN, ..params() }, "temperature"),
        (SamplingParams { top_p: 0.0, ..params() }, "top_p"),
        (SamplingParams { top_p: 1.1, ..params() }, "top_p"),
        (SamplingParams { min_p: -0.1, ..params() }, "min_p"),
        (SamplingParams { repetition_penalty: 0.0, ..params() }, "repetition_penalty"),
        (SamplingParams { presence_penalty: f32::INFINITY, ..params() }, "presence_penalty"),
        (SamplingParams { frequency_penalty: f32::NAN, ..params() }, "frequency_penalty"),
        (SamplingParams { logit_bias: vec![(1, f32::INFINITY)], ..params() }, "logit_bias"),
    ] {
        let error = bad.validate().unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
