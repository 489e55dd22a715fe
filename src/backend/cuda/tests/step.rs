//! step.cu: what turns one step into the next.

use super::bed::{Bed, Found, Rng, assert_noticed};
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::fusion::{DeviceResult, DeviceRow};
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

/// One step of groups of these rows, with `fused` rows of fusion.
fn advance(bed: &Bed, rows: [usize; 2], slots: usize, fused: usize) -> Found {
    let rng = &mut Rng((rows[0] * 100 + rows[1]) as u64);
    let groups = [Group::new(rng, rows[0], 1, slots), Group::new(rng, rows[1], 4, slots)];
    let mut results = vec![DeviceResult::default(); slots];
    for (slot, result) in results.iter_mut().enumerate() {
        // One in five failed, which says a token that there isn't: one past the last, or far from it.
        let tokens = [rng.below(VOCAB_SIZE as usize) as u32, VOCAB_SIZE - 1, 0, VOCAB_SIZE, u32::MAX];
        result.token = tokens[slot % tokens.len()];
    }
    // The step is the last eight bytes of a row. Some carry, and the last row isn't fused.
    let words = size_of::<DeviceRow>() / size_of::<u32>();
    let mut of_fused: Vec<u32> = (0..(fused + 1) * words).map(|_| rng.next() as u32).collect();
    for row in of_fused.chunks_mut(words).step_by(2) {
        row[words - 2] = u32::MAX;
    }
    if let Some(last) = of_fused.chunks_mut(words).nth(2) {
        last[words - 1] = u32::MAX;
    }
    let token = groups.each_ref().map(|group| bed.put(&vec![UNTOUCHED; group.position.len()]));
    let position = groups.each_ref().map(|group| bed.put(&group.position));
    let wanted = groups.each_ref().map(|group| bed.put(&group.wanted));
    let (of_results, on_device) = (bed.put(&results), bed.put(&of_fused));
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
        stamps: stamps.address(),
        slots: slots as u32,
        fused_rows: fused as u32,
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
    for row in of_fused.chunks_mut(words).take(fused) {
        let step = (u64::from(row[words - 1]) << 32 | u64::from(row[words - 2])).wrapping_add(1);
        row[words - 2] = step as u32;
        row[words - 1] = (step >> 32) as u32;
    }
    same("rows of fusion", &bed.back(&on_device)?, &of_fused)?;
    match bed.back(&stamps)?[..] {
        [begun, 7] if begun != NEVER => Ok(()),
        ref other => Err(format!("stamps {other:?}")),
    }
}

#[test]
fn tokens_positions_and_steps_go_on() {
    for (rows, slots, fused) in
        [([1, 0], 1, 1), ([0, 3], 5, 2), ([16, 48], 16, 16), ([300, 513], 40, 600), ([0, 0], 1, 0)]
    {
        advance(&Bed::new(), rows, slots, fused).unwrap();
    }
}

#[test]
fn a_wrong_number_is_noticed() {
    let numbers = [
        (24, "rows of the large model"),
        (56, "rows of the group"),
        (88, "slots"),
        (92, "fused_rows"),
        (96, "vocab_size"),
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
