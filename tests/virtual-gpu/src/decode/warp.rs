//! Barriers, shuffles, votes, tensor cores, and the rest that concerns a whole warp.

use super::operands::Mods;
use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::{control, shuffle, tensor};
use crate::program::*;
use crate::ptx::ast::{Instruction, Operand};

impl Decoder<'_> {
    /// Decodes a warp-wide instruction; false if it is none.
    pub(super) fn warp(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        match i.opcode.as_str() {
            "bar" | "barrier" => self.barrier(i, mods)?,
            "shfl" => self.shuffle(i, mods)?,
            "vote" => self.vote(i, mods)?,
            "match" => self.match_lanes(i, mods)?,
            "redux" => self.reduce(i, mods)?,
            "activemask" => {
                mods.ty();
                let mut inst = self.start(i, shuffle::active_mask, Class::Shuffle)?;
                inst.dst = self.destination(i, false)?;
                self.push(inst);
            }
            "mma" => self.tensor(i, mods)?,
            "nanosleep" => {
                mods.ty();
                let inst = self.start(i, control::pause, Class::Control)?;
                self.push(inst);
            }
            "griddepcontrol" => {
                self.needs(i, 90)?;
                mods.any(&["launch_dependents", "wait"]);
                let inst = self.start(i, control::nothing, Class::Control)?;
                self.push(inst);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn barrier(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        if mods.take("warp") {
            mods.take("sync");
            let a = self.source(i, 0, false)?;
            let mut inst = self.start(i, control::warp_barrier, Class::Barrier)?;
            inst.a = a;
            self.push(inst);
            return Ok(());
        }
        mods.take("cta");
        // `bar` is `barrier.aligned`.
        let aligned = mods.take("aligned") || i.opcode == "bar";
        let mut kind = if aligned { control::ALIGNED } else { 0 };
        let mut first = 0;
        let mut predicate = 0;
        let mut dst = SINK;
        if mods.take("red") {
            let Some(operation) = mods.any(&["popc", "and", "or"]) else {
                return self.error(i, "an operation is due");
            };
            let ty = mods.ty().unwrap_or("");
            if (operation == "popc") != (ty == "u32") {
                return self.error(i, "popc gives u32, and/or give a predicate");
            }
            let number = ["popc", "and", "or"].iter().position(|&o| o == operation).unwrap_or(0) as i64;
            kind |= control::REDUCE | number << control::OPERATION_SHIFT;
            dst = if ty == "pred" {
                kind |= control::TO_PREDICATE;
                self.predicate(i, i.operands.first())?
            } else {
                self.destination(i, false)?
            };
            predicate = self.predicate(i, i.operands.last())?;
            first = 1;
        } else if mods.take("arrive") {
            kind |= control::ARRIVE;
        } else if !mods.take("sync") {
            return self.error(i, "unsupported barrier");
        }
        let last = i.operands.len() - usize::from(kind & control::REDUCE != 0);
        let id = self.source(i, first, false)?;
        let count =
            if first + 1 < last { self.source(i, first + 1, false)? } else { self.constant(0, false) };
        let mut inst = self.start(i, control::barrier, Class::Barrier)?;
        (inst.a, inst.b, inst.c, inst.dst, inst.imm) = (id, count, predicate, dst, kind);
        self.push(inst);
        Ok(())
    }

    /// First destination, and the predicate plus one above bit 8, of `d|p`.
    fn pair(&mut self, i: &Instruction) -> Decoded<(u32, i64)> {
        match i.operands.first() {
            Some(Operand::Pair(d, p)) => {
                let dst = self.destination_of(i, Some(d), false)?;
                let predicate = self.predicate_destination(i, p)?;
                let predicate = if predicate == SINK { 0 } else { i64::from(predicate) + 1 };
                Ok((dst, predicate << 8))
            }
            first => Ok((self.destination_of(i, first, false)?, 0)),
        }
    }

    fn shuffle(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        if !mods.take("sync") {
            return self.error(i, "shuffles without .sync are gone since PTX 6.4");
        }
        let Some(mode) = mods.any(&shuffle::MODES) else { return self.error(i, "a mode is due") };
        mods.ty();
        let number = shuffle::MODES.iter().position(|&m| m == mode).unwrap_or(0) as i64;
        let (dst, predicate) = self.pair(i)?;
        let (a, b) = (self.source(i, 1, false)?, self.source(i, 2, false)?);
        let (c, members) = (self.source(i, 3, false)?, self.source(i, 4, false)?);
        let mut inst = self.start(i, shuffle::shuffle(), Class::Shuffle)?;
        (inst.dst, inst.a, inst.b, inst.c, inst.ext, inst.imm) = (dst, a, b, c, members, number | predicate);
        self.push(inst);
        Ok(())
    }

    fn vote(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        if !mods.take("sync") {
            return self.error(i, "votes without .sync are gone since PTX 6.4");
        }
        let mode = mods.any(&["all", "any", "uni", "ballot"]);
        mods.ty();
        let a = self.predicate(i, i.operands.get(1))?;
        let members = self.source(i, 2, false)?;
        let (dst, number) = match mode {
            Some("ballot") => (self.destination(i, false)?, 3),
            Some("all") => (self.predicate(i, i.operands.first())?, 0),
            Some("any") => (self.predicate(i, i.operands.first())?, 1),
            Some("uni") => (self.predicate(i, i.operands.first())?, 2),
            _ => return self.error(i, "a mode is due"),
        };
        let mut inst = self.start(i, shuffle::vote, Class::Shuffle)?;
        (inst.dst, inst.a, inst.b, inst.imm) = (dst, a, members, number);
        self.push(inst);
        Ok(())
    }

    fn match_lanes(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        self.needs(i, 70)?;
        let all = match mods.any(&["any", "all"]) {
            Some(mode) => mode == "all",
            None => return self.error(i, "a mode is due"),
        };
        mods.take("sync");
        let wide = mods.ty() == Some("b64");
        let (dst, predicate) = self.pair(i)?;
        let (a, members) = (self.source(i, 1, wide)?, self.source(i, 2, false)?);
        let mut inst = self.start(i, shuffle::match_lanes, Class::Shuffle)?;
        (inst.dst, inst.a, inst.b) = (dst, a, members);
        inst.imm = i64::from(all) | i64::from(wide) << 1 | predicate;
        self.push(inst);
        Ok(())
    }

    fn reduce(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        self.needs(i, 80)?;
        mods.take("sync");
        let operation = mods.any(&["add", "min", "max", "and", "or", "xor"]);
        let number = match (operation, mods.ty()) {
            (Some("add"), Some("u32" | "s32")) => 0,
            (Some("min"), Some("u32")) => 1,
            (Some("max"), Some("u32")) => 2,
            (Some("min"), Some("s32")) => 3,
            (Some("max"), Some("s32")) => 4,
            (Some("and"), Some("b32")) => 5,
            (Some("or"), Some("b32")) => 6,
            (Some("xor"), Some("b32")) => 7,
            _ => return self.error(i, "unsupported operation or type"),
        };
        let (a, members) = (self.source(i, 1, false)?, self.source(i, 2, false)?);
        let mut inst = self.start(i, shuffle::reduce, Class::Shuffle)?;
        (inst.dst, inst.a, inst.b, inst.imm) = (self.destination(i, false)?, a, members, number);
        self.push(inst);
        Ok(())
    }

    fn tensor(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        if !(mods.take("sync") && mods.take("aligned")) {
            return self.error(i, "only mma.sync.aligned is supported");
        }
        let Some(form) = mods.take_if(|m| m.starts_with("m16n8k")) else {
            return self.error(i, "only the shapes m16n8k* are supported");
        };
        let k: u32 = form["m16n8k".len()..].parse().unwrap_or(0);
        if !(mods.take("row") && mods.take("col")) {
            return self.error(i, "the layout must be .row.col");
        }
        let saturate = mods.take("satfinite");
        let types = [mods.ty(), mods.ty(), mods.ty(), mods.ty()].map(|t| t.unwrap_or(""));
        let [d, a, b, c] = types;
        let element = |name: &str| match name {
            "f16" => Some(tensor::Element::F16),
            "bf16" => Some(tensor::Element::Bf16),
            "tf32" => Some(tensor::Element::Tf32),
            "s8" => Some(tensor::Element::S8),
            "u8" => Some(tensor::Element::U8),
            _ => None,
        };
        let (Some(ea), Some(eb)) = (element(a), element(b)) else {
            return self.error(i, "unsupported element type");
        };
        let (fits, target) = match (a, b) {
            ("f16", "f16") => (matches!(k, 8 | 16) && matches!((d, c), ("f32", "f32") | ("f16", "f16")), 75),
            ("bf16", "bf16") => (matches!(k, 8 | 16) && (d, c) == ("f32", "f32"), 80),
            ("tf32", "tf32") => (matches!(k, 4 | 8) && (d, c) == ("f32", "f32"), 80),
            ("s8" | "u8", "s8" | "u8") => (matches!(k, 16 | 32) && (d, c) == ("s32", "s32"), 80),
            _ => (false, 0),
        };
        if !fits {
            return self.error(i, "unsupported combination of shape and types");
        }
        self.needs(i, if k == 16 && a == "f16" { 80 } else { target })?;
        let shape = tensor::Shape { k, a: ea, b: eb, half_sums: d == "f16", saturate };
        let counts = [shape.c_registers(), shape.a_registers(), shape.b_registers(), shape.c_registers()];
        let mut list = Vec::new();
        for (n, count) in counts.into_iter().enumerate() {
            let parts = match i.operands.get(n) {
                Some(Operand::Vector(parts)) => parts.as_slice(),
                Some(single) => std::slice::from_ref(single),
                None => return self.error(i, "four operands are due"),
            };
            if parts.len() != count {
                return self.error(i, format!("operand {n} has {} registers, {count} are due", parts.len()));
            }
            for part in parts {
                list.push(if n == 0 {
                    self.destination_of(i, Some(part), false)?
                } else {
                    self.operand(i, part, false, Some("f32"))?
                });
            }
        }
        let mut inst = self.start(i, tensor::multiply(shape), Class::Tensor)?;
        (inst.imm, inst.ext) = (shape.pack(), self.lists.len() as u32);
        self.lists.push(list);
        self.push(inst);
        Ok(())
    }
}
