//! Arithmetic that PTX fixes and Rust does not offer: half formats, directed rounding, flush to zero, canonical
//! NaN, and the approximate functions.
//!
//! Functions used once a lane are written without branches, so that the compiler turns them into vector code.

/// The NaN that every f32 operation returns (PTX ISA 9.7.3).
pub const NAN32: u32 = 0x7fff_ffff;
/// The NaN of f16 and bf16 results.
pub const NAN16: u16 = 0x7fff;

/// Rounding of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// To nearest, ties to even.
    Nearest,
    /// Toward zero.
    Zero,
    /// Toward minus infinity.
    Down,
    /// Toward plus infinity.
    Up,
}

/// `x`, any NaN made canonical. The test is on bits: a compiler may take all NaNs for one another.
#[inline(always)]
pub fn canon(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { NAN32 } else { bits })
}

/// `x`, subnormals made zero of the same sign.
#[inline(always)]
pub fn ftz(x: f32) -> f32 {
    let bits = x.to_bits();
    let flushed = bits & 0x8000_0000;
    f32::from_bits(if bits & 0x7f80_0000 == 0 { flushed } else { bits })
}

/// `x` clamped to [0, 1]; NaN gives 0.
#[inline(always)]
pub fn sat(x: f32) -> f32 {
    let low = if x > 0.0 { x } else { 0.0 };
    if low < 1.0 { low } else { 1.0 }
}

/// A binary format of at most 32 bits.
#[derive(Clone, Copy)]
pub struct Format {
    /// Stored bits of the significand.
    pub mantissa: u32,
    /// Bits of the exponent.
    pub exponent: u32,
}

/// IEEE half.
pub const F16: Format = Format { mantissa: 10, exponent: 5 };
/// The upper half of an f32.
pub const BF16: Format = Format { mantissa: 7, exponent: 8 };
/// IEEE single.
pub const F32: Format = Format { mantissa: 23, exponent: 8 };
/// Ten bits of significand with the range of f32, in the upper bits of a word.
pub const TF32: Format = Format { mantissa: 10, exponent: 8 };

/// `x` rounded to `format`; the bits of the result. NaN gives all ones but the sign.
pub fn narrow(x: f64, format: Format, round: Round) -> u32 {
    let Format { mantissa, exponent } = format;
    let sign_bit = mantissa + exponent;
    let infinity = ((1u32 << exponent) - 1) << mantissa;
    if x.is_nan() {
        return infinity | ((1 << mantissa) - 1);
    }
    let negative = x.is_sign_negative();
    let sign = u32::from(negative) << sign_bit;
    if x.is_infinite() {
        return sign | infinity;
    }
    let bits = x.to_bits();
    let raw_exponent = (bits >> 52 & 0x7ff) as i32;
    let fraction = bits & ((1 << 52) - 1);
    if raw_exponent == 0 && fraction == 0 {
        return sign;
    }
    let (significand, e) =
        if raw_exponent == 0 { (fraction, -1022) } else { (fraction | 1 << 52, raw_exponent - 1023) };
    let bias = (1i32 << (exponent - 1)) - 1;
    let min_exponent = 1 - bias;
    let drop = (52 - mantissa as i32 + (min_exponent - e).max(0)).min(62) as u32;
    let kept = significand >> drop;
    let rest = significand & ((1u64 << drop) - 1);
    let half = 1u64 << (drop - 1);
    let up = match round {
        Round::Nearest => rest > half || (rest == half && kept & 1 == 1),
        Round::Zero => false,
        Round::Down => negative && rest != 0,
        Round::Up => !negative && rest != 0,
    };
    let kept = kept as u32 + u32::from(up);
    // A subnormal has exponent field 0 and no implicit bit; a carry moves into the field by itself.
    let field = if e < min_exponent { 0 } else { (e - min_exponent) as u32 };
    let overflow = sign | infinity;
    if e > bias {
        return saturated(overflow, round, negative);
    }
    let magnitude = (field << mantissa) + kept;
    if magnitude >= infinity { saturated(overflow, round, negative) } else { sign | magnitude }
}

fn saturated(infinity: u32, round: Round, negative: bool) -> u32 {
    let to_infinity = match round {
        Round::Nearest => true,
        Round::Zero => false,
        Round::Down => negative,
        Round::Up => !negative,
    };
    if to_infinity { infinity } else { infinity - 1 }
}

/// `a + b` in f64, the last bit made odd where the sum is not exact: rounding it again to 32 bits or fewer gives
/// the rounding of the exact sum.
#[inline(always)]
pub fn add_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let part = sum - a;
    let error = (a - (sum - part)) + (b - part);
    let bits = sum.to_bits();
    let exact = error == 0.0 || !error.is_finite() || bits & 1 == 1;
    let away = (error > 0.0) == (sum > 0.0);
    let odd = if away { bits + 1 } else { bits.wrapping_sub(1) };
    f64::from_bits(if exact { bits } else { odd })
}

/// `x` rounded to f32; exact values halfway between two f32 do not occur in `x` unless they are meant.
#[inline(always)]
pub fn to_f32(x: f64, round: Round) -> f32 {
    let near = x as f32;
    let bits = near.to_bits();
    let zero = bits & 0x7fff_ffff == 0;
    let negative = bits >> 31 == 1;
    let below = if zero {
        0x8000_0001
    } else if negative {
        bits.wrapping_add(1)
    } else {
        bits.wrapping_sub(1)
    };
    let above = if zero {
        1
    } else if negative {
        bits.wrapping_sub(1)
    } else {
        bits.wrapping_add(1)
    };
    let (too_high, too_low) = (f64::from(near) > x, f64::from(near) < x);
    let down = f32::from_bits(if too_high { below } else { bits });
    let up = f32::from_bits(if too_low { above } else { bits });
    canon(match round {
        Round::Nearest => near,
        Round::Down => down,
        Round::Up => {
            if zero && x < 0.0 {
                -0.0
            } else {
                up
            }
        }
        Round::Zero => {
            if x > 0.0 {
                down
            } else {
                f32::from_bits(up.to_bits() | bits & 0x8000_0000)
            }
        }
    })
}

/// `a + b` rounded as told.
#[inline(always)]
pub fn add32(a: f32, b: f32, round: Round) -> f32 {
    fma32(a, 1.0, b, round)
}

/// `a * b` rounded as told.
#[inline(always)]
pub fn mul32(a: f32, b: f32, round: Round) -> f32 {
    to_f32(f64::from(a) * f64::from(b), round)
}

/// `a * b + c` rounded once, as told.
#[inline(always)]
pub fn fma32(a: f32, b: f32, c: f32, round: Round) -> f32 {
    let product = f64::from(a) * f64::from(b);
    let sum = add_odd(product, f64::from(c));
    if sum == 0.0 && product.is_sign_negative() != c.is_sign_negative() {
        return if round == Round::Down { -0.0 } else { 0.0 };
    }
    to_f32(sum, round)
}

/// `a / b` rounded as told. The f64 quotient of two f32 is inexact by less than what could move it across an
/// f32, so only its direction has to be found.
pub fn div32(a: f32, b: f32, round: Round) -> f32 {
    let (x, y) = (f64::from(a), f64::from(b));
    let quotient = x / y;
    if quotient == 0.0 || !quotient.is_finite() {
        return canon(f32::from_bits(narrow(quotient, F32, round)));
    }
    let remainder = (-quotient).mul_add(y, x);
    let error = if (remainder > 0.0) == (y > 0.0) { 1.0 } else { -1.0 };
    let adjusted = if remainder == 0.0 { quotient } else { odd(quotient, error) };
    canon(f32::from_bits(narrow(adjusted, F32, round)))
}

/// Square root rounded as told.
pub fn sqrt32(a: f32, round: Round) -> f32 {
    let x = f64::from(a);
    let root = x.sqrt();
    let remainder = (-root).mul_add(root, x);
    let adjusted = if remainder == 0.0 || !root.is_finite() { root } else { odd(root, remainder) };
    canon(f32::from_bits(narrow(adjusted, F32, round)))
}

fn odd(x: f64, error: f64) -> f64 {
    let bits = x.to_bits();
    if bits & 1 == 1 {
        return x;
    }
    f64::from_bits(if (error > 0.0) == (x > 0.0) { bits + 1 } else { bits - 1 })
}

/// f16 bits to f32, exactly. NaN payloads move as in the hardware formats.
#[inline(always)]
pub fn f16_to_f32(h: u16) -> f32 {
    let magnitude = u32::from(h & 0x7fff) << 13;
    // 2^112 moves the exponent from f16's bias to f32's and normalises subnormals.
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = magnitude | 0x7f80_0000;
    let bits = if magnitude >= 0x0f80_0000 { special } else { scaled.to_bits() };
    f32::from_bits(bits | u32::from(h & 0x8000) << 16)
}

/// f32 to f16, to nearest even.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let sign = (bits >> 16 & 0x8000) as u16;
    // Adding 0.5 aligns a subnormal result with the low bits of the sum, rounded by the addition itself.
    let small = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let odd = magnitude >> 13 & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let finite = if magnitude < 113 << 23 { small } else { normal };
    // 0x477ff000 is the first value that rounds to infinity.
    let limited = if magnitude >= 0x477f_f000 { 0x7c00 } else { finite };
    let out = sign | limited as u16;
    if magnitude > 0x7f80_0000 { NAN16 } else { out }
}

/// bf16 bits to f32.
#[inline(always)]
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// f32 to bf16, to nearest even.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if x.is_nan() { NAN16 } else { rounded }
}

/// Which 16-bit format an instruction works in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Half {
    /// Exact value of `bits`.
    #[inline(always)]
    pub fn widen(self, bits: u16) -> f32 {
        if self == Half::F16 { f16_to_f32(bits) } else { bf16_to_f32(bits) }
    }

    /// `x` rounded to nearest even.
    #[inline(always)]
    pub fn nearest(self, x: f32) -> u16 {
        if self == Half::F16 { f32_to_f16(x) } else { f32_to_bf16(x) }
    }

    /// The format's shape.
    pub fn format(self) -> Format {
        if self == Half::F16 { F16 } else { BF16 }
    }

    /// `a * b + c`, rounded once.
    pub fn fma(self, a: u16, b: u16, c: u16) -> u16 {
        let product = f64::from(self.widen(a)) * f64::from(self.widen(b));
        let addend = f64::from(self.widen(c));
        let sum = add_odd(product, addend);
        if sum == 0.0 {
            let negative = product.is_sign_negative() && addend.is_sign_negative();
            return u16::from(negative) << 15;
        }
        narrow(sum, self.format(), Round::Nearest) as u16
    }
}

/// 2^x, within one part in 10^12 before rounding to f32.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let clamped = f64::from(x).clamp(-200.0, 200.0);
    // Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
    let magic = 6_755_399_441_055_744.0;
    let shifted = clamped + magic;
    let f = (clamped - (shifted - magic)) * std::f64::consts::LN_2;
    let mut sum = 1.0 / 3_628_800.0;
    for k in [362_880.0, 40_320.0, 5_040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        sum = sum * f + 1.0 / k;
    }
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    canon(if x.is_nan() { x } else { (sum * power) as f32 })
}

/// log2 x, within one part in 10^12 before rounding to f32.
#[inline(always)]
pub fn log2(x: f32) -> f32 {
    let bits = f64::from(x).to_bits();
    // Exponent such that the significand lies in [sqrt(1/2), sqrt(2)).
    let shifted = bits.wrapping_sub(0x3fe6_a09e_667f_3bcd);
    let exponent = (shifted as i64 >> 52) as i32;
    let m = f64::from_bits(bits.wrapping_sub((i64::from(exponent) as u64) << 52));
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut sum = 1.0 / 19.0;
    for k in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        sum = sum * square + 1.0 / k;
    }
    let value = (f64::from(exponent) + 2.0 * s * sum * std::f64::consts::LOG2_E) as f32;
    let at_edges = if x == 0.0 { f32::NEG_INFINITY } else { x };
    let inside = x > 0.0 && x < f32::INFINITY;
    canon(if inside {
        value
    } else if x < 0.0 {
        f32::NAN
    } else {
        at_edges
    })
}

/// 1 / sqrt x.
#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    canon((1.0 / f64::from(x).sqrt()) as f32)
}

/// The larger; NaN loses unless both are NaN; +0 above -0.
#[inline(always)]
pub fn max32(a: f32, b: f32) -> f32 {
    let tie = f32::from_bits(a.to_bits() & b.to_bits());
    let ordered = if a > b { a } else { b };
    let value = if a == b { tie } else { ordered };
    canon(if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        value
    })
}

/// The smaller; NaN loses unless both are NaN; -0 below +0.
#[inline(always)]
pub fn min32(a: f32, b: f32) -> f32 {
    let tie = f32::from_bits(a.to_bits() | b.to_bits());
    let ordered = if a < b { a } else { b };
    let value = if a == b { tie } else { ordered };
    canon(if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        value
    })
}
