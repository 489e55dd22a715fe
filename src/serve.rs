//! An HTTP server that speaks OpenAI's API: completions and chat over one ensemble, many clients together.
//!
//! ```text
//! connection ─► handlers ─► Prepared ─► Engine (one thread, one Generator, one paged cache)
//!      ▲                                  │ steps, one channel a request
//!      └──────── JSON or events ◄─ Answer ┘
//! ```
//!
//! A request is checked whole before it waits for the engine; what is wrong with it is answered in OpenAI's shape
//! with a status that fits. No path in a request reaches the file system, and templates see the messages alone.
//!
//! Besides OpenAI's own fields a body may have a `dlf` object, `{method, alpha, grid, search, objective, every,
//! return_alpha}`, which changes the fusion for this request. The model id `NAME:METHOD` (`demo:large`,
//! `demo:expert:sums`) does the same for clients that can't add fields.

mod alpha;
mod answer;
mod connection;
mod engine;
mod error;
mod fields;
mod handlers;
mod metrics;
mod request;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::backend::BackendOptions;
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::FusionRule;
use crate::tokenizer::Tokenizer;
use engine::Engine;
use error::{ApiError, ApiResult};
use metrics::Metrics;
use request::Form;

/// How a [`Server`] serves.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model id that clients name.
    pub model: String,
    /// How logits are combined where a request doesn't say.
    pub rule: FusionRule,
    /// The key that every path but `/health` asks for.
    pub api_key: Option<String>,
    /// Sequences decoded together; at least 1.
    pub sequences: usize,
    /// Sequences that may wait besides; more are answered 429.
    pub queue: usize,
    /// What one client may ask for.
    pub limits: RequestLimits,
    /// How long requests in flight may go on after the server is told to stop.
    pub grace: Duration,
}

/// What one request may ask for; more is answered 400, or 413 and 408 for the body.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Bytes of a body.
    pub body_bytes: usize,
    /// From a request's head to the end of its body.
    pub body_time: Duration,
    /// From a connection's opening, or the answer before, to the end of a request's head.
    pub head_time: Duration,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens generated for a prompt.
    pub new_tokens: usize,
    /// Prompts times `n`.
    pub sequences: usize,
    /// Connections at one time; more wait.
    pub connections: usize,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            body_bytes: 4 << 20,
            body_time: Duration::from_secs(30),
            head_time: Duration::from_secs(30),
            prompt_tokens: usize::MAX,
            new_tokens: 4096,
            sequences: 128,
            connections: 1024,
        }
    }
}

/// A server that is ready to take connections.
pub struct Server {
    shared: Arc<Shared>,
    engine: JoinHandle<()>,
}

/// What all handlers see.
struct Shared {
    ensemble: Arc<Ensemble>,
    options: Options,
    engine: Engine,
    metrics: Arc<Metrics>,
    draining: AtomicBool,
    answers: AtomicU64,
    /// Unix time of the start.
    created: u64,
}

impl Server {
    /// Opens the backend and starts the engine.
    ///
    /// # Errors
    /// What is wrong with the rule or the device; [`Error::Parameter`] where no sequence could run.
    pub fn new(ensemble: Arc<Ensemble>, backend: BackendOptions, options: Options) -> Result<Self> {
        ensemble.check_rule(&options.rule)?;
        if options.sequences == 0 {
            return Err(Error::Parameter {
                name: "sequences",
                expected: "at least 1".to_owned(),
                found: "0".to_owned(),
            });
        }
        let metrics = Arc::new(Metrics::new(ensemble.models().len()));
        let (sequences, queue) = (options.sequences, options.queue);
        let (engine, thread) =
            Engine::start(Arc::clone(&ensemble), backend, sequences, queue, Arc::clone(&metrics))?;
        let shared = Arc::new(Shared {
            ensemble,
            options,
            engine,
            metrics,
            draining: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        });
        Ok(Self { shared, engine: thread })
    }
}

impl Shared {
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The id of an answer.
    fn next_id(&self, form: Form) -> String {
        let number = self.answers.fetch_add(1, Ordering::Relaxed);
        let prefix = match form {
            Form::Completion => "cmpl",
            Form::Chat => "chatcmpl",
        };
        format!("{prefix}-{:x}-{number}", self.created)
    }

    /// The ids that a request may name: the model, and the model with each method.
    fn model_ids(&self) -> Vec<String> {
        let name = &self.options.model;
        let methods = alpha::methods(&self.options.rule, &self.ensemble);
        std::iter::once(name.clone()).chain(methods.iter().map(|method| format!("{name}:{method}"))).collect()
    }

    /// The id and the rule of the model that a request names; without a name, the default.
    fn model(&self, id: Option<&str>) -> ApiResult<(String, FusionRule)> {
        let Options { model: name, rule, .. } = &self.options;
        let Some(id) = id.filter(|id| id != name) else { return Ok((name.clone(), rule.clone())) };
        let method = id.strip_prefix(name.as_str()).and_then(|rest| rest.strip_prefix(':'));
        let rule = method.and_then(|method| alpha::rule_of(method, rule, &self.ensemble));
        match rule.filter(|rule| self.ensemble.check_rule(rule).is_ok()) {
            Some(rule) => Ok((id.to_owned(), rule)),
            None => Err(ApiError::no_such_model(id, &self.model_ids())),
        }
    }

    /// The longest text, prompt and continuation together, that every model takes.
    fn context(&self) -> usize {
        (0..self.ensemble.models().len()).map(|model| self.ensemble.context(model)).min().unwrap_or(0)
    }

    fn tokenizer(&self) -> ApiResult<&Tokenizer> {
        self.ensemble.tokenizer_of_any().ok_or_else(|| ApiError::invalid("no model has a tokenizer"))
    }

    fn decode(&self, ids: &[u32]) -> String {
        self.ensemble.tokenizer_of_any().map_or_else(String::new, |tokenizer| tokenizer.decode(ids))
    }

    /// The bytes of a token: those of its text, or of its name where it is special.
    fn bytes(&self, token: u32) -> Vec<u8> {
        let Some(tokenizer) = self.ensemble.tokenizer_of_any() else { return Vec::new() };
        match tokenizer.piece(token) {
            [] => tokenizer.token(token).unwrap_or_default().into_bytes(),
            bytes => bytes.to_vec(),
        }
    }

    /// A token in log-probabilities. One that is part of a character is written as OpenAI does: `bytes:\xe6`.
    fn label(&self, token: u32) -> String {
        match String::from_utf8(self.bytes(token)) {
            Ok(text) if text.is_empty() => format!("token_id:{token}"),
            Ok(text) => text,
            Err(error) => {
                let bytes = error.into_bytes();
                bytes.iter().fold("bytes:".to_owned(), |label, byte| format!("{label}\\x{byte:02x}"))
            }
        }
    }
}
