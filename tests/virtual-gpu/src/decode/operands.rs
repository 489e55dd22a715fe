//! Operands to slots, and the bookkeeping of modifiers.

use super::{Decoded, Decoder};
use crate::counters::Class;
use crate::exec::lanes;
use crate::exec::warp_values::special;
use crate::program::*;
use crate::ptx::ast::{Instruction, Operand, RegKind, Space};

/// The modifiers of an instruction, ticked off as they are understood.
pub struct Mods<'a> {
    all: &'a [String],
    used: u64,
}

impl<'a> Mods<'a> {
    /// None used yet. No PTX instruction has 64 modifiers; more would be left over and refused.
    pub fn new(all: &'a [String]) -> Self {
        Mods { all, used: 0 }
    }

    /// Takes the first unused modifier that `accept`s.
    pub fn take_if(&mut self, accept: impl Fn(&str) -> bool) -> Option<&'a str> {
        let found = (0..self.all.len().min(64)).find(|&n| self.used >> n & 1 == 0 && accept(&self.all[n]))?;
        self.used |= 1 << found;
        Some(&self.all[found])
    }

    /// Takes `name` if it is there.
    pub fn take(&mut self, name: &str) -> bool {
        self.take_if(|m| m == name).is_some()
    }

    /// Takes one of `names`.
    pub fn any(&mut self, names: &[&str]) -> Option<&'a str> {
        self.take_if(|m| names.contains(&m))
    }

    /// Takes the next type.
    pub fn ty(&mut self) -> Option<&'a str> {
        self.take_if(|m| m == "pred" || crate::ptx::parser::type_bytes(m).is_some())
    }

    /// Looks at the last modifier, which is the type of most instructions.
    pub fn last(&self) -> &'a str {
        self.all.last().map_or("", String::as_str)
    }

    /// A modifier that nobody took.
    pub fn left(&self) -> Option<&'a str> {
        (0..self.all.len()).find(|&n| n >= 64 || self.used >> n & 1 == 0).map(|n| self.all[n].as_str())
    }
}

/// Whether values of a type lie in 64-bit slots.
pub fn is_wide(ty: &str) -> bool {
    matches!(ty, "b64" | "u64" | "s64" | "f64")
}

impl Decoder<'_> {
    /// The slot of a constant.
    pub(super) fn constant(&mut self, bits: u64, wide: bool) -> u32 {
        let bits = if wide { bits } else { bits & 0xffff_ffff };
        if let Some(&slot) = self.known.get(&(bits, wide)) {
            return slot;
        }
        let slot = CONSTANT | self.constants.len() as u32 * 16;
        if wide {
            let (low, high) = (bits as u32, (bits >> 32) as u32);
            let chunk = std::array::from_fn(|n| if n % 2 == 0 { low } else { high });
            self.constants.extend([Chunk(chunk); 4]);
        } else {
            self.constants.extend([Chunk([bits as u32; 16]); 2]);
        }
        self.known.insert((bits, wide), slot);
        slot
    }

    /// Slot of source operand `n`.
    pub(super) fn source(&mut self, i: &Instruction, n: usize, wide: bool) -> Decoded<u32> {
        match i.operands.get(n) {
            Some(operand) => self.operand(i, operand, wide, None),
            None => self.error(i, "too few operands"),
        }
    }

    /// Slot of source operand `n` of a floating-point type.
    pub(super) fn float_source(&mut self, i: &Instruction, n: usize, ty: &str) -> Decoded<u32> {
        match i.operands.get(n) {
            Some(operand) => self.operand(i, operand, is_wide(ty), Some(ty)),
            None => self.error(i, "too few operands"),
        }
    }

    /// Slot of an operand; `float` gives the type that literals take.
    pub(super) fn operand(
        &mut self,
        i: &Instruction,
        operand: &Operand,
        wide: bool,
        float: Option<&str>,
    ) -> Decoded<u32> {
        match operand {
            Operand::Reg(id) => match (self.function.registers[*id as usize], wide) {
                (RegKind::Word(_), false) | (RegKind::Double, true) => Ok(self.slots[*id as usize]),
                (kind, _) => self.error(i, format!("operand of kind {kind:?} where 64-bit is {wide}")),
            },
            Operand::Int(bits) => Ok(self.constant(*bits, wide)),
            Operand::F32(bits) if wide => Ok(self.constant(f64::from(f32::from_bits(*bits)).to_bits(), true)),
            Operand::F32(bits) => Ok(self.constant(u64::from(*bits), false)),
            Operand::F64(bits) if wide => Ok(self.constant(*bits, true)),
            Operand::F64(bits) if float == Some("f32") => {
                Ok(self.constant(u64::from((f64::from_bits(*bits) as f32).to_bits()), false))
            }
            Operand::Special(name) => self.special(i, name, wide),
            Operand::Symbol(name, offset) => match self.symbol(name) {
                Some(symbol) => Ok(self.constant(symbol.value.wrapping_add(*offset as u64), wide)),
                // A parameter's address is where it begins among all of the kernel's.
                None => match self.function.params.iter().find(|param| param.name == *name) {
                    Some(param) => {
                        Ok(self.constant((param.offset as u64).wrapping_add(*offset as u64), wide))
                    }
                    None => self.error(i, format!("unknown symbol `{name}`")),
                },
            },
            other => self.error(i, format!("operand {other:?} is not a value")),
        }
    }

    /// Reads a special register into a slot of its own.
    pub(super) fn special(&mut self, i: &Instruction, name: &str, wide: bool) -> Decoded<u32> {
        let slot = self.new_slot(wide);
        let Some(number) = crate::exec::warp_values::number(name) else {
            return self.error(i, format!("unknown special register %{name}"));
        };
        let mut inst = self.blank(special, Class::None, i.line);
        (inst.dst, inst.imm, inst.c) = (slot, number, u32::from(wide));
        self.push(inst);
        Ok(slot)
    }

    /// Slot of destination operand 0; results that are not wanted go to a slot that nobody reads.
    pub(super) fn destination(&mut self, i: &Instruction, wide: bool) -> Decoded<u32> {
        let operand = i.operands.first();
        self.destination_of(i, operand, wide)
    }

    pub(super) fn destination_of(
        &mut self,
        i: &Instruction,
        operand: Option<&Operand>,
        wide: bool,
    ) -> Decoded<u32> {
        match operand {
            Some(Operand::Reg(id)) => match (self.function.registers[*id as usize], wide) {
                (RegKind::Word(_), false) | (RegKind::Double, true) => Ok(self.slots[*id as usize]),
                (kind, _) => self.error(i, format!("destination of kind {kind:?} where 64-bit is {wide}")),
            },
            Some(Operand::Sink) => Ok(self.new_slot(wide)),
            _ => self.error(i, "the destination must be a register"),
        }
    }

    /// Predicate operand, perhaps negated; a literal 0 or 1 becomes a predicate of its own.
    pub(super) fn predicate(&mut self, i: &Instruction, operand: Option<&Operand>) -> Decoded<u32> {
        let (id, negated) = match operand {
            Some(Operand::Reg(id)) => (*id, 0),
            Some(Operand::NotReg(id)) => (*id, NEGATED),
            Some(Operand::Int(value)) => return Ok(self.fixed_predicate(i, *value != 0)),
            _ => return self.error(i, "expected a predicate"),
        };
        match self.function.registers[id as usize] {
            RegKind::Pred => Ok(self.slots[id as usize] | negated),
            kind => self.error(i, format!("expected a predicate, found {kind:?}")),
        }
    }

    fn fixed_predicate(&mut self, i: &Instruction, value: bool) -> u32 {
        let number = self.predicates;
        self.predicates += 1;
        let run = if value { lanes::predicates(|_, _| u32::MAX) } else { lanes::predicates(|_, _| 0) };
        let mut inst = self.blank(run, Class::None, i.line);
        (inst.dst, inst.a, inst.b) = (number, number, number);
        self.push(inst);
        number
    }

    /// Destination predicate, or SINK.
    pub(super) fn predicate_destination(&mut self, i: &Instruction, operand: &Operand) -> Decoded<u32> {
        match operand {
            Operand::Sink => Ok(SINK),
            operand => self.predicate(i, Some(operand)),
        }
    }

    /// Whether a register is 64-bit.
    pub(super) fn register_is_wide(&self, operand: &Operand) -> bool {
        matches!(operand, Operand::Reg(id) if self.function.registers[*id as usize] == RegKind::Double)
    }

    /// An address operand: slot, whether it is 64-bit, offset, and the space of the symbol in it.
    pub(super) fn address(
        &mut self,
        i: &Instruction,
        operand: Option<&Operand>,
    ) -> Decoded<(u32, bool, i64, Option<Space>)> {
        let Some(Operand::Address(base, offset)) = operand else {
            return self.error(i, "expected an address");
        };
        match base.as_ref() {
            Operand::Symbol(name, inner) => match self.symbol(name) {
                Some(symbol) => {
                    let value = symbol.value.wrapping_add_signed(*inner);
                    Ok((self.constant(value, true), true, *offset, Some(symbol.space)))
                }
                None => self.error(i, format!("unknown symbol `{name}`")),
            },
            Operand::Int(value) => Ok((self.constant(*value, true), true, *offset, None)),
            register => {
                let wide = self.register_is_wide(register);
                Ok((self.operand(i, register, wide, None)?, wide, *offset, None))
            }
        }
    }

    /// Emits an instruction with one destination and sources `1..`, all of one width.
    pub(super) fn simple(
        &mut self,
        i: &Instruction,
        run: Handler,
        class: Class,
        wide: bool,
        count: usize,
    ) -> Decoded<()> {
        self.mixed(i, run, class, wide, &[wide; 4][..count])
    }

    /// Emits an instruction whose sources have the given widths.
    pub(super) fn mixed(
        &mut self,
        i: &Instruction,
        run: Handler,
        class: Class,
        wide: bool,
        sources: &[bool],
    ) -> Decoded<()> {
        if i.operands.len() != sources.len() + 1 {
            return self
                .error(i, format!("{} operands where {} are due", i.operands.len(), sources.len() + 1));
        }
        let mut slots = [0; 4];
        for (n, &wide) in sources.iter().enumerate() {
            slots[n] = self.source(i, n + 1, wide)?;
        }
        let mut inst = self.start(i, run, class)?;
        inst.dst = self.destination(i, wide)?;
        [inst.a, inst.b, inst.c, inst.ext] = slots;
        self.push(inst);
        Ok(())
    }

    /// Refuses an instruction that the module's target does not have.
    pub(super) fn needs(&self, i: &Instruction, target: u32) -> Decoded<()> {
        if self.module.target < target {
            return self
                .error(i, format!("needs .target sm_{target}, the module is for sm_{}", self.module.target));
        }
        Ok(())
    }
}
