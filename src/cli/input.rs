//! Prompts and texts: from flags, files and JSONL to token ids for every role.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::ensemble::Ensemble;
use crate::model::Role;
use crate::tokenizer::{Message, Tokenizer};

/// Bytes of a prompt, or of a line of input: more than any context holds.
const MOST_BYTES: usize = 64 << 20;

/// A text, or ids that are taken as they are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
    Text(String),
    Ids(Vec<u32>),
}

impl Source {
    /// As `--json` shows it.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => Value::from(text.as_str()),
            Self::Ids(ids) => Value::from(ids.as_slice()),
        }
    }
}

/// One line of input.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Item {
    /// For all roles that don't have their own.
    pub(crate) prompt: Option<Source>,
    /// By role or expert name: `large`, `small`, `expert` for every expert, or a name.
    pub(crate) prompts: Vec<(String, Source)>,
    /// What `score` scores.
    pub(crate) text: Option<Source>,
    /// The file and line that it comes from, as messages name it; none where it was typed.
    pub(crate) place: Option<String>,
}

impl Item {
    /// Where it comes from; `typed` is what it is called where it was typed.
    pub(crate) fn place(&self, typed: &str) -> String {
        self.place.clone().unwrap_or_else(|| typed.to_owned())
    }
}

/// The lines of a file of input.
#[derive(Debug, Default)]
pub(crate) struct Input {
    pub(crate) items: Vec<Item>,
    /// What was found in them and means nothing.
    pub(crate) note: Option<String>,
}

impl Input {
    /// What was typed instead of a file.
    pub(crate) fn typed(item: Item) -> Self {
        Self { items: vec![item], note: None }
    }
}

/// Whether what `path` names can be read again: stdin can't.
pub(super) fn can_be_read_again(path: &Path) -> bool {
    path.as_os_str() != "-"
}

/// Reads JSONL; `-` is stdin. Blank lines are passed over. Lines may hold other fields, of which the note tells: one may
/// be a misspelt one.
pub(crate) fn read_jsonl(path: &Path, required: &str) -> Result<Input> {
    let (name, reader): (_, Box<dyn BufRead>) = if path.as_os_str() == "-" {
        ("stdin".to_owned(), Box::new(std::io::stdin().lock()))
    } else {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| name.clone())?;
        (name, Box::new(BufReader::new(file)))
    };
    let (mut reader, mut items, mut unknown) = (reader, Vec::new(), Vec::new());
    for number in 1.. {
        let place = || format!("{name}:{number}");
        let Some(line) = read_line(&mut reader).with_context(place)? else { break };
        // What Windows puts before UTF-8.
        let line = if number == 1 { line.trim_start_matches('\u{feff}') } else { &line };
        if line.trim().is_empty() {
            continue;
        }
        let (item, others) = parse_line(line, required).with_context(place)?;
        items.push(Item { place: Some(place()), ..item });
        for field in others {
            if !unknown.contains(&field) {
                unknown.push(field);
            }
        }
    }
    if items.is_empty() {
        bail!("{name}: no lines of input");
    }
    Ok(Input { items, note: note(&name, &unknown) })
}

/// Of the fields that mean nothing.
fn note(name: &str, unknown: &[String]) -> Option<String> {
    const MOST: usize = 8;
    let named = unknown.iter().take(MOST).map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", ");
    let more = if unknown.len() > MOST { ", …" } else { "" };
    (!unknown.is_empty()).then(|| {
        format!("{name}: ignored: {named}{more}; the fields that are read are `prompt`, `prompts` and `text`")
    })
}

/// The next line; `None` at the end.
fn read_line(reader: &mut dyn BufRead) -> Result<Option<String>> {
    let mut line = String::new();
    let read = reader.take(MOST_BYTES as u64 + 1).read_line(&mut line)?;
    if read > MOST_BYTES {
        bail!("the line is longer than {} MiB", MOST_BYTES >> 20);
    }
    Ok((read > 0).then_some(line))
}

/// What a line asks, and the fields that mean nothing.
fn parse_line(line: &str, required: &str) -> Result<(Item, Vec<String>)> {
    let value = serde_json::from_str(line).map_err(|error| anyhow!("{}", crate::json::not_a_line(&error)))?;
    let Value::Object(mut object) = value else {
        bail!("expected an object like {{\"{required}\": …}}");
    };
    let mut take = |key: &str| object.remove(key).map(|v| source(key, v)).transpose();
    let (prompt, text) = (take("prompt")?, take("text")?);
    let mut prompts = Vec::new();
    match object.remove("prompts") {
        None => {}
        Some(Value::Object(roles)) => {
            for (role, value) in roles {
                let value = source(&role, value)?;
                prompts.push((role, value));
            }
        }
        Some(other) => {
            bail!("`prompts`: expected an object of prompts by role, found {}", crate::json::show(&other))
        }
    }
    let item = Item { prompt, prompts, text, place: None };
    match required {
        "text" if item.text.is_none() => bail!("no field `text`"),
        "prompt" if item.prompt.is_none() && item.prompts.is_empty() => bail!("no field `prompt`"),
        _ => Ok((item, object.keys().cloned().collect())),
    }
}

fn source(field: &str, value: Value) -> Result<Source> {
    match value {
        Value::String(text) => Ok(Source::Text(text)),
        Value::Array(ids) => {
            let id = |v: Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
            let ids: Option<Vec<u32>> = ids.into_iter().map(id).collect();
            Ok(Source::Ids(ids.with_context(|| format!("`{field}`: expected token ids"))?))
        }
        other => {
            bail!("`{field}`: expected a string or a list of token ids, found {}", crate::json::show(&other))
        }
    }
}

/// A file's text, without one line end at its end; `-` is stdin.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let name = || path.display().to_string();
    let reader: Box<dyn Read> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(File::open(path).with_context(name)?)
    };
    let mut text = String::new();
    if reader.take(MOST_BYTES as u64 + 1).read_to_string(&mut text).with_context(name)? > MOST_BYTES {
        bail!("{}: more than {} MiB", name(), MOST_BYTES >> 20);
    }
    // What editors put behind the last line.
    let whole = text.strip_suffix("\r\n").or_else(|| text.strip_suffix('\n'));
    Ok(whole.map_or_else(|| text.clone(), str::to_owned))
}

/// Turns sources into ids, role by role.
pub(crate) struct Encoder<'a> {
    pub(crate) ensemble: &'a Ensemble,
    /// Whether prompts go through chat templates.
    pub(crate) chat: bool,
}

impl Encoder<'_> {
    /// The prompt of every model, indexed like [`Ensemble::models`].
    pub(crate) fn prompts(&self, item: &Item) -> Result<Vec<Vec<u32>>> {
        for (name, _) in &item.prompts {
            let is_role = ["large", "small", "expert"].contains(&name.as_str());
            let mut models = self.ensemble.models().iter();
            // A method that needs fewer models takes the same input.
            if !is_role && !models.any(|model| model.name == *name) {
                bail!("`prompts`: there is no model {name:?} in this ensemble");
            }
        }
        (0..self.ensemble.models().len()).map(|model| self.prompt(item, model)).collect()
    }

    fn prompt(&self, item: &Item, model: usize) -> Result<Vec<u32>> {
        let entry = &self.ensemble.models()[model];
        let own = names(entry.role, &entry.name)
            .into_iter()
            .find_map(|name| item.prompts.iter().find(|(role, _)| role == name).map(|(_, source)| source));
        match own.or(item.prompt.as_ref()) {
            None => bail!("no prompt for the {} model", entry.role),
            Some(Source::Ids(ids)) => Ok(ids.clone()),
            // A BOS alone would be a prompt, but hardly the one that was meant.
            Some(Source::Text(text)) if text.is_empty() => {
                Err(crate::Error::EmptyPrompt { role: entry.role }.into())
            }
            Some(Source::Text(text)) => {
                let tokenizer = self.tokenizer(model)?;
                if self.chat && self.has_template(model) {
                    let message = Message { role: "user".to_owned(), content: text.clone() };
                    let text = tokenizer.apply_chat_template(&[message])?;
                    return Ok(tokenizer.encode(&text, false)?);
                }
                Ok(tokenizer.encode(text, true)?)
            }
        }
    }

    /// The ids of a text to score, which follow a prompt or begin the sequence.
    pub(crate) fn text(&self, source: &Source, begins: bool) -> Result<Vec<u32>> {
        match source {
            Source::Ids(ids) => Ok(ids.clone()),
            Source::Text(text) if text.is_empty() => bail!("the text is empty"),
            Source::Text(text) => Ok(self.tokenizer(0)?.encode(text, begins)?),
        }
    }

    /// Fails where `--chat` would change nothing.
    pub(crate) fn check_chat(&self) -> Result<()> {
        if self.chat && !(0..self.ensemble.models().len()).any(|model| self.has_template(model)) {
            bail!("--chat: none of the models has a chat template");
        }
        Ok(())
    }

    fn has_template(&self, model: usize) -> bool {
        self.ensemble.tokenizer(model).is_some_and(Tokenizer::has_chat_template)
    }

    /// The model's own tokenizer, or that of another model: the ids mean the same.
    fn tokenizer(&self, model: usize) -> Result<&Tokenizer> {
        let any = || (0..self.ensemble.models().len()).find_map(|model| self.ensemble.tokenizer(model));
        let entry = &self.ensemble.models()[model];
        let tokenizer = self.ensemble.tokenizer(model).or_else(any);
        Ok(tokenizer
            .ok_or_else(|| crate::Error::NoTokenizer { role: entry.role, path: entry.path.clone() })?)
    }
}

/// What a model may be called in `prompts`, the most special name first.
fn names(role: Role, name: &str) -> Vec<&str> {
    match role {
        Role::Large => vec!["large"],
        Role::Small => vec!["small"],
        Role::Expert(_) => vec![name, "expert"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_have_prompts_by_role() {
        let (item, others) =
            parse_line(r#"{"prompt": "a", "prompts": {"expert": [1, 2]}, "id": 7}"#, "prompt").unwrap();
        assert_eq!(item.prompt, Some(Source::Text("a".to_owned())));
        assert_eq!(item.prompts, [("expert".to_owned(), Source::Ids(vec![1, 2]))]);
        assert_eq!(others, ["id"]);
    }

    #[test]
    fn one_line_end_is_taken_off_a_prompt() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (written, read) in [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a ", "a "), ("\n", "")] {
            std::fs::write(file.path(), written).unwrap();
            assert_eq!(read_text(file.path()).unwrap(), read, "{written:?}");
        }
    }

    #[test]
    fn wrong_lines_are_named() {
        for (line, says) in [
            ("[]", "expected an object"),
            ("{\"prompt\": 3}", "`prompt`"),
            ("{\"prompt\": [1, -1]}", "token ids"),
            ("{\"text\": \"a\"}", "no field `prompt`"),
            ("{\"prompt\": \"a\", \"prompts\": []}", "by role"),
            ("{", "not JSON at column 1: a line holds one object"),
            ("plain text", "not JSON at column 1"),
        ] {
            let error = format!("{:#}", parse_line(line, "prompt").unwrap_err());
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
