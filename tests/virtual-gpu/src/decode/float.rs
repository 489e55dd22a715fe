//! f32 and f64 arithmetic and comparisons, and the approximate functions.

// Comparisons are spelled so that NaN falls on the side that PTX gives it.
#![allow(clippy::double_comparisons, clippy::neg_cmp_op_on_partial_ord)]

use super::operands::{Mods, is_wide};
use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::lanes::*;
use crate::num::{self, Round, canon, ftz, sat};
use crate::program::Handler;
use crate::ptx::ast::Instruction;

fn one(f: impl Fn(f32) -> f32 + Copy, flush: bool) -> Handler {
    if flush { map1(move |a: f32| ftz(f(ftz(a)))) } else { map1(f) }
}

fn two(f: impl Fn(f32, f32) -> f32 + Copy, flush: bool, saturate: bool) -> Handler {
    match (flush, saturate) {
        (false, false) => map2(f),
        (true, false) => map2(move |a: f32, b: f32| ftz(f(ftz(a), ftz(b)))),
        (false, true) => map2(move |a: f32, b: f32| sat(f(a, b))),
        (true, true) => map2(move |a: f32, b: f32| sat(ftz(f(ftz(a), ftz(b))))),
    }
}

/// As [`two`], for rare operations.
fn slow_two(f: impl Fn(f32, f32) -> f32 + Copy, flush: bool, saturate: bool) -> Handler {
    match (flush, saturate) {
        (false, false) => each2(f),
        (true, false) => each2(move |a: f32, b: f32| ftz(f(ftz(a), ftz(b)))),
        (false, true) => each2(move |a: f32, b: f32| sat(f(a, b))),
        (true, true) => each2(move |a: f32, b: f32| sat(ftz(f(ftz(a), ftz(b))))),
    }
}

/// As [`one`], for rare operations.
fn slow_one(f: impl Fn(f32) -> f32 + Copy, flush: bool) -> Handler {
    if flush { each1(move |a: f32| ftz(f(ftz(a)))) } else { each1(f) }
}

fn three(f: impl Fn(f32, f32, f32) -> f32 + Copy, flush: bool, saturate: bool) -> Handler {
    match (flush, saturate) {
        (false, false) => map3(f),
        (true, false) => map3(move |a: f32, b: f32, c: f32| ftz(f(ftz(a), ftz(b), ftz(c)))),
        (false, true) => map3(move |a: f32, b: f32, c: f32| sat(f(a, b, c))),
        (true, true) => map3(move |a: f32, b: f32, c: f32| sat(ftz(f(ftz(a), ftz(b), ftz(c))))),
    }
}

#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    canon(a.mul_add(b, c))
}

/// Comparisons of floats by name: ordered ones are false on NaN, those that end in `u` are true.
pub(super) fn comparison<T: Lane + PartialOrd>(name: &str) -> Option<Handler> {
    let nan = |a: T, b: T| a.partial_cmp(&b).is_none();
    Some(match name {
        "eq" => compare(|a: T, b: T| a == b),
        "ne" => compare(|a: T, b: T| a < b || a > b),
        "lt" => compare(|a: T, b: T| a < b),
        "le" => compare(|a: T, b: T| a <= b),
        "gt" => compare(|a: T, b: T| a > b),
        "ge" => compare(|a: T, b: T| a >= b),
        "equ" => compare(|a: T, b: T| !(a < b || a > b)),
        "neu" => compare(|a: T, b: T| a != b),
        "ltu" => compare(|a: T, b: T| !(a >= b)),
        "leu" => compare(|a: T, b: T| !(a > b)),
        "gtu" => compare(|a: T, b: T| !(a <= b)),
        "geu" => compare(|a: T, b: T| !(a < b)),
        "num" => compare(move |a: T, b: T| !nan(a, b)),
        "nan" => compare(nan),
        _ => return None,
    })
}

/// The rounding that a modifier names.
pub(super) fn rounding(mods: &mut Mods) -> Option<Round> {
    Some(match mods.any(&["rn", "rz", "rm", "rp"])? {
        "rn" => Round::Nearest,
        "rz" => Round::Zero,
        "rm" => Round::Down,
        _ => Round::Up,
    })
}

impl Decoder<'_> {
    /// Decodes an f32 or f64 instruction; false if it is none.
    pub(super) fn float(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let ty = mods.last();
        match (i.opcode.as_str(), ty) {
            ("setp", "f32") => self.setp_float(i, mods),
            ("setp", "f64") => {
                let name = i.modifiers.first().map_or("", String::as_str);
                let Some(run) = comparison::<f64>(name) else { return self.error(i, "unknown comparison") };
                mods.take(name);
                self.compare(i, mods, run, Class::Double)?;
                Ok(true)
            }
            ("testp", "f32") => self.testp(i, mods).map(|()| true),
            (_, "f32") => self.single(i, mods),
            (_, "f64") => self.double(i, mods),
            _ => Ok(false),
        }
    }

    fn setp_float(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let name = i.modifiers.first().map_or("", String::as_str);
        let Some(mut run) = comparison::<f32>(name) else { return self.error(i, "unknown comparison") };
        mods.take(name);
        if mods.take("ftz") {
            run = match name {
                "eq" => compare_each(|a: f32, b: f32| ftz(a) == ftz(b)),
                "ne" => compare_each(|a: f32, b: f32| ftz(a) < ftz(b) || ftz(a) > ftz(b)),
                "lt" => compare_each(|a: f32, b: f32| ftz(a) < ftz(b)),
                "le" => compare_each(|a: f32, b: f32| ftz(a) <= ftz(b)),
                "gt" => compare_each(|a: f32, b: f32| ftz(a) > ftz(b)),
                "ge" => compare_each(|a: f32, b: f32| ftz(a) >= ftz(b)),
                "equ" => compare_each(|a: f32, b: f32| !(ftz(a) < ftz(b) || ftz(a) > ftz(b))),
                "neu" => compare_each(|a: f32, b: f32| ftz(a) != ftz(b)),
                "ltu" => compare_each(|a: f32, b: f32| !(ftz(a) >= ftz(b))),
                "leu" => compare_each(|a: f32, b: f32| !(ftz(a) > ftz(b))),
                "gtu" => compare_each(|a: f32, b: f32| !(ftz(a) <= ftz(b))),
                "geu" => compare_each(|a: f32, b: f32| !(ftz(a) < ftz(b))),
                _ => run,
            };
        }
        self.compare(i, mods, run, Class::Float)?;
        Ok(true)
    }

    fn testp(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let run = match mods.any(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"]) {
            Some("finite") => compare_each(|a: f32, _: f32| a.is_finite()),
            Some("infinite") => compare_each(|a: f32, _: f32| a.is_infinite()),
            Some("number") => compare_each(|a: f32, _: f32| !a.is_nan()),
            Some("notanumber") => compare_each(|a: f32, _: f32| a.is_nan()),
            Some("normal") => compare_each(|a: f32, _: f32| a.is_normal()),
            Some(_) => compare_each(|a: f32, _: f32| a.is_subnormal()),
            None => return self.error(i, "what to test for is due"),
        };
        mods.ty();
        let a = self.float_source(i, 1, "f32")?;
        let dst = self.predicate(i, i.operands.first())?;
        let mut inst = self.start(i, run, Class::Float)?;
        (inst.dst, inst.a, inst.b) = (dst, a, a);
        self.push(inst);
        Ok(())
    }

    fn single(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let (mut class, flush, saturate) = (Class::Float, mods.take("ftz"), mods.take("sat"));
        let round = rounding(mods);
        let nearest = matches!(round, None | Some(Round::Nearest));
        macro_rules! directed {
            ($make:ident, $f:path, |$($x:ident),+|) => {
                match round {
                    Some(Round::Zero) => $make(|$($x),+| $f($($x),+, Round::Zero), flush, saturate),
                    Some(Round::Down) => $make(|$($x),+| $f($($x),+, Round::Down), flush, saturate),
                    _ => $make(|$($x),+| $f($($x),+, Round::Up), flush, saturate),
                }
            };
        }
        #[inline(always)]
        fn subtract(a: f32, b: f32, round: Round) -> f32 {
            num::add32(a, -b, round)
        }
        let run = match i.opcode.as_str() {
            "add" if nearest => two(|a, b| canon(a + b), flush, saturate),
            "sub" if nearest => two(|a, b| canon(a - b), flush, saturate),
            "mul" if nearest => two(|a, b| canon(a * b), flush, saturate),
            "fma" | "mad" if nearest => three(fma, flush, saturate),
            "add" => directed!(slow_two, num::add32, |a, b|),
            "sub" => directed!(slow_two, subtract, |a, b|),
            "mul" => directed!(slow_two, num::mul32, |a, b|),
            "fma" | "mad" => directed!(three, num::fma32, |a, b, c|),
            "div" => {
                class = Class::Special;
                let approximate = mods.any(&["approx", "full"]).is_some();
                if approximate || nearest {
                    two(|a, b| canon(a / b), flush, saturate)
                } else {
                    directed!(slow_two, num::div32, |a, b|)
                }
            }
            "min" | "max" => {
                let with_nan = mods.take("NaN");
                match (i.opcode.as_str(), with_nan) {
                    ("min", false) => two(num::min32, flush, false),
                    ("min", true) => two(
                        |a, b| if a.is_nan() || b.is_nan() { canon(f32::NAN) } else { num::min32(a, b) },
                        flush,
                        false,
                    ),
                    (_, false) => two(num::max32, flush, false),
                    _ => two(
                        |a, b| if a.is_nan() || b.is_nan() { canon(f32::NAN) } else { num::max32(a, b) },
                        flush,
                        false,
                    ),
                }
            }
            "neg" => one(|a| canon(-a), flush),
            "abs" => one(|a| canon(a.abs()), flush),
            "copysign" => map2(|a: f32, b: f32| b.copysign(a)),
            "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
                class = Class::Special;
                mods.take("approx");
                let directed = match round {
                    None | Some(Round::Nearest) => 0,
                    Some(Round::Zero) => 1,
                    Some(Round::Down) => 2,
                    Some(Round::Up) => 3,
                };
                match (i.opcode.as_str(), directed) {
                    ("rcp", 0) => one(|a| canon(1.0 / a), flush),
                    ("rcp", 1) => slow_one(|a| num::div32(1.0, a, Round::Zero), flush),
                    ("rcp", 2) => slow_one(|a| num::div32(1.0, a, Round::Down), flush),
                    ("rcp", _) => slow_one(|a| num::div32(1.0, a, Round::Up), flush),
                    ("sqrt", 0) => one(|a| canon(a.sqrt()), flush),
                    ("sqrt", 1) => slow_one(|a| num::sqrt32(a, Round::Zero), flush),
                    ("sqrt", 2) => slow_one(|a| num::sqrt32(a, Round::Down), flush),
                    ("sqrt", _) => slow_one(|a| num::sqrt32(a, Round::Up), flush),
                    ("rsqrt", 0) => one(num::rsqrt, flush),
                    ("ex2", 0) => one(num::exp2, flush),
                    ("lg2", 0) => one(num::log2, flush),
                    ("sin", 0) => slow_one(|a| canon(f64::from(a).sin() as f32), flush),
                    ("cos", 0) => slow_one(|a| canon(f64::from(a).cos() as f32), flush),
                    ("tanh", 0) => slow_one(|a| canon(f64::from(a).tanh() as f32), flush),
                    _ => return self.error(i, "unsupported rounding"),
                }
            }
            _ => return Ok(false),
        };
        mods.ty();
        self.float_operands(i, run, class, "f32")?;
        Ok(true)
    }

    fn double(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let round = rounding(mods);
        if !matches!(round, None | Some(Round::Nearest)) && i.opcode != "cvt" {
            return self.error(i, "f64 is supported with .rn only");
        }
        let run = match i.opcode.as_str() {
            "add" => map2(|a: f64, b: f64| a + b),
            "sub" => map2(|a: f64, b: f64| a - b),
            "mul" => map2(|a: f64, b: f64| a * b),
            "fma" | "mad" => map3(|a: f64, b: f64, c: f64| a.mul_add(b, c)),
            "div" => map2(|a: f64, b: f64| a / b),
            "min" => each2(|a: f64, b: f64| a.min(b)),
            "max" => each2(|a: f64, b: f64| a.max(b)),
            "neg" => map1(|a: f64| -a),
            "abs" => map1(|a: f64| a.abs()),
            "sqrt" => map1(|a: f64| a.sqrt()),
            "rcp" if mods.take("approx") => {
                mods.take("ftz");
                each1(rough_reciprocal)
            }
            "rcp" => each1(|a: f64| 1.0 / a),
            "copysign" => each2(|a: f64, b: f64| b.copysign(a)),
            _ => return Ok(false),
        };
        mods.ty();
        self.float_operands(i, run, Class::Double, "f64")?;
        Ok(true)
    }

    /// Emits an instruction whose operands are all of floating-point type `ty`.
    pub(super) fn float_operands(
        &mut self,
        i: &Instruction,
        run: Handler,
        class: Class,
        ty: &str,
    ) -> Decoded<()> {
        let mut slots = [0; 3];
        let count = match i.opcode.as_str() {
            "fma" | "mad" => 3,
            "add" | "sub" | "mul" | "div" | "min" | "max" | "copysign" => 2,
            _ => 1,
        };
        if i.operands.len() != count + 1 {
            return self.error(i, format!("{} operands where {} are due", i.operands.len(), count + 1));
        }
        for (n, slot) in slots.iter_mut().enumerate().take(count) {
            *slot = self.float_source(i, n + 1, ty)?;
        }
        let dst = self.destination(i, is_wide(ty))?;
        let mut inst = self.start(i, run, class)?;
        (inst.dst, [inst.a, inst.b, inst.c]) = (dst, slots);
        self.push(inst);
        Ok(())
    }
}

/// `rcp.approx.ftz.f64`: twenty bits of the mantissa, and no subnormal goes in or comes out.
fn rough_reciprocal(a: f64) -> f64 {
    let flushed = |x: f64| if x.is_subnormal() { 0.0_f64.copysign(x) } else { x };
    let rough = flushed(1.0 / flushed(a));
    if rough.is_finite() { f64::from_bits(rough.to_bits() & 0xffff_ffff_0000_0000) } else { rough }
}
