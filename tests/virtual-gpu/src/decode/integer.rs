//! Integer, logic, moves and comparisons of integers.

use super::operands::{Mods, is_wide};
use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::lanes::*;
use crate::program::*;
use crate::ptx::ast::{Instruction, Operand};

/// One handler for each integer type.
macro_rules! by_type {
    ($ty:expr, $make:ident, |$($x:ident),+| $body:expr) => {
        match $ty {
            "u16" | "b16" => Some($make(|$($x: u16),+| $body)),
            "s16" => Some($make(|$($x: i16),+| $body)),
            "u32" | "b32" => Some($make(|$($x: u32),+| $body)),
            "s32" => Some($make(|$($x: i32),+| $body)),
            "u64" | "b64" => Some($make(|$($x: u64),+| $body)),
            "s64" => Some($make(|$($x: i64),+| $body)),
            _ => None,
        }
    };
}

macro_rules! bitwise {
    ($ty:expr, $make:ident, |$($x:ident),+| $body:expr) => {
        match $ty {
            "b16" | "u16" | "s16" => Some($make(|$($x: u16),+| $body)),
            "b32" | "u32" | "s32" => Some($make(|$($x: u32),+| $body)),
            "b64" | "u64" | "s64" => Some($make(|$($x: u64),+| $body)),
            _ => None,
        }
    };
}

/// Permutation of bytes: the selector's four nibbles pick bytes of b:a.
#[inline(always)]
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = u64::from(a) | u64::from(b) << 32;
    let mut out = 0;
    for n in 0..4 {
        let nibble = selector >> (4 * n) & 0xf;
        let byte = (bytes >> (8 * (nibble & 7))) as u32 & 0xff;
        let sign = if byte & 0x80 != 0 { 0xff } else { 0 };
        out |= (if nibble & 8 != 0 { sign } else { byte }) << (8 * n);
    }
    out
}

#[inline(always)]
fn lookup(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut out = 0;
    for n in 0..8u32 {
        let chosen = 0u32.wrapping_sub(table >> n & 1);
        let x = if n & 4 != 0 { a } else { !a };
        let y = if n & 2 != 0 { b } else { !b };
        let z = if n & 1 != 0 { c } else { !c };
        out |= x & y & z & chosen;
    }
    out
}

#[inline(always)]
fn extract(a: u64, position: u32, length: u32, width: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let top = (position + length - 1).min(width - 1);
    let sign = signed && a >> top & 1 == 1;
    let inside = if position >= width { 0 } else { a >> position };
    let kept = length.min(width.saturating_sub(position));
    let mask = if kept >= 64 { u64::MAX } else { (1 << kept) - 1 };
    let value = inside & mask;
    if sign { value | !mask } else { value }
}

#[inline(always)]
fn insert(a: u64, b: u64, position: u32, length: u32, width: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 || position >= width {
        return b;
    }
    let ones = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    let mask = ones << position;
    (b & !mask) | (a << position & mask)
}

impl Decoder<'_> {
    /// Decodes an integer instruction; false if it is none.
    pub(super) fn integer(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let ty = mods.last();
        let class = Class::Integer;
        let wide = is_wide(ty);
        let (handler, count): (Option<Handler>, usize) = match i.opcode.as_str() {
            "mov" => return self.mov(i, mods).map(|()| true),
            "setp" => return self.setp_integer(i, mods),
            "selp" => return self.selp(i, mods).map(|()| true),
            "slct" => return self.slct(i, mods).map(|()| true),
            "mul" | "mad" => return self.multiply(i, mods),
            "and" | "or" | "xor" | "not" if ty == "pred" => return self.logic(i, mods).map(|()| true),
            "shl" | "shr" => return self.shift(i, mods).map(|()| true),
            "add" => (by_type!(ty, map2, |a, b| a.wrapping_add(b)), 2),
            "sub" => (by_type!(ty, map2, |a, b| a.wrapping_sub(b)), 2),
            "div" => (by_type!(ty, each2, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) }), 2),
            "rem" => (by_type!(ty, each2, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }), 2),
            "min" => (by_type!(ty, map2, |a, b| if b < a { b } else { a }), 2),
            "max" => (by_type!(ty, map2, |a, b| if b > a { b } else { a }), 2),
            "abs" => (
                signed(
                    ty,
                    map1(|a: i16| a.wrapping_abs()),
                    map1(|a: i32| a.wrapping_abs()),
                    map1(|a: i64| a.wrapping_abs()),
                ),
                1,
            ),
            "neg" => (
                signed(
                    ty,
                    map1(|a: i16| a.wrapping_neg()),
                    map1(|a: i32| a.wrapping_neg()),
                    map1(|a: i64| a.wrapping_neg()),
                ),
                1,
            ),
            "sad" => (
                match ty {
                    "u32" => Some(map3(|a: u32, b: u32, c: u32| c.wrapping_add(a.abs_diff(b)))),
                    "s32" => Some(map3(|a: i32, b: i32, c: u32| c.wrapping_add(a.abs_diff(b)))),
                    _ => None,
                },
                3,
            ),
            "and" => (bitwise!(ty, map2, |a, b| a & b), 2),
            "or" => (bitwise!(ty, map2, |a, b| a | b), 2),
            "xor" => (bitwise!(ty, map2, |a, b| a ^ b), 2),
            "not" => (bitwise!(ty, map1, |a| !a), 1),
            "cnot" => (bitwise!(ty, each1, |a| if a == 0 { 1 } else { 0 }), 1),
            "popc" | "clz" | "bfind" | "brev" | "bfe" | "bfi" | "shf" | "prmt" | "lop3" | "dp4a" | "dp2a"
            | "bmsk" => {
                return self.bits(i, mods).map(|()| true);
            }
            _ => return Ok(false),
        };
        let Some(handler) = handler else { return Ok(false) };
        mods.ty();
        self.simple(i, handler, class, wide, count)?;
        Ok(true)
    }

    fn shift(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let ty = mods.ty().unwrap_or("");
        let handler = match (i.opcode.as_str(), ty) {
            ("shl", "b16") => map2(|a: u16, n: u32| if n > 15 { 0 } else { a << n }),
            ("shl", "b32") => map2(|a: u32, n: u32| if n > 31 { 0 } else { a << (n & 31) }),
            ("shl", "b64") => map2(|a: u64, n: u32| if n > 63 { 0 } else { a << (n & 63) }),
            ("shr", "b16" | "u16") => map2(|a: u16, n: u32| if n > 15 { 0 } else { a >> n }),
            ("shr", "b32" | "u32") => map2(|a: u32, n: u32| if n > 31 { 0 } else { a >> (n & 31) }),
            ("shr", "b64" | "u64") => map2(|a: u64, n: u32| if n > 63 { 0 } else { a >> (n & 63) }),
            ("shr", "s16") => map2(|a: i16, n: u32| a >> n.min(15)),
            ("shr", "s32") => map2(|a: i32, n: u32| a >> n.min(31)),
            ("shr", "s64") => map2(|a: i64, n: u32| a >> n.min(63)),
            _ => return self.error(i, "unsupported type"),
        };
        let wide = is_wide(ty);
        self.mixed(i, handler, Class::Integer, wide, &[wide, false])
    }

    fn multiply(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let ty = mods.last();
        if !matches!(ty, "u16" | "s16" | "u32" | "s32" | "u64" | "s64") {
            return Ok(false);
        }
        mods.ty();
        let part = mods.any(&["lo", "hi", "wide"]).unwrap_or("");
        let add = i.opcode == "mad";
        let handler = match (part, ty, add) {
            ("lo", "u16" | "s16", false) => each2(|a: u16, b: u16| a.wrapping_mul(b)),
            ("lo", "u32" | "s32", false) => map2(|a: u32, b: u32| a.wrapping_mul(b)),
            ("lo", "u64" | "s64", false) => map2(|a: u64, b: u64| a.wrapping_mul(b)),
            ("lo", "u16" | "s16", true) => each3(|a: u16, b: u16, c: u16| a.wrapping_mul(b).wrapping_add(c)),
            ("lo", "u32" | "s32", true) => map3(|a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c)),
            ("lo", "u64" | "s64", true) => map3(|a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c)),
            ("hi", "u16", false) => each2(|a: u16, b: u16| (u32::from(a) * u32::from(b) >> 16) as u16),
            ("hi", "s16", false) => each2(|a: i16, b: i16| (i32::from(a) * i32::from(b) >> 16) as i16),
            ("hi", "u32", false) => map2(|a: u32, b: u32| (u64::from(a) * u64::from(b) >> 32) as u32),
            ("hi", "s32", false) => map2(|a: i32, b: i32| (i64::from(a) * i64::from(b) >> 32) as i32),
            ("hi", "u64", false) => each2(|a: u64, b: u64| (u128::from(a) * u128::from(b) >> 64) as u64),
            ("hi", "s64", false) => each2(|a: i64, b: i64| (i128::from(a) * i128::from(b) >> 64) as i64),
            ("hi", "u32", true) => {
                map3(|a: u32, b: u32, c: u32| ((u64::from(a) * u64::from(b) >> 32) as u32).wrapping_add(c))
            }
            ("hi", "s32", true) => {
                map3(|a: i32, b: i32, c: i32| ((i64::from(a) * i64::from(b) >> 32) as i32).wrapping_add(c))
            }
            ("wide", "u16", false) => each2(|a: u16, b: u16| u32::from(a) * u32::from(b)),
            ("wide", "s16", false) => each2(|a: i16, b: i16| i32::from(a) * i32::from(b)),
            ("wide", "u32", false) => map2(|a: u32, b: u32| u64::from(a) * u64::from(b)),
            ("wide", "s32", false) => map2(|a: i32, b: i32| i64::from(a) * i64::from(b)),
            ("wide", "u16", true) => {
                each3(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c))
            }
            ("wide", "s16", true) => {
                each3(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c))
            }
            ("wide", "u32", true) => {
                map3(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c))
            }
            ("wide", "s32", true) => {
                map3(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c))
            }
            _ => return self.error(i, "unsupported multiply"),
        };
        let narrow = is_wide(ty);
        let result = narrow || (part == "wide" && matches!(ty, "u32" | "s32"));
        let sources = [narrow, narrow, result];
        self.mixed(i, handler, Class::Integer, result, if add { &sources } else { &sources[..2] })?;
        Ok(true)
    }

    fn logic(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        mods.ty();
        let run = match i.opcode.as_str() {
            "and" => predicates(|a, b| a & b),
            "or" => predicates(|a, b| a | b),
            "xor" => predicates(|a, b| a ^ b),
            _ => predicates(|a, _| !a),
        };
        let dst = self.predicate(i, i.operands.first())?;
        let a = self.predicate(i, i.operands.get(1))?;
        let b = if i.opcode == "not" { a } else { self.predicate(i, i.operands.get(2))? };
        let mut inst = self.start(i, run, Class::Integer)?;
        (inst.dst, inst.a, inst.b) = (dst, a, b);
        self.push(inst);
        Ok(())
    }

    fn mov(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let ty = mods.ty().unwrap_or("");
        let [dst, src] = i.operands.as_slice() else { return self.error(i, "two operands are due") };
        if ty == "pred" {
            let (d, a) = (self.predicate(i, Some(dst))?, self.predicate(i, Some(src))?);
            let mut inst = self.start(i, predicates(|a, _| a), Class::Move)?;
            (inst.dst, inst.a, inst.b) = (d, a, a);
            self.push(inst);
            return Ok(());
        }
        let wide = is_wide(ty);
        match (dst, src) {
            (dst, Operand::Vector(parts)) => self.join(i, ty, dst, parts),
            (Operand::Vector(parts), src) => self.split(i, ty, parts, src),
            (_, Operand::Special(name)) => {
                let Some(number) = crate::exec::warp_values::number(name) else {
                    return self.error(i, format!("unknown special register %{name}"));
                };
                let mut inst = self.start(i, crate::exec::warp_values::special, Class::Move)?;
                (inst.dst, inst.imm, inst.c) = (self.destination(i, wide)?, number, u32::from(wide));
                self.push(inst);
                Ok(())
            }
            _ => {
                let run = if wide { map1(|a: u64| a) } else { map1(|a: u32| a) };
                let a = self.float_source(i, 1, ty)?;
                let mut inst = self.start(i, run, Class::Move)?;
                (inst.dst, inst.a) = (self.destination(i, wide)?, a);
                self.push(inst);
                Ok(())
            }
        }
    }

    /// `mov.b32 d, {a, b}` and its like: shifts and ors through a scratch slot, so that a part may be the
    /// destination's own register.
    fn join(&mut self, i: &Instruction, ty: &str, dst: &Operand, parts: &[Operand]) -> Decoded<()> {
        let wide = is_wide(ty);
        let bits = if wide { 64 } else { 32 } / parts.len() as u32;
        let d = self.destination_of(i, Some(dst), wide)?;
        let run = match (wide, parts.len()) {
            (false, 2) => map2(|a: u32, b: u32| (a & 0xffff) | b << 16),
            (true, 2) => map2(|a: u32, b: u32| u64::from(a) | u64::from(b) << 32),
            (true, 4) => map4(|a: u16, b: u16, c: u32, d: u32| {
                u64::from(a) | u64::from(b) << 16 | u64::from(c & 0xffff) << 32 | u64::from(d & 0xffff) << 48
            }),
            (false, 4) => {
                map4(|a: u32, b: u32, c: u32, d: u32| (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24)
            }
            _ => return self.error(i, format!("cannot join {} parts of {bits} bits", parts.len())),
        };
        let mut slots = [0; 4];
        for (n, part) in parts.iter().enumerate() {
            slots[n] = self.operand(i, part, false, None)?;
        }
        let mut inst = self.start(i, run, Class::Move)?;
        inst.dst = d;
        [inst.a, inst.b, inst.c, inst.ext] = slots;
        self.push(inst);
        Ok(())
    }

    /// `mov.b32 {a, b}, s`: through a scratch slot when a part is the source's own register.
    fn split(&mut self, i: &Instruction, ty: &str, parts: &[Operand], src: &Operand) -> Decoded<()> {
        let wide = is_wide(ty);
        let mut a = self.operand(i, src, wide, Some(ty))?;
        if parts.contains(src) {
            let scratch = self.new_slot(wide);
            let run = if wide { map1(|a: u64| a) } else { map1(|a: u32| a) };
            let mut inst = self.start(i, run, Class::None)?;
            (inst.dst, inst.a) = (scratch, a);
            self.push(inst);
            a = scratch;
        }
        for (n, part) in parts.iter().enumerate() {
            if *part == Operand::Sink {
                continue;
            }
            let run = match (wide, parts.len(), n) {
                (false, 2, 0) => map1(|a: u32| a & 0xffff),
                (false, 2, 1) => map1(|a: u32| a >> 16),
                (true, 2, 0) => map1(|a: u64| a as u32),
                (true, 2, 1) => map1(|a: u64| (a >> 32) as u32),
                (true, 4, 0) => map1(|a: u64| a as u16),
                (true, 4, 1) => map1(|a: u64| (a >> 16) as u16),
                (true, 4, 2) => map1(|a: u64| (a >> 32) as u16),
                (true, 4, 3) => map1(|a: u64| (a >> 48) as u16),
                (false, 4, 0) => map1(|a: u32| a & 255),
                (false, 4, 1) => map1(|a: u32| a >> 8 & 255),
                (false, 4, 2) => map1(|a: u32| a >> 16 & 255),
                (false, 4, 3) => map1(|a: u32| a >> 24),
                _ => return self.error(i, "cannot split like this"),
            };
            let dst = self.destination_of(i, Some(part), false)?;
            let class = if n == 0 { Class::Move } else { Class::None };
            let mut inst = self.start(i, run, class)?;
            (inst.dst, inst.a) = (dst, a);
            self.push(inst);
        }
        Ok(())
    }

    fn selp(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let ty = mods.ty().unwrap_or("");
        let wide = is_wide(ty);
        let c = self.predicate(i, i.operands.get(3))?;
        let (a, b) = (self.float_source(i, 1, ty)?, self.float_source(i, 2, ty)?);
        let run = if wide { select::<u64>() } else { select::<u32>() };
        let mut inst = self.start(i, run, Class::Move)?;
        (inst.dst, inst.a, inst.b, inst.c) = (self.destination(i, wide)?, a, b, c);
        self.push(inst);
        Ok(())
    }

    /// `slct.dtype.ctype d, a, b, c`: a where c >= 0.
    fn slct(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        mods.take("ftz");
        let (ty, by) = (mods.ty().unwrap_or(""), mods.ty().unwrap_or(""));
        let wide = is_wide(ty);
        let run = match (wide, by) {
            (false, "s32") => each3(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b }),
            (true, "s32") => each3(|a: u64, b: u64, c: i32| if c >= 0 { a } else { b }),
            (false, "f32") => each3(|a: u32, b: u32, c: f32| if c >= 0.0 { a } else { b }),
            (true, "f32") => each3(|a: u64, b: u64, c: f32| if c >= 0.0 { a } else { b }),
            _ => return self.error(i, "unsupported selector type"),
        };
        self.mixed(i, run, Class::Move, wide, &[wide, wide, false])
    }

    fn setp_integer(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        let ty = mods.last();
        let comparison = i.modifiers.first().map_or("", String::as_str);
        let run = match comparison {
            "eq" => bitwise!(ty, compare, |a, b| a == b),
            "ne" => bitwise!(ty, compare, |a, b| a != b),
            "lt" => by_type!(ty, compare, |a, b| a < b),
            "le" => by_type!(ty, compare, |a, b| a <= b),
            "gt" => by_type!(ty, compare, |a, b| a > b),
            "ge" => by_type!(ty, compare, |a, b| a >= b),
            "lo" => bitwise!(ty, compare, |a, b| a < b),
            "ls" => bitwise!(ty, compare, |a, b| a <= b),
            "hi" => bitwise!(ty, compare, |a, b| a > b),
            "hs" => bitwise!(ty, compare, |a, b| a >= b),
            _ => None,
        };
        let Some(run) = run else { return Ok(false) };
        mods.take(comparison);
        self.compare(i, mods, run, Class::Integer)?;
        Ok(true)
    }

    /// The rest of `setp`, for every type.
    pub(super) fn compare(
        &mut self,
        i: &Instruction,
        mods: &mut Mods,
        run: Handler,
        class: Class,
    ) -> Decoded<()> {
        let combine = mods.any(&["and", "or", "xor"]);
        let ty = mods.ty().unwrap_or("");
        let (a, b) = (self.float_source(i, 1, ty)?, self.float_source(i, 2, ty)?);
        let (first, second) = match i.operands.first() {
            Some(Operand::Pair(p, q)) => {
                (self.predicate_destination(i, p)?, self.predicate_destination(i, q)?)
            }
            Some(p) => (self.predicate_destination(i, p)?, SINK),
            None => return self.error(i, "no destination"),
        };
        let (mut c, mut ext) = (0, 0);
        if let Some(combine) = combine {
            c = self.predicate(i, i.operands.get(3))?;
            ext = match combine {
                "and" => COMBINE_AND,
                "or" => COMBINE_OR,
                _ => COMBINE_XOR,
            };
        }
        let mut inst = self.start(i, run, class)?;
        (inst.dst, inst.a, inst.b, inst.c, inst.ext) = (first, a, b, c, ext);
        inst.imm = if second == SINK { 0 } else { i64::from(second) + 1 };
        self.push(inst);
        Ok(())
    }

    fn bits(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let class = Class::Integer;
        let ty = mods.last();
        let wide = is_wide(ty);
        let b32 = [false; 4];
        let (run, result, sources): (Handler, bool, &[bool]) = match (i.opcode.as_str(), ty) {
            ("popc", "b32") => (map1(|a: u32| a.count_ones()), false, &b32[..1]),
            ("popc", "b64") => (map1(|a: u64| a.count_ones()), false, &[true]),
            ("clz", "b32") => (map1(|a: u32| a.leading_zeros()), false, &b32[..1]),
            ("clz", "b64") => (map1(|a: u64| a.leading_zeros()), false, &[true]),
            // How far left the highest bit is from the top: no bit is u32::MAX.
            ("bfind", "u32") if mods.take("shiftamt") => {
                let shift = |a: u32| if a == 0 { u32::MAX } else { a.leading_zeros() };
                (map1(shift), false, &b32[..1])
            }
            ("bfind", "u32") => (map1(|a: u32| 31u32.wrapping_sub(a.leading_zeros())), false, &b32[..1]),
            ("bfind", "u64") => (map1(|a: u64| 63u32.wrapping_sub(a.leading_zeros())), false, &[true]),
            ("bfind", "s32") => (
                map1(|a: u32| 31u32.wrapping_sub((if a >> 31 == 1 { !a } else { a }).leading_zeros())),
                false,
                &b32[..1],
            ),
            ("brev", "b32") => (map1(|a: u32| a.reverse_bits()), false, &b32[..1]),
            ("brev", "b64") => (map1(|a: u64| a.reverse_bits()), true, &[true]),
            ("bfe", "u32") => {
                (map3(|a: u32, b: u32, c: u32| extract(a.into(), b, c, 32, false) as u32), false, &b32[..3])
            }
            ("bfe", "s32") => {
                (map3(|a: u32, b: u32, c: u32| extract(a.into(), b, c, 32, true) as u32), false, &b32[..3])
            }
            ("bfe", "u64") => {
                (map3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, false)), true, &[true, false, false])
            }
            ("bfe", "s64") => {
                (map3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, true)), true, &[true, false, false])
            }
            ("bfi", "b32") => {
                (map4(|a: u32, b: u32, c, d| insert(a.into(), b.into(), c, d, 32) as u32), false, &b32)
            }
            ("bfi", "b64") => {
                (map4(|a: u64, b: u64, c, d| insert(a, b, c, d, 64)), true, &[true, true, false, false])
            }
            ("bmsk", "b32") => {
                mods.take("clamp");
                (
                    map2(|a: u32, b: u32| insert(u64::MAX, 0, a.min(255), b.min(255), 32) as u32),
                    false,
                    &b32[..2],
                )
            }
            ("prmt", "b32") => (map3(permute), false, &b32[..3]),
            ("lop3", "b32") => (map4(lookup), false, &b32),
            ("shf", "b32") => (self.funnel(i, mods)?, false, &b32[..3]),
            ("dp4a" | "dp2a", _) => (self.dot(i, mods)?, false, &b32[..3]),
            _ => return self.error(i, "unsupported type"),
        };
        let _ = wide;
        mods.ty();
        self.mixed(i, run, class, result, sources)
    }

    fn funnel(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<Handler> {
        let both = |a: u32, b: u32| u64::from(a) | u64::from(b) << 32;
        Ok(match (mods.any(&["l", "r"]), mods.any(&["wrap", "clamp"])) {
            (Some("l"), Some("wrap")) => {
                map3(move |a: u32, b: u32, c: u32| (both(a, b) << (c & 31) >> 32) as u32)
            }
            (Some("l"), Some("clamp")) => {
                map3(move |a: u32, b: u32, c: u32| (both(a, b) << c.min(32) >> 32) as u32)
            }
            (Some("r"), Some("wrap")) => map3(move |a: u32, b: u32, c: u32| (both(a, b) >> (c & 31)) as u32),
            (Some("r"), Some("clamp")) => {
                map3(move |a: u32, b: u32, c: u32| (both(a, b) >> c.min(32)) as u32)
            }
            _ => return self.error(i, "direction and mode are due"),
        })
    }

    fn dot(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<Handler> {
        let half = mods.any(&["lo", "hi"]);
        let types = (mods.ty().unwrap_or(""), mods.ty().unwrap_or(""));
        let u = |x: u32, n: u32| (x >> (8 * n) & 0xff) as i32;
        let s = |x: u32, n: u32| i32::from((x >> (8 * n)) as i8);
        macro_rules! four {
            ($x:ident, $y:ident) => {
                map3(move |a: u32, b: u32, c: u32| {
                    (0..4).fold(c, |sum, n| sum.wrapping_add(($x(a, n) * $y(b, n)) as u32))
                })
            };
        }
        Ok(match (i.opcode.as_str(), half, types) {
            ("dp4a", None, ("u32", "u32")) => four!(u, u),
            ("dp4a", None, ("s32", "s32")) => four!(s, s),
            ("dp4a", None, ("u32", "s32")) => four!(u, s),
            ("dp4a", None, ("s32", "u32")) => four!(s, u),
            _ => return self.error(i, "unsupported types"),
        })
    }
}

fn signed(ty: &str, short: Handler, word: Handler, long: Handler) -> Option<Handler> {
    match ty {
        "s16" => Some(short),
        "s32" => Some(word),
        "s64" => Some(long),
        _ => None,
    }
}
