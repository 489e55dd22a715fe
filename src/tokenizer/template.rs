//! Chat templates: Jinja as Hugging Face writes it, rendered with nothing in reach but the conversation.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, ErrorKind, State, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

use super::{CHAT_TEMPLATE, TOKENIZER_CONFIG};
use crate::error::{Error, Result};
use crate::json::{Object, show};

/// What one rendering may take besides what its messages allow: instructions, or 64 bytes of data each. A long
/// conversation takes thousands.
const FUEL: u64 = 1_000_000;
/// Bytes of JSON that one unit of fuel pays for: a sixteenth of the bytes that are copied for it.
const JSON_BYTES_PER_FUEL: u64 = 4;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A chat template and the special tokens that it may name.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    /// The file that holds the template, or the directory that has none.
    path: PathBuf,
    source: Option<String>,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Takes `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, in this order.
    pub(super) fn new(
        dir: &Path,
        config: Option<&Object>,
        special_tokens_map: Option<&Object>,
        jinja: Option<&str>,
    ) -> Result<Self> {
        let in_config = match config {
            Some(config) => template_of_config(config)?,
            None => None,
        };
        let (path, source) = match (jinja, in_config) {
            (Some(jinja), _) => (dir.join(CHAT_TEMPLATE), Some(jinja.to_owned())),
            (None, Some(source)) => (dir.join(TOKENIZER_CONFIG), Some(source)),
            (None, None) => (dir.to_owned(), None),
        };
        let mut special_tokens = Vec::new();
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            let files = [config, special_tokens_map].into_iter().flatten();
            for file in files {
                if let Some(token) = special_token(file, name)? {
                    special_tokens.push((name, token));
                    break;
                }
            }
        }
        Ok(Self { path, source, special_tokens })
    }

    pub(super) fn exists(&self) -> bool {
        self.source.is_some()
    }

    pub(super) fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// The text of `bos_token`, `eos_token`, `unk_token` or `pad_token`.
    pub(super) fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.iter().find(|(known, _)| *known == name).map(|(_, token)| token.as_str())
    }

    /// Renders the prompt that asks for an answer to `messages`.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String> {
        let failed = |reason: String| Error::Template { path: self.path.clone(), reason };
        let Some(source) = &self.source else {
            let reason = format!("neither {CHAT_TEMPLATE} nor {TOKENIZER_CONFIG} has one");
            return Err(failed(reason));
        };
        let variables = context! {
            messages => messages
                .iter()
                .map(|message| context! { role => message.role.as_str(), content => message.content.as_str() })
                .collect::<minijinja::Value>(),
            add_generation_prompt => true,
            tools => (),
            documents => (),
            ..minijinja::Value::from_pairs(self.special_tokens.iter().map(|(name, token)| (*name, token.as_str()))),
        };
        // A long message may be copied, trimmed and searched many times over.
        let fuel = FUEL + messages.iter().map(|message| message.content.len() as u64).sum::<u64>();
        environment(fuel)
            .and_then(|environment| environment.render_str(&without_generation_marks(source), variables))
            .map_err(|error| failed(describe(&error)))
    }
}

/// The message of an error, with the line it is about.
fn describe(error: &minijinja::Error) -> String {
    match (error.kind(), error.detail(), error.line()) {
        (ErrorKind::OutOfFuel, _, _) => "it doesn't come to an end, or takes too much memory".to_owned(),
        (kind, Some(detail), Some(line)) => format!("line {line}: {kind}: {detail}"),
        (kind, Some(detail), None) => format!("{kind}: {detail}"),
        (kind, None, Some(line)) => format!("line {line}: {kind}"),
        (kind, None, None) => kind.to_string(),
    }
}

/// `chat_template`: a template, or a list of named ones, of which `default` is for plain conversations.
fn template_of_config(config: &Object) -> Result<Option<String>> {
    const FIELD: &str = "chat_template";
    let expected = "a template, or a list of {name, template} with one named default";
    match config.get(FIELD) {
        None => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(list)) => {
            let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
            let default = list.iter().find(named).and_then(|entry| entry.get("template")?.as_str());
            match default {
                Some(template) => Ok(Some(template.to_owned())),
                None => {
                    let names: Vec<_> = list.iter().filter_map(|entry| entry.get("name")?.as_str()).collect();
                    Err(config.invalid(FIELD, expected, format!("templates named {names:?}")))
                }
            }
        }
        Some(other) => Err(config.invalid(FIELD, expected, show(other))),
    }
}

/// A special token: its text, or an object with its text as `content`.
fn special_token(file: &Object, name: &str) -> Result<Option<String>> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        token => token.get("content")?.as_str().map(str::to_owned),
    };
    match file.get(name) {
        None => Ok(None),
        Some(value) => match text(value) {
            Some(token) => Ok(Some(token)),
            None => Err(file.invalid(name, "a token's text", show(value))),
        },
    }
}

/// `{% generation %} … {% endgeneration %}` marks for training what the assistant said; here it is nothing but its
/// contents.
fn without_generation_marks(source: &str) -> String {
    let mut rest = source;
    let mut out = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let (inside, after) = (&tag[2..end], &tag[end + 2..]);
        let replacement = match inside.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace()) {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => inside.to_owned(),
        };
        out.push_str(before);
        out.push_str("{%");
        out.push_str(&replacement);
        out.push_str("%}");
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Jinja as transformers sets it up. It has no loader: a template can't read another file.
/// Fuel bounds its time and, as strings are paid for before they are made, its memory.
fn environment(fuel: u64) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(fuel));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    Ok(environment)
}

fn raise_exception(message: &str) -> Result<(), minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// The local time, in a format of `strftime`.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => {
            let reason = format!("{format:?} is no strftime format");
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
        }
    }
}

/// Python's `json.dumps(value, ensure_ascii=False)`: transformers has it instead of Jinja's own, which escapes HTML.
fn tojson(
    state: &State<'_, '_>,
    value: &minijinja::Value,
    kwargs: Kwargs,
) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let failed = |reason: String| minijinja::Error::new(ErrorKind::BadSerialization, reason);
    if ensure_ascii == Some(true) {
        return Err(failed("tojson with ensure_ascii=True is not supported".to_owned()));
    }
    let spaces = " ".repeat(indent.unwrap_or(0).min(16));
    let left = state.fuel_levels().map_or(0, |(_, left)| left);
    let mut json = Bounded { bytes: Vec::new(), left: left.saturating_mul(JSON_BYTES_PER_FUEL) };
    let written = match indent {
        Some(_) => serialize(value, &mut json, PrettyFormatter::with_indent(spaces.as_bytes())),
        None => serialize(value, &mut json, Spaced(CompactFormatter)),
    };
    match written {
        Ok(()) => String::from_utf8(json.bytes).map_err(|error| failed(error.to_string())),
        Err(error) if error.is_io() => Err(minijinja::Error::from(ErrorKind::OutOfFuel)),
        Err(error) => Err(failed(error.to_string())),
    }
}

fn serialize(
    value: &minijinja::Value,
    json: &mut Bounded,
    formatter: impl Formatter,
) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(json, formatter))
}

/// Bytes up to a number: a list that holds another one twice, and so on, is small and writes itself at any length.
struct Bounded {
    bytes: Vec<u8>,
    left: u64,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.left =
            self.left.checked_sub(bytes.len() as u64).ok_or_else(|| std::io::Error::other("out of fuel"))?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Python's separators: a space after each comma and colon.
struct Spaced(CompactFormatter);

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
