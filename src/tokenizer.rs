//! Text to token ids and back: `tokenizer.json`, chat templates, and a decoder that streams.

mod pieces;
mod template;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use pieces::Decoder;
pub use template::Message;

use crate::config::MAX_VOCAB;
use crate::error::{Error, Result};
use crate::json::{MAX_CONFIG_BYTES, Object, read_file, read_text, show};
use pieces::Pieces;
use template::ChatTemplate;

/// Ten times the largest tokenizer.json.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The tokenizer of one model. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    vocabulary: Arc<Vocabulary>,
    /// Where tokenizer_config.json says whether BOS and EOS are added, that holds instead of the post-processor.
    added: Option<Added>,
    template: ChatTemplate,
}

/// What tokenizer.json says. Models of one family have the same file, which is parsed once.
struct Vocabulary {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
    pieces: Pieces,
}

/// The vocabularies that were parsed already, by the text they were parsed from.
#[derive(Default)]
pub(crate) struct Parsed(Vec<(Vec<u8>, Arc<Vocabulary>)>);

/// The tokens that go around a prompt.
#[derive(Clone, Copy, Debug)]
struct Added {
    bos: Option<u32>,
    eos: Option<u32>,
}

/// The texts of a tokenizer's files.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub config: Option<&'a str>,
    /// `special_tokens_map.json`: the names of special tokens that `tokenizer_config.json` leaves out.
    pub special_tokens_map: Option<&'a str>,
    /// `chat_template.jinja`.
    pub chat_template: Option<&'a str>,
}

impl Tokenizer {
    /// Reads the tokenizer of `dir`; `None` where it has no `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Tokenizer`], [`Error::Config`] where a file is malformed, [`Error::Unsupported`]
    /// where its decoder is not one of a Llama tokenizer. A malformed chat template is an error only when it is used.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        Self::load_with(dir, &mut Parsed::default())
    }

    /// Like [`load`](Self::load), without parsing again what is in `parsed`.
    pub(crate) fn load_with(dir: &Path, parsed: &mut Parsed) -> Result<Option<Self>> {
        let path = dir.join(TOKENIZER);
        let Some(tokenizer) = read_file(&path, MAX_TOKENIZER_BYTES)? else { return Ok(None) };
        let known = parsed.0.iter().find(|(text, _)| *text == tokenizer).map(|(_, known)| Arc::clone(known));
        let vocabulary = match known {
            Some(known) => known,
            None => {
                let vocabulary = Arc::new(Vocabulary::new(path, &tokenizer)?);
                parsed.0.push((tokenizer, Arc::clone(&vocabulary)));
                vocabulary
            }
        };
        let text = |name: &str| read_text(&dir.join(name), MAX_CONFIG_BYTES);
        let (config, special_tokens_map) = (text(TOKENIZER_CONFIG)?, text(SPECIAL_TOKENS_MAP)?);
        let chat_template = text(CHAT_TEMPLATE)?;
        let files = TokenizerFiles {
            tokenizer: &[],
            config: config.as_deref(),
            special_tokens_map: special_tokens_map.as_deref(),
            chat_template: chat_template.as_deref(),
        };
        Self::new(dir, vocabulary, files).map(Some)
    }

    /// Like [`load`](Self::load), from the files' texts; `dir` is for messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_files(dir: &Path, files: TokenizerFiles<'_>) -> Result<Self> {
        let vocabulary = Vocabulary::new(dir.join(TOKENIZER), files.tokenizer)?;
        Self::new(dir, Arc::new(vocabulary), files)
    }

    fn new(dir: &Path, vocabulary: Arc<Vocabulary>, files: TokenizerFiles<'_>) -> Result<Self> {
        let parse = |name: &str, text: Option<&str>| {
            text.map(|text| Object::parse(&dir.join(name), text)).transpose()
        };
        let config = parse(TOKENIZER_CONFIG, files.config)?;
        let map = parse(SPECIAL_TOKENS_MAP, files.special_tokens_map)?;
        let template = ChatTemplate::new(dir, config.as_ref(), map.as_ref(), files.chat_template)?;
        let added = added(&vocabulary.tokenizer, config.as_ref(), &template)?;
        Ok(Self { inner: Arc::new(Inner { vocabulary, added, template }) })
    }

    /// The tokens of `text`. Special tokens that are written out in `text` are recognised. `add_special` also adds
    /// what the model wants around a prompt: for most a BOS in front. Not wanted after a chat template, which writes
    /// those itself.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the text can't be represented.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let added = self.inner.added.filter(|_| add_special);
        let by_post_processor = add_special && added.is_none();
        let Vocabulary { path, tokenizer, .. } = &*self.inner.vocabulary;
        let encoding = tokenizer
            .encode_fast(text, by_post_processor)
            .map_err(|error| Error::Tokenizer { path: path.clone(), reason: error.to_string() })?;
        let ids = encoding.get_ids();
        let Some(Added { bos, eos }) = added else { return Ok(ids.to_vec()) };
        Ok(bos.into_iter().chain(ids.iter().copied()).chain(eos).collect())
    }

    /// The text of `ids`, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// A streaming decoder for a text that starts with its first token.
    pub fn decoder(&self) -> Decoder {
        Decoder::new(Arc::clone(&self.inner.vocabulary), true)
    }

    /// A streaming decoder for a text that goes on after `prompt`: the space that begins a word stays, where at the
    /// start of a text it would be dropped.
    pub fn decoder_after(&self, prompt: &[u32]) -> Decoder {
        let starts = prompt.iter().all(|&id| self.piece(id).is_empty());
        Decoder::new(Arc::clone(&self.inner.vocabulary), starts)
    }

    /// The bytes that token `id` stands for inside a text; empty for special tokens and ids that no token has.
    pub fn piece(&self, id: u32) -> &[u8] {
        self.inner.vocabulary.pieces.get(id)
    }

    /// Whether token `id` is a special one: recognised where a text writes it out, and no text itself.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.vocabulary.pieces.is_special(id)
    }

    /// The ids that [`encode`](Self::encode) puts before a text and after it where it adds what the model wants.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub(crate) fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        const ANY_TEXT: &str = "a";
        let (text, whole) = (self.encode(ANY_TEXT, false)?, self.encode(ANY_TEXT, true)?);
        let start = (0..whole.len()).find(|&start| whole[start..].starts_with(&text)).unwrap_or(whole.len());
        let end = (start + text.len()).min(whole.len());
        Ok((whole[..start].to_vec(), whole[end..].to_vec()))
    }

    /// Token `id` as the vocabulary writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.vocabulary.tokenizer.id_to_token(id)
    }

    /// The id of a token that is written as the vocabulary writes it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.vocabulary.tokenizer.token_to_id(token)
    }

    /// One more than the largest id that a token has.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocabulary.pieces.len()
    }

    /// Whether the two were loaded from the same text of `tokenizer.json`.
    pub fn shares_vocabulary(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner.vocabulary, &other.inner.vocabulary)
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.inner.template.exists()
    }

    /// The chat template, as its file has it.
    pub fn chat_template(&self) -> Option<&str> {
        self.inner.template.source()
    }

    /// The text of `bos_token`, `eos_token`, `unk_token` or `pad_token`, where the files name one.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.inner.template.special_token(name)
    }

    /// The prompt that asks the model to answer `messages`. It holds the special tokens already: encode it with
    /// `add_special` false.
    ///
    /// # Errors
    /// [`Error::Template`] where there is no template, or it is malformed, raises an error or doesn't end.
    pub fn apply_chat_template(&self, messages: &[Message]) -> Result<String> {
        self.inner.template.render(messages)
    }
}

impl Vocabulary {
    fn new(path: PathBuf, text: &[u8]) -> Result<Self> {
        let malformed = |reason: String| Error::Tokenizer { path: path.clone(), reason };
        // The crate panics on some malformed texts, so it is given what was parsed before.
        let json: Value = serde_json::from_slice(text).map_err(|error| malformed(error.to_string()))?;
        refuse_unsupported(&path, &json)?;
        let decoder = json.get("decoder").cloned().unwrap_or_default();
        let mut tokenizer: tokenizers::Tokenizer =
            serde_json::from_value(json).map_err(|error| malformed(error.to_string()))?;
        // Both are about batches of training; left on, they would cut prompts.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        let largest = tokenizer.get_vocab(true).into_iter().max_by_key(|&(_, id)| id);
        let size = match largest {
            Some((token, id)) if id as usize >= MAX_VOCAB => {
                let reason =
                    format!("token {token:?} has the id {id}; the largest supported is {}", MAX_VOCAB - 1);
                return Err(malformed(reason));
            }
            Some((_, id)) => id as usize + 1,
            None => 0,
        };
        let pieces = Pieces::new(&path, &tokenizer, &decoder, size)?;
        Ok(Self { path, tokenizer, pieces })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.inner.vocabulary.path)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// Refuses what no Llama tokenizer has: dropout would give one prompt other tokens each time, and a mark on parts of
/// words would show in the text.
fn refuse_unsupported(path: &Path, tokenizer: &Value) -> Result<()> {
    let what = match tokenizer.pointer("/model/dropout").and_then(Value::as_f64) {
        Some(dropout) if dropout != 0.0 => Some(format!("a BPE dropout of {dropout}")),
        _ => ["continuing_subword_prefix", "end_of_word_suffix"].into_iter().find_map(|field| {
            let mark = tokenizer.get("model")?.get(field)?;
            (!mark.is_null() && mark != "").then(|| format!("the {field} {}", show(mark)))
        }),
    };
    what.map_or(Ok(()), |what| Err(Error::Unsupported { path: path.to_owned(), what }))
}

/// `add_bos_token` and `add_eos_token`; where either is there, transformers goes by them alone.
fn added(
    tokenizer: &tokenizers::Tokenizer,
    config: Option<&Object>,
    template: &ChatTemplate,
) -> Result<Option<Added>> {
    let Some(config) = config else { return Ok(None) };
    let (bos, eos) = (config.bool("add_bos_token")?, config.bool("add_eos_token")?);
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let id = |wanted: Option<bool>, name: &str| -> Result<Option<u32>> {
        let Some(token) = template.special_token(name).filter(|_| wanted == Some(true)) else {
            return Ok(None);
        };
        match tokenizer.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => Err(config.invalid(name, "a token of the vocabulary", format!("{token:?}"))),
        }
    };
    Ok(Some(Added { bos: id(bos, "bos_token")?, eos: id(eos, "eos_token")? }))
}
