//! The syntax tree of a PTX module. Names of registers are resolved by the parser, since inline assembly opens
//! scopes in which they are declared anew.

use std::collections::HashMap;

/// A register, by its index in [`Function::registers`].
pub type RegId = u32;

/// A label, by its index in [`Function::labels`].
pub type LabelId = u32;

/// Width class of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegKind {
    /// `.pred`: one bit a lane.
    Pred,
    /// `.b8` to `.b32`, `.f16` to `.f32`: one 32-bit slot a lane, with the width in bits.
    Word(u8),
    /// `.b64`, `.f64`: one 64-bit slot a lane.
    Double,
}

/// State space of a variable or an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// Device memory.
    Global,
    /// Read-only device memory.
    Const,
    /// The block's memory.
    Shared,
    /// The thread's memory.
    Local,
    /// Kernel parameters.
    Param,
    /// Decided by the address.
    Generic,
}

/// An operand.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// A register.
    Reg(RegId),
    /// `!%p`.
    NotReg(RegId),
    /// Integer literal, two's complement.
    Int(u64),
    /// Bits of an f32 literal.
    F32(u32),
    /// Bits of an f64 literal.
    F64(u64),
    /// A special register: `tid.x`.
    Special(String),
    /// A variable or parameter, plus bytes.
    Symbol(String, i64),
    /// `[base+offset]`.
    Address(Box<Operand>, i64),
    /// `{a, b, …}`.
    Vector(Vec<Operand>),
    /// `d|p`.
    Pair(Box<Operand>, Box<Operand>),
    /// A branch target.
    Label(LabelId),
    /// `_`: the result is not wanted.
    Sink,
}

/// One instruction.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// `@%p` or `@!%p`: the register and whether it is negated.
    pub guard: Option<(RegId, bool)>,
    /// First word of the opcode.
    pub opcode: String,
    /// The modifiers in order.
    pub modifiers: Vec<String>,
    /// The operands in order.
    pub operands: Vec<Operand>,
    /// Line of the PTX text.
    pub line: u32,
    /// `.loc` in force: file number and line, where known.
    pub source: Option<(u32, u32)>,
}

/// One statement of a body.
#[derive(Debug, Clone)]
pub enum Statement {
    /// An instruction.
    Instruction(Instruction),
    /// A place to branch to.
    Label(LabelId),
}

/// A variable.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Where it lives.
    pub space: Space,
    /// Bytes.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Initial contents; empty means zeros.
    pub init: Vec<u8>,
    /// `.extern`: the size is given at launch.
    pub external: bool,
}

/// A kernel parameter.
#[derive(Debug, Clone)]
pub struct Param {
    /// Its name.
    pub name: String,
    /// Offset in the parameter block.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// A kernel.
#[derive(Debug, Clone, Default)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Line of its declaration.
    pub line: u32,
    /// Its parameters.
    pub params: Vec<Param>,
    /// Bytes of the parameter block.
    pub param_bytes: usize,
    /// Kind of each register.
    pub registers: Vec<RegKind>,
    /// Names of labels.
    pub labels: Vec<String>,
    /// Lists named by `.branchtargets`.
    pub branch_targets: HashMap<String, Vec<LabelId>>,
    /// The body.
    pub body: Vec<Statement>,
    /// Shared and local variables declared in the body.
    pub variables: Vec<Variable>,
    /// `.maxntid`.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
}

/// A module.
#[derive(Debug, Clone, Default)]
pub struct Module {
    /// `.version`.
    pub version: (u32, u32),
    /// `.target sm_XX`.
    pub target: u32,
    /// Names by `.file` number.
    pub files: HashMap<u32, String>,
    /// Variables at module scope.
    pub variables: Vec<Variable>,
    /// The kernels.
    pub kernels: Vec<Function>,
}
