//! The kernel against the CPU's fusion, which is held against the f64 definition, on the virtual GPU with its
//! sanitizers on.

mod sampling;

use virtual_gpu::host::Gpu as Device;

use super::*;
use crate::backend::Choice;
use crate::backend::cpu::fuse::{Fuser, sequential};
use crate::backend::cuda::tests::virtual_gpu;
use crate::backend::cuda::weights::stride;
use crate::fusion::{AlphaGrid, DynamicRule, FusionRule, Logits, Objective};
use crate::sampling::SamplingParams;

/// A large model, a small one, and experts.
fn roles(experts: usize) -> Roles {
    Roles([Role::Large, Role::Small].into_iter().chain((0..experts).map(Role::Expert)).collect())
}

/// Uniform numbers in −½ … ½.
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    }

    fn normal(&mut self, scale: f32) -> f32 {
        (self.next() + self.next() + self.next() + self.next()) * 1.7 * scale
    }
}

/// `(models, slots, vocab_size)`: a small model that resembles the large one, experts that resemble the small one.
fn random_logits(experts: usize, slots: usize, vocab_size: usize, seed: u64) -> Vec<Vec<Vec<f32>>> {
    let mut uniform = Uniform(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut models = vec![vec![vec![0.0; vocab_size]; slots]; 2 + experts];
    for slot in 0..slots {
        for token in 0..vocab_size {
            let large = uniform.normal(3.0);
            let small = 0.8 * large + uniform.normal(1.5);
            models[0][slot][token] = large;
            models[1][slot][token] = small;
            for expert in &mut models[2..] {
                expert[slot][token] = small + uniform.normal(1.0);
            }
        }
    }
    models
}

/// Logits on a virtual GPU of their own.
struct Bed {
    device: Device,
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    place: LogitsPlace,
    models: usize,
    _alive: (Buffer<f32>, Buffer<u64>),
}

impl Bed {
    /// With the logits of a large model, a small one and experts.
    fn new(profile: &str, models: &[Vec<Vec<f32>>]) -> Self {
        let (slots, vocab_size) = (models[0].len(), models[0][0].len());
        let (device, gpu) = virtual_gpu(profile);
        let stream = gpu.stream().unwrap();
        let vocab_stride = stride(vocab_size);
        // So much between the rows that whoever reads it chooses it. (The sampler passes over NaN.)
        let mut numbers = vec![1e9; models.len() * slots * vocab_stride];
        for (row, to) in models.iter().flatten().zip(numbers.chunks_mut(vocab_stride)) {
            to[..vocab_size].copy_from_slice(row);
        }
        let logits = gpu.upload(&stream, &numbers, "logits").unwrap();
        let address =
            |model: usize| logits.address() + (model * slots * vocab_stride * size_of::<f32>()) as u64;
        let table: Vec<u64> = (0..models.len()).map(address).collect();
        let table = gpu.upload(&stream, &table, "logits").unwrap();
        let place = LogitsPlace {
            address: logits.address(),
            table: table.address(),
            vocab_size,
            vocab_stride,
            slots,
        };
        Self { device, gpu, stream, place, models: models.len(), _alive: (logits, table) }
    }

    fn fuser(&self) -> Result<DeviceFuser> {
        DeviceFuser::new(&self.gpu, &self.stream, roles(self.models - 2), self.place)
    }

    fn fuse(&self, fuser: &mut DeviceFuser, rows: &[FuseRow<'_>]) -> Result<Vec<Result<Decision>>> {
        fuser.fuse(&self.gpu, &self.stream, self.place.table, rows)
    }
}

/// What lies in outputs before a launch, in every byte: no number that a kernel finds.
const POISON: u8 = 0xA5;

/// Fills an output.
fn poison<T: DeviceRepr + Copy + Default>(bed: &Bed, buffer: &mut Buffer<T>) {
    let mut number = T::default();
    // SAFETY: outputs are plain numbers, which any bytes are.
    unsafe { std::ptr::from_mut(&mut number).write_bytes(POISON, 1) };
    bed.gpu.write(&bed.stream, buffer, 0, &vec![number; buffer.len()]).unwrap();
}

/// Nothing was written but what `may` names.
fn assert_untouched<T: DeviceRepr + Copy + Default>(
    bed: &Bed,
    (what, buffer): (&str, &Buffer<T>),
    may: impl Fn(usize) -> bool,
) {
    let mut found = vec![T::default(); buffer.len()];
    bed.gpu.read(&bed.stream, buffer, 0, &mut found).unwrap();
    for (at, number) in found.iter().enumerate().filter(|(at, _)| !may(*at)) {
        // SAFETY: all its bytes came from the GPU, and they live as long as the number.
        let bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(number).cast::<u8>(), size_of::<T>()) };
        assert!(bytes.iter().all(|&byte| byte == POISON), "{what}: number {at} was written");
    }
}

impl DeviceFuser {
    /// Fills all that the kernels write.
    fn poison(&mut self, bed: &Bed) {
        poison(bed, &mut self.results);
        poison(bed, &mut self.partial);
        poison(bed, &mut self.drawn);
        poison(bed, &mut self.fused);
        poison(bed, &mut self.chunks);
    }

    /// Whether the kernels wrote only what belongs to `rows`, and left what must be as it was between launches.
    fn assert_in_bounds(&self, bed: &Bed, rows: &[FuseRow<'_>]) {
        let encoded: Vec<Encoded> = rows.iter().filter_map(|row| self.encode(row).ok()).collect();
        let lanes = encoded.iter().map(Encoded::most_lanes).max().unwrap_or(0);
        let sampled = encoded.iter().any(|row| row.sampled.is_some());
        let rows = encoded.len();
        assert_untouched(bed, ("results", &self.results), |row| row < rows);
        let row_of = |at| at / (self.slices * self.lane_stride);
        assert_untouched(bed, ("states", &self.partial), |at| {
            row_of(at) < rows && at % self.lane_stride < lanes
        });
        assert_untouched(bed, ("what was drawn", &self.drawn), |at| {
            let mut of_launches = encoded.iter().skip(row_of(at)).step_by(self.capacity);
            of_launches.any(|row| row.row.scale > 0.0) && at % self.lane_stride < lanes
        });
        let sampled_rows = if sampled { rows } else { 0 };
        let slices = sampled_slices(&self.place);
        assert_untouched(bed, ("fused logits", &self.fused), |at| {
            at / (slices * SAMPLED_SLICE) < sampled_rows
        });
        assert_untouched(bed, ("chunks", &self.chunks), |at| at / (slices * SAMPLED_CHUNKS) < sampled_rows);
        let mut tickets = vec![1; self.tickets.len()];
        bed.gpu.read(&bed.stream, &self.tickets, 0, &mut tickets).unwrap();
        assert!(tickets.iter().all(|&number| number == 0));
        let mut not_finite = vec![0; self.not_finite.len()];
        bed.gpu.read(&bed.stream, &self.not_finite, 0, &mut not_finite).unwrap();
        assert!(not_finite.iter().all(|&number| number == u64::MAX));
    }
}

/// What the kernel and the CPU decide, for one row a slot.
struct Both {
    device: Vec<Result<Decision>>,
    host: Vec<Result<Decision>>,
    launches: usize,
}

fn fuse_both(models: &[Vec<Vec<f32>>], rows: &[FuseRow<'_>]) -> Both {
    let bed = Bed::new("a100", models);
    let mut fuser = bed.fuser().unwrap();
    fuser.poison(&bed);
    bed.device.clear();
    let on_device = bed.fuse(&mut fuser, rows).unwrap();
    let launches = bed.device.launches().len();
    fuser.assert_in_bounds(&bed, rows);
    // The launch leaves tickets as it found them: it can be repeated, and gives the same, in another order of blocks and warps.
    bed.device.seed(7);
    let again = bed.fuse(&mut fuser, rows).unwrap();
    for (first, second) in on_device.iter().zip(&again) {
        assert_eq!(first.as_ref().ok(), second.as_ref().ok());
    }
    assert_eq!(bed.device.reports(), []);
    let of_row = |row: usize| Logits {
        large: Some(&models[0][rows[row].slot]),
        small: Some(&models[1][rows[row].slot]),
        experts: models[2..].iter().map(|expert| &expert[rows[row].slot][..]).collect(),
    };
    let mut host = Vec::new();
    Fuser::new().fuse(&mut sequential, rows, &of_row, &mut host);
    Both { device: on_device, host, launches }
}

/// Both are f32 sums of up to a few thousand terms a part, with logits of the order of ten: 1e-6 of rounding in each
/// logarithm, and twice that in a difference.
fn assert_close(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()) || a == b, "{what}: {a} and {b}");
}

fn assert_alike(a: &Decision, b: &Decision, what: &str) {
    assert_eq!((a.token, a.argmax_fused), (b.token, b.argmax_fused), "{what}");
    assert_eq!((a.expert, &a.alpha), (b.expert, &b.alpha), "{what}");
    assert_eq!((a.argmax_large, &a.argmax_expert), (b.argmax_large, &b.argmax_expert), "{what}");
    let optional = |x: Option<f64>| x.unwrap_or(f64::MAX);
    let pairs = [
        (a.logprob_fused, b.logprob_fused),
        (optional(a.loss), optional(b.loss)),
        (optional(a.kl_fused_large), optional(b.kl_fused_large)),
        (optional(a.kl_large_fused), optional(b.kl_large_fused)),
        (optional(a.logprob_large), optional(b.logprob_large)),
        (optional(a.logprob_small), optional(b.logprob_small)),
    ];
    for (index, (a, b)) in pairs.into_iter().enumerate() {
        assert_close(a, b, &format!("{what}, number {index}"));
    }
    for (a, b) in [
        (&a.kl_expert_small, &b.kl_expert_small),
        (&a.kl_small_expert, &b.kl_small_expert),
        (&a.logprob_expert, &b.logprob_expert),
    ] {
        assert_eq!(a.len(), b.len(), "{what}");
        a.iter().zip(b.iter()).for_each(|(a, b)| assert_close(*a, *b, what));
    }
}

fn greedy() -> SamplingParams {
    SamplingParams::default()
}

fn sample(params: &SamplingParams) -> Choice<'_> {
    Choice::Sample { params, history: &[], generated: 0, banned: &[] }
}

#[test]
fn every_rule_decides_as_on_the_cpu() {
    let params = greedy();
    for (experts, vocab_size) in [(1, 1), (1, 31), (2, 111), (8, 300), (1, 3000), (3, 2049)] {
        let models = random_logits(experts, 9, vocab_size, (experts * 1000 + vocab_size) as u64);
        let uneven = AlphaGrid::new(-0.5, 2.6, 0.1, true).unwrap();
        let grids =
            DynamicRule { grids: (0..experts).map(|_| uneven.clone()).collect(), ..DynamicRule::default() };
        let rules = [
            FusionRule::default(),
            FusionRule::Dynamic(DynamicRule { objective: Objective::Forward, ..DynamicRule::default() }),
            FusionRule::Dynamic(DynamicRule { objective: Objective::Reverse, ..grids }),
            FusionRule::Static((0..experts).map(|t| 1.3 - 0.4 * t as f64).collect()),
            FusionRule::Large,
            FusionRule::Small,
            FusionRule::Expert(experts - 1),
            FusionRule::default(),
            FusionRule::default(),
        ];
        let rows: Vec<FuseRow<'_>> = rules
            .iter()
            .enumerate()
            .map(|(slot, rule)| FuseRow {
                slot,
                step: slot,
                rule,
                held: (slot == 7).then_some((experts - 1, 0.7)),
                choice: if slot == 8 { Choice::Forced((vocab_size / 2) as u32) } else { sample(&params) },
            })
            .collect();
        let Both { device, host, launches } = fuse_both(&models, &rows);
        assert_eq!(launches, 1, "all rows, whatever they ask for");
        for (slot, (device, host)) in device.iter().zip(&host).enumerate() {
            let what = format!("{experts} experts, {vocab_size} tokens, row {slot}");
            assert_alike(device.as_ref().unwrap(), host.as_ref().unwrap(), &what);
        }
    }
}

#[test]
fn the_identities_hold() {
    let params = greedy();
    let rule = FusionRule::default();
    let mut models = random_logits(1, 3, 700, 5);
    // Row 0: large = small, so P̃ = Q_t at α = 1; row 1: expert = small, so α = 0; row 2: two constants added.
    models[0][0] = models[1][0].clone();
    models[2][1] = models[1][1].clone();
    let row = |slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice: sample(&params) };
    let both = fuse_both(&models, &[row(0), row(1), row(2)]);
    let decisions: Vec<_> = both.device.iter().map(|decision| decision.as_ref().unwrap().clone()).collect();
    assert_eq!(decisions[0].alpha[0], 1.0);
    assert!(decisions[0].loss.unwrap() < 1e-9);
    assert_eq!(decisions[0].argmax_fused, decisions[0].argmax_expert[0]);
    assert_eq!((decisions[1].alpha[0], decisions[1].loss), (0.0, Some(0.0)));
    assert_eq!(decisions[1].argmax_fused, decisions[1].argmax_large.unwrap());
    models[0][2].iter_mut().for_each(|x| *x += 8.0);
    models[2][2].iter_mut().for_each(|x| *x -= 16.0);
    let moved = fuse_both(&models, &[row(2)]).device.remove(0).unwrap();
    assert_eq!((moved.token, &moved.alpha), (decisions[2].token, &decisions[2].alpha));
    assert_close(moved.loss.unwrap(), decisions[2].loss.unwrap(), "a constant changes nothing");
}

#[test]
fn excluded_and_broken_logits() {
    let params = greedy();
    let rule = FusionRule::default();
    let mut models = random_logits(2, 4, 333, 8);
    // Row 0: the best tokens are excluded by any of the models; row 1: NaN; row 2: nothing is left; row 3: +∞.
    let mut order: Vec<usize> = (0..333).collect();
    order.sort_by(|&a, &b| models[0][0][b].total_cmp(&models[0][0][a]));
    for (model, &token) in models.iter_mut().zip(&order) {
        model[0][token] = f32::NEG_INFINITY;
    }
    models[3][1][200] = f32::NAN;
    models[1][2].fill(f32::NEG_INFINITY);
    models[0][3][5] = f32::INFINITY;
    let row = |slot| FuseRow { slot, step: 6, rule: &rule, held: None, choice: sample(&params) };
    let both = fuse_both(&models, &[row(0), row(1), row(2), row(3)]);
    assert_alike(both.device[0].as_ref().unwrap(), both.host[0].as_ref().unwrap(), "excluded");
    let not_finite = |decision: &Result<Decision>| match decision {
        Err(Error::NotFinite { role, step, token, .. }) => Some((*role, *step, *token)),
        _ => None,
    };
    assert_eq!(not_finite(&both.device[1]), Some((Role::Expert(1), 6, 200)));
    assert!(matches!(both.device[2], Err(Error::NoCandidate { step: 6 })), "{:?}", both.device[2]);
    assert_eq!(not_finite(&both.device[3]), Some((Role::Large, 6, 5)));
    for (device, host) in both.device.iter().zip(&both.host).skip(1) {
        assert_eq!(not_finite(device), not_finite(host));
    }
}

#[test]
fn wide_logits_and_differences() {
    let params = greedy();
    let rule = FusionRule::default();
    let mut models = random_logits(1, 2, 500, 11);
    // Logits up to 1e4, differences of hundreds: far from any f32 exponential's range.
    for (number, model) in models.iter_mut().enumerate() {
        model[0].iter_mut().for_each(|x| *x *= 1000.0);
        model[1].iter_mut().enumerate().for_each(|(i, x)| *x += (i % 7) as f32 * 60.0 * number as f32);
    }
    let row = |slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice: sample(&params) };
    let both = fuse_both(&models, &[row(0), row(1)]);
    for (device, host) in both.device.iter().zip(&both.host) {
        let (device, host) = (device.as_ref().unwrap(), host.as_ref().unwrap());
        // f32 holds logits of 1e4 to 5e-4, and each number is a difference of a few; the loss is flat within that, so
        // α itself may differ.
        let (a, b) = (device.loss.unwrap().sqrt(), host.loss.unwrap().sqrt());
        assert!((a - b).abs() < 5e-3 * (1.0 + b), "{a} and {b}");
    }
}

#[test]
fn the_same_seed_draws_the_same_token() {
    let rule = FusionRule::default();
    let models = random_logits(2, 1, 1500, 21);
    let params: Vec<SamplingParams> = (0..24)
        .map(|seed| SamplingParams {
            temperature: 0.3 + 0.1 * (seed % 12) as f32,
            seed: seed * 77 + 1,
            ..greedy()
        })
        .collect();
    let rows: Vec<FuseRow<'_>> = params
        .iter()
        .enumerate()
        .map(|(step, params)| FuseRow { slot: 0, step, rule: &rule, held: None, choice: sample(params) })
        .collect();
    // The device holds one row for each slot in a launch, so these take turns.
    let both = fuse_both(&models, &rows);
    let tokens = |decisions: &[Result<Decision>]| -> Vec<u32> {
        decisions.iter().map(|decision| decision.as_ref().unwrap().token).collect()
    };
    let drawn = tokens(&both.device);
    assert_eq!(drawn, tokens(&both.host));
    let distinct: std::collections::BTreeSet<_> = drawn.iter().collect();
    assert!(distinct.len() > 12, "24 draws from a flat distribution: {drawn:?}");
}

#[test]
fn each_logit_is_read_once() {
    let params = greedy();
    let rule = FusionRule::default();
    for (experts, vocab_size, most) in [(1, 32_000, 1.3), (2, 32_000, 1.3)] {
        let models = random_logits(experts, 1, vocab_size, 3);
        let row = FuseRow { slot: 0, step: 0, rule: &rule, held: None, choice: sample(&params) };
        let bed = Bed::new("h100", &models);
        let mut fuser = bed.fuser().unwrap();
        bed.device.clear();
        bed.fuse(&mut fuser, &[row]).unwrap().remove(0).unwrap();
        let launches = bed.device.launches();
        assert_eq!(launches.len(), 1);
        let counters = launches[0].counters;
        let needed = ((2 + experts) * vocab_size * size_of::<f32>()) as f64;
        let moved = (counters.global_load_bytes + counters.global_store_bytes) as f64;
        assert!(
            moved >= needed && moved <= most * needed,
            "{experts} experts: {} of {needed}",
            moved / needed
        );
    }
}

#[test]
fn logits_of_a_caller_are_fused_where_they_lie() {
    // Rows of whole vectors, and others.
    for stride in [1504, 1501] {
        fuse_logits_of_a_caller(stride);
    }
}

/// Logits of a stream and a stride of their own.
fn fuse_logits_of_a_caller(stride: usize) {
    use crate::backend::cuda::{CudaFusion, DeviceLogits};
    use crate::fusion::ModelLogits;

    let (experts, rows, vocab_size) = (2, 3, 1500);
    let models = random_logits(experts, rows, vocab_size, 11);
    let (device, gpu) = virtual_gpu("h100");
    // A stream that isn't ours, with work in it that hasn't run.
    let theirs = gpu.stream().unwrap();
    let buffers: Vec<_> = models
        .iter()
        .map(|model| {
            let mut numbers = vec![f32::NAN; rows * stride];
            for (row, to) in model.iter().zip(numbers.chunks_mut(stride)) {
                to[..vocab_size].copy_from_slice(row);
            }
            gpu.upload(&theirs, &numbers, "their logits").unwrap()
        })
        .collect();
    let logits = ModelLogits {
        large: Some(buffers[0].address()),
        small: Some(buffers[1].address()),
        experts: buffers[2..].iter().map(|buffer| buffer.address()).collect(),
    };
    let shape = DeviceLogits { rows, vocab_size, stride };
    let mut fusion = CudaFusion::new(gpu.ordinal(), experts, shape).unwrap();
    let (params, rule) = (greedy(), FusionRule::default());
    let row = |slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice: sample(&params) };
    let fused: Vec<FuseRow<'_>> = [2, 0, 1].map(row).into();
    let (mut found, after) = (Vec::new(), theirs.cu_stream().cast());
    device.clear();
    // SAFETY: the buffers live, with three rows each; the stream is of the same context.
    unsafe { fusion.fuse(&logits, after, &fused, &mut found) }.unwrap();
    assert_eq!(device.launches().len(), 1);
    let expected = fuse_both(&models, &fused).host;
    for (slot, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_alike(found.as_ref().unwrap(), expected.as_ref().unwrap(), &format!("row {slot}"));
    }
    assert_eq!(device.reports(), []);

    // What can't be is refused before anything is launched.
    // SAFETY: as above.
    let message = unsafe { fusion.fuse(&logits, after, &[row(3)], &mut found) }.unwrap_err().to_string();
    assert!(message.contains("below 3"), "{message}");
    assert_eq!(device.launches().len(), 1);
    // A truncated distribution takes one more.
    let top_k = SamplingParams { top_k: 3, temperature: 1.0, ..greedy() };
    let truncated = [FuseRow { choice: sample(&top_k), ..row(1) }];
    // SAFETY: as above.
    unsafe { fusion.fuse(&logits, after, &truncated, &mut found) }.unwrap();
    assert_eq!(device.launches().len(), 3);
    let expected = fuse_both(&models, &truncated).host;
    assert_alike(found[0].as_ref().unwrap(), expected[0].as_ref().unwrap(), "truncated");
    let narrow = DeviceLogits { stride: 1000, ..shape };
    assert!(CudaFusion::new(gpu.ordinal(), experts, narrow).is_err());
}
