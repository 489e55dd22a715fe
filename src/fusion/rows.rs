//! Logits that the caller owns: one matrix a model, wherever it lies.

use super::PerExpert;
use crate::error::{Error, Result};

/// What each model gave for the same rows. `L` says where the logits lie: [`LogitsRows`] are in this process's
/// memory.
#[derive(Clone, Debug)]
pub struct ModelLogits<L> {
    /// L.
    pub large: Option<L>,
    /// S.
    pub small: Option<L>,
    /// E_t, expert 0 first.
    pub experts: PerExpert<L>,
}

impl<L> Default for ModelLogits<L> {
    /// No model.
    fn default() -> Self {
        Self { large: None, small: None, experts: PerExpert::new() }
    }
}

/// The logits of one model: `(rows, vocab_size)` f32, row-major, row `r` beginning at `r · stride`. Borrowed, never
/// copied.
#[derive(Clone, Copy, Debug)]
pub struct LogitsRows<'a> {
    values: &'a [f32],
    rows: usize,
    vocab_size: usize,
    stride: usize,
}

impl<'a> LogitsRows<'a> {
    /// Rows of `vocab_size` logits that follow each other without a gap.
    ///
    /// # Errors
    /// [`Error::Parameter`] where `vocab_size` is 0 or doesn't divide the number of values.
    pub fn new(values: &'a [f32], vocab_size: usize) -> Result<Self> {
        if vocab_size == 0 || !values.len().is_multiple_of(vocab_size) {
            return Err(Error::Parameter {
                name: "logits",
                expected: format!("rows of vocab_size = {vocab_size} > 0 values"),
                found: format!("{} values", values.len()),
            });
        }
        Ok(Self { values, rows: values.len() / vocab_size, vocab_size, stride: vocab_size })
    }

    /// Rows that begin `stride` values apart, as where another engine pads its vocabulary.
    ///
    /// # Errors
    /// [`Error::Parameter`] where `vocab_size` is 0, `stride` is less, or there are too few values for the last row.
    pub fn with_stride(values: &'a [f32], rows: usize, vocab_size: usize, stride: usize) -> Result<Self> {
        let needed = Self::span(rows, vocab_size, stride)?;
        if values.len() < needed {
            return Err(Error::Parameter {
                name: "logits",
                expected: format!("{needed} values for {rows} rows of {vocab_size}, {stride} apart"),
                found: values.len().to_string(),
            });
        }
        Ok(Self { values, rows, vocab_size, stride })
    }

    /// The values that a matrix spans, from the first of its first row to the last of its last one.
    ///
    /// # Errors
    /// [`Error::Parameter`] where `vocab_size` is 0, `stride` is less, or there is no memory of that size.
    pub fn span(rows: usize, vocab_size: usize, stride: usize) -> Result<usize> {
        let invalid = |name, expected: &str, found: usize| Error::Parameter {
            name,
            expected: expected.to_owned(),
            found: found.to_string(),
        };
        if vocab_size == 0 {
            return Err(invalid("vocab_size", "at least 1", 0));
        }
        if stride < vocab_size {
            return Err(invalid("stride", &format!("vocab_size = {vocab_size} or more"), stride));
        }
        let Some(last) = rows.checked_sub(1) else { return Ok(0) };
        let len = last.checked_mul(stride).and_then(|start| start.checked_add(vocab_size));
        // No object is larger than half the address space.
        let len = len.filter(|&len| len <= isize::MAX as usize / size_of::<f32>());
        len.ok_or_else(|| invalid("rows", "a matrix that fits memory", rows))
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The logits of one row: `(vocab_size,)`.
    pub fn row(&self, row: usize) -> Option<&'a [f32]> {
        if row >= self.rows {
            return None;
        }
        let start = row * self.stride;
        self.values.get(start..start + self.vocab_size)
    }
}
