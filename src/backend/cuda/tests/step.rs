//! step.cu: what turns one step into the next.

use super::bed::{Bed, Found, Rng, assert_noticed};
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::fusion::{DeviceResult, DeviceRow, DeviceSample};
use crate::backend::cuda::kernels::{AdvanceArgs, StampArgs, StepRows};

const ONE: Grid = Grid { blocks: (1, 1, 1), threads: (256, 1, 1), shared: 0 };
const VOCAB_SIZE: u32 = 1000;
const UNTOUCHED: u32 = 0xDEAD;

/// A time that no clock says.
const NEVER: u64 = u64::MAX;

/// A group's lists on the host: token, position, wanted slot; a number more than there are rows.
struct Group {
    position: Vec<u32>,
    wanted: Vec<u32>,
}

impl Group {
    /// Rows of `models` models, `rows` in all, in any slots.
    fn new(rng: &mut Rng, rows: usize, models: usize, slots: usize) -> Self {
        let mut some = |below: usize| (0..=rows).map(|_| rng.below(below) as u32).collect();
        Self { position: some(4000), wanted: some(models * slots) }
    }
}

/// Tokens that a history has room for.
const HISTORY: usize = 5;

/// Rows of fusion of every kind, and what samples them; the last one isn't fused.
struct Fused {
    rows: Vec<DeviceRow>,
    samples: Vec<DeviceSample>,
    histories: Vec<u32>,
}

impl Fused {
    fn new(rng: &mut Rng, count: usize) -> Self {
        let mut fused = Self { rows: Vec::new(), samples: Vec::new(), histories: Vec::new() };
        for index in 0..=count {
            let steps = [u64::from(u32::MAX), u64::MAX, rng.below(100) as u64];
            let step = steps[index % steps.len()];
            fused.rows.push(DeviceRow {
                experts: rng.below(9) as u32,
                every: [0, 1, 2, 3][index % 4],
                held: (index / 4 % 2) as u32,
                coefficient: std::array::from_fn(|_| rng.below(100) as f32),
                step: [step as u32, (step >> 32) as u32],
                ..DeviceRow::default()
            });
            fused.samples.push(DeviceSample {
                active: (index % 3 > 0) as u32,
                // Whether it is remembered; where, is known later.
                history: (index % 3 > 1) as u64,
                history_len: rng.below(HISTORY) as u32,
                ..DeviceSample::default()
            });
            fused.histories.extend([UNTOUCHED; HISTORY]);
        }
        fused
    }

    /// The first `count` one step on, after `results`.
    fn advance(&mut self, count: usize, results: &[DeviceResult]) {
        for (index, (row, result)) in self.rows.iter_mut().zip(results).take(count).enumerate() {
            let step = (u64::from(row.step[1]) << 32 | u64::from(row.step[0])).wrapping_add(1);
            row.step = [step as u32, (step >> 32) as u32];
            if row.held == 0 {
                for (to, alpha) in row.coefficient.iter_mut().zip(result.alpha).take(row.experts as usize) {
                    *to = alpha as f32;
                }
            }
            row.held = if row.every == 0 { 1 } else { u32::from(step % u64::from(row.every) != 0) };
            let sample = &mut self.samples[index];
            if sample.active == 1 && sample.history != 0 {
                self.histories[index * HISTORY + sample.history_len as usize] = result.token.min(VOCAB_SIZE);
                sample.history_len += 1;
            }
        }
    }
}

/// One step of groups of these rows, with `count` rows of fusion.
fn advance(bed: &Bed, rows: [usize; 2], slots: usize, count: usize) -> Found {
    let rng = &mut Rng((rows[0] * 100 + rows[1]) as u64);
    let groups = [Group::new(rng, rows[0], 1, slots), Group::new(rng, rows[1], 4, slots)];
    let mut results = vec![DeviceResult::default(); slots];
    for (slot, result) in results.iter_mut().enumerate() {
        // One in five failed, which says a token that there isn't: one past the last, or far from it.
        let tokens = [rng.below(VOCAB_SIZE as usize) as u32, VOCAB_SIZE - 1, 0, VOCAB_SIZE, u32::MAX];
        result.token = tokens[slot % tokens.len()];
        result.alpha = std::array::from_fn(|_| rng.below(1000) as f64 / 100.0);
    }
    let mut fused = Fused::new(rng, count);
    let histories = bed.put(&fused.histories);
    for (index, sample) in fused.samples.iter_mut().enumerate().filter(|(_, sample)| sample.history != 0) {
        sample.history = histories.address() + (index * HISTORY * size_of::<u32>()) as u64;
    }
    let token = groups.each_ref().map(|group| bed.put(&vec![UNTOUCHED; group.position.len()]));
    let position = groups.each_ref().map(|group| bed.put(&group.position));
    let wanted = groups.each_ref().map(|group| bed.put(&group.wanted));
    let (of_results, on_device, samples) = (bed.put(&results), bed.put(&fused.rows), bed.put(&fused.samples));
    let stamps = bed.put(&[NEVER, 7]);
    let of_group = |index: usize| StepRows {
        token: token[index].address(),
        position: position[index].address(),
        wanted_slot: wanted[index].address(),
        rows: rows[index] as u64,
    };
    let args = AdvanceArgs {
        large: of_group(0),
        small: of_group(1),
        results: of_results.address(),
        fused: on_device.address(),
        samples: samples.address(),
        stamps: stamps.address(),
        slots: slots as u32,
        fused_rows: count as u32,
        vocab_size: VOCAB_SIZE,
    };
    let kernel = bed.gpu.kernel("step", "advance").unwrap();
    bed.launch(&kernel, ONE, &args)?;
    let same = |what: &str, found: &[u32], expected: &[u32]| match found == expected {
        true => Ok(()),
        false => Err(format!("{what} of {rows:?}: {found:?}, not {expected:?}")),
    };
    for (index, group) in groups.iter().enumerate() {
        let chosen = |slot: &u32| results[*slot as usize % slots].token;
        let mut tokens: Vec<u32> = group.wanted.iter().map(chosen).collect();
        tokens.iter_mut().filter(|token| **token >= VOCAB_SIZE).for_each(|token| *token = 0);
        let mut positions: Vec<u32> = group.position.iter().map(|position| position + 1).collect();
        tokens[rows[index]] = UNTOUCHED;
        positions[rows[index]] -= 1;
        same("tokens", &bed.back(&token[index])?, &tokens)?;
        same("positions", &bed.back(&position[index])?, &positions)?;
        same("wanted slots", &bed.back(&wanted[index])?, &group.wanted)?;
    }
    fused.advance(count, &results);
    same("histories", &bed.back(&histories)?, &fused.histories)?;
    if bed.back(&on_device)? != fused.rows || bed.back(&samples)? != fused.samples {
        return Err(format!("rows of fusion: {:?}, not {:?}", bed.back(&on_device), fused.rows));
    }
    match bed.back(&stamps)?[..] {
        [begun, 7] if begun != NEVER => Ok(()),
        ref other => Err(format!("stamps {other:?}")),
    }
}

#[test]
fn tokens_positions_and_steps_go_on() {
    for (rows, slots, fused) in
        [([1, 0], 1, 1), ([0, 3], 5, 2), ([16, 48], 16, 16), ([300, 513], 600, 600), ([0, 0], 1, 0)]
    {
        advance(&Bed::new(), rows, slots, fused).unwrap();
    }
}

#[test]
fn a_wrong_number_is_noticed() {
    let numbers = [
        (24, "rows of the large model"),
        (56, "rows of the group"),
        (96, "slots"),
        (100, "fused_rows"),
        (104, "vocab_size"),
    ];
    for (at, name) in numbers {
        assert_noticed("advance", at, name, |bed| advance(bed, [9, 20], 7, 3));
    }
}

#[test]
fn a_stamp_is_the_time() {
    let bed = Bed::new();
    let stamps = bed.put(&[3, NEVER, 5]);
    let kernel = bed.gpu.kernel("step", "stamp").unwrap();
    let args = StampArgs { to: stamps.address() + size_of::<u64>() as u64 };
    bed.launch(&kernel, Grid { threads: (1, 1, 1), ..ONE }, &args).unwrap();
    let found = bed.back(&stamps).unwrap();
    assert!(found[0] == 3 && found[1] != NEVER && found[2] == 5, "{found:?}");
}
