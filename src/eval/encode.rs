//! From the texts of prompts to token ids, role by role.

use super::task::Prompt;
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::model::Role;
use crate::tokenizer::{Message, Tokenizer};

/// Encodes prompts and what follows them for the models of one ensemble.
#[derive(Clone, Copy, Debug)]
pub struct Encoder<'a> {
    /// The ensemble.
    pub ensemble: &'a Ensemble,
    /// Whether prompts go through the chat template of models that have one.
    pub chat: bool,
}

impl Encoder<'_> {
    /// The prompt of every model, as [`Request::prompts`](crate::Request::prompts) takes it: one where all are alike.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`], [`Error::Template`], and [`Error::EmptyPrompt`].
    pub fn prompts(&self, prompt: &Prompt) -> Result<Vec<Vec<u32>>> {
        let models = 0..self.ensemble.models().len();
        let mut all = models
            .map(|model| {
                let (text, special) = self.text(model, prompt)?;
                self.tokenizer(model)?.encode(&text, special)
            })
            .collect::<Result<Vec<_>>>()?;
        if all.windows(2).all(|pair| pair[0] == pair[1]) {
            all.truncate(1);
        }
        Ok(all)
    }

    /// The ids of a continuation: those of the first model's whole text past those of its prompt, as
    /// lm-evaluation-harness cuts it.
    ///
    /// # Errors
    /// As [`prompts`](Self::prompts); [`Error::Parameter`] where nothing is left of it.
    pub fn continuation(&self, prompt: &Prompt, continuation: &str) -> Result<Vec<u32>> {
        let (mut text, special) = self.text(0, prompt)?;
        let tokenizer = self.tokenizer(0)?;
        let before = tokenizer.encode(&text, special)?.len();
        text.push_str(continuation);
        let mut ids = tokenizer.encode(&text, special)?;
        let after = ids.split_off(before.min(ids.len()));
        if after.is_empty() {
            return Err(Error::Parameter {
                name: "continuation",
                expected: "a text of its own tokens".to_owned(),
                found: format!("{continuation:?}, which disappears in the prompt's last token"),
            });
        }
        Ok(after)
    }

    /// Whether a role or an expert's name, as a task has it, is one of the ensemble's models.
    pub fn knows(&self, name: &str) -> bool {
        self.ensemble.models().iter().any(|model| names(model.role, &model.name).contains(&name))
    }

    /// The text that a model reads, and whether its tokenizer adds what goes around a prompt.
    fn text(&self, model: usize, prompt: &Prompt) -> Result<(String, bool)> {
        let Some(entry) = self.ensemble.models().get(model) else {
            return Err(Error::MissingModel { method: "evaluation", what: "a model".to_owned() });
        };
        let own = names(entry.role, &entry.name)
            .into_iter()
            .find_map(|name| prompt.own.iter().find(|(role, _)| role == name));
        let text = own.map_or(&prompt.text, |(_, text)| text);
        if text.is_empty() {
            return Err(Error::EmptyPrompt { role: entry.role });
        }
        match self.ensemble.tokenizer(model).filter(|tokenizer| self.chat && tokenizer.has_chat_template()) {
            Some(tokenizer) => {
                let message = Message { role: "user".to_owned(), content: text.clone() };
                Ok((tokenizer.apply_chat_template(&[message])?, false))
            }
            None => Ok((text.clone(), true)),
        }
    }

    /// The model's own tokenizer, or that of another model: the ids mean the same.
    fn tokenizer(&self, model: usize) -> Result<&Tokenizer> {
        let found = self.ensemble.tokenizer(model).or_else(|| self.ensemble.tokenizer_of_any());
        found.ok_or_else(|| {
            let entry = self.ensemble.models().get(model);
            let (role, path) =
                entry.map_or((Role::Large, ".".into()), |entry| (entry.role, entry.path.clone()));
            Error::NoTokenizer { role, path }
        })
    }
}

/// What a model may be called, the most special name first.
fn names(role: Role, name: &str) -> Vec<&str> {
    match role {
        Role::Large => vec!["large"],
        Role::Small => vec!["small"],
        Role::Expert(_) => vec![name, "expert"],
    }
}
