//! What the tests of single kernels share: a virtual GPU, buffers with guards, numbers that are hard to sum, and what
//! rounding may cost.
//!
//! A test makes a kernel's arguments as the engine's launcher does, and compares every number of its outputs with a
//! plain f64 sum, or with what lay there before where the kernel must not write. It says what is wrong instead of
//! failing, so that another test can break an argument and see that it is found.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};
use virtual_gpu::host;

use super::virtual_gpu;
use crate::backend::cuda::device::{Gpu, Grid, Kernel};
use crate::backend::cuda::images;
use crate::backend::cuda::memory::Buffer;
use crate::backend::cuda::weights::stride;
use crate::weights::Dtype;

/// Nothing, or what is wrong.
pub(super) type Found = Result<(), String>;

/// Half a unit in the last place of an f32 near one: what one rounding costs.
pub(super) const ROUNDING: f64 = 1.0 / (1_u64 << 24) as f64;

/// What lies where nobody has written: a NaN that no sum gives.
const POISON: u32 = 0xFFC0_DEAD;

/// Numbers before and after each output.
const GUARD: usize = 64;

/// All dtypes of weights.
pub(super) const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// A GPU of its own.
pub(super) struct Bed {
    pub(super) device: host::Gpu,
    pub(super) gpu: Arc<Gpu>,
    pub(super) stream: Arc<CudaStream>,
}

impl Bed {
    pub(super) fn new() -> Self {
        let (device, gpu) = virtual_gpu("a100");
        // A loop without end ends here.
        device.budget(50_000_000);
        // Blocks and warps come in any order.
        device.seed(11);
        let stream = gpu.stream().unwrap();
        Self { device, gpu, stream }
    }

    /// A copy of `values` on the GPU.
    pub(super) fn put<T: DeviceRepr + ValidAsZeroBits>(&self, values: &[T]) -> Buffer<T> {
        self.gpu.upload(&self.stream, values, "a test").unwrap()
    }

    /// What lies in a buffer.
    pub(super) fn back<T: DeviceRepr + Clone + Default>(&self, buffer: &Buffer<T>) -> Result<Vec<T>, String> {
        let mut numbers = vec![T::default(); buffer.len()];
        self.gpu.read(&self.stream, buffer, 0, &mut numbers).map_err(|error| error.to_string())?;
        match &self.device.reports()[..] {
            [] => Ok(numbers),
            [report, ..] => Err(format!("{report:?}")),
        }
    }

    /// Runs a kernel and waits for it.
    pub(super) fn launch<A: DeviceRepr>(&self, kernel: &Kernel, grid: Grid, args: &A) -> Found {
        // SAFETY: `args` is the struct of that kernel; the virtual GPU checks every address before it is used.
        let launched = unsafe { self.gpu.launch(&self.stream, kernel, grid, args) };
        launched.and_then(|()| self.gpu.synchronize(&self.stream)).map_err(|error| error.to_string())
    }

    /// Whether the kernels launched here are all of an image that `is_mine` names.
    pub(super) fn assert_every(&self, modules: &[&str], is_mine: impl Fn(&str) -> bool) {
        let names = modules
            .iter()
            .filter_map(|module| images::image(module))
            .flat_map(images::kernels)
            .map(|(name, _)| name.to_owned());
        let shipped: BTreeSet<String> = names.filter(|name| is_mine(name)).collect();
        let launched: BTreeSet<String> = self
            .device
            .launches()
            .into_iter()
            .map(|launch| launch.kernel)
            .filter(|name| is_mine(name))
            .collect();
        assert!(!shipped.is_empty());
        assert_eq!(launched, shipped);
    }

    /// An output, with `before` in it, between guards.
    pub(super) fn output(&self, before: &[f32]) -> Output {
        let guard = [f32::from_bits(POISON); GUARD];
        let before = [&guard, before, &guard].concat();
        Output { buffer: self.put(&before), before }
    }

    /// An output of so many numbers that nobody has written yet.
    pub(super) fn fresh(&self, len: usize) -> Output {
        self.output(&vec![f32::from_bits(POISON); len])
    }
}

/// Numbers that a kernel writes.
pub(super) struct Output {
    buffer: Buffer<f32>,
    before: Vec<f32>,
}

impl Output {
    /// Where the first number lies.
    pub(super) fn address(&self) -> u64 {
        self.buffer.address() + (GUARD * size_of::<f32>()) as u64
    }

    /// What lies there, between guards that are as they were.
    pub(super) fn numbers(&self, bed: &Bed) -> Result<Vec<f32>, String> {
        let all = bed.back(&self.buffer)?;
        let guards = all[..GUARD].iter().chain(&all[all.len() - GUARD..]);
        if guards.clone().any(|number| number.to_bits() != POISON) {
            return Err(format!("guards of {} numbers: {:?}", all.len(), guards.collect::<Vec<_>>()));
        }
        Ok(all[GUARD..all.len() - GUARD].to_vec())
    }

    /// Compares every number: `expected(i)` is what the kernel must have written to number `i`, or `None` where it must
    /// have written nothing.
    pub(super) fn check(
        &self,
        bed: &Bed,
        what: &dyn Debug,
        expected: impl Fn(usize) -> Option<Near>,
    ) -> Found {
        let found = bed.back(&self.buffer)?;
        for (at, (found, before)) in found.iter().zip(&self.before).enumerate() {
            let inside = at >= GUARD && at < self.before.len() - GUARD;
            let good = match inside.then(|| expected(at - GUARD)).flatten() {
                Some(near) => near.holds(*found),
                None => found.to_bits() == before.to_bits(),
            };
            if !good {
                let near = inside.then(|| expected(at - GUARD)).flatten();
                let at = at as i64 - GUARD as i64;
                return Err(format!("{what:?}: number {at} is {found}, not {near:?}; it was {before}"));
            }
        }
        Ok(())
    }
}

/// A number, and how far an f32 computation of it may be off.
#[derive(Clone, Copy, Debug)]
pub(super) struct Near {
    pub(super) value: f64,
    pub(super) error: f64,
}

impl Near {
    pub(super) fn exactly(value: f32) -> Self {
        Self { value: f64::from(value), error: 0.0 }
    }

    pub(super) fn holds(self, found: f32) -> bool {
        // Below the normal numbers an f32 has no relative precision.
        let least = if self.error > 0.0 { f64::from(f32::MIN_POSITIVE) } else { 0.0 };
        (f64::from(found) - self.value).abs() <= self.error + least
    }
}

/// A sum in f64, and that of its terms' absolute values: an f32 sum whose terms go through k roundings each, whatever its
/// order, is off by at most k · 2⁻²⁴ · size.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub(super) value: f64,
    pub(super) size: f64,
}

impl Sum {
    pub(super) fn add(&mut self, term: f64) {
        self.value += term;
        self.size += term.abs();
    }

    pub(super) fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, size: self.size * factor.abs() }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self { value: self.value + other.value, size: self.size + other.size }
    }

    /// After so many roundings of each term. (1 + 2⁻²⁴)^k − 1 is a little more than k · 2⁻²⁴.
    pub(super) fn rounded(self, roundings: usize) -> Near {
        Near { value: self.value, error: 1.01 * roundings as f64 * ROUNDING * self.size }
    }
}

/// Random numbers from a seed.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// From −1 to 1.
    pub(super) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// Numbers that are hard to sum: one in sixteen is zero, one in sixteen thirty times the others.
    pub(super) fn numbers(&mut self, len: usize) -> Vec<f32> {
        let mut number = || match self.below(16) {
            0 => 0.0,
            1 => 30.0 * self.uniform(),
            _ => self.uniform(),
        };
        (0..len).map(|_| number()).collect()
    }

    /// A permutation of `0..n`.
    pub(super) fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            all.swap(i, self.below(i + 1));
        }
        all
    }
}

/// `rows` rows of `cols` numbers, each with `padding` up to its stride.
pub(super) fn padded(numbers: &[f32], cols: usize, padding: f32) -> Vec<f32> {
    let mut all = Vec::new();
    for row in numbers.chunks(cols) {
        all.extend_from_slice(row);
        all.resize(all.len() + stride(cols) - cols, padding);
    }
    all
}

/// Tensors one after another, as `DeviceWeights` lays them out, with NaN between them.
#[derive(Default)]
pub(super) struct Arena {
    pub(super) bytes: Vec<u8>,
}

impl Arena {
    fn begin(&mut self) -> usize {
        // NaN in every dtype; at least some of it.
        self.bytes.resize((self.bytes.len() + 16).next_multiple_of(256), 0xFF);
        self.bytes.len()
    }

    /// A random matrix `(rows, cols)`, its rows padded with zeros; where it lies, and its numbers as they are stored.
    pub(super) fn matrix(
        &mut self,
        rng: &mut Rng,
        dtype: Dtype,
        rows: usize,
        cols: usize,
    ) -> (u64, Vec<f32>) {
        let at = self.begin();
        let mut stored = rng.numbers(rows * cols);
        stored.iter_mut().for_each(|x| *x = round(*x, dtype));
        for number in padded(&stored, cols, 0.0) {
            match dtype {
                Dtype::F32 => self.bytes.extend(number.to_le_bytes()),
                Dtype::F16 => self.bytes.extend(f16::from_f32(number).to_le_bytes()),
                Dtype::Bf16 => self.bytes.extend(bf16::from_f32(number).to_le_bytes()),
            }
        }
        (at as u64, stored)
    }

    /// A random vector with zeros up to its stride.
    pub(super) fn vector(&mut self, rng: &mut Rng, len: usize) -> (u64, Vec<f32>) {
        self.matrix(rng, Dtype::F32, 1, len)
    }

    /// Ends a set of tensors: the next one begins here.
    pub(super) fn end(&mut self) -> usize {
        self.begin()
    }
}

fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Where each set's rows begin, and where the last ends.
pub(super) fn firsts(rows: &[usize]) -> Vec<u32> {
    let mut firsts = vec![0];
    firsts.extend(rows.iter().scan(0, |end, &rows| {
        *end += rows as u32;
        Some(*end)
    }));
    firsts
}

/// The set of each row.
pub(super) fn sets_of(rows: &[usize]) -> Vec<usize> {
    rows.iter().enumerate().flat_map(|(set, &rows)| std::iter::repeat_n(set, rows)).collect()
}

/// Breaks one number of a kernel's arguments and runs `test`, which must find something.
pub(super) fn assert_noticed(kernel: &str, at: usize, name: &str, test: impl Fn(&Bed) -> Found) {
    let bed = Bed::new();
    test(&bed).unwrap();
    let bed = Bed::new();
    bed.device.nudge(kernel, at);
    let found = test(&bed);
    assert!(bed.device.mutations() > 0, "{kernel} wasn't launched");
    assert!(found.is_err(), "{kernel} with {name} + 1 went unnoticed");
}
