//! Places the registers of a kernel in the register file of a warp. PTX names a register for nearly every value, a
//! thousand or more; those that are never alive together share a slot, so that what a warp works on stays in cache.
//!
//! A register is alive from a write to the last read that may follow it in the thread's flow of control. Sharing is
//! safe for lanes that part as well: each has its own place in a slot, and writes touch executing lanes only.

use crate::cfg::Node;
use crate::ptx::ast::{Function, Instruction, Operand, RegId, RegKind};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A set of registers.
#[derive(Clone, PartialEq)]
struct Set(Vec<u64>);

impl Set {
    fn new(count: usize) -> Self {
        Set(vec![0; count.div_ceil(64)])
    }

    fn insert(&mut self, register: RegId) {
        self.0[register as usize / 64] |= 1 << (register % 64);
    }

    fn has(&self, register: RegId) -> bool {
        self.0[register as usize / 64] >> (register % 64) & 1 == 1
    }

    fn for_each(&self, mut f: impl FnMut(RegId)) {
        for (n, &word) in self.0.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                f(n as RegId * 64 + left.trailing_zeros());
                left &= left - 1;
            }
        }
    }
}

/// Calls `f` with every register of an operand.
fn registers(operand: &Operand, f: &mut impl FnMut(RegId)) {
    match operand {
        Operand::Reg(id) | Operand::NotReg(id) => f(*id),
        Operand::Address(base, _) => registers(base, f),
        Operand::Vector(parts) => parts.iter().for_each(|part| registers(part, f)),
        Operand::Pair(first, second) => {
            registers(first, f);
            registers(second, f);
        }
        Operand::Int(_)
        | Operand::F32(_)
        | Operand::F64(_)
        | Operand::Special(_)
        | Operand::Symbol(..)
        | Operand::Label(_)
        | Operand::Sink => {}
    }
}

/// Whether the first operand is written in full and not read, by each lane that executes. What is not known here
/// counts as read, which only keeps it alive longer.
fn writes_first(i: &Instruction) -> bool {
    i.guard.is_none()
        && matches!(
            i.opcode.as_str(),
            "abs"
                | "activemask"
                | "add"
                | "and"
                | "atom"
                | "bfe"
                | "bfi"
                | "bfind"
                | "bmsk"
                | "brev"
                | "clz"
                | "cnot"
                | "copysign"
                | "cos"
                | "cvt"
                | "cvta"
                | "div"
                | "dp2a"
                | "dp4a"
                | "ex2"
                | "fma"
                | "ld"
                | "ldmatrix"
                | "ldu"
                | "lg2"
                | "lop3"
                | "mad"
                | "match"
                | "max"
                | "min"
                | "mma"
                | "mov"
                | "mul"
                | "neg"
                | "not"
                | "or"
                | "popc"
                | "prmt"
                | "rcp"
                | "redux"
                | "rem"
                | "rsqrt"
                | "sad"
                | "selp"
                | "shf"
                | "shfl"
                | "shl"
                | "shr"
                | "sin"
                | "slct"
                | "sqrt"
                | "sub"
                | "tanh"
                | "vote"
                | "xor"
        )
}

/// The registers that an instruction reads, or writes only in part, and those that it writes in full.
fn effects(i: &Instruction, read: &mut Vec<RegId>, written: &mut Vec<RegId>) {
    read.clear();
    written.clear();
    let writes = writes_first(i);
    for (n, operand) in i.operands.iter().enumerate() {
        let to = if n == 0 && writes { &mut *written } else { &mut *read };
        registers(operand, &mut |id| to.push(id));
    }
}

/// First and last instruction at which a register is alive; the first above the last if it never is.
#[derive(Clone, Copy)]
struct Span {
    first: usize,
    last: usize,
}

impl Span {
    fn cover(&mut self, at: usize) {
        self.first = self.first.min(at);
        self.last = self.last.max(at);
    }
}

/// The registers alive at the start of each block.
fn alive_at_start(count: usize, instructions: &[&Instruction], nodes: &[Node]) -> Vec<Set> {
    let (mut read, mut written) = (Vec::new(), Vec::new());
    // Of each block: what it reads before it writes it, and what it writes before it reads it.
    let mut needs = vec![Set::new(count); nodes.len()];
    let mut gives = vec![Set::new(count); nodes.len()];
    for (n, node) in nodes.iter().enumerate() {
        for i in &instructions[node.start..node.end] {
            effects(i, &mut read, &mut written);
            read.iter().filter(|&&id| !gives[n].has(id)).for_each(|&id| needs[n].insert(id));
            let first = written.iter().filter(|&&id| !needs[n].has(id));
            first.for_each(|&id| gives[n].insert(id));
        }
    }
    let mut alive = needs;
    loop {
        let mut changed = false;
        for (n, node) in nodes.iter().enumerate().rev() {
            for &next in &node.next {
                for word in 0..count.div_ceil(64) {
                    let more = alive[next].0[word] & !gives[n].0[word] & !alive[n].0[word];
                    alive[n].0[word] |= more;
                    changed |= more != 0;
                }
            }
        }
        if !changed {
            return alive;
        }
    }
}

/// The instructions, as one line of code, over which each register is alive.
fn spans(count: usize, instructions: &[&Instruction], nodes: &[Node]) -> Vec<Span> {
    let alive = alive_at_start(count, instructions, nodes);
    let mut spans = vec![Span { first: usize::MAX, last: 0 }; count];
    let (mut read, mut written) = (Vec::new(), Vec::new());
    for (n, node) in nodes.iter().enumerate() {
        for (at, i) in instructions.iter().enumerate().take(node.end).skip(node.start) {
            // What an instruction reads and what it writes never share: some write before they have read all.
            effects(i, &mut read, &mut written);
            read.iter().chain(&written).for_each(|&id| spans[id as usize].cover(at));
        }
        if node.start == node.end {
            continue;
        }
        alive[n].for_each(|id| spans[id as usize].cover(node.start));
        for &next in &node.next {
            alive[next].for_each(|id| spans[id as usize].cover(node.end - 1));
        }
    }
    // What may be read before it is written keeps a slot for itself.
    if let Some(entry) = alive.first() {
        entry.for_each(|id| spans[id as usize] = Span { first: 0, last: usize::MAX });
    }
    spans
}

/// Slots of one width, of which some are free again.
struct Slots {
    words: u32,
    free: BinaryHeap<Reverse<u32>>,
    /// Those in use, by the last instruction that needs them.
    busy: BinaryHeap<Reverse<(usize, u32)>>,
}

impl Slots {
    fn new(words: u32) -> Self {
        Slots { words, free: BinaryHeap::new(), busy: BinaryHeap::new() }
    }

    fn take(&mut self, span: Span, end: &mut u32) -> u32 {
        while let Some(&Reverse((last, slot))) = self.busy.peek() {
            if last >= span.first {
                break;
            }
            self.busy.pop();
            self.free.push(Reverse(slot));
        }
        let slot = self.free.pop().map_or_else(
            || {
                *end += self.words;
                *end - self.words
            },
            |Reverse(slot)| slot,
        );
        self.busy.push(Reverse((span.last, slot)));
        slot
    }
}

/// A slot for each register that is no predicate (0 for those that never appear), and how many words they take.
pub(super) fn place(function: &Function, instructions: &[&Instruction], nodes: &[Node]) -> (Vec<u32>, u32) {
    let count = function.registers.len();
    let spans = spans(count, instructions, nodes);
    let mut order: Vec<usize> = (0..count).filter(|&id| spans[id].first <= spans[id].last).collect();
    order.sort_by_key(|&id| spans[id].first);
    let (mut single, mut double) = (Slots::new(32), Slots::new(64));
    let mut words = 0;
    let mut slots = vec![0; count];
    for id in order {
        slots[id] = match function.registers[id] {
            RegKind::Pred => continue,
            RegKind::Word(_) => single.take(spans[id], &mut words),
            RegKind::Double => double.take(spans[id], &mut words),
        };
    }
    (slots, words)
}

#[cfg(test)]
mod tests {
    use crate::ptx::parser::parse;
    use std::collections::HashMap;

    fn words(body: &str) -> usize {
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u32 n) {{\n\
             .reg .b32 %r<9>; .reg .pred %p;\n{body}\nret;\n}}\n"
        );
        let kernels = crate::decode::decode(&parse(&text).unwrap(), &HashMap::new()).unwrap();
        kernels[0].register_words / 32
    }

    #[test]
    fn values_that_do_not_meet_share() {
        let chain = "ld.param.u32 %r0, [n]; add.u32 %r1, %r0, 1; add.u32 %r2, %r1, 1; add.u32 %r3, %r2, 1;";
        assert_eq!(words(chain), 2, "one alive, one being written");
        assert_eq!(words(&format!("{chain} add.u32 %r4, %r3, %r0;")), 3);
    }

    #[test]
    fn a_loop_keeps_what_it_reads_again() {
        let body = "ld.param.u32 %r0, [n]; mov.u32 %r1, 0; mov.u32 %r2, 7;\n\
                    L: add.u32 %r3, %r1, %r2; add.u32 %r4, %r3, 1; add.u32 %r1, %r4, 1;\n\
                    setp.lt.u32 %p, %r1, %r0; @%p bra L;";
        // %r0, %r1 and %r2 live through the loop, %r3 and %r4 follow one another.
        assert_eq!(words(body), 5);
    }

    #[test]
    fn what_may_be_unset_shares_with_nobody() {
        let body = "ld.param.u32 %r0, [n]; setp.eq.u32 %p, %r0, 0; @%p mov.u32 %r1, 1;\n\
                    add.u32 %r2, %r1, 1; add.u32 %r3, %r2, 1; add.u32 %r4, %r3, 1;";
        assert_eq!(words(body), 3, "%r1 alone, the others by turns");
    }
}
