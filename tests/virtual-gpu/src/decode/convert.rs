//! `cvt` and `cvta`.

use super::float::rounding;
use super::operands::{Mods, is_wide};
use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::lanes::*;
use crate::memory::{LOCAL_WINDOW, SHARED_WINDOW};
use crate::num::{self, BF16, F16, F32, Half, Round, canon, ftz, narrow, sat};
use crate::program::Handler;
use crate::ptx::ast::Instruction;

macro_rules! to_integer {
    ($ty:expr, $s:ty, |$x:ident| $value:expr) => {
        match $ty {
            "u8" => each1(|$x: $s| u32::from($value as u8)),
            "s8" => each1(|$x: $s| i32::from($value as i8)),
            "u16" => each1(|$x: $s| u32::from($value as u16)),
            "s16" => each1(|$x: $s| i32::from($value as i16)),
            "u32" => each1(|$x: $s| $value as u32),
            "s32" => each1(|$x: $s| $value as i32),
            "u64" => each1(|$x: $s| $value as u64),
            _ => each1(|$x: $s| $value as i64),
        }
    };
}

macro_rules! from_integer {
    ($ty:expr, |$x:ident| $value:expr) => {
        match $ty {
            "u8" => each1(|raw: u32| {
                let $x = raw as u8;
                $value
            }),
            "s8" => each1(|raw: u32| {
                let $x = raw as i8;
                $value
            }),
            "u16" => each1(|$x: u16| $value),
            "s16" => each1(|$x: i16| $value),
            "u32" => each1(|$x: u32| $value),
            "s32" => each1(|$x: i32| $value),
            "u64" => each1(|$x: u64| $value),
            _ => each1(|$x: i64| $value),
        }
    };
}

macro_rules! clamp_to {
    ($from:expr, $t:ty, $w:ty) => {
        from_integer!($from, |x| (x as i128).clamp(<$t>::MIN as i128, <$t>::MAX as i128) as $t as $w)
    };
}

/// How a float becomes an integral value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Integral {
    Nearest,
    Zero,
    Down,
    Up,
}

/// f32 to a 64-bit integer: NaN has the value that PTX gives for 64-bit results.
fn long_unsigned(x: f64) -> u64 {
    if x.is_nan() { 1 << 63 } else { x as u64 }
}

fn long_signed(x: f64) -> i64 {
    if x.is_nan() { i64::MIN } else { x as i64 }
}

fn is_integer(ty: &str) -> bool {
    matches!(ty, "u8" | "s8" | "u16" | "s16" | "u32" | "s32" | "u64" | "s64")
}

impl Decoder<'_> {
    /// Decodes a conversion; false if it is none.
    pub(super) fn convert(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        match i.opcode.as_str() {
            "cvta" => self.cvta(i, mods)?,
            "cvt" => self.cvt(i, mods)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn cvta(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let to = mods.take("to");
        let space = mods.any(&["global", "shared", "shared::cta", "local", "const", "param"]);
        let run = match (space, to) {
            (Some("shared" | "shared::cta"), false) => each1(|a: u64| a.wrapping_add(SHARED_WINDOW)),
            (Some("shared" | "shared::cta"), true) => each1(|a: u64| a.wrapping_sub(SHARED_WINDOW)),
            (Some("local"), false) => each1(|a: u64| a.wrapping_add(LOCAL_WINDOW)),
            (Some("local"), true) => each1(|a: u64| a.wrapping_sub(LOCAL_WINDOW)),
            (Some("global" | "const"), _) => each1(|a: u64| a),
            _ => return self.error(i, "unsupported state space"),
        };
        if mods.ty() != Some("u64") {
            return self.error(i, "only 64-bit addresses are supported");
        }
        self.simple(i, run, Class::Move, true, 1)
    }

    fn cvt(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let integral = mods.any(&["rni", "rzi", "rmi", "rpi"]).map(|m| match m {
            "rni" => Integral::Nearest,
            "rzi" => Integral::Zero,
            "rmi" => Integral::Down,
            _ => Integral::Up,
        });
        let away = mods.take("rna");
        let round = rounding(mods);
        let (flush, saturate, relu) = (mods.take("ftz"), mods.take("sat"), mods.take("relu"));
        let (Some(to), Some(from)) = (mods.ty(), mods.ty()) else {
            return self.error(i, "two types are due");
        };
        if relu && !matches!(to, "f16" | "bf16" | "f16x2" | "bf16x2") {
            return self.error(i, ".relu needs a half result");
        }
        if from.starts_with("bf16") || to.starts_with("bf16") || to == "tf32" {
            self.needs(i, 80)?;
        }
        if matches!(to, "f16x2" | "bf16x2") {
            return self.cvt_pair(i, to, from, round, relu);
        }
        let run = match (is_integer(to), is_integer(from)) {
            (true, true) if saturate => self.saturated(i, to, from)?,
            (true, true) => integers(to, from),
            (true, false) => self.float_to_integer(i, to, from, integral, flush)?,
            (false, true) => self.integer_to_float(i, to, from, round)?,
            (false, false) if to == "tf32" && from == "f32" && away => each1(|a: u32| {
                if a & 0x7fff_ffff > 0x7f80_0000 { num::NAN32 } else { a.wrapping_add(0x1000) & !0x1fff }
            }),
            (false, false) => {
                return self.float_to_float(i, to, from, integral, round, (flush, saturate, relu));
            }
        };
        self.converted(i, run, to, from)
    }

    /// Emits a conversion; a 64-bit register read as a narrower type is cut first.
    fn converted(&mut self, i: &Instruction, run: Handler, to: &str, from: &str) -> Decoded<()> {
        let Some(source) = i.operands.get(1) else { return self.error(i, "too few operands") };
        let mut a;
        if self.register_is_wide(source) && !is_wide(from) {
            a = self.operand(i, source, true, None)?;
            let scratch = self.new_slot(false);
            let mut cut = self.blank(each1(|x: u64| x as u32), Class::None, i.line);
            (cut.dst, cut.a) = (scratch, a);
            self.push(cut);
            a = scratch;
        } else {
            a = self.operand(i, source, is_wide(from), Some(from))?;
        }
        let mut inst = self.start(i, run, Class::Convert)?;
        (inst.dst, inst.a) = (self.destination(i, is_wide(to))?, a);
        self.push(inst);
        Ok(())
    }

    fn saturated(&self, i: &Instruction, to: &str, from: &str) -> Decoded<Handler> {
        Ok(match to {
            "u8" => clamp_to!(from, u8, u32),
            "s8" => clamp_to!(from, i8, i32),
            "u16" => clamp_to!(from, u16, u32),
            "s16" => clamp_to!(from, i16, i32),
            "u32" => clamp_to!(from, u32, u32),
            "s32" => clamp_to!(from, i32, i32),
            _ => return self.error(i, "unsupported saturating conversion"),
        })
    }

    fn float_to_integer(
        &self,
        i: &Instruction,
        to: &str,
        from: &str,
        integral: Option<Integral>,
        flush: bool,
    ) -> Decoded<Handler> {
        let Some(integral) = integral else { return self.error(i, "a rounding to integer is due") };
        // Subnormals round to 0 or to ±1 by direction: only the latter two see a flush.
        if flush && matches!(integral, Integral::Down | Integral::Up) {
            return self.error(i, ".ftz with .rmi or .rpi is not supported");
        }
        macro_rules! rounded {
            ($s:ty, |$x:ident| $wide:expr) => {
                match (to, integral) {
                    ("u64", Integral::Nearest) => each1(|$x: $s| long_unsigned($wide.round_ties_even())),
                    ("u64", Integral::Zero) => each1(|$x: $s| long_unsigned($wide)),
                    ("u64", Integral::Down) => each1(|$x: $s| long_unsigned($wide.floor())),
                    ("u64", Integral::Up) => each1(|$x: $s| long_unsigned($wide.ceil())),
                    ("s64", Integral::Nearest) => each1(|$x: $s| long_signed($wide.round_ties_even())),
                    ("s64", Integral::Zero) => each1(|$x: $s| long_signed($wide)),
                    ("s64", Integral::Down) => each1(|$x: $s| long_signed($wide.floor())),
                    ("s64", Integral::Up) => each1(|$x: $s| long_signed($wide.ceil())),
                    (to, Integral::Nearest) => to_integer!(to, $s, |$x| $wide.round_ties_even()),
                    (to, Integral::Zero) => to_integer!(to, $s, |$x| $wide),
                    (to, Integral::Down) => to_integer!(to, $s, |$x| $wide.floor()),
                    (to, Integral::Up) => to_integer!(to, $s, |$x| $wide.ceil()),
                }
            };
        }
        Ok(match from {
            "f32" => rounded!(f32, |x| f64::from(x)),
            "f16" => rounded!(u16, |x| f64::from(num::f16_to_f32(x))),
            "bf16" => rounded!(u16, |x| f64::from(num::bf16_to_f32(x))),
            "f64" => rounded!(f64, |x| x),
            _ => return self.error(i, "unsupported source type"),
        })
    }

    fn integer_to_float(
        &self,
        i: &Instruction,
        to: &str,
        from: &str,
        round: Option<Round>,
    ) -> Decoded<Handler> {
        let Some(round) = round else { return self.error(i, "a rounding is due") };
        let long = matches!(from, "u64" | "s64");
        Ok(match (to, round) {
            ("f32", Round::Nearest) if from == "s32" => map1(|x: i32| x as f32),
            ("f32", Round::Nearest) if from == "u32" => map1(|x: u32| x as f32),
            ("f32", Round::Nearest) => from_integer!(from, |x| x as f32),
            ("f64", Round::Nearest) => from_integer!(from, |x| x as f64),
            ("f64", _) if !long => from_integer!(from, |x| x as f64),
            ("f16", Round::Nearest) => from_integer!(from, |x| narrow(x as f64, F16, Round::Nearest)),
            ("bf16", Round::Nearest) => from_integer!(from, |x| narrow(x as f64, BF16, Round::Nearest)),
            ("f32", Round::Zero) if !long => from_integer!(from, |x| narrow(x as f64, F32, Round::Zero)),
            ("f32", Round::Down) if !long => from_integer!(from, |x| narrow(x as f64, F32, Round::Down)),
            ("f32", Round::Up) if !long => from_integer!(from, |x| narrow(x as f64, F32, Round::Up)),
            ("f16", Round::Zero) => from_integer!(from, |x| narrow(x as f64, F16, Round::Zero)),
            ("f16", Round::Down) => from_integer!(from, |x| narrow(x as f64, F16, Round::Down)),
            ("f16", Round::Up) => from_integer!(from, |x| narrow(x as f64, F16, Round::Up)),
            _ => return self.error(i, "unsupported conversion"),
        })
    }

    fn float_to_float(
        &mut self,
        i: &Instruction,
        to: &str,
        from: &str,
        integral: Option<Integral>,
        round: Option<Round>,
        (flush, saturate, relu): (bool, bool, bool),
    ) -> Decoded<()> {
        let run = match (to, from) {
            ("f32", "f32") | ("f16", "f16") | ("f64", "f64") => {
                self.same(i, to, integral, flush, saturate)?
            }
            ("f32", "f16") if saturate => each1(|x: u16| sat(canon(num::f16_to_f32(x)))),
            ("f32", "f16") => map1(|x: u16| canon(num::f16_to_f32(x))),
            ("f32", "bf16") => map1(|x: u16| canon(num::bf16_to_f32(x))),
            ("f64", "f32") if flush => each1(|x: f32| f64::from(ftz(x))),
            ("f64", "f32") => map1(|x: f32| f64::from(x)),
            ("f64", "f16") => each1(|x: u16| f64::from(num::f16_to_f32(x))),
            ("f32", "f64") => match (round, flush, saturate) {
                (Some(Round::Nearest), false, false) => map1(|x: f64| canon(x as f32)),
                (Some(Round::Nearest), true, false) => each1(|x: f64| ftz(canon(x as f32))),
                (Some(Round::Nearest), _, true) => each1(|x: f64| sat(x as f32)),
                (Some(Round::Zero), false, false) => {
                    each1(|x: f64| canon(f32::from_bits(narrow(x, F32, Round::Zero))))
                }
                (Some(Round::Down), false, false) => {
                    each1(|x: f64| canon(f32::from_bits(narrow(x, F32, Round::Down))))
                }
                (Some(Round::Up), false, false) => {
                    each1(|x: f64| canon(f32::from_bits(narrow(x, F32, Round::Up))))
                }
                _ => return self.error(i, "a rounding is due"),
            },
            ("f16", "f64") if round == Some(Round::Nearest) => {
                each1(|x: f64| half_bits(x, Half::F16, Round::Nearest))
            }
            ("bf16", "f64") if round == Some(Round::Nearest) => {
                each1(|x: f64| half_bits(x, Half::Bf16, Round::Nearest))
            }
            ("f16" | "bf16", "f32") => self.to_half(i, to == "f16", round, flush, (saturate, relu))?,
            _ => return self.error(i, "unsupported conversion"),
        };
        self.converted(i, run, to, from)
    }

    fn same(
        &self,
        i: &Instruction,
        ty: &str,
        integral: Option<Integral>,
        flush: bool,
        saturate: bool,
    ) -> Decoded<Handler> {
        macro_rules! with {
            (|$x:ident| $f:expr) => {
                match (ty, flush, saturate) {
                    ("f32", false, false) => map1(|$x: f32| canon($f)),
                    ("f32", true, false) => each1(|y: f32| {
                        let $x = ftz(y);
                        ftz(canon($f))
                    }),
                    ("f32", false, true) => map1(|$x: f32| sat($f)),
                    ("f32", true, true) => each1(|y: f32| {
                        let $x = ftz(y);
                        sat($f)
                    }),
                    ("f16", false, false) => each1(|h: u16| {
                        let $x = num::f16_to_f32(h);
                        num::f32_to_f16($f)
                    }),
                    ("f64", false, false) => each1(|$x: f64| $f),
                    _ => return self.error(i, "unsupported modifiers"),
                }
            };
        }
        Ok(match integral {
            None => with!(|x| x),
            Some(Integral::Nearest) => with!(|x| x.round_ties_even()),
            Some(Integral::Zero) => with!(|x| x.trunc()),
            Some(Integral::Down) => with!(|x| x.floor()),
            Some(Integral::Up) => with!(|x| x.ceil()),
        })
    }

    fn to_half(
        &self,
        i: &Instruction,
        f16: bool,
        round: Option<Round>,
        flush: bool,
        (saturate, relu): (bool, bool),
    ) -> Decoded<Handler> {
        let Some(round) = round else { return self.error(i, "a rounding is due") };
        if flush {
            // An f32 subnormal is below half of the smallest f16, but not of the smallest bf16.
            if !f16 || !matches!(round, Round::Nearest | Round::Zero) {
                return self.error(i, ".ftz is supported for f16 with .rn and .rz only");
            }
        }
        Ok(match (f16, round, saturate, relu) {
            (true, Round::Nearest, false, false) => map1(|x: f32| num::f32_to_f16(x)),
            (false, Round::Nearest, false, false) => map1(|x: f32| num::f32_to_bf16(x)),
            (true, Round::Nearest, true, false) => each1(|x: f32| num::f32_to_f16(sat(x))),
            (true, Round::Nearest, false, true) => each1(|x: f32| relu_half(x, Half::F16)),
            (false, Round::Nearest, false, true) => each1(|x: f32| relu_half(x, Half::Bf16)),
            (true, Round::Zero, false, false) => each1(|x: f32| half_bits(x.into(), Half::F16, Round::Zero)),
            (true, Round::Down, false, false) => each1(|x: f32| half_bits(x.into(), Half::F16, Round::Down)),
            (true, Round::Up, false, false) => each1(|x: f32| half_bits(x.into(), Half::F16, Round::Up)),
            (false, Round::Zero, false, false) => {
                each1(|x: f32| half_bits(x.into(), Half::Bf16, Round::Zero))
            }
            (false, Round::Down, false, false) => {
                each1(|x: f32| half_bits(x.into(), Half::Bf16, Round::Down))
            }
            (false, Round::Up, false, false) => each1(|x: f32| half_bits(x.into(), Half::Bf16, Round::Up)),
            _ => return self.error(i, "unsupported modifiers"),
        })
    }

    /// `cvt.rn.f16x2.f32 d, a, b`: a becomes the upper half.
    fn cvt_pair(
        &mut self,
        i: &Instruction,
        to: &str,
        from: &str,
        round: Option<Round>,
        relu: bool,
    ) -> Decoded<()> {
        self.needs(i, 80)?;
        if from != "f32" {
            return self.error(i, "the source must be f32");
        }
        let pack = |a: u16, b: u16| u32::from(a) << 16 | u32::from(b);
        let run = match (to, round, relu) {
            ("f16x2", Some(Round::Nearest), false) => {
                map2(move |a: f32, b: f32| pack(num::f32_to_f16(a), num::f32_to_f16(b)))
            }
            ("bf16x2", Some(Round::Nearest), false) => {
                map2(move |a: f32, b: f32| pack(num::f32_to_bf16(a), num::f32_to_bf16(b)))
            }
            ("f16x2", Some(Round::Nearest), true) => {
                each2(move |a: f32, b: f32| pack(relu_half(a, Half::F16), relu_half(b, Half::F16)))
            }
            ("bf16x2", Some(Round::Nearest), true) => {
                each2(move |a: f32, b: f32| pack(relu_half(a, Half::Bf16), relu_half(b, Half::Bf16)))
            }
            ("f16x2", Some(Round::Zero), false) => each2(move |a: f32, b: f32| {
                pack(half_bits(a.into(), Half::F16, Round::Zero), half_bits(b.into(), Half::F16, Round::Zero))
            }),
            ("bf16x2", Some(Round::Zero), false) => each2(move |a: f32, b: f32| {
                pack(
                    half_bits(a.into(), Half::Bf16, Round::Zero),
                    half_bits(b.into(), Half::Bf16, Round::Zero),
                )
            }),
            _ => return self.error(i, "unsupported modifiers"),
        };
        let (a, b) = (self.float_source(i, 1, "f32")?, self.float_source(i, 2, "f32")?);
        let mut inst = self.start(i, run, Class::Convert)?;
        (inst.dst, inst.a, inst.b) = (self.destination(i, false)?, a, b);
        self.push(inst);
        Ok(())
    }
}

fn integers(to: &str, from: &str) -> Handler {
    // The common ones.
    match (to, from) {
        ("u64", "u32") => return map1(|x: u32| u64::from(x)),
        ("s64", "s32") => return map1(|x: i32| i64::from(x)),
        ("u32", "u64") => return map1(|x: u64| x as u32),
        ("u32" | "s32", "u16") => return map1(|x: u16| u32::from(x)),
        ("u16", "u32") => return map1(|x: u32| x & 0xffff),
        _ => {}
    }
    match to {
        "u8" => from_integer!(from, |x| u32::from(x as u8)),
        "s8" => from_integer!(from, |x| i32::from(x as i8)),
        "u16" => from_integer!(from, |x| u32::from(x as u16)),
        "s16" => from_integer!(from, |x| i32::from(x as i16)),
        "u32" => from_integer!(from, |x| x as u32),
        "s32" => from_integer!(from, |x| x as i32),
        "u64" => from_integer!(from, |x| x as u64),
        _ => from_integer!(from, |x| x as i64),
    }
}

fn half_bits(x: f64, half: Half, round: Round) -> u16 {
    let bits = narrow(x, half.format(), round) as u16;
    if x.is_nan() { num::NAN16 } else { bits }
}

fn relu_half(x: f32, half: Half) -> u16 {
    if x > 0.0 || x.is_nan() { half.nearest(x) } else { 0 }
}
