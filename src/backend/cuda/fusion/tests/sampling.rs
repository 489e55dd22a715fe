//! sample.cu against the CPU's sampler, which works in f64.

use super::*;
use crate::error::Error;

/// What one row asks for.
#[derive(Clone, Debug, Default)]
struct Ask {
    params: SamplingParams,
    history: Vec<u32>,
    generated: usize,
    banned: Vec<u32>,
}

impl Ask {
    fn choice(&self) -> Choice<'_> {
        let Self { params, history, generated, banned } = self;
        Choice::Sample { params, history, generated: *generated, banned }
    }
}

/// Every parameter now and then, alone and with others.
fn random_ask(uniform: &mut Uniform, vocab_size: usize, seed: u64) -> Ask {
    let mut below = |n: usize| ((uniform.next() + 0.5) * n as f32) as usize % n;
    let mut pick = |values: &[f32]| values[below(values.len())];
    let mut params = SamplingParams {
        temperature: pick(&[0.0, 0.3, 1.0, 1.7, 40.0]),
        top_p: pick(&[1.0, 1.0, 1e-4, 0.3, 0.9, 0.9999]),
        min_p: pick(&[0.0, 0.0, 0.02, 0.3, 1.0]),
        repetition_penalty: pick(&[1.0, 1.0, 1.3, 0.8]),
        presence_penalty: pick(&[0.0, 0.0, 1.5, -0.5]),
        frequency_penalty: pick(&[0.0, 0.0, 0.7]),
        seed,
        ..SamplingParams::default()
    };
    let sizes = [0, 0, 1, 2, 7, vocab_size / 2, vocab_size, 10 * vocab_size, usize::MAX];
    params.top_k = sizes[below(sizes.len())];
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| below(vocab_size + 3) as u32).collect() };
    let history = ids(40);
    let banned = if seed.is_multiple_of(3) { ids(4) } else { Vec::new() };
    if seed.is_multiple_of(4) {
        let biases = ids(5).into_iter().zip([f32::NEG_INFINITY, 3.0, -2.5, 60.0, 0.125]);
        params.logit_bias = biases.collect();
    }
    Ask { params, history, generated: (seed % 41) as usize, banned }
}

/// Both choose alike, for every slot of `models` by every ask.
fn assert_chosen_alike(models: &[Vec<Vec<f32>>], asks: &[Ask], rule: &FusionRule) {
    let slots = models[0].len();
    let rows: Vec<FuseRow<'_>> = asks
        .iter()
        .enumerate()
        .map(|(step, ask)| FuseRow { slot: step % slots, step, rule, held: None, choice: ask.choice() })
        .collect();
    let both = fuse_both(models, &rows);
    for ((device, host), ask) in both.device.iter().zip(&both.host).zip(asks) {
        match (device, host) {
            (Ok(device), Ok(host)) => assert_alike(device, host, &format!("{ask:?}")),
            (Err(Error::NoCandidate { .. }), Err(Error::NoCandidate { .. })) => {}
            _ => panic!("{device:?} and {host:?} for {ask:?}"),
        }
    }
}

#[test]
fn every_parameter_chooses_as_on_the_cpu() {
    for (experts, vocab_size) in [(1, 1), (1, 31), (2, 111), (1, 700), (1, 3000)] {
        let mut models = random_logits(experts, 4, vocab_size, vocab_size as u64);
        // Some are excluded, by each model in turn.
        for (number, model) in models.iter_mut().enumerate() {
            model[1].iter_mut().skip(number).step_by(7).for_each(|x| *x = f32::NEG_INFINITY);
        }
        let mut uniform = Uniform(77 + vocab_size as u64);
        let count = if vocab_size > 1000 { 60 } else { 240 };
        let asks: Vec<Ask> = (0..count).map(|seed| random_ask(&mut uniform, vocab_size, seed)).collect();
        assert_chosen_alike(&models, &asks, &FusionRule::default());
    }
}

#[test]
fn every_rule_is_sampled_from() {
    let models = random_logits(2, 3, 500, 4);
    let ask = |seed| Ask {
        params: SamplingParams { temperature: 0.8, top_k: 30, top_p: 0.9, seed, ..SamplingParams::default() },
        ..Ask::default()
    };
    let asks: Vec<Ask> = (0..12).map(ask).collect();
    let fixed = FusionRule::Static([1.3, -0.4].into_iter().collect());
    for rule in [fixed, FusionRule::Large, FusionRule::Small, FusionRule::Expert(1)] {
        assert_chosen_alike(&models, &asks, &rule);
    }
}

/// Multiples of four, so that many tie and no sum is rounded.
fn tied_logits(vocab_size: usize) -> Vec<Vec<Vec<f32>>> {
    let mut models = random_logits(1, 1, vocab_size, 9);
    models.iter_mut().flatten().flatten().for_each(|x| *x = (*x / 4.0).round() * 4.0);
    models
}

#[test]
fn extremes_choose_as_on_the_cpu() {
    let models = random_logits(1, 2, 400, 3);
    let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let cases = [
        SamplingParams { temperature: 1e-39, ..base.clone() },
        SamplingParams { temperature: 1e-39, top_p: 0.5, ..base.clone() },
        SamplingParams { temperature: 1e-6, top_k: 5, ..base.clone() },
        SamplingParams { temperature: 3e38, top_p: 0.3, ..base.clone() },
        SamplingParams { temperature: 1e8, min_p: 1.0, ..base.clone() },
        SamplingParams { top_p: f32::MIN_POSITIVE, ..base.clone() },
        SamplingParams { logit_bias: vec![(3, 3e38), (3, 3e38)], top_p: 0.9, ..base.clone() },
        SamplingParams { logit_bias: (0..400).map(|id| (id, -3e38)).collect(), top_p: 0.9, ..base.clone() },
        SamplingParams { logit_bias: (0..400).map(|id| (id, f32::NEG_INFINITY)).collect(), ..base.clone() },
        SamplingParams { frequency_penalty: -3e38, top_p: 0.9, ..base.clone() },
        SamplingParams { repetition_penalty: 1e-38, min_p: 0.1, ..base },
    ];
    let ask = |(seed, params): (usize, &SamplingParams)| Ask {
        params: SamplingParams { seed: seed as u64, ..params.clone() },
        history: vec![7, 9, 9, 400, u32::MAX],
        generated: 4,
        banned: Vec::new(),
    };
    let asks: Vec<Ask> = cases.iter().cycle().take(4 * cases.len()).enumerate().map(ask).collect();
    assert_chosen_alike(&models, &asks, &FusionRule::Large);
}

#[test]
fn ties_at_the_border() {
    let models = tied_logits(900);
    let ask = |seed: u64| {
        let mut params = SamplingParams { temperature: 4.0, seed, ..SamplingParams::default() };
        match seed % 3 {
            // All that tie with the last are kept.
            0 => params.top_k = 1 + seed as usize,
            // Of those that tie for the last place the lower ids are kept.
            1 => params.top_p = 0.02 + 0.003 * seed as f32,
            _ => (params.top_k, params.top_p) = (200 + seed as usize, 0.5),
        }
        Ask { params, ..Ask::default() }
    };
    let asks: Vec<Ask> = (0..300).map(ask).collect();
    assert_chosen_alike(&models, &asks, &FusionRule::Large);
}

/// Settings that are usual, at every step another seed.
fn usual_asks(vocab_size: usize) -> Vec<Ask> {
    let plain = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    let penalised = SamplingParams { repetition_penalty: 1.2, ..plain.clone() };
    let cases = [
        SamplingParams { temperature: 0.0, ..penalised.clone() },
        SamplingParams { top_k: 40, ..plain.clone() },
        SamplingParams { top_p: 0.9, ..plain.clone() },
        SamplingParams { min_p: 0.05, ..plain.clone() },
        SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.05, ..penalised.clone() },
        SamplingParams { presence_penalty: 0.5, ..plain },
        penalised,
    ];
    let ask = |(seed, params): (usize, SamplingParams)| Ask {
        params: SamplingParams { seed: seed as u64, ..params },
        history: (0..90).map(|at| (at * at * 31 % (vocab_size + 2)) as u32).collect(),
        generated: 40,
        banned: vec![vocab_size as u32 / 3],
    };
    cases.into_iter().enumerate().map(ask).collect()
}

#[test]
fn every_width_is_sampled_from() {
    // Fewer than a thread has, than a warp, a little more; all but one of whole slices; as many as Llama 3 has.
    for vocab_size in [1, 2, 3, 4, 5, 31, 33, 127, 129, 2047, 2049, 8191, 128_256] {
        let models = random_logits(1, 2, vocab_size, 6);
        let rule = FusionRule::Static(std::iter::once(0.8).collect());
        assert_chosen_alike(&models, &usual_asks(vocab_size), &rule);
    }
}

#[test]
fn lists_longer_than_a_block() {
    // Its 512 threads take three turns for the tokens, two for the biases. The later one stands, the more it raises its id:
    // among the tokens of each hundred there are fewer.
    let vocab_size = 3000;
    let models = random_logits(1, 2, vocab_size, 14);
    let raised =
        SamplingParams { presence_penalty: -0.5, frequency_penalty: -0.7, ..SamplingParams::default() };
    let lowered =
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.2, ..SamplingParams::default() };
    let ask = |seed: usize| {
        let (hundred, place) = (|at: usize| at / 100, |at: usize| at % (13 - at / 100));
        let history = (0..1300).map(|at| ((hundred(at) * 131 + place(at) * 7 + seed) % vocab_size) as u32);
        let biases = (0..700).map(|i| ((i * 4 + seed % 4) as u32, 0.05 * i as f32));
        let params = if seed.is_multiple_of(2) { &raised } else { &lowered };
        Ask {
            params: SamplingParams {
                temperature: [0.0, 1.0, 20.0][seed / 2 % 3],
                top_p: [1.0, 0.9][seed / 6 % 2],
                logit_bias: if (seed / 4).is_multiple_of(3) { Vec::new() } else { biases.collect() },
                seed: seed as u64,
                ..params.clone()
            },
            history: history.collect(),
            generated: 900,
            banned: Vec::new(),
        }
    };
    let asks: Vec<Ask> = (0..48).map(ask).collect();
    assert_chosen_alike(&models, &asks, &FusionRule::default());
}

#[test]
fn one_token_that_is_left_is_chosen() {
    // In the first and the last of the ids, and between.
    for (vocab_size, left) in [(5000, 0), (5000, 4999), (5000, 2048), (1, 0)] {
        let mut models = random_logits(1, 1, vocab_size, 3);
        models[0][0]
            .iter_mut()
            .enumerate()
            .filter(|&(id, _)| id != left)
            .for_each(|(_, x)| *x = f32::NEG_INFINITY);
        let mut asks = usual_asks(vocab_size);
        asks.iter_mut().for_each(|ask| ask.banned.clear());
        assert_chosen_alike(&models, &asks, &FusionRule::Large);
    }
}

#[test]
fn more_tokens_than_there_is_room_for() {
    // Flat distributions, of which 4096 tokens are a part: they are looked at in the row itself.
    let vocab_size = 9001;
    let mut models = random_logits(1, 2, vocab_size, 12);
    // In slot 1 all tie.
    models[0][1].fill(1.5);
    let flat = SamplingParams { temperature: 20.0, ..SamplingParams::default() };
    let cases = [
        SamplingParams { top_p: 0.9, ..flat.clone() },
        SamplingParams { top_p: 0.25, ..flat.clone() },
        SamplingParams { top_k: 5000, ..flat.clone() },
        SamplingParams { top_k: 60, ..flat.clone() },
        SamplingParams { top_k: 5000, top_p: 0.7, min_p: 0.9, ..flat.clone() },
        SamplingParams { top_k: usize::MAX, top_p: 0.6, ..flat.clone() },
        SamplingParams { min_p: 1e-6, ..flat.clone() },
        flat,
    ];
    // Each of them in both slots.
    let ask = |seed: usize| Ask {
        params: SamplingParams { seed: seed as u64, ..cases[seed / 2 % cases.len()].clone() },
        ..Ask::default()
    };
    let asks: Vec<Ask> = (0..6 * cases.len()).map(ask).collect();
    assert_chosen_alike(&models, &asks, &FusionRule::Large);
}

/// What the best of each chunk doesn't show: the tokens that share probability stand beside each other. Slot 0 has one token at
/// the top and 127 beside it that only together weigh something, slot 1 two such chunks, slot 2 whole chunks that tie.
fn crowded_logits(vocab_size: usize) -> Vec<Vec<Vec<f32>>> {
    let mut models = random_logits(1, 3, vocab_size, 31);
    let crowd = |row: &mut [f32], chunk: usize, top: f32, rest: f32| {
        row[chunk * 128..][..128].iter_mut().enumerate().for_each(|(i, x)| *x = rest - 0.01 * i as f32);
        row[chunk * 128 + 77] = top;
    };
    models[0].iter_mut().flatten().for_each(|x| *x -= 30.0);
    crowd(&mut models[0][0], 9, 10.0, 4.0);
    crowd(&mut models[0][1], 3, 10.0, 6.5);
    crowd(&mut models[0][1], 15, 9.0, 2.5);
    models[0][2][128 * 5..128 * 13].fill(10.0);
    models
}

#[test]
fn likely_tokens_that_stand_together() {
    let models = crowded_logits(9001);
    let ask = |seed: usize| {
        let mut params = SamplingParams { temperature: 1.0, seed: seed as u64, ..SamplingParams::default() };
        match seed / 3 % 4 {
            0 => params.top_p = 0.3 + 0.01 * (seed % 70) as f32,
            1 => params.top_k = 2 + 3 * seed,
            2 => (params.top_p, params.min_p) = (0.97, 0.002),
            _ => (params.top_k, params.top_p) = (200, 0.8),
        }
        Ask { params, ..Ask::default() }
    };
    let asks: Vec<Ask> = (0..180).map(ask).collect();
    assert_chosen_alike(&models, &asks, &FusionRule::Large);
}

#[test]
fn what_is_kept_is_drawn_and_nothing_else() {
    // Ids 0 … 9 have the probabilities 2⁻¹, 2⁻², …: top-k, top-p and min-p each leave out what they should.
    let logits: Vec<f32> = (0..10).map(|id| -(id as f32) * 2.0_f32.ln()).collect();
    let models = vec![vec![logits]; 3];
    let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let cases = [
        (SamplingParams { top_k: 3, ..base.clone() }, 3),
        // 1/2 + 1/4 + 1/8 is the first sum that reaches 0.8 of all.
        (SamplingParams { top_p: 0.8, ..base.clone() }, 3),
        (SamplingParams { min_p: 0.2, ..base.clone() }, 3),
        (SamplingParams { top_p: 0.5, ..base.clone() }, 1),
        (SamplingParams { top_k: 5, top_p: 0.99, min_p: 0.1, ..base }, 4),
    ];
    for (params, kept) in cases {
        let draw = |seed| Ask { params: SamplingParams { seed, ..params.clone() }, ..Ask::default() };
        let asks: Vec<Ask> = (0..150).map(draw).collect();
        let rule = FusionRule::Large;
        let rows: Vec<FuseRow<'_>> = asks
            .iter()
            .map(|ask| FuseRow { slot: 0, step: 0, rule: &rule, held: None, choice: ask.choice() })
            .collect();
        let decisions = decided(&models, &rows, |_| {}).1.unwrap();
        let drawn: std::collections::BTreeSet<u32> =
            decisions.into_iter().map(|decision| decision.unwrap().token).collect();
        // The rarest that is kept has a probability of at least 1/15 of the rest: 150 draws miss it once in 30 000.
        assert_eq!(drawn, (0..kept).collect(), "{params:?}");
    }
}

#[test]
fn a_row_that_is_sampled_costs_one_more_launch() {
    let models = random_logits(1, 2, 300, 2);
    let rule = FusionRule::default();
    let (plain, truncated) = (
        Ask::default(),
        Ask { params: SamplingParams { temperature: 1.0, top_k: 4, ..greedy() }, ..Ask::default() },
    );
    let row = |slot, choice| FuseRow { slot, step: 0, rule: &rule, held: None, choice };
    // Top-k changes nothing where the most probable token is taken.
    let moot = Ask { params: SamplingParams { top_k: 4, ..greedy() }, ..Ask::default() };
    assert_eq!(fuse_both(&models, &[row(0, plain.choice()), row(1, moot.choice())]).launches, 1);
    assert_eq!(fuse_both(&models, &[row(0, plain.choice()), row(1, truncated.choice())]).launches, 2);
}

#[test]
fn the_refined_distribution_is_drawn_from() {
    let models = random_logits(2, 4, 1200, 17);
    let mode = crate::fusion::SearchMode::Refine;
    let rule = FusionRule::Dynamic(DynamicRule { mode, ..DynamicRule::default() });
    let ask = |seed: u64| {
        let temperature = [0.0, 0.7, 1.3][seed as usize % 3];
        let top_k = if seed.is_multiple_of(2) { 20 } else { 0 };
        Ask {
            params: SamplingParams { temperature, top_k, seed, ..SamplingParams::default() },
            ..Ask::default()
        }
    };
    let asks: Vec<Ask> = (0..24).map(ask).collect();
    let rows: Vec<FuseRow<'_>> = asks
        .iter()
        .enumerate()
        .map(|(step, ask)| FuseRow { slot: step % 4, step, rule: &rule, held: None, choice: ask.choice() })
        .collect();
    let both = fuse_both(&models, &rows);
    for ((device, host), ask) in both.device.iter().zip(&both.host).zip(&asks) {
        let (device, host) = (device.as_ref().unwrap(), host.as_ref().unwrap());
        // Rounding of the sums moves the minimum a little, and all numbers with it.
        let expert = host.expert.unwrap();
        assert_eq!((device.expert, device.token), (Some(expert), host.token), "{ask:?}");
        assert!(
            (device.alpha[expert] - host.alpha[expert]).abs() < 1e-4,
            "{:?} {:?}",
            device.alpha,
            host.alpha
        );
        for (a, b) in [(device.logprob_fused, host.logprob_fused), (device.loss.unwrap(), host.loss.unwrap())]
        {
            assert!((a - b).abs() < 1e-3 * (1.0 + b.abs()), "{a} and {b}");
        }
        assert_eq!(device.argmax_fused, host.argmax_fused);
    }
}

/// How many places of the kernels `change` has changed, and what is then decided; `None` where the GPU failed, or
/// something was reported.
fn decided(
    models: &[Vec<Vec<f32>>],
    rows: &[FuseRow<'_>],
    change: impl FnOnce(&Device),
) -> (u64, Option<Vec<Option<Decision>>>) {
    let bed = Bed::new("a100", models);
    // A loop without end ends here.
    bed.device.budget(20_000_000);
    // Warps in another order than their own, which hides what a barrier is for.
    bed.device.seed(7);
    change(&bed.device);
    let found = bed
        .fuser()
        .and_then(|mut fuser| bed.fuse(&mut fuser, rows))
        .map(|found| found.into_iter().map(Result::ok).collect());
    (bed.device.mutations(), found.ok().filter(|_| bed.device.reports().is_empty()))
}

#[test]
#[ignore = "a minute: the gate runs it"]
fn a_change_to_sampling_is_noticed() {
    let mode = crate::fusion::SearchMode::Refine;
    let rule = FusionRule::Dynamic(DynamicRule { mode, ..DynamicRule::default() });
    // More than a slice.
    const VOCAB_SIZE: usize = 2100;
    let mut models = random_logits(2, 4, VOCAB_SIZE, 8);
    // In slot 0 many tie, in slot 2 nothing is left, in slot 3 likely tokens stand together.
    models.iter_mut().for_each(|model| model[0].iter_mut().for_each(|x| *x = (*x / 4.0).round() * 4.0));
    models[0][2].fill(f32::NEG_INFINITY);
    let crowded = crowded_logits(VOCAB_SIZE);
    models.iter_mut().for_each(|model| model[3].clone_from(&crowded[0][0]));
    let flat = SamplingParams { temperature: 30.0, ..SamplingParams::default() };
    let mut uniform = Uniform(5);
    let mut tokens = || -> Vec<u32> {
        let any = (0..2 * VOCAB_SIZE).map(|_| ((uniform.next() + 0.5) * VOCAB_SIZE as f32) as u32);
        (0..VOCAB_SIZE as u32).chain(any).collect()
    };
    // What is left out, and what is added or subtracted, must matter: distributions are flat, lists longer than a warp,
    // and no id is without a penalty.
    let asks: Vec<Ask> = (0..40)
        .map(|seed: usize| {
            let mut ask =
                Ask { params: SamplingParams { seed: seed as u64, ..flat.clone() }, ..Ask::default() };
            match seed % 5 {
                0 | 1 => ask.params.top_p = 0.1 + 0.02 * seed as f32,
                2 => ask.params.top_k = 20 * (seed + 1),
                3 => {
                    ask.params.temperature = 0.0;
                    ask.params.repetition_penalty = 3.0;
                    // Negative ones: else an id that was never generated would win, whatever is done to the others.
                    (ask.params.presence_penalty, ask.params.frequency_penalty) = (-2.0, -0.1);
                    (ask.history, ask.generated) = (tokens(), 2 * VOCAB_SIZE);
                }
                _ => {
                    ask.params.min_p = 0.9;
                    let bias = |id: usize| (id as u32, ((id * 37 + seed) % 101) as f32 / 5.0);
                    ask.params.logit_bias = (0..VOCAB_SIZE).filter(|id| id % 3 > 0).map(bias).collect();
                    if seed.is_multiple_of(2) {
                        (ask.params.repetition_penalty, ask.history) = (1.5, tokens());
                    }
                }
            }
            ask
        })
        .collect();
    let mut rows: Vec<FuseRow<'_>> = asks
        .iter()
        .enumerate()
        .map(|(step, ask)| FuseRow {
            slot: step / 5 % 2,
            step,
            rule: &rule,
            held: None,
            choice: ask.choice(),
        })
        .collect();
    // And some whose border lies below the best of all chunks; with nothing left out; and with the best in any chunk.
    let low = |seed| SamplingParams { temperature: 1.0, top_p: 0.9, seed, ..greedy() };
    let any = |seed| SamplingParams { presence_penalty: 0.1, seed, ..flat.clone() };
    let best = |id| SamplingParams { logit_bias: vec![(id, 60.0)], ..greedy() };
    let last = VOCAB_SIZE as u32 - 1;
    let more = (0..4).map(low).chain((0..12).map(any)).chain([0, 129, 300, 640, 1990, 2048, last].map(best));
    let more: Vec<Ask> = more.map(|params| Ask { params, ..Ask::default() }).collect();
    rows.extend(more.iter().enumerate().map(|(step, ask)| FuseRow {
        slot: if ask.params.logit_bias.is_empty() { 3 } else { 1 },
        step,
        rule: &rule,
        held: None,
        choice: ask.choice(),
    }));
    // And some whose border lies among few tokens that tie, so that one more is often drawn.
    let few = |seed| SamplingParams { top_p: 0.004 * (1 + seed) as f32, seed, ..flat.clone() };
    let tied: Vec<Ask> = (0..12).map(|seed| Ask { params: few(seed), ..Ask::default() }).collect();
    let row = |(step, ask)| FuseRow {
        slot: 0,
        step,
        rule: &FusionRule::Large,
        held: None,
        choice: Ask::choice(ask),
    };
    rows.extend(tied.iter().enumerate().map(row));
    // And some that the refined search alone decides.
    let drawn = Ask { params: SamplingParams { temperature: 1.0, ..greedy() }, ..Ask::default() };
    let refined = |step| FuseRow { slot: step % 3, step, rule: &rule, held: None, choice: drawn.choice() };
    rows.extend((0..6).map(refined));
    let (_, expected) = decided(&models, &rows, |_| {});
    assert!(expected.is_some());

    let mut changes: Vec<(&str, &str, u64)> = Vec::new();
    for (kernel, find, count) in [
        ("sample", "bar.sync", 0..64),
        ("sample", "membar", 0..2),
        // Not those of the first look at top-k, which only spares work, nor the digit that all ids share. The largest and the
        // lowest of a warp, and the upper halves of sums of weights, or the lower ones of counts: the others are nothing, or a
        // millionth.
        ("sample", "redux.sync", 0..3),
        ("sample", "redux.sync", 4..6),
        ("sample", "redux.sync", 8..9),
        ("sample", "redux.sync", 11..13),
        ("sample", "redux.sync", 16..17),
        // What the tokens in shared memory weigh only spares work, too, and the first look at top-p, but for its first
        // digit, which each lane holds back; as it does that digit of ids.
        ("sample", "atom", 0..3),
        ("sample", "atom", 6..8),
        ("sample", "atom", 9..13),
        ("sample", "atom", 14..16),
        // The best of chunks, of which there are two lanes' halves, and of what they drew; the first of the digits' sums.
        ("sample", "shfl.sync", 0..20),
        ("sample", "shfl.sync", 33..35),
        ("sample", "shfl.sync", 46..47),
        ("sample", "shfl.sync", 57..58),
        ("sample", "shfl.sync", 70..81),
        ("sample", "shfl.sync", 84..86),
        ("sample", "shfl.sync", 97..107),
        // The refined search's: tests/cuda_mutations.rs has the others.
        ("fuse_2", "bar.sync", 7..16),
    ] {
        changes.extend(count.map(|nth| (kernel, find, nth)));
    }
    let (mut survived, mut all) = (Vec::new(), 0);
    for (kernel, find, nth) in changes {
        let (found, decisions) = decided(&models, &rows, |device| device.mutate(kernel, find, nth, ""));
        all += usize::from(found > 0);
        if found > 0 && decisions == expected {
            survived.push(format!("{kernel}: {find} {nth}"));
        }
    }
    for (name, at) in [("vocab_stride", 64), ("vocab_size", 68), ("small_model", 72), ("first_expert", 76)] {
        all += 1;
        if decided(&models, &rows, |device| device.nudge("sample", at)).1 == expected {
            survived.push(format!("sample: {name}"));
        }
    }
    assert!(survived.is_empty(), "{survived:#?} of {all}");
    assert!(all >= 40, "{all}");
}
