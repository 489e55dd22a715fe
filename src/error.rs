//! Everything that can go wrong, as one typed enum.

use std::path::PathBuf;

use crate::model::Role;

/// The result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, mapped, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is malformed or one of its fields has a wrong type or an impossible value.
    #[error("{}: `{field}`: expected {expected}, found {found}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, or `json` where the file as a whole can't be parsed.
        field: String,
        /// What the field must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The files ask for something that this engine doesn't compute; running on would give wrong text.
    #[error("{}: {what} is not supported", path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What it asks for, by name.
        what: String,
    },
    /// A safetensors file or its index is malformed.
    #[error("{}: {reason}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing, or has the wrong shape or dtype.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file, or the directory where the tensor is in none of its files.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Expected shape or dtype.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// A tokenizer file can't be used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Text was given or asked for, and the directory has no tokenizer.
    #[error("the {role} model has no tokenizer ({} has no tokenizer.json): give token ids", path.display())]
    NoTokenizer {
        /// The model.
        role: Role,
        /// Its directory.
        path: PathBuf,
    },
    /// A chat template is missing, malformed, or raised an error.
    #[error("{}: chat template: {reason}", path.display())]
    Template {
        /// The file that holds it, or the directory where there is none.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file that describes a task of an evaluation can't be used.
    #[error("{}: {reason}", path.display())]
    Task {
        /// The file, or the name of a built-in task.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A sample of an evaluation can't be used.
    #[error("{}:{line}: {reason}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Two models can't form an ensemble.
    #[error("the {left} and {right} models differ in {what}: {expected} and {found}")]
    Mismatch {
        /// One model.
        left: Role,
        /// The other.
        right: Role,
        /// What they must agree on.
        what: String,
        /// What the left one has.
        expected: String,
        /// What the right one has.
        found: String,
    },
    /// A method needs a model that the ensemble doesn't have.
    #[error("the {method} method needs {what}")]
    MissingModel {
        /// The method.
        method: &'static str,
        /// What must be given.
        what: String,
    },
    /// A parameter is out of its range.
    #[error("{name}: expected {expected}, found {found}")]
    Parameter {
        /// The parameter, as the user writes it.
        name: &'static str,
        /// Its range.
        expected: String,
        /// Its value.
        found: String,
    },
    /// A prompt has no token.
    #[error("the prompt for the {role} model is empty")]
    EmptyPrompt {
        /// The model whose prompt it is.
        role: Role,
    },
    /// A token id is outside the vocabulary that the models share.
    #[error("token id {id} is outside the vocabulary of the {role} model ({vocab_size} ids)")]
    TokenOutOfRange {
        /// The model.
        role: Role,
        /// The id.
        id: u32,
        /// The number of ids.
        vocab_size: usize,
    },
    /// A prompt, or a text to score, doesn't fit the context of a model.
    #[error("{tokens} tokens don't fit the context of the {role} model ({context} tokens)")]
    PromptTooLong {
        /// The model.
        role: Role,
        /// The tokens that were given.
        tokens: usize,
        /// The model's `max_position_embeddings`.
        context: usize,
    },
    /// A model computed NaN or +infinity: its weights or its context are broken.
    #[error("the {role} model computed {value} as the logit of token {token} at step {step}")]
    NotFinite {
        /// The model.
        role: Role,
        /// The step, counted from the first token after the prompt.
        step: usize,
        /// The token id.
        token: u32,
        /// NaN or inf.
        value: f32,
    },
    /// Every token is excluded: by −inf logits, logit biases or bans.
    #[error("no token is left to choose from at step {step}")]
    NoCandidate {
        /// The step, counted from the first token after the prompt.
        step: usize,
    },
    /// The key-value cache can't hold one more sequence.
    #[error("the key-value cache is full: {needed} blocks needed, {available} available")]
    CacheFull {
        /// Blocks of [`BLOCK_SIZE`](crate::kv_cache::BLOCK_SIZE) positions that are needed.
        needed: usize,
        /// Blocks that are free.
        available: usize,
    },
    /// A request that was accepted could not be finished; the others go on.
    #[error("prompt {request}: {source}")]
    Request {
        /// The request's number.
        request: usize,
        /// What went wrong.
        #[source]
        source: Box<Error>,
    },
    /// A device can't be used.
    #[error("device {requested}: {reason}")]
    Device {
        /// As the user wrote it.
        requested: String,
        /// Why not.
        reason: String,
    },
    /// A CUDA call failed. The GPU is not used any more: later calls report the same.
    #[error("cuda:{device}: {operation}: {reason}")]
    Cuda {
        /// The GPU's number.
        device: usize,
        /// The call, with the kernel or the sizes that it was about.
        operation: String,
        /// What the driver said.
        reason: String,
    },
}

impl Error {
    /// Wraps an I/O error with the path it happened at.
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}
