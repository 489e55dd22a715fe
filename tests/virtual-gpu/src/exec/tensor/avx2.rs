//! `mma.sync` with sums in f32 on CPUs with AVX2: what [`super::multiply_body`] computes, bit for bit. A row of sums is
//! two vectors, the even columns and the odd ones, as registers hold them; so only B must be turned around.

use super::super::lanes::has_avx2;
use super::{Accumulate, Element, Flow, Handler, Inst, Kernel, Machine, Shape};
use super::{BF16, F16, TF32, count_product, multiply_any, require_all};
use crate::num::NAN32;
use std::arch::x86_64::*;

/// A register of the warp: 16 bytes of each row of A, column of B, or row of C.
type Words = [[u32; 4]; 8];
/// For each row, the sums of the even columns and those of the odd ones.
type Sums = [[__m256d; 2]; 16];

/// The handler for a shape; None if there is none here, or the CPU can't.
pub(super) fn multiply(shape: Shape) -> Option<Handler> {
    if !has_avx2() || !is_x86_feature_detected!("f16c") || shape.half_sums {
        return None;
    }
    match (shape.a, shape.k) {
        (Element::F16, 16) => Some(run::<F16, 8>),
        (Element::Bf16, 16) => Some(run::<BF16, 8>),
        (Element::Tf32, 8) => Some(run::<TF32, 4>),
        _ => None,
    }
}

/// `SIDE` is half the depth: the elements in 16 bytes.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run<const E: u8, const SIDE: usize>(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    if m.settings.accumulate != Accumulate::Exact {
        // SAFETY: the caller's promise.
        return unsafe { multiply_any()(m, i, mask) };
    }
    require_all(m, i, mask);
    let kernel: *const Kernel = &*m.kernel;
    // SAFETY: the machine keeps the kernel alive. The list has the registers of D, A, B and C, which the decoder
    // counted, and each slot has 32 words. Nothing is written before all is read.
    unsafe {
        let list = &(&(*kernel).lists)[i.ext as usize];
        let Some(&[d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3]) = list.first_chunk() else {
            return Flow::Next;
        };
        // No `map`, whose closures would be calls.
        macro_rules! each {
            ($read:expr, $($slot:ident)*) => { [$($read(&*m.slot($slot).cast::<Words>())),*] };
        }
        let a = each!(rows::<E, SIDE>, a0 a1 a2 a3);
        let b = each!(turned::<E>, b0 b1);
        let mut sums = load(each!(std::convert::identity, c0 c1 c2 c3));
        add_products::<E, SIDE>(&a, &b, &mut sums);
        for (r, slot) in [d0, d1, d2, d3].into_iter().enumerate() {
            let words = m.slot(slot).cast::<__m128>();
            for (g, row) in sums[r / 2 * 8..][..8].iter().enumerate() {
                words.add(g).write_unaligned(canonical(_mm256_cvtpd_ps(row[r % 2])));
            }
        }
    }
    count_product(m, 2 * SIDE as u32);
    Flow::Next
}

#[inline]
#[target_feature(enable = "avx2")]
fn vector(words: &[u32; 4]) -> __m128i {
    // SAFETY: both are 16 bytes, and any bits are a vector.
    unsafe { std::ptr::from_ref(words).cast::<__m128i>().read_unaligned() }
}

/// Eight halves as f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn floats<const E: u8>(halves: __m128i) -> __m256 {
    match E {
        F16 => _mm256_cvtph_ps(halves),
        _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))),
    }
}

/// tf32 bits as f64.
#[inline]
#[target_feature(enable = "avx2")]
fn cut(words: __m128i) -> __m256d {
    _mm256_cvtps_pd(_mm_castsi128_ps(_mm_and_si128(words, _mm_set1_epi32(!0x1fff))))
}

/// Eight f32 as f64.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(floats: __m256) -> [__m256d; 2] {
    [_mm256_cvtps_pd(_mm256_castps256_ps128(floats)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(floats))]
}

/// A register of A: eight rows of `SIDE` elements one after the other; those behind them mean nothing.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn rows<const E: u8, const SIDE: usize>(register: &Words) -> [f64; 64] {
    let mut out = [_mm256_setzero_pd(); 16];
    for (row, words) in register.iter().enumerate() {
        if E == TF32 {
            out[row] = cut(vector(words));
        } else {
            [out[2 * row], out[2 * row + 1]] = widen(floats::<E>(vector(words)));
        }
    }
    // SAFETY: both are 512 bytes, and any bits are numbers.
    unsafe { std::mem::transmute(out) }
}

/// A register of B: for each of its steps of k the even columns and the odd ones.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn turned<const E: u8>(register: &Words) -> [[__m256d; 2]; 8] {
    let [c0, c1, c2, c3, c4, c5, c6, c7] = register;
    let mut out = [[_mm256_setzero_pd(); 2]; 8];
    if E == TF32 {
        let (even, odd) = (turned_words([c0, c2, c4, c6]), turned_words([c1, c3, c5, c7]));
        for (k, out) in out.iter_mut().enumerate().take(4) {
            *out = [cut(even[k]), cut(odd[k])];
        }
    } else {
        for (k, halves) in turned_halves([c0, c2, c4, c6, c1, c3, c5, c7]).into_iter().enumerate() {
            out[k] = widen(floats::<E>(halves));
        }
    }
    out
}

/// Four rows of four words by columns.
#[inline]
#[target_feature(enable = "avx2")]
fn turned_words([p, q, r, s]: [&[u32; 4]; 4]) -> [__m128i; 4] {
    let (p, q, r, s) = (vector(p), vector(q), vector(r), vector(s));
    let (left, right) = (_mm_unpacklo_epi32(p, q), _mm_unpacklo_epi32(r, s));
    let (below, beside) = (_mm_unpackhi_epi32(p, q), _mm_unpackhi_epi32(r, s));
    [
        _mm_unpacklo_epi64(left, right),
        _mm_unpackhi_epi64(left, right),
        _mm_unpacklo_epi64(below, beside),
        _mm_unpackhi_epi64(below, beside),
    ]
}

/// Eight rows of eight halves by columns.
#[inline]
#[target_feature(enable = "avx2")]
fn turned_halves(rows: [&[u32; 4]; 8]) -> [__m128i; 8] {
    let mut out = [_mm_setzero_si128(); 8];
    // Four columns of four rows each.
    let mut quarters = [[_mm_setzero_si128(); 4]; 2];
    for (quarter, rows) in quarters.iter_mut().zip(rows.chunks_exact(4)) {
        let (p, q, r, s) = (vector(rows[0]), vector(rows[1]), vector(rows[2]), vector(rows[3]));
        let (left, right) = (_mm_unpacklo_epi16(p, q), _mm_unpacklo_epi16(r, s));
        let (below, beside) = (_mm_unpackhi_epi16(p, q), _mm_unpackhi_epi16(r, s));
        *quarter = [
            _mm_unpacklo_epi32(left, right),
            _mm_unpackhi_epi32(left, right),
            _mm_unpacklo_epi32(below, beside),
            _mm_unpackhi_epi32(below, beside),
        ];
    }
    for pair in 0..4 {
        out[2 * pair] = _mm_unpacklo_epi64(quarters[0][pair], quarters[1][pair]);
        out[2 * pair + 1] = _mm_unpackhi_epi64(quarters[0][pair], quarters[1][pair]);
    }
    out
}

/// Adds the products, k by k. Factors have so few bits that each is exact in f64. With a caller for each `E` it is
/// compiled into it, and the sums stay in registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_products<const E: u8, const SIDE: usize>(
    a: &[[f64; 64]; 4],
    b: &[[[__m256d; 2]; 8]; 2],
    sums: &mut Sums,
) {
    // Four rows at once: enough sums that do not wait for one another, in half of the registers.
    for (n, rows) in sums.chunks_exact_mut(4).enumerate() {
        let mut all = [rows[0], rows[1], rows[2], rows[3]];
        for (r, b) in b.iter().enumerate() {
            let a = &a[2 * r + n / 2];
            for k in 0..SIDE {
                for (row, sums) in all.iter_mut().enumerate() {
                    let x = _mm256_set1_pd(a[(n % 2 * 4 + row) * SIDE + k]);
                    sums[0] = _mm256_fmadd_pd(x, b[k][0], sums[0]);
                    sums[1] = _mm256_fmadd_pd(x, b[k][1], sums[1]);
                }
            }
        }
        rows.copy_from_slice(&all);
    }
}

/// C: registers 2h and 2h + 1 hold the rows from 8h on, the even and the odd columns.
#[inline]
#[target_feature(enable = "avx2")]
fn load(registers: [&Words; 4]) -> Sums {
    let mut sums = [[_mm256_setzero_pd(); 2]; 16];
    for (r, register) in registers.into_iter().enumerate() {
        for (row, words) in sums[r / 2 * 8..].iter_mut().zip(register) {
            row[r % 2] = _mm256_cvtps_pd(_mm_castsi128_ps(vector(words)));
        }
    }
    sums
}

/// One NaN for all.
#[inline]
#[target_feature(enable = "avx2")]
fn canonical(floats: __m128) -> __m128 {
    let nan = _mm_castsi128_ps(_mm_set1_epi32(NAN32 as i32));
    _mm_blendv_ps(floats, nan, _mm_cmpunord_ps(floats, floats))
}
