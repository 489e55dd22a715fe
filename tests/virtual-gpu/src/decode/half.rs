//! Arithmetic of f16 and bf16, single and in pairs. Results are rounded once from the exact value.

// Comparisons are spelled so that NaN falls on the side that PTX gives it.
#![allow(clippy::double_comparisons, clippy::neg_cmp_op_on_partial_ord)]

use super::operands::Mods;
use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::lanes::*;
use crate::num::{Half, max32, min32};
use crate::program::Handler;
use crate::ptx::ast::Instruction;

const F16: Half = Half::F16;
const BF16: Half = Half::Bf16;

/// Flushes a subnormal f16.
fn flush(bits: u16) -> u16 {
    if bits & 0x7c00 == 0 { bits & 0x8000 } else { bits }
}

/// Clamps to [0, 1]; NaN gives 0.
fn saturate(half: Half, bits: u16) -> u16 {
    half.nearest(crate::num::sat(half.widen(bits)))
}

fn relu(half: Half, bits: u16) -> u16 {
    let x = half.widen(bits);
    if x.is_nan() {
        crate::num::NAN16
    } else if x > 0.0 {
        bits
    } else {
        0
    }
}

/// Both halves of a word.
fn pair(f: impl Fn(u16) -> u16, a: u32) -> u32 {
    u32::from(f(a as u16)) | u32::from(f((a >> 16) as u16)) << 16
}

fn pair2(f: impl Fn(u16, u16) -> u16, a: u32, b: u32) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

fn pair3(f: impl Fn(u16, u16, u16) -> u16, a: u32, b: u32, c: u32) -> u32 {
    let high = f((a >> 16) as u16, (b >> 16) as u16, (c >> 16) as u16);
    u32::from(f(a as u16, b as u16, c as u16)) | u32::from(high) << 16
}

fn one(f: impl Fn(u16) -> u16 + Copy, packed: bool) -> Handler {
    if packed { each1(move |a: u32| pair(f, a)) } else { each1(move |a: u16| f(a)) }
}

fn two(f: impl Fn(u16, u16) -> u16 + Copy, packed: bool) -> Handler {
    if packed { each2(move |a: u32, b: u32| pair2(f, a, b)) } else { each2(move |a: u16, b: u16| f(a, b)) }
}

fn three(f: impl Fn(u16, u16, u16) -> u16 + Copy, packed: bool) -> Handler {
    if packed {
        each3(move |a: u32, b: u32, c: u32| pair3(f, a, b, c))
    } else {
        each3(move |a: u16, b: u16, c: u16| f(a, b, c))
    }
}

/// After the operation: nothing, flush, saturate, flush and saturate, or relu.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    Nothing,
    Flush,
    Saturate,
    Relu,
}

macro_rules! halves {
    ($half:expr, $after:expr, $make:ident, $packed:expr, |$h:ident, $($x:ident),+| $body:expr) => {
        match ($half, $after) {
            (Half::F16, After::Nothing) => $make(|$($x),+| { let $h = F16; $body }, $packed),
            (Half::F16, After::Flush) => {
                $make(|$($x),+| { let $h = F16; $(let $x = flush($x);)+ flush($body) }, $packed)
            }
            (Half::F16, After::Saturate) => $make(|$($x),+| { let $h = F16; saturate($h, $body) }, $packed),
            (Half::F16, After::Relu) => $make(|$($x),+| { let $h = F16; relu($h, $body) }, $packed),
            (Half::Bf16, After::Relu) => $make(|$($x),+| { let $h = BF16; relu($h, $body) }, $packed),
            (Half::Bf16, _) => $make(|$($x),+| { let $h = BF16; $body }, $packed),
        }
    };
}

/// The bits of one.
fn unit(half: Half) -> u16 {
    if half == F16 { 0x3c00 } else { 0x3f80 }
}

impl Decoder<'_> {
    /// Decodes an f16 or bf16 instruction; false if it is none.
    pub(super) fn half(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let (half, packed) = match mods.last() {
            "f16" => (F16, false),
            "f16x2" => (F16, true),
            "bf16" => (BF16, false),
            "bf16x2" => (BF16, true),
            _ => return Ok(false),
        };
        if i.opcode == "setp" {
            return self.setp_half(i, mods, half, packed);
        }
        let target = match (i.opcode.as_str(), half) {
            ("add" | "sub" | "mul", BF16) => 90,
            ("ex2", BF16) => 90,
            ("tanh", BF16) => 90,
            (_, BF16) | ("min" | "max", _) => 80,
            ("ex2" | "tanh", _) => 75,
            _ => 53,
        };
        self.needs(i, target)?;
        mods.take("rn");
        mods.take("approx");
        let (ftz, sat, positive) = (mods.take("ftz"), mods.take("sat"), mods.take("relu"));
        let after = match (ftz && half == F16, sat, positive) {
            (false, false, false) => After::Nothing,
            (true, false, false) => After::Flush,
            (false, true, false) => After::Saturate,
            (false, false, true) => After::Relu,
            _ => return self.error(i, "this combination of .ftz, .sat and .relu is not supported"),
        };
        if sat && half == BF16 {
            return self.error(i, "bf16 has no .sat");
        }
        let with_nan = mods.take("NaN");
        let (run, count): (Handler, usize) = match i.opcode.as_str() {
            "add" => (halves!(half, after, two, packed, |h, a, b| h.fma(a, unit(h), b)), 2),
            "sub" => (halves!(half, after, two, packed, |h, a, b| h.fma(b, unit(h) | 0x8000, a)), 2),
            // Minus zero keeps the sign of a product that is zero.
            "mul" => (halves!(half, after, two, packed, |h, a, b| product(h, a, b)), 2),
            "fma" => (halves!(half, after, three, packed, |h, a, b, c| h.fma(a, b, c)), 3),
            "neg" => (halves!(half, after, one, packed, |_h, a| a ^ 0x8000), 1),
            "abs" => (halves!(half, after, one, packed, |_h, a| a & 0x7fff), 1),
            "min" if with_nan => {
                (halves!(half, after, two, packed, |h, a, b| extreme(h, a, b, false, true)), 2)
            }
            "max" if with_nan => {
                (halves!(half, after, two, packed, |h, a, b| extreme(h, a, b, true, true)), 2)
            }
            "min" => (halves!(half, after, two, packed, |h, a, b| extreme(h, a, b, false, false)), 2),
            "max" => (halves!(half, after, two, packed, |h, a, b| extreme(h, a, b, true, false)), 2),
            "ex2" => (halves!(half, after, one, packed, |h, a| h.nearest(crate::num::exp2(h.widen(a)))), 1),
            "tanh" => {
                (halves!(half, after, one, packed, |h, a| h.nearest(f64::from(h.widen(a)).tanh() as f32)), 1)
            }
            _ => return Ok(false),
        };
        mods.ty();
        self.simple(i, run, Class::Half, false, count)?;
        Ok(true)
    }

    fn setp_half(&mut self, i: &Instruction, mods: &mut Mods, half: Half, packed: bool) -> Decoded<bool> {
        if packed {
            return self.error(i, "setp of pairs is not supported");
        }
        let name = i.modifiers.first().map_or("", String::as_str);
        if super::float::comparison::<f32>(name).is_none() {
            return self.error(i, "unknown comparison");
        }
        macro_rules! widened {
            ($h:expr, |$a:ident, $b:ident| $body:expr) => {
                compare_each(|x: u16, y: u16| {
                    let ($a, $b) = ($h.widen(x), $h.widen(y));
                    $body
                })
            };
        }
        macro_rules! by_name {
            ($h:expr) => {
                match name {
                    "eq" => widened!($h, |a, b| a == b),
                    "ne" => widened!($h, |a, b| a < b || a > b),
                    "lt" => widened!($h, |a, b| a < b),
                    "le" => widened!($h, |a, b| a <= b),
                    "gt" => widened!($h, |a, b| a > b),
                    "ge" => widened!($h, |a, b| a >= b),
                    "equ" => widened!($h, |a, b| !(a < b || a > b)),
                    "neu" => widened!($h, |a, b| a != b),
                    "ltu" => widened!($h, |a, b| !(a >= b)),
                    "leu" => widened!($h, |a, b| !(a > b)),
                    "gtu" => widened!($h, |a, b| !(a <= b)),
                    "geu" => widened!($h, |a, b| !(a < b)),
                    "num" => widened!($h, |a, b| !a.is_nan() && !b.is_nan()),
                    _ => widened!($h, |a, b| a.is_nan() || b.is_nan()),
                }
            };
        }
        let run = if half == F16 { by_name!(F16) } else { by_name!(BF16) };
        mods.take(name);
        mods.take("ftz");
        self.compare(i, mods, run, Class::Half)?;
        Ok(true)
    }
}

fn product(half: Half, a: u16, b: u16) -> u16 {
    let exact = f64::from(half.widen(a)) * f64::from(half.widen(b));
    crate::num::narrow(exact, half.format(), crate::num::Round::Nearest) as u16
}

fn extreme(half: Half, a: u16, b: u16, largest: bool, with_nan: bool) -> u16 {
    let (x, y) = (half.widen(a), half.widen(b));
    if with_nan && (x.is_nan() || y.is_nan()) {
        return crate::num::NAN16;
    }
    half.nearest(if largest { max32(x, y) } else { min32(x, y) })
}
