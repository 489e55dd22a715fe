//! Tokens as bytes. A token may end inside a character, so text is put together from bytes, and only whole
//! characters leave.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::Vocabulary;
use crate::error::{Error, Result};
use crate::json::show;

/// The bytes of every token, and what happens at the start of a text.
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Where the piece of an id ends; it starts where that of the id before ends.
    ends: Vec<usize>,
    /// The ids of special tokens, in order.
    special: Vec<u32>,
    opening: Opening,
}

/// What the start of a text loses: the space that tokenizers put in front of its first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// Nothing.
    Whole,
    /// This character, up to so many times.
    Strip(char, usize),
    /// Every replacement character of the first token.
    Drop(char),
}

/// How the decoder of tokenizer.json turns a token into bytes.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// GPT-2's bytes in the guise of printable characters.
    ByteLevel,
    /// `<0xE4>` is a byte.
    ByteFallback,
    /// A string for another.
    Replace(String, String),
    /// A space before every token.
    Join,
}

impl Pieces {
    /// The pieces of the ids below `size`. `decoder` is that of tokenizer.json.
    pub(super) fn new(
        path: &Path,
        tokenizer: &tokenizers::Tokenizer,
        decoder: &Value,
        size: usize,
    ) -> Result<Self> {
        let (steps, opening) =
            steps(decoder).map_err(|what| Error::Unsupported { path: path.to_owned(), what })?;
        let added = tokenizer.get_added_tokens_decoder();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(size));
        let mut special = Vec::new();
        for id in 0..size as u32 {
            if added.get(&id).is_some_and(|token| token.special) {
                special.push(id);
            } else if let Some(token) = tokenizer.id_to_token(id) {
                bytes.extend(piece(&steps, token));
            }
            ends.push(bytes.len());
        }
        Ok(Self { bytes, ends, special, opening })
    }

    /// Whether token `id` is a special one.
    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// The piece of token `id`, empty where it has none.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { Some(0) } else { self.ends.get(id - 1).copied() };
        match (start, self.ends.get(id)) {
            (Some(start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }

    /// One more than the largest id.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}

/// The bytes of `token`.
fn piece(steps: &[Step], mut token: String) -> Vec<u8> {
    for step in steps {
        match step {
            Step::ByteLevel => {
                return match token.chars().map(byte_of).collect() {
                    Some(bytes) => bytes,
                    // Added tokens may hold other characters; they stand for themselves.
                    None => token.into_bytes(),
                };
            }
            Step::ByteFallback => {
                let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                if let Some(byte) =
                    hex.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok())
                {
                    return vec![byte];
                }
            }
            Step::Replace(pattern, content) => token = token.replace(pattern, content),
            Step::Join => token.insert(0, ' '),
        }
    }
    token.into_bytes()
}

/// The byte that byte-level BPE writes as `c`: printable Latin-1 characters are themselves, the other 68 bytes are
/// the characters from U+0100 on, in order.
fn byte_of(c: char) -> Option<u8> {
    let printable = |c: u32| matches!(c, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        c if printable(c) => u8::try_from(c).ok(),
        c @ 0x100..=0x143 => (0..=255_u8).filter(|&byte| !printable(byte.into())).nth((c - 0x100) as usize),
        _ => None,
    }
}

/// Reads a decoder; the reason names what isn't one of a Llama tokenizer.
fn steps(decoder: &Value) -> Result<(Vec<Step>, Opening), String> {
    if decoder.is_null() {
        return Ok((vec![Step::Join], Opening::Strip(' ', 1)));
    }
    let (mut steps, mut opening, mut fused) = (Vec::new(), Opening::Whole, false);
    let nested = [decoder.clone()];
    let list = match decoder.get("decoders") {
        Some(list) => list.as_array().map(Vec::as_slice).unwrap_or_default(),
        None => nested.as_slice(),
    };
    for step in list {
        let unsupported = || format!("the token decoder {}", show(step));
        let text = |pointer: &str| step.pointer(pointer).and_then(Value::as_str);
        match text("/type") {
            // After these, a token is bytes and no later step could look at its characters.
            _ if matches!(steps.last(), Some(Step::ByteLevel)) => return Err(unsupported()),
            Some("Fuse") => fused = true,
            Some("Strip") if fused && opening == Opening::Whole => {
                let count = |name: &str| step.get(name).and_then(Value::as_u64);
                let content = text("/content").and_then(|content| content.chars().next());
                let (Some(content), Some(start), Some(0)) = (content, count("start"), count("stop")) else {
                    return Err(unsupported());
                };
                opening = Opening::Strip(content, usize::try_from(start).unwrap_or(usize::MAX));
            }
            _ if fused => return Err(unsupported()),
            Some("ByteLevel") => steps.push(Step::ByteLevel),
            Some("ByteFallback") => steps.push(Step::ByteFallback),
            Some("Replace") => {
                let (Some(pattern), Some(content)) = (text("/pattern/String"), text("/content")) else {
                    return Err(unsupported());
                };
                steps.push(Step::Replace(pattern.to_owned(), content.to_owned()));
            }
            Some("Metaspace") if opening == Opening::Whole => {
                let Some(replacement) = text("/replacement").and_then(|text| text.chars().next()) else {
                    return Err(unsupported());
                };
                let never = text("/prepend_scheme") == Some("never")
                    || step.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
                if !never {
                    opening = Opening::Drop(replacement);
                }
                steps.push(Step::Replace(replacement.to_string(), " ".to_owned()));
            }
            _ => return Err(unsupported()),
        }
    }
    Ok((steps, opening))
}

/// Turns tokens into text as they come. What it has given out never changes: characters that a token leaves
/// unfinished wait for the next.
#[derive(Clone)]
pub struct Decoder {
    vocabulary: Arc<Vocabulary>,
    /// What the start of the text still loses.
    opening: Opening,
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl Decoder {
    pub(super) fn new(vocabulary: Arc<Vocabulary>, at_start: bool) -> Self {
        let opening = if at_start { vocabulary.pieces.opening } else { Opening::Whole };
        Self { vocabulary, opening, pending: Vec::new() }
    }

    /// Takes the next token and gives the text that it completes. Special tokens, and ids that no token has, add
    /// nothing. Bytes that can't be part of any character become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        let vocabulary = Arc::clone(&self.vocabulary);
        let piece = vocabulary.pieces.get(id);
        if piece.is_empty() {
            return String::new();
        }
        match self.opening {
            Opening::Whole => self.pending.extend(piece),
            Opening::Strip(content, count) => {
                let mut encoded = [0; 4];
                let content_bytes = content.encode_utf8(&mut encoded).as_bytes();
                let (mut rest, mut left) = (piece, count);
                while left > 0
                    && let Some(after) = rest.strip_prefix(content_bytes)
                {
                    (rest, left) = (after, left - 1);
                }
                self.pending.extend(rest);
                let done = left == 0 || !rest.is_empty();
                self.opening = if done { Opening::Whole } else { Opening::Strip(content, left) };
            }
            Opening::Drop(replacement) => {
                self.opening = Opening::Whole;
                // Only here does it matter which spaces of the piece were written as the replacement.
                let token = vocabulary.tokenizer.id_to_token(id).unwrap_or_default();
                self.pending.extend(token.replace(replacement, "").bytes());
            }
        }
        self.take_whole_characters()
    }

    /// Ends the text: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }

    fn take_whole_characters(&mut self) -> String {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    match error.error_len() {
                        Some(invalid) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &rest[invalid..];
                        }
                        None => break,
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("pending", &self.pending).finish_non_exhaustive()
    }
}
