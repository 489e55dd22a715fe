//! Turns a parsed module into kernels that can run. Every modifier of every instruction must be understood:
//! what is left over is an error with its line.

mod convert;
mod float;
mod half;
mod integer;
mod memory;
mod operands;
mod registers;
mod warp;

use crate::cfg::{Node, post_dominators};
use crate::counters::Class;
use crate::exec::control;
use crate::program::*;
use crate::ptx::LoadError;
use crate::ptx::ast::{self, Function, Instruction, Operand, RegKind, Space, Statement};
use operands::Mods;
use std::collections::HashMap;
use std::sync::Arc;

type Decoded<T> = Result<T, LoadError>;

/// Where a symbol is.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    space: Space,
    value: u64,
}

/// Decodes all kernels of a module. `globals` gives device addresses of the module's variables by name.
///
/// # Errors
/// Names the line of the first instruction that cannot be run.
pub fn decode(module: &ast::Module, globals: &HashMap<String, u64>) -> Decoded<Vec<Kernel>> {
    module.kernels.iter().map(|f| Decoder::new(module, f, globals).kernel()).collect()
}

struct Decoder<'a> {
    module: &'a ast::Module,
    function: &'a Function,
    /// Slot or predicate number of each register.
    slots: Vec<u32>,
    words: u32,
    predicates: u32,
    constants: Vec<Chunk>,
    known: HashMap<(u64, bool), u32>,
    symbols: HashMap<String, Symbol>,
    shared_bytes: usize,
    local_bytes: usize,
    code: Vec<Inst>,
    blocks: Vec<Block>,
    accesses: Vec<Access>,
    lists: Vec<Vec<u32>>,
    sources: Vec<(Arc<str>, u32)>,
    source_ids: HashMap<(u32, u32), u32>,
    synchronises: bool,
    placed: bool,
}

/// Branches whose targets are block numbers until all blocks have their place.
enum Fix {
    Target(usize, usize),
    Join(usize, usize),
    List(usize, Vec<usize>),
}

impl<'a> Decoder<'a> {
    fn new(module: &'a ast::Module, function: &'a Function, globals: &HashMap<String, u64>) -> Self {
        let mut d = Decoder {
            module,
            function,
            slots: Vec::new(),
            words: 0,
            predicates: 0,
            constants: Vec::new(),
            known: HashMap::new(),
            symbols: HashMap::new(),
            shared_bytes: 0,
            local_bytes: 0,
            code: Vec::new(),
            blocks: Vec::new(),
            accesses: Vec::new(),
            lists: Vec::new(),
            sources: Vec::new(),
            source_ids: HashMap::new(),
            synchronises: false,
            placed: false,
        };
        for (name, &value) in globals {
            d.symbols.insert(name.clone(), Symbol { space: Space::Global, value });
        }
        d.lay_out();
        d
    }

    /// Places shared and local variables. Dynamic shared memory begins behind the static part.
    fn lay_out(&mut self) {
        let all = || self.module.variables.iter().chain(&self.function.variables);
        let mut symbols = Vec::new();
        let (mut shared, mut local) = (0usize, 0usize);
        for v in all().filter(|v| !v.external) {
            let top = match v.space {
                Space::Shared => &mut shared,
                Space::Local => &mut local,
                _ => continue,
            };
            let at = top.next_multiple_of(v.align);
            *top = at + v.size;
            symbols.push((v.name.clone(), Symbol { space: v.space, value: at as u64 }));
        }
        let align = all().filter(|v| v.external).map(|v| v.align).max().unwrap_or(1).max(16);
        if all().any(|v| v.external && v.space == Space::Shared) {
            shared = shared.next_multiple_of(align);
        }
        for v in all().filter(|v| v.external) {
            symbols.push((v.name.clone(), Symbol { space: Space::Shared, value: shared as u64 }));
        }
        self.symbols.extend(symbols);
        (self.shared_bytes, self.local_bytes) = (shared, local.next_multiple_of(16));
    }

    /// Looks a variable up; that of one in device memory binds the kernel to where it was placed.
    fn symbol(&mut self, name: &str) -> Option<Symbol> {
        let symbol = self.symbols.get(name).copied()?;
        self.placed |= symbol.space == Space::Global;
        Some(symbol)
    }

    fn new_slot(&mut self, wide: bool) -> u32 {
        let slot = self.words;
        self.words += if wide { 64 } else { 32 };
        slot
    }

    fn kernel(mut self) -> Decoded<Kernel> {
        let function = self.function;
        let (instructions, nodes) = self.graph()?;
        (self.slots, self.words) = registers::place(function, &instructions, &nodes);
        for (slot, kind) in self.slots.iter_mut().zip(&function.registers) {
            if *kind == RegKind::Pred {
                *slot = self.predicates;
                self.predicates += 1;
            }
        }
        let joins = post_dominators(&nodes);
        let mut fixes = Vec::new();
        let mut starts = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            starts.push(self.code.len());
            let line = instructions.get(node.start).map_or(function.line, |i| i.line);
            let mut open = self.blank(control::open_block, Class::None, line);
            open.imm = self.code.len() as i64;
            open.ext = n as u32;
            self.code.push(open);
            self.blocks.push(Block::default());
            let joined = joins[n];
            for instruction in &instructions[node.start..node.end] {
                self.instruction(instruction, &nodes, joined, &mut fixes)?;
            }
        }
        let end = self.blank(control::exit, Class::None, function.line);
        self.code.push(end);
        self.resolve(fixes, &starts);
        let params = function.params.clone();
        let kinds = function.registers.iter();
        let virtual_registers = kinds.map(|k| match k {
            RegKind::Pred => 0,
            RegKind::Word(_) => 1,
            RegKind::Double => 2,
        });
        Ok(Kernel {
            name: function.name.clone(),
            params,
            param_bytes: function.param_bytes,
            virtual_registers: virtual_registers.sum(),
            code: self.code,
            blocks: self.blocks,
            accesses: self.accesses,
            lists: self.lists,
            register_words: self.words as usize,
            predicates: self.predicates as usize,
            constants: self.constants,
            shared_bytes: self.shared_bytes,
            local_bytes: self.local_bytes,
            max_threads: function.max_threads,
            required_threads: function.required_threads,
            sources: self.sources,
            synchronises: self.synchronises,
            placed: self.placed,
        })
    }

    fn resolve(&mut self, fixes: Vec<Fix>, starts: &[usize]) {
        for fix in fixes {
            match fix {
                Fix::Target(at, block) => self.code[at].imm = starts[block] as i64,
                Fix::Join(at, block) => self.code[at].ext = starts[block] as u32,
                Fix::List(at, blocks) => {
                    self.code[at].c = self.lists.len() as u32;
                    self.lists.push(blocks.iter().map(|&b| starts[b] as u32).collect());
                }
            }
        }
    }

    /// The instructions and the blocks they form.
    fn graph(&self) -> Decoded<(Vec<&'a Instruction>, Vec<Node>)> {
        let function = self.function;
        let mut instructions: Vec<&Instruction> = Vec::new();
        let mut label_at = vec![usize::MAX; function.labels.len()];
        let mut leaders = vec![0];
        for statement in &function.body {
            match statement {
                Statement::Label(id) => {
                    label_at[*id as usize] = instructions.len();
                    leaders.push(instructions.len());
                }
                Statement::Instruction(i) => {
                    instructions.push(i);
                    if ends_block(i) {
                        leaders.push(instructions.len());
                    }
                }
            }
        }
        leaders.sort_unstable();
        leaders.dedup();
        let block_of = |at: usize| leaders.binary_search(&at).unwrap_or(0);
        let mut nodes = Vec::new();
        for (n, &start) in leaders.iter().enumerate() {
            let end = leaders.get(n + 1).copied().unwrap_or(instructions.len());
            let mut node = Node { start, end, ..Node::default() };
            let last = (end > start).then(|| instructions[end - 1]);
            let goes_on = last.is_none_or(|i| !ends_block(i) || i.guard.is_some());
            if let Some(i) = last.filter(|i| ends_block(i)) {
                for label in self.targets(i)? {
                    node.next.push(block_of(label_at[label as usize]));
                }
                node.leaves = matches!(i.opcode.as_str(), "ret" | "exit" | "trap");
            }
            if goes_on {
                if n + 1 < leaders.len() {
                    node.next.push(n + 1);
                } else {
                    node.leaves = true;
                }
            }
            nodes.push(node);
        }
        Ok((instructions, nodes))
    }

    /// The labels to which an instruction may branch.
    fn targets(&self, i: &Instruction) -> Decoded<Vec<u32>> {
        match (i.opcode.as_str(), i.operands.as_slice()) {
            ("bra", [Operand::Label(label)]) => Ok(vec![*label]),
            ("brx", [_, Operand::Symbol(name, 0)]) => match self.function.branch_targets.get(name) {
                Some(list) => Ok(list.clone()),
                None => Err(LoadError::new(i.line, format!("no .branchtargets `{name}`"))),
            },
            ("bra" | "brx", _) => Err(LoadError::new(i.line, "malformed branch")),
            _ => Ok(Vec::new()),
        }
    }

    fn blank(&self, run: Handler, class: Class, line: u32) -> Inst {
        Inst { run, guard: NO_GUARD, dst: 0, a: 0, b: 0, c: 0, ext: 0, imm: 0, class, line, source: 0 }
    }

    /// An instruction with line, source and guard filled in.
    fn start(&mut self, i: &Instruction, run: Handler, class: Class) -> Decoded<Inst> {
        let mut inst = self.blank(run, class, i.line);
        if let Some((register, negated)) = i.guard {
            if self.function.registers[register as usize] != RegKind::Pred {
                return self.error(i, "the guard is no predicate");
            }
            inst.guard = self.slots[register as usize] | if negated { NEGATED } else { 0 };
        }
        if let Some((file, line)) = i.source {
            let next = self.sources.len() as u32 + 1;
            inst.source = *self.source_ids.entry((file, line)).or_insert(next);
            if inst.source == next {
                let name = self.module.files.get(&file).map_or("?", String::as_str);
                self.sources.push((Arc::from(name), line));
            }
        }
        Ok(inst)
    }

    /// Appends an instruction of the program and counts it in its block.
    fn push(&mut self, inst: Inst) {
        if let Some(block) = self.blocks.last_mut() {
            block.classes[inst.class as usize] += 1;
        }
        self.code.push(inst);
    }

    fn error<T>(&self, i: &Instruction, message: impl std::fmt::Display) -> Decoded<T> {
        let spelled: String = i.modifiers.iter().map(|m| format!(".{m}")).collect();
        Err(LoadError::new(i.line, format!("`{}{spelled}`: {message}", i.opcode)))
    }

    fn instruction(
        &mut self,
        i: &Instruction,
        nodes: &[Node],
        joined: Option<usize>,
        fixes: &mut Vec<Fix>,
    ) -> Decoded<()> {
        let mut mods = Mods::new(&i.modifiers);
        match i.opcode.as_str() {
            "bra" | "brx" => return self.branch(i, nodes, joined, fixes),
            "ret" | "exit" => {
                mods.take("uni");
                let inst = self.start(i, control::exit, Class::Control)?;
                self.push(inst);
            }
            "trap" => {
                let inst = self.start(i, control::trap, Class::Control)?;
                self.push(inst);
            }
            _ => {
                let known = self.convert(i, &mut mods)?
                    || self.memory(i, &mut mods)?
                    || self.warp(i, &mut mods)?
                    || self.integer(i, &mut mods)?
                    || self.float(i, &mut mods)?
                    || self.half(i, &mut mods)?;
                if !known {
                    return self.error(i, "unknown instruction");
                }
            }
        }
        match mods.left() {
            Some(modifier) => self.error(i, format!("unknown modifier .{modifier}")),
            None => Ok(()),
        }
    }

    fn branch(
        &mut self,
        i: &Instruction,
        nodes: &[Node],
        joined: Option<usize>,
        fixes: &mut Vec<Fix>,
    ) -> Decoded<()> {
        let mut mods = Mods::new(&i.modifiers);
        mods.take("uni");
        let at_source = |n: &Node| n.end;
        let mut inst = self.start(i, control::jump, Class::Control)?;
        inst.ext = NO_JOIN;
        let node = self.blocks.len() - 1;
        debug_assert!(at_source(&nodes[node]) > nodes[node].start);
        if i.opcode == "brx" {
            mods.take("idx");
            if i.guard.is_some() {
                return self.error(i, "a guarded brx is not supported");
            }
            inst.run = control::branch_table;
            inst.a = self.source(i, 0, false)?;
            let at = self.emit_position();
            fixes.push(Fix::List(at, nodes[node].next.clone()));
            if let Some(join) = joined {
                fixes.push(Fix::Join(at, join));
            }
        } else {
            let at = self.emit_position();
            fixes.push(Fix::Target(at, nodes[node].next[0]));
            if i.guard.is_some() {
                inst.run = control::branch;
                inst.a = std::mem::replace(&mut inst.guard, NO_GUARD);
                if let Some(join) = joined {
                    fixes.push(Fix::Join(at, join));
                }
            }
        }
        self.push(inst);
        match mods.left() {
            Some(modifier) => self.error(i, format!("unknown modifier .{modifier}")),
            None => Ok(()),
        }
    }

    fn emit_position(&self) -> usize {
        self.code.len()
    }
}

fn ends_block(i: &Instruction) -> bool {
    matches!(i.opcode.as_str(), "bra" | "brx" | "ret" | "exit" | "trap")
}
