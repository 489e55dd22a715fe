//! A task: how a sample becomes a prompt, and how what comes back is scored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::Value;
use serde::Deserialize;

use super::data::{Sample, data};
use super::extract::Extract;
use super::metrics::Metric;
use super::template::Templates;
use crate::error::{Error, Result};
use crate::json::{MAX_CONFIG_BYTES, read_file};

macro_rules! built_in {
    ($name:literal) => {
        ($name, include_str!(concat!("../../tasks/", $name, ".toml")))
    };
}

/// The task files in the library: name and text.
pub const BUILT_IN: [(&str, &str); 9] = [
    built_in!("gsm8k"),
    built_in!("triviaqa"),
    built_in!("cnn_dailymail"),
    built_in!("truthfulqa_mc"),
    built_in!("truthfulqa_mc1"),
    built_in!("truthfulqa_mc2"),
    built_in!("mmlu"),
    built_in!("facts"),
    built_in!("sums"),
];

const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// A task file, as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    #[serde(default)]
    columns: Vec<String>,
    #[serde(default)]
    preamble: String,
    prompt: String,
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    target: Option<String>,
    #[serde(default = "blank_line")]
    separator: String,
    metrics: Vec<Metric>,
    generate: Option<Generate>,
    choice: Option<Choice>,
}

fn blank_line() -> String {
    "\n\n".to_owned()
}

/// How a text is generated and its answer scored.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// Strings that end the text and aren't part of it.
    #[serde(default)]
    pub stop: Vec<String>,
    /// From the text to the answer.
    #[serde(default)]
    pub extract: Extract,
    /// An expression: the right answer, or a list of them.
    references: String,
    /// From what `references` gives to the right answer.
    #[serde(default)]
    extract_reference: Extract,
    /// Whether ROUGE stems.
    #[serde(default)]
    pub stemmer: bool,
}

/// How choices are scored.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// An expression: the list of choices.
    choices: String,
    /// An expression: which choice is right, by its index, its letter or its text.
    answer: Option<String>,
    /// An expression: for each choice, whether it is true.
    labels: Option<String>,
    /// A template with `choice` and `letter` besides the fields: what follows the prompt.
    #[serde(default = "after_a_space")]
    continuation: String,
}

fn after_a_space() -> String {
    " {{ choice }}".to_owned()
}

/// What kind of task it is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A text is generated.
    Generate(Generate),
    /// Given choices are compared.
    Choice(Choice),
}

/// The prompts of one sample, as texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// For all roles that don't have their own.
    pub text: String,
    /// By `large`, `small`, `expert` or an expert's name.
    pub own: Vec<(String, String)>,
}

/// The choices of one sample; three lists of one length.
#[derive(Clone, Debug, PartialEq)]
pub struct Choices {
    /// What follows the prompt.
    pub continuations: Vec<String>,
    /// The continuations' lengths in bytes, white space at the start not counted.
    pub bytes: Vec<usize>,
    /// Which are right.
    pub right: Vec<bool>,
}

/// What a sample asks, and what is right.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// The right answers.
    References(Vec<String>),
    /// The choices.
    Choices(Choices),
}

/// A task, checked.
#[derive(Debug)]
pub struct Task {
    path: PathBuf,
    text: String,
    file: File,
    /// `generate` or `choice` of the file.
    kind: Kind,
    templates: Templates,
}

impl Task {
    /// A built-in task by its name, or a file's.
    ///
    /// # Errors
    /// [`Error::Task`], [`Error::Io`].
    pub fn load(name: &str) -> Result<Self> {
        if let Some((name, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
            return Self::parse(Path::new(name), text);
        }
        let path = Path::new(name);
        let failed = |reason: String| Error::Task { path: path.to_owned(), reason };
        let Some(bytes) = read_file(path, MAX_CONFIG_BYTES)? else {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            return Err(failed(format!("no such task file; the built-in tasks are {}", names.join(", "))));
        };
        let text = String::from_utf8(bytes).map_err(|error| failed(format!("expected UTF-8: {error}")))?;
        Self::parse(path, &text)
    }

    /// Parses a task file; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Task`] where it is malformed: unknown or missing fields, broken templates, metrics of another kind.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let failed = |reason: String| Error::Task { path: path.to_owned(), reason };
        let mut file: File =
            toml::from_str(text.strip_prefix('\u{feff}').unwrap_or(text)).map_err(|error| {
                let line = error.span().map(|span| {
                    1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|&&b| b == b'\n').count()
                });
                failed(
                    line.map_or(error.message().to_owned(), |line| {
                        format!("line {line}: {}", error.message())
                    }),
                )
            })?;
        let kind = match (file.generate.take(), file.choice.take()) {
            (Some(generate), None) => Kind::Generate(generate),
            (None, Some(choice)) => Kind::Choice(choice),
            _ => return Err(failed("expected one of the tables [generate] and [choice]".to_owned())),
        };
        check(&file, &kind).map_err(failed)?;
        let templates = templates(&file, &kind).map_err(failed)?;
        Ok(Self { path: path.to_owned(), text: text.to_owned(), file, kind, templates })
    }

    /// The task's name.
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// The file's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What is measured; the first is the task's own score.
    pub fn metrics(&self) -> &[Metric] {
        &self.file.metrics
    }

    /// How the samples are scored.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The columns of a CSV file without a header.
    pub fn columns(&self) -> &[String] {
        &self.file.columns
    }

    /// The roles and names of experts that have prompts of their own.
    pub fn roles(&self) -> impl Iterator<Item = &str> {
        self.file.prompts.keys().map(String::as_str)
    }

    /// The prompts of a sample after `shots`, which are shown with their answers. `path` is the data's, for messages.
    ///
    /// # Errors
    /// [`Error::Data`] where a field is missing.
    pub fn prompt(&self, path: &Path, sample: &Sample, shots: &[Sample]) -> Result<Prompt> {
        let own = self.file.prompts.keys();
        let own = own.map(|role| Ok((role.clone(), self.text_for(path, &prompt_name(role), sample, shots)?)));
        Ok(Prompt { text: self.text_for(path, "prompt", sample, shots)?, own: own.collect::<Result<_>>()? })
    }

    fn text_for(&self, path: &Path, template: &str, sample: &Sample, shots: &[Sample]) -> Result<String> {
        let mut text = self.render(path, "preamble", sample, &fields(sample))?;
        for shot in shots {
            text.push_str(&self.render(path, template, shot, &fields(shot))?);
            text.push_str(&self.target(path, shot)?);
            text.push_str(&self.file.separator);
        }
        text.push_str(&self.render(path, template, sample, &fields(sample))?);
        Ok(text)
    }

    /// The answer of an example.
    fn target(&self, path: &Path, shot: &Sample) -> Result<String> {
        if self.file.target.is_some() {
            return self.render(path, "target", shot, &fields(shot));
        }
        match self.item(path, shot)? {
            Item::Choices(choices) => {
                let right = choices.right.iter().position(|&right| right);
                let right = right.and_then(|right| choices.continuations.into_iter().nth(right));
                right.ok_or_else(|| data(path, shot.line, "an example without a right choice"))
            }
            Item::References(_) => Err(Error::Task {
                path: self.path.clone(),
                reason: "examples need `target`, the template of an answer".to_owned(),
            }),
        }
    }

    /// What a sample asks. `path` is the data's, for messages.
    ///
    /// # Errors
    /// [`Error::Data`] where a field is missing, or isn't what it must be.
    pub fn item(&self, path: &Path, sample: &Sample) -> Result<Item> {
        match &self.kind {
            Kind::Generate(generate) => self.references(path, sample, generate).map(Item::References),
            Kind::Choice(choice) => self.choices(path, sample, choice).map(Item::Choices),
        }
    }

    fn references(&self, path: &Path, sample: &Sample, generate: &Generate) -> Result<Vec<String>> {
        let value = self.eval(path, "references", &generate.references, sample)?;
        let list = match value {
            serde_json::Value::Array(list) => list,
            other => vec![other],
        };
        let found: Option<Vec<String>> = list.iter().map(plain_text).collect();
        let found = found.ok_or_else(|| {
            data(path, sample.line, "references: expected a text or number, or a list of them")
        })?;
        let found: Vec<String> =
            found.iter().filter_map(|text| generate.extract_reference.apply(text)).collect();
        if found.is_empty() {
            return Err(data(path, sample.line, "references: there is no right answer in it"));
        }
        Ok(found)
    }

    fn choices(&self, path: &Path, sample: &Sample, choice: &Choice) -> Result<Choices> {
        let failed = |reason: &str| data(path, sample.line, reason);
        let list = self.eval(path, "choices", &choice.choices, sample)?;
        let texts: Option<Vec<String>> =
            list.as_array().and_then(|list| list.iter().map(plain_text).collect());
        let texts = texts.filter(|texts| !texts.is_empty()).ok_or_else(|| {
            let found = crate::json::show(&list);
            failed(&format!("choices: expected a list of texts that isn't empty, found {found}"))
        })?;
        let right = match (&choice.answer, &choice.labels) {
            (Some(answer), _) => {
                let answer = self.eval(path, "answer", answer, sample)?;
                let right = right_choice(&answer, &texts).ok_or_else(|| {
                    failed(&format!(
                        "answer: expected the index, letter or text of one of {} choices, found {}",
                        texts.len(),
                        crate::json::show(&answer)
                    ))
                })?;
                (0..texts.len()).map(|k| k == right).collect()
            }
            (None, Some(labels)) => {
                let value = self.eval(path, "labels", labels, sample)?;
                let labels: Option<Vec<bool>> =
                    value.as_array().and_then(|list| list.iter().map(label).collect());
                labels
                    .filter(|labels| labels.len() == texts.len() && labels.contains(&true))
                    .ok_or_else(|| failed("labels: expected a 0 or 1 for each choice, and one 1 at least"))?
            }
            (None, None) => Vec::new(),
        };
        let mut continuations = Vec::with_capacity(texts.len());
        for (k, text) in texts.iter().enumerate() {
            let letter = LETTERS.get(k..=k).unwrap_or_default();
            let more = minijinja::context! { choice => text, letter => letter, ..fields(sample) };
            continuations.push(self.render(path, "continuation", sample, &more)?);
        }
        let bytes: Vec<usize> = continuations.iter().map(|text| text.trim_start().len()).collect();
        if bytes.contains(&0) {
            return Err(failed("choices: one of them is empty"));
        }
        Ok(Choices { continuations, bytes, right })
    }

    fn render(&self, path: &Path, template: &str, sample: &Sample, fields: &Value) -> Result<String> {
        let failed = |reason: String| data(path, sample.line, &format!("the template `{template}`{reason}"));
        self.templates.render(template, fields).map_err(failed)
    }

    fn eval(&self, path: &Path, name: &str, expression: &str, sample: &Sample) -> Result<serde_json::Value> {
        let failed = |reason: String| data(path, sample.line, &format!("`{name} = {expression}`{reason}"));
        self.templates.eval(expression, &fields(sample)).map_err(failed)
    }
}

fn fields(sample: &Sample) -> Value {
    Value::from(minijinja::value::Serde(&sample.fields))
}

fn prompt_name(role: &str) -> String {
    format!("prompts.{role}")
}

/// Checks what the types don't say.
fn check(file: &File, kind: &Kind) -> Result<(), String> {
    let name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if file.name.is_empty() || !file.name.chars().all(name) {
        return Err(format!("`name`: expected letters, digits, _, - and ., found {:?}", file.name));
    }
    let Some(first) = file.metrics.first() else { return Err("`metrics`: none".to_owned()) };
    if let Some(twice) =
        file.metrics.iter().enumerate().find(|(k, metric)| file.metrics[..*k].contains(metric))
    {
        return Err(format!("`metrics`: {} is there twice", twice.1.name()));
    }
    let of_choices = matches!(kind, Kind::Choice(_));
    if let Some(metric) = file.metrics.iter().find(|metric| metric.is_of_choices() != of_choices) {
        let table = if of_choices { "choice" } else { "generate" };
        return Err(format!("`metrics`: {} is not for a task with [{table}]", metric.name()));
    }
    match kind {
        Kind::Generate(generate) if generate.max_new_tokens == 0 => {
            Err("`max_new_tokens`: expected at least 1, found 0".to_owned())
        }
        Kind::Generate(generate) if generate.stop.iter().any(String::is_empty) => {
            Err("`stop`: a string is empty".to_owned())
        }
        Kind::Choice(choice) => {
            let by_label = |metric: &Metric| matches!(metric, Metric::Mc1 | Metric::Mc2);
            let wanted = if by_label(first) { "labels" } else { "answer" };
            let mixed = file.metrics.iter().any(|metric| by_label(metric) != by_label(first));
            let there = if by_label(first) {
                choice.labels.is_some() && choice.answer.is_none()
            } else {
                choice.answer.is_some() && choice.labels.is_none()
            };
            if mixed || !there {
                return Err(format!("{} needs `{wanted}` in [choice], and no other metrics", first.name()));
            }
            Ok(())
        }
        Kind::Generate(_) => Ok(()),
    }
}

/// Compiles all templates and expressions.
fn templates(file: &File, kind: &Kind) -> Result<Templates, String> {
    let mut templates = Templates::new()?;
    let mut add = |name: &str, source: &str| {
        templates.add(name, source).map_err(|reason| format!("`{name}`: {reason}"))
    };
    add("prompt", &file.prompt)?;
    add("preamble", &file.preamble)?;
    for (role, source) in &file.prompts {
        add(&prompt_name(role), source)?;
    }
    if let Some(target) = &file.target {
        add("target", target)?;
    }
    let expressions: Vec<(&str, &String)> = match kind {
        Kind::Generate(generate) => vec![("references", &generate.references)],
        Kind::Choice(choice) => {
            add("continuation", &choice.continuation)?;
            let optional = [("answer", &choice.answer), ("labels", &choice.labels)];
            let optional = optional.into_iter().filter_map(|(name, source)| Some((name, source.as_ref()?)));
            std::iter::once(("choices", &choice.choices)).chain(optional).collect()
        }
    };
    for (name, source) in expressions {
        templates.check(source).map_err(|reason| format!("`{name}`: {reason}"))?;
    }
    Ok(templates)
}

fn plain_text(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn label(value: &serde_json::Value) -> Option<bool> {
    match value {
        serde_json::Value::Bool(label) => Some(*label),
        serde_json::Value::Number(number) => match number.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        _ => None,
    }
}

/// A number is an index; a text is a letter, or else one of the choices.
fn right_choice(answer: &serde_json::Value, choices: &[String]) -> Option<usize> {
    match answer {
        serde_json::Value::Number(number) => number
            .as_u64()
            .and_then(|index| usize::try_from(index).ok())
            .filter(|&index| index < choices.len()),
        serde_json::Value::String(text) => {
            let text = text.trim();
            let letter = if text.len() == 1 { LETTERS.find(text) } else { None };
            letter.filter(|&letter| letter < choices.len()).or_else(|| choices.iter().position(|c| c == text))
        }
        _ => None,
    }
}
