//! Pictures of a trace: α of every token, which expert acted, the KL terms and the loss.
//!
//! [`read`] takes the lines that `generate --trace` wrote; [`svg()`] draws them for a document, [`html()`] as one page
//! that walks through the tokens. Neither output refers to anything outside itself.

mod chart;
mod html;
mod palette;
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
    /// There is nothing to draw.
    #[error("{}: the trace has no tokens", path.display())]
    Empty {
        /// The trace.
        path: PathBuf,
    },
}

/// One token of a trace; KL terms and the loss in nats. Arrays have one entry an expert.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    /// Which prompt of the run.
    pub prompt_index: usize,
    /// Which token of its text, from 0.
    pub step: usize,
    /// What was asked, a text or token ids; only in the first record of a prompt.
    #[serde(default)]
    pub prompt: Option<serde_json::Value>,
    /// The experts' names; only in the first record of a prompt.
    #[serde(default)]
    pub experts: Vec<String>,
    /// The token's id.
    pub token_id: u32,
    /// The token's text; empty where the run had no tokenizer.
    pub text: String,
    /// The active expert's name.
    pub expert: Option<String>,
    /// α of each expert.
    pub alpha: Vec<f64>,
    /// The loss at α.
    pub loss: Option<f64>,
    /// KL(fused‖large).
    pub kl_fused_large: Option<f64>,
    /// KL(large‖fused).
    pub kl_large_fused: Option<f64>,
    /// KL(expert‖small), the target of KL(fused‖large).
    pub kl_expert_small: Vec<f64>,
    /// KL(small‖expert), the target of KL(large‖fused).
    pub kl_small_expert: Vec<f64>,
    /// The large model's own choice.
    pub argmax_large: Option<u32>,
    /// Its text.
    #[serde(default)]
    pub argmax_large_text: Option<String>,
    /// Each expert's own choice.
    pub argmax_expert: Vec<u32>,
    /// Their texts; none in traces without a tokenizer.
    #[serde(default)]
    pub argmax_expert_text: Vec<String>,
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
        visible(&self.text)
    }
}

/// The tokens of one prompt.
#[derive(Clone, Debug)]
pub struct Text {
    /// The trace, as it was named.
    pub source: String,
    /// Which prompt of that run.
    pub prompt_index: usize,
    /// What was asked, where that was a text.
    pub prompt: Option<String>,
    /// The experts' names, in the order of α.
    pub experts: Vec<String>,
    /// One a token, in the order of the trace.
    pub records: Vec<Record>,
}

impl Text {
    /// What expert `t` is called.
    fn expert(&self, t: usize) -> String {
        self.experts.get(t).cloned().unwrap_or_else(|| format!("expert {t}"))
    }
}

/// Whether several experts act at once, as static fusion lets them: what is drawn is then the sum of their α.
fn is_sum(texts: &[Text]) -> bool {
    let acting = |record: &Record| record.alpha.iter().filter(|alpha| **alpha != 0.0).count();
    texts.iter().flat_map(|text| &text.records).any(|record| acting(record) > 1)
}

/// Whether a character has no place in XML, escaped or not, or would turn the text around it.
fn unprintable(c: char) -> bool {
    c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn visible(text: &str) -> String {
    let visible = |c: char| match c {
        ' ' => '·',
        '\n' => '↵',
        '\t' => '⇥',
        c if unprintable(c) => '\u{fffd}',
        c => c,
    };
    if text.is_empty() { "∅".into() } else { text.chars().map(visible).collect() }
}

/// The texts of a trace: the records of one prompt each, in the order of the file. There is one at least.
///
/// # Errors
/// [`PlotError`] names the file, and the line of a broken record. Blank lines are passed over.
pub fn read(path: &Path) -> Result<Vec<Text>, PlotError> {
    let io = |source| PlotError::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let name = path.display();
    let mut texts: Vec<Text> = Vec::new();
    let mut place = std::collections::HashMap::new();
    for (index, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        let mut record: Record = serde_json::from_str(&line).map_err(|source| PlotError::Record {
            path: path.to_owned(),
            line: index + 1,
            source,
        })?;
        let prompt_index = record.prompt_index;
        let at = *place.entry(prompt_index).or_insert_with(|| {
            texts.push(Text {
                source: name.to_string(),
                prompt_index,
                prompt: record.prompt.as_ref().and_then(|prompt| Some(prompt.as_str()?.to_owned())),
                experts: std::mem::take(&mut record.experts),
                records: Vec::new(),
            });
            texts.len() - 1
        });
        if let Some(text) = texts.get_mut(at) {
            text.records.push(record);
        }
    }
    if texts.is_empty() {
        return Err(PlotError::Empty { path: path.to_owned() });
    }
    Ok(texts)
}

/// What a text is called: the last `most` characters of its prompt, or the prompt's number; and its file where there are
/// several.
fn label(text: &Text, texts: &[Text], most: usize) -> String {
    let one_file = texts.iter().all(|other| other.source == text.source);
    let source = if one_file { String::new() } else { format!("{}: ", visible(&text.source)) };
    let Some(prompt) = text.prompt.as_ref().filter(|prompt| !prompt.trim().is_empty()) else {
        return format!("{source}prompt {}", text.prompt_index);
    };
    let lines: Vec<&str> = prompt.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let shown: Vec<char> =
        lines.join(" ↵ ").chars().map(|c| if unprintable(c) { '\u{fffd}' } else { c }).collect();
    let cut = shown.len().saturating_sub(most.saturating_sub(source.chars().count()));
    let end: String = shown[cut..].iter().collect();
    format!("{source}{}{end}", if cut > 0 { "…" } else { "" })
}

/// Text for an element or a quoted attribute.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// α as it is written over a token: as many digits as it has, at most two.
fn alpha_text(alpha: f64) -> String {
    let two = format!("{alpha:.2}");
    two.strip_suffix('0').map_or(two.clone(), str::to_owned)
}
