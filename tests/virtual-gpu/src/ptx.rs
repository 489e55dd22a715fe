//! PTX text to a syntax tree: [`lexer`], [`parser`], [`ast`].

pub mod ast;
mod body;
pub mod lexer;
pub mod parser;

use std::fmt;

/// Why a module was refused: the PTX line (from 1) and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// Line of the PTX text, counted from 1.
    pub line: u32,
    /// What was found and why it is refused.
    pub message: String,
}

impl LoadError {
    /// An error at `line`.
    pub fn new(line: u32, message: impl Into<String>) -> Self {
        LoadError { line, message: message.into() }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for LoadError {}
