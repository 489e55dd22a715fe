//! Loads, stores, atomics, asynchronous copies, matrix loads.

use super::operands::{Mods, is_wide};
use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::{access, atomic, control, copy, tensor, warp_values};
use crate::program::*;
use crate::ptx::ast::{Instruction, Operand, Space};
use crate::ptx::parser::{space_of, type_bytes};

const SCOPES: [&str; 4] = ["cta", "cluster", "gpu", "sys"];

fn is_hint(m: &str) -> bool {
    matches!(m, "ca" | "cg" | "cs" | "lu" | "cv" | "nc" | "wb" | "wt")
        || m.starts_with("L1::")
        || m.starts_with("L2::")
}

fn order(mods: &mut Mods) -> Order {
    match mods.any(&["weak", "volatile", "relaxed", "acquire", "release", "acq_rel"]) {
        Some("volatile" | "relaxed") => Order::Relaxed,
        Some("acquire") => Order::Acquire,
        Some("release") => Order::Release,
        Some("acq_rel") => Order::AcquireRelease,
        _ => Order::Weak,
    }
}

impl Decoder<'_> {
    /// Decodes a memory instruction; false if it is none.
    pub(super) fn memory(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<bool> {
        match i.opcode.as_str() {
            "ld" | "ldu" | "st" => self.load_or_store(i, mods)?,
            "atom" | "red" => self.atomic(i, mods)?,
            "cp" => self.copy(i, mods)?,
            "ldmatrix" | "stmatrix" => self.matrix(i, mods)?,
            "isspacep" => self.is_space(i, mods)?,
            "membar" | "fence" => {
                if i.opcode == "fence" && mods.take("proxy") {
                    return self.error(i, "proxy fences are not supported");
                }
                mods.any(&["sc", "acq_rel"]);
                let scope = mods.any(&["cta", "cluster", "gpu", "gl", "sys"]);
                let run = if scope == Some("cta") { control::nothing } else { control::fence };
                self.synchronises |= scope != Some("cta");
                let inst = self.start(i, run, Class::Barrier)?;
                self.push(inst);
            }
            "prefetch" => {
                mods.take_if(|m| is_hint(m) || m == "global" || m == "local" || m == "L1" || m == "L2");
                mods.take_if(|m| is_hint(m) || m == "L1" || m == "L2");
                let inst = self.start(i, control::nothing, Class::Memory)?;
                self.push(inst);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn space(&self, i: &Instruction, mods: &mut Mods, symbol: Option<Space>) -> Decoded<Space> {
        let named = mods.take_if(|m| space_of(m).is_some()).and_then(space_of);
        let space = named.unwrap_or(Space::Generic);
        // Constant variables live in device memory.
        let space = if space == Space::Const { Space::Global } else { space };
        let plain = |s: Space| if s == Space::Const { Space::Global } else { s };
        match symbol.map(plain) {
            Some(of) if space != Space::Generic && of != space => {
                self.error(i, "the symbol is of another state space")
            }
            // A symbol without cvta is relative to its own window, not a generic address.
            Some(of) => Ok(of),
            None => Ok(space),
        }
    }

    fn load_or_store(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let store = i.opcode == "st";
        let order = order(mods);
        if order != Order::Weak {
            self.synchronises |= matches!(order, Order::Acquire | Order::Release);
        }
        let ty = mods.last().to_string();
        let Some(bytes) = type_bytes(&ty) else { return self.error(i, "a type is due") };
        mods.ty();
        while mods.take_if(is_hint).is_some() {}
        mods.any(&SCOPES);
        let (target, data) = if store { (0, 1) } else { (1, 0) };
        let count = match mods.any(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        if bytes * count > 16 {
            return self.error(i, "more than 16 bytes");
        }
        let Some(operand) = i.operands.get(data) else { return self.error(i, "too few operands") };
        let (slots, wide) = self.data(i, operand, count, store, &ty)?;
        let signed = ty.starts_with('s');
        let mut access = Access {
            space: Space::Global,
            bytes: bytes as u32,
            count: count as u32,
            signed,
            slots,
            wide,
            order,
        };
        if mods.take("param") {
            if store {
                return self.error(i, "kernel parameters are read-only");
            }
            if let Some(Operand::Address(base, offset)) = i.operands.get(target)
                && let Operand::Reg(_) = base.as_ref()
            {
                let wide = self.register_is_wide(base);
                let slot = self.operand(i, base, wide, None)?;
                let mut inst = self.start(i, warp_values::parameter_at(), Class::Memory)?;
                (inst.a, inst.c, inst.imm, inst.ext) = (slot, u32::from(wide), *offset, self.access(access));
                self.push(inst);
                return Ok(());
            }
            let offset = self.parameter_offset(i, target, bytes * count)?;
            let mut inst = self.start(i, warp_values::parameter, Class::Memory)?;
            (inst.imm, inst.ext) = (offset, self.access(access));
            self.push(inst);
            return Ok(());
        }
        let (base, base_wide, offset, symbol) = self.address(i, i.operands.get(target))?;
        access.space = self.space(i, mods, symbol)?;
        let mut inst = self.start(i, if store { access::store() } else { access::load() }, Class::Memory)?;
        (inst.a, inst.c, inst.imm, inst.ext) = (base, u32::from(base_wide), offset, self.access(access));
        self.push(inst);
        Ok(())
    }

    /// The offset of an access to a parameter by its name.
    fn parameter_offset(&self, i: &Instruction, n: usize, len: usize) -> Decoded<i64> {
        let Some(Operand::Address(base, offset)) = i.operands.get(n) else {
            return self.error(i, "expected an address");
        };
        let Operand::Symbol(name, inner) = base.as_ref() else {
            return self.error(i, "expected a parameter");
        };
        let Some(param) = self.function.params.iter().find(|p| p.name == *name) else {
            return self.error(i, format!("unknown parameter `{name}`"));
        };
        let at = inner + offset;
        if at < 0 || at as usize + len > param.size {
            return self.error(i, format!("{len} bytes at {at} of a parameter of {} bytes", param.size));
        }
        Ok(param.offset as i64 + at)
    }

    fn access(&mut self, access: Access) -> u32 {
        self.accesses.push(access);
        self.accesses.len() as u32 - 1
    }

    /// Slots of the registers that a load or store moves.
    fn data(
        &mut self,
        i: &Instruction,
        operand: &Operand,
        count: usize,
        store: bool,
        ty: &str,
    ) -> Decoded<([u32; 4], bool)> {
        let parts = match operand {
            Operand::Vector(parts) if parts.len() == count => parts.as_slice(),
            single if count == 1 => std::slice::from_ref(single),
            _ => return self.error(i, format!("expected {count} registers")),
        };
        let mut wide = is_wide(ty);
        let mut slots = [SINK; 4];
        for part in parts {
            if matches!(part, Operand::Reg(_)) {
                wide = self.register_is_wide(part);
            }
        }
        if is_wide(ty) && !wide {
            return self.error(i, "the register is narrower than the access");
        }
        for (slot, part) in slots.iter_mut().zip(parts) {
            *slot = match part {
                Operand::Sink if !store => SINK,
                part if store => self.operand(i, part, wide, Some(ty))?,
                part => self.destination_of(i, Some(part), wide)?,
            };
        }
        Ok((slots, wide))
    }

    fn atomic(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let returns = i.opcode == "atom";
        let mut order = order(mods);
        if matches!(order, Order::Acquire | Order::Release | Order::AcquireRelease) {
            self.synchronises = true;
        } else {
            order = Order::Relaxed;
        }
        let ty = mods.last();
        let Some(bytes) = type_bytes(ty) else { return self.error(i, "a type is due") };
        mods.ty();
        mods.any(&SCOPES);
        mods.take("noftz");
        while mods.take_if(is_hint).is_some() {}
        let names: Vec<&str> = atomic::Operation::ALL.iter().map(|o| o.0).collect();
        let Some(name) = mods.any(&names) else { return self.error(i, "an operation is due") };
        let number = names.iter().position(|&n| n == name).unwrap_or(0) as u32;
        let kind = self.atomic_type(i, name, ty)?;
        let wide = is_wide(ty);
        let first = usize::from(returns);
        let (base, base_wide, offset, symbol) = self.address(i, i.operands.get(first))?;
        let space = self.space(i, mods, symbol)?;
        let mut slots = [SINK; 4];
        if returns {
            slots[0] = self.destination(i, wide)?;
        }
        slots[1] = self.float_source(i, first + 1, ty)?;
        if name == "cas" {
            slots[2] = self.float_source(i, first + 2, ty)?;
        }
        let access = Access { space, bytes: bytes as u32, count: 1, signed: false, slots, wide, order };
        let mut inst = self.start(i, atomic::atomic, Class::Atomic)?;
        (inst.a, inst.c, inst.imm) = (base, u32::from(base_wide), offset);
        inst.b = number | kind << 8;
        inst.ext = self.access(access);
        self.push(inst);
        Ok(())
    }

    fn atomic_type(&self, i: &Instruction, name: &str, ty: &str) -> Decoded<u32> {
        let kind = match ty {
            "u32" | "u64" | "b32" | "b64" | "b16" => 0,
            "s32" | "s64" => 1,
            "f32" | "f64" => 2,
            "f16" | "f16x2" => 3,
            "bf16" | "bf16x2" => 4,
            _ => return self.error(i, "unsupported type"),
        };
        let fits = match name {
            "add" => !ty.starts_with('b') || kind == 4,
            "min" | "max" => matches!(ty, "u32" | "s32" | "u64" | "s64"),
            "inc" | "dec" => ty == "u32",
            "exch" => matches!(ty, "b32" | "b64" | "u32" | "u64" | "s32" | "f32"),
            "cas" => matches!(ty, "b16" | "b32" | "b64" | "u32" | "s32" | "u64"),
            _ => matches!(ty, "b32" | "b64"),
        };
        if ty.starts_with("bf16") {
            self.needs(i, 90)?;
        }
        if fits { Ok(kind) } else { self.error(i, "the operation has no such type") }
    }

    fn copy(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        self.needs(i, 80)?;
        if !mods.take("async") || mods.left().is_some_and(|m| m == "bulk") {
            return self.error(i, "only cp.async without .bulk is supported");
        }
        if mods.take("commit_group") {
            let inst = self.start(i, copy::commit, Class::Memory)?;
            self.push(inst);
            return Ok(());
        }
        let all = mods.take("wait_all");
        if all || mods.take("wait_group") {
            let keep = match i.operands.first() {
                Some(Operand::Int(n)) if !all => *n as i64,
                _ if all => -1,
                _ => return self.error(i, "a count of groups is due"),
            };
            let mut inst = self.start(i, copy::wait(), Class::Memory)?;
            inst.imm = keep;
            self.push(inst);
            return Ok(());
        }
        let whole = mods.take("cg");
        mods.take("ca");
        mods.any(&["shared", "shared::cta"]);
        mods.take("global");
        while mods.take_if(is_hint).is_some() {}
        let Some(&Operand::Int(len)) = i.operands.get(2) else { return self.error(i, "a size is due") };
        if !(len == 16 || (!whole && (len == 4 || len == 8))) {
            return self.error(i, format!("cannot copy {len} bytes"));
        }
        let (to, to_wide, to_offset, _) = self.address(i, i.operands.first())?;
        let (from, from_wide, from_offset, _) = self.address(i, i.operands.get(1))?;
        if !from_wide {
            return self.error(i, "the source address must be 64-bit");
        }
        let size = if i.operands.len() > 3 { self.source(i, 3, false)? } else { SINK };
        let slots = [from_offset as u32, (from_offset >> 32) as u32, 0, 0];
        let (space, order) = (Space::Global, Order::Weak);
        let access = Access { space, bytes: len as u32, count: 1, signed: false, slots, wide: false, order };
        let mut inst = self.start(i, copy::copy(), Class::Memory)?;
        (inst.a, inst.dst, inst.b, inst.c) = (to, u32::from(to_wide), from, size);
        (inst.imm, inst.ext) = (to_offset << 8 | len as i64, self.access(access));
        self.push(inst);
        Ok(())
    }

    fn matrix(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        let store = i.opcode == "stmatrix";
        self.needs(i, if store { 90 } else { 75 })?;
        let shape = mods.take("sync") && mods.take("aligned") && mods.take("m8n8");
        let count = match mods.any(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return self.error(i, "a count is due"),
        };
        let transpose = mods.take("trans");
        if !shape || mods.any(&["shared", "shared::cta"]).is_none() || !mods.take("b16") {
            return self.error(i, "only .sync.aligned.m8n8.….shared.b16 is supported");
        }
        let (address, data) = if store { (0, 1) } else { (1, 0) };
        let Some(Operand::Vector(parts)) = i.operands.get(data) else {
            return self.error(i, "registers are due");
        };
        if parts.len() != count {
            return self.error(i, format!("expected {count} registers"));
        }
        let mut list = Vec::new();
        for part in parts {
            list.push(if store {
                self.operand(i, part, false, None)?
            } else {
                self.destination_of(i, Some(part), false)?
            });
        }
        let (base, wide, offset, _) = self.address(i, i.operands.get(address))?;
        let run = if store { tensor::store_matrix } else { tensor::load_matrix() };
        let mut inst = self.start(i, run, Class::Memory)?;
        (inst.a, inst.imm, inst.ext) = (base, offset, self.lists.len() as u32);
        inst.c = u32::from(wide) | u32::from(transpose) << 1;
        self.lists.push(list);
        self.push(inst);
        Ok(())
    }

    fn is_space(&mut self, i: &Instruction, mods: &mut Mods) -> Decoded<()> {
        use crate::exec::lanes::compare;
        let run = match mods.take_if(|m| space_of(m).is_some()) {
            Some("shared" | "shared::cta") => compare(|a: u64, _: u64| a >> 56 == 2),
            Some("local") => compare(|a: u64, _: u64| a >> 56 == 3),
            Some("global") => compare(|a: u64, _: u64| !matches!(a >> 56, 2 | 3)),
            _ => return self.error(i, "unsupported state space"),
        };
        let a = self.source(i, 1, true)?;
        let mut inst = self.start(i, run, Class::Integer)?;
        (inst.dst, inst.a, inst.b) = (self.predicate(i, i.operands.first())?, a, a);
        self.push(inst);
        Ok(())
    }
}
