//! Pictures of a trace: α of every token, which expert acted, the KL terms and the loss.
//!
//! [`read`] takes the lines that `generate --trace` wrote; [`svg()`] draws them for a document, [`html()`] as one page
//! that walks through the tokens. Neither output refers to anything outside itself.

mod html;
mod svg;

use std::io::BufRead;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use html::html;
pub use svg::svg;

/// Why a trace can't be drawn.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The file can't be opened or read.
    #[error("{}", path.display())]
    Io {
        /// The trace.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line isn't a record of a trace.
    #[error("{}, line {line}: not a record of a trace", path.display())]
    Record {
        /// The trace.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Which field, expected and found.
        source: serde_json::Error,
    },
}

/// One token of a trace; KL terms and the loss in nats. Arrays have one entry an expert.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    /// Which prompt of the run.
    pub prompt_index: usize,
    /// Which token of its text, from 0.
    pub step: usize,
    /// The token's text; empty where the run had no tokenizer.
    pub text: String,
    /// The active expert's name.
    pub expert: Option<String>,
    /// α of each expert.
    pub alpha: Vec<f64>,
    /// The loss at α.
    pub loss: Option<f64>,
    /// KL(P̃‖P).
    pub kl_fused_large: Option<f64>,
    /// KL(P‖P̃).
    pub kl_large_fused: Option<f64>,
    /// KL(Q_t‖Q), the target of KL(P̃‖P).
    pub kl_expert_small: Vec<f64>,
    /// KL(Q‖Q_t), the target of KL(P‖P̃).
    pub kl_small_expert: Vec<f64>,
    /// The large model's own choice.
    pub argmax_large: Option<u32>,
    /// Each expert's own choice.
    pub argmax_expert: Vec<u32>,
    /// Whether the fused choice differs from the large model's.
    pub changed: Option<bool>,
}

impl Record {
    /// Σ_t α_t: the α of the one expert that acts, or of all of a static rule; none where no expert took part.
    #[must_use]
    pub fn total_alpha(&self) -> Option<f64> {
        (!self.alpha.is_empty()).then(|| self.alpha.iter().sum())
    }

    /// The text with spaces, line ends and control characters made visible; `∅` if there is none.
    fn shown(&self) -> String {
        let visible = |c: char| match c {
            ' ' => '·',
            '\n' => '↵',
            '\t' => '⇥',
            // XML has no place for these, escaped or not.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => '\u{fffd}',
            c => c,
        };
        if self.text.is_empty() { "∅".into() } else { self.text.chars().map(visible).collect() }
    }
}

/// The texts of a trace: the records of one prompt each, in the order of the file.
///
/// # Errors
/// [`PlotError`] names the file, and the line of a broken record. Blank lines are passed over.
pub fn read(path: &Path) -> Result<Vec<Vec<Record>>, PlotError> {
    let io = |source| PlotError::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut texts: Vec<Vec<Record>> = Vec::new();
    let mut place = std::collections::HashMap::new();
    for (index, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        let record: Record = serde_json::from_str(&line).map_err(|source| PlotError::Record {
            path: path.to_owned(),
            line: index + 1,
            source,
        })?;
        let at = *place.entry(record.prompt_index).or_insert_with(|| {
            texts.push(Vec::new());
            texts.len() - 1
        });
        if let Some(text) = texts.get_mut(at) {
            text.push(record);
        }
    }
    Ok(texts)
}

/// Text for an element or a quoted attribute.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The experts by name, sorted: their order is their colour.
fn experts(texts: &[Vec<Record>]) -> Vec<&str> {
    let names: std::collections::BTreeSet<&str> =
        texts.iter().flatten().filter_map(|r| r.expert.as_deref()).collect();
    names.into_iter().collect()
}
