//! The unfused search on the virtual GPU, beside the paper in f64 and beside the fused launch; and its counts.

use std::collections::{BTreeMap, BTreeSet};

use virtual_gpu::host::{self, Driver};

use super::*;
use crate::backend::cuda::{CudaFusion, DeviceLogits};
use crate::cli::bench::fusion::gpu::{Bed, Enqueue};
use crate::cli::bench::fusion::{Caches, rows, rule};
use crate::cli::bench::plain::Models;
use crate::fusion::reference::decide;
use crate::fusion::{Decision, FusionRule, Logits, ModelLogits};

const ORDERS: [Order; 2] = [Order::Loop, Order::Broadcast];

/// Random logits of a case, on a virtual GPU of their own.
struct Fixture {
    device: host::Gpu,
    case: Case,
    rule: FusionRule,
    models: Models,
    bed: Bed,
}

impl Fixture {
    fn new(case: Case) -> Self {
        let device = Driver::load().unwrap().device("a100").unwrap();
        // Blocks and warps come in any order.
        device.seed(5);
        let (models, rule) =
            (Models::new(case.vocab * case.batch, case.experts), rule(case.candidates).unwrap());
        let all: Vec<&[f32]> =
            [&models.large, &models.small].into_iter().chain(&models.experts).map(Vec::as_slice).collect();
        let bed = Bed::new(device.ordinal(), case, &rule, &all).unwrap();
        Self { device, case, rule, models, bed }
    }

    fn candidates(&self) -> &[f64] {
        let FusionRule::Dynamic(dynamic) = &self.rule else { panic!("{:?}", self.rule) };
        dynamic.grids[0].candidates()
    }

    /// What the unfused search finds, or what the device has to say.
    fn try_unfused(&self, order: Order) -> std::result::Result<Vec<Found>, String> {
        let search = || {
            let unfused = self.bed.unfused(self.case, self.candidates(), order)?;
            // SAFETY: the logits live as long as this; the virtual GPU checks every address before it is used.
            unsafe { unfused.launch()? };
            Ok(unfused.found()?)
        };
        let found = search().map_err(|error: anyhow::Error| error.to_string())?;
        match &self.device.reports()[..] {
            [] => Ok(found),
            [report, ..] => Err(format!("{report:?}")),
        }
    }

    fn unfused(&self, order: Order) -> Vec<Found> {
        self.try_unfused(order).unwrap()
    }

    /// What the fused launch decides.
    fn fused(&self) -> Vec<Decision> {
        let Case { vocab, experts, batch, .. } = self.case;
        let shape = DeviceLogits { rows: batch, vocab_size: vocab, stride: stride(vocab) };
        let mut fusion = CudaFusion::new(self.device.ordinal(), experts, shape).unwrap();
        let address = |model: usize| self.bed.logits.address() + 4 * (model * batch * stride(vocab)) as u64;
        let logits = ModelLogits {
            large: Some(address(0)),
            small: Some(address(1)),
            experts: (0..experts).map(|t| address(2 + t)).collect(),
        };
        let (rows, mut decisions) = (rows(self.case, &self.rule), Vec::new());
        // SAFETY: so many rows lie there, and nobody writes them.
        unsafe { fusion.fuse(&logits, std::ptr::null_mut(), &rows, &mut decisions).unwrap() };
        decisions.into_iter().map(Result::unwrap).collect()
    }

    fn logits(&self, row: usize) -> Logits<'_> {
        let ids = row * self.case.vocab..(row + 1) * self.case.vocab;
        Logits {
            large: Some(&self.models.large[ids.clone()]),
            small: Some(&self.models.small[ids.clone()]),
            experts: self.models.experts.iter().map(|expert| &expert[ids.clone()]).collect(),
        }
    }
}

/// How far a loss may be off where each KL term is by `delta`: each of the 2 T squares (k − t)² by 4 δ |k − t| + 4 δ².
fn loss_off(loss: f64, experts: usize, delta: f64) -> f64 {
    4.0 * delta * (2.0 * experts as f64 * loss).sqrt() + 8.0 * experts as f64 * delta * delta
}

#[test]
fn it_finds_what_the_paper_and_the_fused_launch_find() {
    let mut clear = 0;
    for (vocab, experts, candidates, batch) in [
        (2, 1, 2, 1),
        (7, 2, 5, 3),
        (1023, 1, 20, 2),
        (1500, 8, 3, 1),
        (4097, 3, 32, 2),
        (5000, 1, 20, 5),
        (32_000, 2, 4, 1),
    ] {
        let case = Case { vocab, experts, candidates, batch };
        let fixture = Fixture::new(case);
        let fused = fixture.fused();
        for order in ORDERS {
            for (row, found) in fixture.unfused(order).into_iter().enumerate() {
                let exact = decide(&fixture.logits(row), &fixture.rule, None, 0).unwrap();
                let (loss, margin) = (exact.loss.unwrap(), exact.margin.unwrap());
                let targets = exact.kl_expert_small.iter().chain(&exact.kl_small_expert).copied();
                let own = exact.kl_fused_large.into_iter().chain(exact.kl_large_fused);
                let largest = targets.chain(own).fold(0.0, f64::max);
                // Sums of f32 terms, of which a thread adds at most 32: 1e-5, as for the fused kernel.
                let off = loss_off(loss + margin, experts, 1e-5 * (1.0 + largest));
                let alpha = fixture.candidates()[found.candidate];
                let what = format!(
                    "{case:?} {order:?} row {row}: {found:?}, not {exact:?}",
                    exact = (&exact.alpha, loss)
                );
                assert!((f64::from(found.loss) - loss).abs() <= off, "{what} ± {off}");
                if margin > 2.0 * off {
                    clear += 1;
                    assert_eq!(
                        (Some(found.expert), alpha),
                        (exact.expert, exact.alpha[found.expert]),
                        "{what}"
                    );
                    assert_eq!(
                        (fused[row].expert, &fused[row].alpha),
                        (exact.expert, &exact.alpha),
                        "{what}"
                    );
                }
                // The same numbers in the same operations: where both take the same α, the token is the same.
                if (fused[row].expert, fused[row].alpha[found.expert]) == (Some(found.expert), alpha) {
                    assert_eq!(found.token, fused[row].argmax_fused, "{what}");
                    assert!((f64::from(found.loss) - fused[row].loss.unwrap()).abs() <= 2.0 * off, "{what}");
                }
            }
        }
    }
    // Of thirty rows: most leave no room for rounding.
    assert!(clear >= 24, "{clear}");
}

#[test]
fn launches_and_bytes_are_those_of_the_formulas() {
    let mut run = BTreeSet::new();
    for (vocab, experts, candidates, batch) in [(3000, 1, 20, 1), (2049, 3, 4, 2)] {
        let case = Case { vocab, experts, candidates, batch };
        let fixture = Fixture::new(case);
        fixture.device.clear();
        fixture.bed.fused().unwrap();
        let (gpu, stream) = fixture.bed.place();
        gpu.synchronize(stream).unwrap();
        let [launch] = &fixture.device.launches()[..] else { panic!("the fused search isn't one launch") };
        let moved = launch.counters.global_load_bytes + launch.counters.global_store_bytes;
        // Each block reads what it is to do, and each row's decision is a few hundred bytes.
        let slack = launch.counters.blocks * (512 + 12 * 23 * experts as u64) + batch as u64 * 4096;
        let formula = fixture.bed.fused_bytes() as u64;
        assert!((formula..=formula + slack).contains(&moved), "{case:?}: {moved}, not {formula} + {slack}");

        for order in ORDERS {
            fixture.device.clear();
            fixture.unfused(order);
            let launches = fixture.device.launches();
            run.extend(launches.iter().map(|launch| launch.kernel.clone()));
            let tensors = if order == Order::Loop { experts * candidates } else { experts };
            assert_eq!(launches.len(), 5 + 6 * experts + 7 * tensors, "{order:?}");
            let (mut moved, mut slack) = (0, 0);
            for launch in &launches {
                let c = &launch.counters;
                let bytes = c.global_load_bytes + c.global_store_bytes;
                // Numbers by the row: α and which candidate, for each warp; sums and losses.
                match launch.kernel.as_str() {
                    "loss" | "argmin" => slack += bytes,
                    "row_sum" | "argmax" => slack += 4 * c.blocks,
                    "tilt" => slack += 4 * c.warps,
                    "tilt_chosen" => slack += 8 * c.warps,
                    _ => {}
                }
                moved += bytes;
            }
            assert_eq!(moved - slack, Unfused::bytes(case) as u64, "{case:?} {order:?}");
        }
    }
    let image = IMAGES.iter().find(|(name, _)| *name == MODULE).unwrap().1;
    let entries = image.lines().filter_map(|line| line.split_once(".entry "));
    let shipped: BTreeSet<String> =
        entries.map(|(_, name)| name.trim_end_matches('(').trim().to_owned()).collect();
    assert_eq!(run, shipped);
}

#[test]
fn a_wrong_number_is_noticed() {
    // Bytes of `TensorArgs` and `LossArgs` in front of the number, where one more changes what is found.
    let numbers = [
        ("log_softmax", 40, "cols"),
        ("log_softmax", 44, "stride"),
        ("row_sum", 40, "cols"),
        ("row_sum", 44, "stride"),
        ("argmin", 40, "cols"),
        ("argmin", 44, "stride"),
        ("argmax", 44, "stride"),
        ("subtract", 44, "stride"),
        ("tilt", 44, "stride"),
        ("tilt", 52, "y_per"),
        ("tilt_chosen", 44, "stride"),
        ("tilt_chosen", 48, "x_per"),
        ("tilt_chosen", 52, "y_per"),
        ("kl_terms", 44, "stride"),
        ("kl_terms", 48, "x_per"),
        ("kl_terms", 52, "y_per"),
        ("loss", 36, "per"),
        ("loss", 40, "batch"),
        ("loss", 44, "experts"),
        ("loss", 48, "first"),
        ("loss", 52, "stride"),
    ];
    // Rows without padding, whose zeros would hide a row that is read too far; and experts whose last candidate isn't
    // theirs any more where each has one more.
    let case = Case { vocab: 304, experts: 4, candidates: 2, batch: 5 };
    let right = Fixture::new(case).unfused(Order::Broadcast);
    let unnoticed = numbers.into_iter().filter(|(kernel, at, _)| {
        let fixture = Fixture::new(case);
        fixture.device.nudge(kernel, *at);
        let found = fixture.try_unfused(Order::Broadcast);
        assert!(fixture.device.mutations() > 0, "{kernel} wasn't launched");
        found.as_ref() == Ok(&right)
    });
    assert_eq!(unnoticed.collect::<Vec<_>>(), []);
}

#[test]
fn both_searches_are_timed_by_events_and_a_device_without_time_tells_none() {
    const REPETITIONS: u16 = 3;
    let case = Case { vocab: 500, experts: 2, candidates: 3, batch: 2 };
    let mut fixture = Fixture::new(case);
    let unfused = fixture.bed.unfused(case, fixture.candidates(), Order::Loop).unwrap();
    let graph = fixture.bed.record(&unfused).unwrap();
    let launch_graph = |bed: &Bed| Ok(bed.place().0.launch_graph(&graph)?);
    let searches: [(u64, &Enqueue<'_>); 2] = [(1, &Bed::fused), (5 + 6 * 2 + 7 * 2 * 3, &launch_graph)];
    for (launches, search) in searches {
        // A search before each that is timed has warmed the caches, or a copy has emptied them.
        for (caches, runs, copies) in [(Caches::Warm, 2, 0), (Caches::Flushed, 1, 1)] {
            fixture.device.clear();
            let times = fixture.bed.time(caches, REPETITIONS, search).unwrap();
            assert_eq!(times, [None; REPETITIONS as usize]);
            let repetitions = u64::from(REPETITIONS);
            assert_eq!(fixture.device.launches().len() as u64, repetitions * runs * launches);
            assert_eq!(fixture.device.calls("cuEventElapsedTime"), repetitions);
            assert_eq!(fixture.device.calls("cuMemcpyDtoDAsync_v2"), repetitions * copies);
        }
    }
    // The graph found what single launches find.
    let found = unfused.found().unwrap();
    assert_eq!(found, fixture.unfused(Order::Loop));
}

/// The counts of docs/measurements.md: `cargo test --release --lib counts_of_the_measurements -- --ignored --nocapture`.
#[test]
#[ignore = "ten seconds: the gate runs it"]
#[allow(clippy::print_stdout, reason = "it prints what it counts")]
fn counts_of_the_measurements() {
    for (vocab, experts) in [(32_000, 1), (32_000, 4), (128_256, 1), (128_256, 4)] {
        let case = Case { vocab, experts, candidates: 20, batch: 1 };
        let fixture = Fixture::new(case);
        let count = |name: &str, run: &dyn Fn()| {
            fixture.device.clear();
            run();
            let launches = fixture.device.launches();
            let mut sums = BTreeMap::new();
            for launch in &launches {
                let c = &launch.counters;
                *sums.entry("bytes").or_insert(0) += c.global_load_bytes + c.global_store_bytes;
                *sums.entry("sectors").or_insert(0) += 32 * (c.global_load_sectors + c.global_store_sectors);
                *sums.entry("warp instructions").or_insert(0) += c.warp_instructions;
            }
            println!("{vocab}, {experts}: {name}: {} launches, {sums:?}", launches.len());
            (launches.len(), sums["bytes"])
        };
        let fused = count("fused", &|| {
            fixture.bed.fused().unwrap();
            let (gpu, stream) = fixture.bed.place();
            gpu.synchronize(stream).unwrap();
        });
        let looped = count("loop", &|| drop(fixture.unfused(Order::Loop)));
        let broadcast = count("broadcast", &|| drop(fixture.unfused(Order::Broadcast)));
        assert_eq!((fused.0, looped.0 > 2 * broadcast.0), (1, true));
        // Of each candidate at least four tensors are written and read, where the fused search reads three in all.
        assert!(looped.1 > 80 * fused.1 && broadcast.1 > 80 * fused.1, "{fused:?} {looped:?} {broadcast:?}");
    }
}
