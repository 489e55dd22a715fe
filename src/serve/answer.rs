//! From steps to the JSON of an answer: whole, or one chunk after the other.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::Shared;
use super::request::{Form, Prepared};
use crate::generate::{FinishReason, Step};

/// The log-probability that stands for −∞, which JSON doesn't have.
const LOWEST: f64 = -9999.0;

/// One request's answer while it comes together.
pub(super) struct Answer {
    shared: Arc<Shared>,
    form: Form,
    id: String,
    created: u64,
    model: String,
    choices: Vec<State>,
    logprobs: Option<usize>,
    return_alpha: bool,
    include_usage: bool,
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// What is known of a choice.
struct State {
    /// What comes before the first step, until it is said.
    opening: Option<Opening>,
    /// Characters so far.
    offset: usize,
    finish: Option<FinishReason>,
}

struct Opening {
    echo: Option<String>,
    first: Option<u32>,
}

/// What the steps of a choice say.
#[derive(Default)]
struct Part {
    text: String,
    tokens: Vec<TokenLogprobs>,
    alpha: Vec<Value>,
    expert: Vec<Value>,
}

struct TokenLogprobs {
    token: u32,
    /// `None` for the first token of a prompt.
    logprob: Option<f64>,
    top: Vec<(u32, f64)>,
    offset: usize,
}

impl Answer {
    /// An answer with nothing in it yet.
    pub(super) fn new(shared: Arc<Shared>, prepared: &Prepared) -> Self {
        let state = |choice: &super::request::Choice| State {
            opening: Some(Opening { echo: choice.echo.clone(), first: choice.first }),
            offset: 0,
            // Nothing is computed: it has come to its end.
            finish: choice.request.is_none().then_some(FinishReason::Length),
        };
        Self {
            form: prepared.form,
            id: shared.next_id(prepared.form),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            model: prepared.model.clone(),
            choices: prepared.choices.iter().map(state).collect(),
            logprobs: prepared.logprobs,
            return_alpha: prepared.return_alpha,
            include_usage: prepared.include_usage,
            prompt_tokens: prepared.prompt_tokens,
            completion_tokens: 0,
            shared,
        }
    }

    /// How many choices there are.
    pub(super) fn len(&self) -> usize {
        self.choices.len()
    }

    /// Whether every choice has come to its end.
    pub(super) fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// The whole answer; `steps` has those of each choice.
    pub(super) fn whole(mut self, steps: Vec<Vec<Step>>) -> Value {
        let mut choices = Vec::with_capacity(self.len());
        for (index, steps) in steps.into_iter().enumerate() {
            let part = self.take(index, &steps);
            choices.push(self.choice(index, part));
        }
        let object = match self.form {
            Form::Completion => "text_completion",
            Form::Chat => "chat.completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
        })
    }

    /// What is sent before the first step of a choice; `None` where that is nothing.
    pub(super) fn opening(&mut self, index: usize) -> Option<Value> {
        let finished = self.choices.get(index)?.finish.is_some();
        match self.form {
            Form::Chat => Some(self.chunk(json!([{
                "index": index,
                "delta": { "role": "assistant", "content": "" },
                "logprobs": null,
                "finish_reason": null,
            }]))),
            Form::Completion => {
                let part = self.take(index, &[]);
                let says = finished || !part.text.is_empty() || !part.tokens.is_empty();
                says.then(|| {
                    let choice = self.choice(index, part);
                    self.chunk(json!([choice]))
                })
            }
        }
    }

    /// What a step adds; `None` where that is nothing to be shown yet.
    pub(super) fn step(&mut self, index: usize, step: Step) -> Option<Value> {
        let part = self.take(index, std::slice::from_ref(&step));
        if part.text.is_empty() && step.finish.is_none() && self.logprobs.is_none() && !self.return_alpha {
            return None;
        }
        let choice = match self.form {
            Form::Completion => self.choice(index, part),
            Form::Chat => self.delta(index, part),
        };
        Some(self.chunk(json!([choice])))
    }

    /// The chunk after the last, where the client wants to know the usage.
    pub(super) fn closing(&self) -> Option<Value> {
        self.include_usage.then(|| {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = self.usage();
            chunk
        })
    }

    fn chunk(&self, choices: Value) -> Value {
        let object = match self.form {
            Form::Completion => "text_completion",
            Form::Chat => "chat.completion.chunk",
        };
        let mut chunk = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }

    /// Takes in the steps of a choice.
    fn take(&mut self, index: usize, steps: &[Step]) -> Part {
        let mut part = Part::default();
        let Some(state) = self.choices.get_mut(index) else { return part };
        if let Some(Opening { echo, first }) = state.opening.take() {
            part.text.extend(echo);
            if let Some(token) = first {
                part.tokens.push(TokenLogprobs { token, logprob: None, top: Vec::new(), offset: 0 });
                part.alpha.push(Value::Null);
                part.expert.push(Value::Null);
                state.offset += self.shared.decode(&[token]).chars().count();
            } else {
                state.offset += part.text.chars().count();
            }
        }
        for step in steps {
            if !step.forced {
                part.text.push_str(&step.text);
                self.completion_tokens += 1;
            }
            let decision = &step.decision;
            let (token, logprob, offset) = (step.token, Some(decision.logprob_fused), state.offset);
            part.tokens.push(TokenLogprobs { token, logprob, top: step.top.clone(), offset });
            state.offset += step.piece.chars().count();
            part.alpha.push(json!(decision.alpha.as_slice()));
            part.expert.push(json!(decision.expert));
            state.finish = step.finish.or(state.finish);
        }
        part
    }

    /// A choice of a whole answer, or of a completion's chunk.
    fn choice(&self, index: usize, part: Part) -> Value {
        let (logprobs, finish) = (self.logprobs_json(&part.tokens), self.finish(index));
        let dlf = self.alpha_json(part.alpha, part.expert);
        let mut choice = match self.form {
            Form::Completion => json!({ "index": index, "text": part.text }),
            Form::Chat => json!({
                "index": index,
                "message": { "role": "assistant", "content": part.text },
            }),
        };
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = finish;
        if let Some(dlf) = dlf {
            choice["dlf"] = dlf;
        }
        choice
    }

    /// A choice of a chat's chunk.
    fn delta(&self, index: usize, part: Part) -> Value {
        let delta = if part.text.is_empty() { json!({}) } else { json!({ "content": part.text }) };
        let logprobs = self.logprobs_json(&part.tokens);
        let mut choice = json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": self.finish(index) });
        if let Some(dlf) = self.alpha_json(part.alpha, part.expert) {
            choice["dlf"] = dlf;
        }
        choice
    }

    fn finish(&self, index: usize) -> Value {
        let finish = self.choices.get(index).and_then(|choice| choice.finish);
        json!(finish.map(FinishReason::as_str))
    }

    /// α of each expert and the active expert, one entry a token.
    fn alpha_json(&self, alpha: Vec<Value>, expert: Vec<Value>) -> Option<Value> {
        let ensemble = &self.shared.ensemble;
        self.return_alpha.then(|| {
            let experts: Vec<&str> = (0..).map_while(|t| ensemble.expert_name(t)).collect();
            json!({ "experts": experts, "alpha": alpha, "expert": expert })
        })
    }

    fn logprobs_json(&self, tokens: &[TokenLogprobs]) -> Value {
        match (self.logprobs, self.form) {
            (None, _) => Value::Null,
            (Some(_), Form::Completion) => self.completion_logprobs(tokens),
            (Some(_), Form::Chat) => {
                json!({ "content": tokens.iter().map(|token| self.chat_logprob(token)).collect::<Vec<_>>() })
            }
        }
    }

    /// Four lists of one length. The token itself is always among the most probable ones, as OpenAI has it, and
    /// with the very same number.
    fn completion_logprobs(&self, tokens: &[TokenLogprobs]) -> Value {
        let top = |entry: &TokenLogprobs| match entry.logprob {
            None => Value::Null,
            Some(logprob) => {
                let mut top = Map::new();
                for &(token, logprob) in entry.top.iter().chain(&[(entry.token, logprob)]) {
                    // Two ids may be written alike: the more probable one stays.
                    top.entry(self.shared.label(token)).or_insert_with(|| json!(shown(logprob)));
                }
                Value::Object(top)
            }
        };
        json!({
            "tokens": tokens.iter().map(|entry| self.shared.label(entry.token)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|entry| entry.logprob.map(shown)).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|entry| entry.offset).collect::<Vec<_>>(),
        })
    }

    fn chat_logprob(&self, entry: &TokenLogprobs) -> Value {
        let one = |token: u32, logprob: f64| {
            let bytes = self.shared.bytes(token);
            json!({ "token": self.shared.label(token), "logprob": shown(logprob), "bytes": bytes })
        };
        let mut token = one(entry.token, entry.logprob.unwrap_or(f64::NEG_INFINITY));
        let top: Vec<Value> = entry.top.iter().map(|&(token, logprob)| one(token, logprob)).collect();
        token["top_logprobs"] = json!(top);
        token
    }
}

fn shown(logprob: f64) -> f64 {
    logprob.max(LOWEST)
}
