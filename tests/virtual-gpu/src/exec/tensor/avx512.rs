//! `mma.sync` with sums in f32 on CPUs with AVX-512: what [`super::multiply_body`] computes, bit for bit, with all 128
//! sums in vectors. One holds eight rows of a column, so that of the factors only A must be turned around; B is read
//! one element at a time.

use super::super::lanes::has_avx512;
use super::{Accumulate, Element, Flow, Handler, Inst, Kernel, Machine, Shape};
use super::{BF16, F16, TF32, count_product, multiply_any, require_all};
use crate::num::NAN32;
use std::arch::x86_64::*;

/// A register of the warp.
type Words = [u32; 32];
/// For each column, the sums of rows 0 to 7 and those of rows 8 to 15.
type Sums = [[__m512d; 2]; 8];

/// The handler for a shape; None if there is none here, or the CPU can't.
pub(super) fn multiply(shape: Shape) -> Option<Handler> {
    if !has_avx512() || shape.half_sums {
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run<const E: u8, const SIDE: usize>(m: &mut Machine, i: &Inst, mask: u32) -> Flow {
    if m.settings.accumulate == Accumulate::Sequential {
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
        let b = each!(columns::<E, SIDE>, b0 b1);
        let mut sums = load(each!(std::convert::identity, c0 c1 c2 c3));
        add_products::<E, SIDE>(&a, &b, &mut sums);
        let d = match m.settings.accumulate {
            Accumulate::Truncating => store(&sums, |x| _mm512_cvt_roundpd_ps::<TO_ZERO>(x)),
            _ => store(&sums, |x| _mm512_cvtpd_ps(x)),
        };
        for (slot, vectors) in [d0, d1, d2, d3].into_iter().zip(d) {
            m.slot(slot).cast::<[__m512i; 2]>().write_unaligned(vectors);
        }
    }
    count_product(m, 2 * SIDE as u32);
    Flow::Next
}

const TO_ZERO: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

#[inline]
#[target_feature(enable = "avx512f")]
fn vectors(register: &Words) -> [__m512i; 2] {
    // SAFETY: both are 128 bytes, and any bits are a vector.
    unsafe { std::ptr::from_ref(register).cast::<[__m512i; 2]>().read_unaligned() }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn vector(bits: &[u16; 32]) -> __m512i {
    // SAFETY: both are 64 bytes, and any bits are a vector.
    unsafe { std::ptr::from_ref(bits).cast::<__m512i>().read_unaligned() }
}

/// The halves (`WIDTH` 1) or words (`WIDTH` 2) of a register of 8 rows, 16 bytes each, that lie at `2 * pair` and
/// `2 * pair + 1` of their rows: their numbers, `spread` halves apart.
const fn turned(width: usize, spread: usize, first: usize) -> [[u16; 32]; 4] {
    let side = 8 / width;
    let mut out = [[0; 32]; 4];
    let mut pair = 0;
    while pair < side / 2 {
        let mut e = 0;
        while e < 16 {
            out[pair][spread * e + first] = (e % 8 * side + 2 * pair + e / 8) as u16;
            e += 1;
        }
        pair += 1;
    }
    out
}

/// f16: the low 16 halves.
const TURN_F16: [[u16; 32]; 4] = turned(1, 1, 0);
/// bf16: the upper halves of 16 words, which makes them f32.
const TURN_BF16: [[u16; 32]; 4] = turned(1, 2, 1);
/// tf32: words.
const TURN_TF32: [[u16; 32]; 4] = turned(2, 2, 0);

/// A register of A, eight rows: two steps of k a vector.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn rows<const E: u8, const SIDE: usize>(register: &Words) -> [__m512; 4] {
    let [low, high] = vectors(register);
    let mut out = [_mm512_setzero_ps(); 4];
    for (pair, out) in out.iter_mut().enumerate().take(SIDE / 2) {
        *out = match E {
            F16 => {
                let halves = _mm512_permutex2var_epi16(low, vector(&TURN_F16[pair]), high);
                _mm512_cvtph_ps(_mm512_castsi512_si256(halves))
            }
            BF16 => {
                let upper = 0xaaaa_aaaa;
                let words = _mm512_maskz_permutex2var_epi16(upper, low, vector(&TURN_BF16[pair]), high);
                _mm512_castsi512_ps(words)
            }
            _ => cut(_mm512_permutex2var_epi32(low, vector(&TURN_TF32[pair]), high)),
        };
    }
    out
}

/// tf32 bits as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn cut(words: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(!0x1fff)))
}

/// A register of B, eight columns of `SIDE` elements one after the other; those behind them mean nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn columns<const E: u8, const SIDE: usize>(register: &Words) -> [f64; 64] {
    let pieces = vectors(register);
    let mut out = [[_mm512_setzero_pd(); 2]; 4];
    for (n, out) in out.iter_mut().enumerate().take(SIDE / 2) {
        let quarter = || match n % 2 {
            0 => _mm512_castsi512_si256(pieces[n / 2]),
            _ => _mm512_extracti64x4_epi64::<1>(pieces[n / 2]),
        };
        *out = widen(match E {
            F16 => _mm512_cvtph_ps(quarter()),
            BF16 => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(quarter()))),
            _ => cut(pieces[n & 1]),
        });
    }
    // SAFETY: both are 512 bytes, and any bits are numbers.
    unsafe { std::mem::transmute(out) }
}

/// Sixteen f32 as f64.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn widen(floats: __m512) -> [__m512d; 2] {
    [_mm512_cvtps_pd(_mm512_castps512_ps256(floats)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(floats))]
}

/// Adds the products, k by k. Factors have so few bits that each is exact in f64. With a caller for each `E` it is
/// compiled into it, and the sums stay in registers.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn add_products<const E: u8, const SIDE: usize>(a: &[[__m512; 4]; 4], b: &[[f64; 64]; 2], sums: &mut Sums) {
    let mut all = *sums;
    for (rows, b) in a.chunks_exact(2).zip(b) {
        for pair in 0..SIDE / 2 {
            let x = [widen(rows[0][pair]), widen(rows[1][pair])];
            for odd in 0..2 {
                for (column, sums) in all.iter_mut().enumerate() {
                    let y = _mm512_set1_pd(b[column * SIDE + 2 * pair + odd]);
                    for half in 0..2 {
                        sums[half] = _mm512_fmadd_pd(x[half][odd], y, sums[half]);
                    }
                }
            }
        }
    }
    *sums = all;
}

/// Where the words of a pair of threads t of all eight g lie in a register of C, and back.
const fn columns_of(pair: usize) -> [u16; 32] {
    let mut out = [0; 32];
    let mut e = 0;
    while e < 16 {
        out[2 * e] = (e % 8 * 4 + 2 * pair + e / 8) as u16;
        e += 1;
    }
    out
}

const PAIRS: [[u16; 32]; 2] = [columns_of(0), columns_of(1)];

/// The inverse of both `PAIRS`: words of lanes 0 to 15 and 16 to 31.
const fn lanes_of(half: usize) -> [u16; 32] {
    let mut out = [0; 32];
    let mut e = 0;
    while e < 16 {
        let (g, t) = (half * 4 + e / 4, e % 4);
        out[2 * e] = (t * 8 + g) as u16;
        e += 1;
    }
    out
}

const LANES: [[u16; 32]; 2] = [lanes_of(0), lanes_of(1)];

/// C: registers 2h and 2h + 1 hold the rows from 8h on, the even and the odd columns.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn load(registers: [&Words; 4]) -> Sums {
    let mut sums = [[_mm512_setzero_pd(); 2]; 8];
    for (r, register) in registers.into_iter().enumerate() {
        let [low, high] = vectors(register);
        for (pair, index) in PAIRS.iter().enumerate() {
            let words = _mm512_permutex2var_epi32(low, vector(index), high);
            let [first, second] = widen(_mm512_castsi512_ps(words));
            (sums[4 * pair + r % 2][r / 2], sums[4 * pair + 2 + r % 2][r / 2]) = (first, second);
        }
    }
    sums
}

/// D, in registers laid out as C.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn store(sums: &Sums, narrow: impl Fn(__m512d) -> __m256) -> [[__m512i; 2]; 4] {
    let mut out = [[_mm512_setzero_si512(); 2]; 4];
    for (r, out) in out.iter_mut().enumerate() {
        let column = |t: usize| narrow(sums[2 * t + r % 2][r / 2]);
        let both = |t| _mm512_insertf32x8::<1>(_mm512_castps256_ps512(column(t)), column(t + 1));
        let [left, right] = [canonical(both(0)), canonical(both(2))];
        for (out, index) in out.iter_mut().zip(&LANES) {
            *out = _mm512_permutex2var_epi32(left, vector(index), right);
        }
    }
    out
}

/// The bits, with one NaN for all.
#[inline]
#[target_feature(enable = "avx512f")]
fn canonical(floats: __m512) -> __m512i {
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(floats, floats);
    _mm512_mask_mov_epi32(_mm512_castps_si512(floats), nan, _mm512_set1_epi32(NAN32 as i32))
}
