//! Models, and what they generate.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::generate::limits_for;
use engine::{BackendOptions, Device, EnsembleSpec, ExpertSpec, Request, SamplingParams};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::rule::Options;
use crate::worker::Workers;

/// How often a wait looks for Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(50);

/// A large model, a small one, and experts: loaded once, used by any number of generations.
#[pyclass(frozen, module = "dlf_engine")]
pub(crate) struct Ensemble {
    models: Arc<engine::Ensemble>,
    workers: Workers,
}

/// A text, or ids that are taken as they are.
#[derive(FromPyObject)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// One token.
#[pyclass(frozen, get_all, module = "dlf_engine")]
#[derive(Clone)]
pub(crate) struct Step {
    /// Its id.
    token_id: u32,
    /// The text that is certain with it.
    text: String,
    /// α of each expert.
    alpha: Vec<f64>,
    /// The expert that acted.
    expert: Option<usize>,
    /// The loss at α.
    loss: Option<f64>,
    /// Its log-probability under the fused distribution.
    logprob: f64,
    /// Under the large model's.
    logprob_large: Option<f64>,
    /// The large model's own choice.
    argmax_large: Option<u32>,
    /// Why it is the last: `stop` or `length`.
    finish_reason: Option<String>,
}

/// A finished generation.
#[pyclass(frozen, get_all, module = "dlf_engine")]
pub(crate) struct Generation {
    text: String,
    token_ids: Vec<u32>,
    finish_reason: Option<String>,
    steps: Vec<Step>,
}

/// Steps of a generation that goes on while they are read. Dropping it ends the generation.
#[pyclass(module = "dlf_engine")]
pub(crate) struct Stream {
    /// In a lock only because Python may share the object; every method has it alone.
    steps: Mutex<Option<Receiver<engine::Result<engine::Step>>>>,
}

/// What a generation is to be, from keyword arguments.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Wanted {
    options: Options,
    max_new_tokens: usize,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    seed: u64,
    stop: Vec<String>,
    ignore_eos: bool,
    device: String,
    threads: Option<usize>,
}

#[pymethods]
impl Ensemble {
    #[new]
    #[pyo3(signature = (large=None, small=None, experts=Vec::new()))]
    fn new(
        py: Python<'_>,
        large: Option<PathBuf>,
        small: Option<PathBuf>,
        experts: Vec<(Option<String>, PathBuf)>,
    ) -> PyResult<Self> {
        let experts = experts.into_iter().map(|(name, path)| ExpertSpec { name, path }).collect();
        let spec = EnsembleSpec { large, small, experts };
        py.detach(|| engine::Ensemble::load(&spec)).map(Self::from).map_err(crate::error)
    }

    /// The ensemble that is built in.
    #[staticmethod]
    fn demo(py: Python<'_>) -> PyResult<Self> {
        py.detach(engine::Ensemble::demo).map(Self::from).map_err(crate::error)
    }

    /// The ids that all models share.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.models.vocab_size()
    }

    /// The names of the experts.
    #[getter]
    fn experts(&self) -> Vec<String> {
        let experts =
            self.models.models().iter().filter(|model| matches!(model.role, engine::model::Role::Expert(_)));
        experts.map(|model| model.name.clone()).collect()
    }

    /// The ids of a text.
    fn encode(&self, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        self.tokenizer(0)?.encode(text, add_special_tokens).map_err(crate::error)
    }

    /// Frees what the last generation left for the next one: a thread, and on a GPU the weights.
    fn release(&self, py: Python<'_>) {
        py.detach(|| self.workers.release());
    }

    fn stream(&self, py: Python<'_>, prompt: Prompt, wanted: Wanted) -> PyResult<Stream> {
        let request = Request {
            rule: wanted.options.rule()?,
            sampling: wanted.sampling(),
            max_new_tokens: wanted.max_new_tokens,
            stop_strings: wanted.stop.clone(),
            ignore_eos: wanted.ignore_eos,
            ..Request::new(Vec::new(), 1)
        };
        self.start(py, Request { prompts: self.prompts(prompt)?, ..request }, &wanted)
    }

    fn score(&self, py: Python<'_>, text: Prompt, wanted: Wanted) -> PyResult<Stream> {
        let ids = match text {
            Prompt::Text(text) => self.tokenizer(0)?.encode(&text, true).map_err(crate::error)?,
            Prompt::Ids(ids) => ids,
        };
        if ids.len() < 2 {
            return Err(PyValueError::new_err("text: expected at least two tokens: the first is not scored"));
        }
        self.start(py, Request { rule: wanted.options.rule()?, ..Request::score(ids) }, &wanted)
    }
}

impl Ensemble {
    fn tokenizer(&self, model: usize) -> PyResult<&engine::tokenizer::Tokenizer> {
        let tokenizer = self.models.tokenizer(model).or_else(|| self.models.tokenizer_of_any());
        tokenizer.ok_or_else(|| PyValueError::new_err("no model has a tokenizer: give token ids"))
    }

    /// The prompt of every model.
    fn prompts(&self, prompt: Prompt) -> PyResult<Vec<Vec<u32>>> {
        let models = 0..self.models.models().len();
        match prompt {
            Prompt::Ids(ids) => Ok(models.map(|_| ids.clone()).collect()),
            Prompt::Text(text) if text.is_empty() => Err(PyValueError::new_err("the prompt is empty")),
            Prompt::Text(text) => {
                models.map(|model| self.tokenizer(model)?.encode(&text, true).map_err(crate::error)).collect()
            }
        }
    }

    /// Gives the request to a thread that computes.
    fn start(&self, py: Python<'_>, request: Request, wanted: &Wanted) -> PyResult<Stream> {
        request.validate(&self.models).map_err(crate::error)?;
        let device: Device = wanted.device.parse().map_err(crate::error)?;
        let limits = limits_for(&self.models, std::slice::from_ref(&request), 1);
        let options = BackendOptions { threads: wanted.threads, ..BackendOptions::new(device, limits) };
        let steps = py.detach(|| self.workers.start(&self.models, options, request))?;
        Ok(Stream { steps: Mutex::new(Some(steps)) })
    }
}

impl From<engine::Ensemble> for Ensemble {
    fn from(models: engine::Ensemble) -> Self {
        Self { models: Arc::new(models), workers: Workers::default() }
    }
}

impl Wanted {
    fn sampling(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            ..SamplingParams::default()
        }
    }
}

#[pymethods]
impl Stream {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&mut self, py: Python<'_>) -> PyResult<Option<Step>> {
        loop {
            let Some(steps) = self.place().take() else { return Ok(None) };
            // Kept aside while others of Python's threads run: a second one that asks finds the end.
            let (steps, received) = py.detach(move || {
                let received = steps.recv_timeout(PATIENCE);
                (steps, received)
            });
            match received {
                Ok(Ok(step)) => {
                    *self.place() = Some(steps);
                    // Nobody else looks while `finish` reads on and on.
                    py.check_signals()?;
                    return Ok(Some(Step::from(step)));
                }
                Ok(Err(error)) => return Err(crate::error(error)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    *self.place() = Some(steps);
                    py.check_signals()?;
                }
            }
        }
    }

    /// All steps that are left, as one result.
    fn finish(&mut self, py: Python<'_>) -> PyResult<Generation> {
        let mut steps = Vec::new();
        while let Some(step) = self.__next__(py)? {
            steps.push(step);
        }
        Ok(Generation {
            text: steps.iter().map(|step| step.text.as_str()).collect(),
            token_ids: steps.iter().map(|step| step.token_id).collect(),
            finish_reason: steps.last().and_then(|step| step.finish_reason.clone()),
            steps,
        })
    }
}

impl Stream {
    fn place(&mut self) -> &mut Option<Receiver<engine::Result<engine::Step>>> {
        self.steps.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<engine::Step> for Step {
    fn from(step: engine::Step) -> Self {
        let decision = step.decision;
        Self {
            token_id: step.token,
            text: step.text,
            alpha: decision.alpha.to_vec(),
            expert: decision.expert,
            loss: decision.loss,
            logprob: decision.logprob_fused,
            logprob_large: decision.logprob_large,
            argmax_large: decision.argmax_large,
            finish_reason: step.finish.map(|finish| finish.as_str().to_owned()),
        }
    }
}
