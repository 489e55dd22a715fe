//! What memory gives, read as a lone row's weights are.

use std::hint::black_box;
use std::time::Instant;

use super::matmul::AHEAD;
use super::pool::Pool;
use super::simd::{Isa, Kernel, LANES, Simd, Vector};
use crate::error::Result;

/// What is read, in vectors: 512 MiB, more than caches hold.
const VECTORS: usize = (512 << 20) / size_of::<Vector>();

/// Vectors of a task: 1 MiB.
const TASK: usize = (1 << 20) / size_of::<Vector>();

/// Bytes a second that `threads` threads read from memory, the best of five passes.
///
/// # Errors
/// Those of [`Pool::new`].
pub(crate) fn bandwidth(threads: usize) -> Result<f64> {
    let (isa, mut pool) = (Isa::detect(), Pool::new(threads)?);
    let numbers = vec![[1.0; LANES]; VECTORS];
    let mut once = || {
        let start = Instant::now();
        pool.run(VECTORS / TASK, |_, task| {
            black_box(isa.run(Read(&numbers[task * TASK..(task + 1) * TASK])));
        });
        start.elapsed().as_secs_f64()
    };
    let least = (0..5).map(|_| once()).fold(f64::INFINITY, f64::min);
    Ok(size_of_val(numbers.as_slice()) as f64 / least)
}

/// Adds numbers up, as many at once as their latency asks for.
struct Read<'a>(&'a [Vector]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.zero(); 4];
        for vectors in self.0.chunks_exact(4) {
            for vector in vectors {
                simd.prefetch(vector.as_ptr().cast::<u8>().wrapping_add(AHEAD));
            }
            for (i, part) in S::parts(vectors).iter().enumerate() {
                sums[i % 4] = simd.add(sums[i % 4], simd.load(part));
            }
        }
        simd.sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
    }
}
