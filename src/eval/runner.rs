//! Runs one method over the samples of a task.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use super::data::Sample;
use super::encode::Encoder;
use super::metrics::{Metric, argmax};
use super::task::{Choices, Item, Kind, Prompt, Task};
use crate::error::{Error, Result};
use crate::fusion::FusionRule;
use crate::generate::{FinishReason, Generator, Request, Step};
use crate::sampling::SamplingParams;

/// How texts are decoded, whatever the method.
#[derive(Clone, Debug, Default)]
pub struct Decoding {
    /// Greedy by default.
    pub sampling: SamplingParams,
    /// Instead of the task's own number of new tokens.
    pub max_new_tokens: Option<usize>,
}

/// What is evaluated: the same for all methods.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The task.
    pub task: &'a Task,
    /// The file of the samples, for messages.
    pub path: &'a Path,
    /// All samples.
    pub samples: &'a [Sample],
    /// The samples of this run, by their place in `samples`: all, or those of a shard.
    pub indices: &'a [usize],
    /// Examples in front of every prompt.
    pub shots: &'a [Sample],
    /// Texts to tokens.
    pub encoder: Encoder<'a>,
    /// How texts are decoded.
    pub decoding: &'a Decoding,
}

/// What is known of one sample; it holds no time, so that the same run gives the same bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SampleResult {
    /// The sample's place in the data, from 0.
    pub index: usize,
    /// By metric, in the task's order.
    #[serde(serialize_with = "as_map")]
    pub scores: Vec<(&'static str, f64)>,
    /// The generated text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The answer found in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// The right answers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<String>,
    /// Why the text ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<&'static str>,
    /// The log-likelihood of each choice, in nats.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f64>,
    /// The most likely choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<usize>,
    /// The right choices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub right: Vec<usize>,
    /// Tokens generated or scored.
    pub tokens: usize,
    /// α summed over the experts, mean over the tokens; null where the method has none.
    pub mean_alpha: Option<f64>,
    /// Why there is no result; the scores are 0 then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn as_map<S: Serializer>(scores: &[(&'static str, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(scores.iter().copied())
}

/// A sample in flight.
struct Running {
    item: Item,
    /// Requests that haven't ended.
    open: usize,
    /// Of each choice.
    logprobs: Vec<f64>,
    alpha: f64,
    alphas: usize,
    result: SampleResult,
}

/// One method over a plan.
#[derive(Debug)]
pub struct Runner<'a> {
    /// What is evaluated.
    pub plan: Plan<'a>,
    /// The method.
    pub rule: &'a FusionRule,
    /// Requests in flight at once.
    pub batch_size: usize,
}

impl Plan<'_> {
    /// Reads every sample once. Returns the tokens of the longest sequence, its continuation included, and the most
    /// requests that a sample makes.
    ///
    /// # Errors
    /// The first sample that can't be used; one that is too long for a model is no error here.
    pub fn check(&self) -> Result<(usize, usize)> {
        if let Some(name) = self.task.roles().find(|name| !self.encoder.knows(name)) {
            let reason = format!("`prompts`: there is no model {name:?} in this ensemble");
            return Err(Error::Task { path: self.task.name().into(), reason });
        }
        let (mut longest, mut most) = (1, 1);
        for &index in self.indices {
            let (prompt, item) = self.read(index)?;
            let requests = self.requests(&prompt, &item, &FusionRule::Large)?;
            most = most.max(requests.len());
            for request in requests {
                let prompt = request.prompts.iter().map(Vec::len).max().unwrap_or(0);
                longest = longest.max(prompt + request.forced.len() + request.max_new_tokens);
            }
        }
        Ok((longest, most))
    }

    /// Prompt and question of a sample.
    fn read(&self, index: usize) -> Result<(Prompt, Item)> {
        let sample = self.samples.get(index).ok_or_else(|| Error::Parameter {
            name: "indices",
            expected: format!("places in {} samples", self.samples.len()),
            found: index.to_string(),
        })?;
        let prompt = self.task.prompt(self.path, sample, self.shots)?;
        Ok((prompt, self.task.item(self.path, sample)?))
    }

    /// One request for a text, or one for each choice.
    fn requests(&self, prompt: &Prompt, item: &Item, rule: &FusionRule) -> Result<Vec<Request>> {
        let prompts = self.encoder.prompts(prompt)?;
        let request = Request {
            prompts,
            rule: rule.clone(),
            sampling: self.decoding.sampling.clone(),
            ..Request::new(Vec::new(), 0)
        };
        match (item, self.task.kind()) {
            (Item::Choices(choices), _) => {
                let score = |text: &String| {
                    Ok(Request { forced: self.encoder.continuation(prompt, text)?, ..request.clone() })
                };
                choices.continuations.iter().map(score).collect()
            }
            (Item::References(_), Kind::Generate(generate)) => Ok(vec![Request {
                max_new_tokens: self.decoding.max_new_tokens.unwrap_or(generate.max_new_tokens),
                stop_strings: generate.stop.clone(),
                ..request
            }]),
            (Item::References(_), Kind::Choice(_)) => Ok(Vec::new()),
        }
    }
}

impl Runner<'_> {
    /// Runs the samples after the first `done` of the plan, and gives each result to `sink` in their order, with the
    /// time since the one before was finished: all times together are the run's. Only what is in flight is kept.
    ///
    /// # Errors
    /// Those of `sink`, of a sample that can't be used, and of the device. A sample that fails alone is a result.
    pub fn run<E: From<Error>>(
        &self,
        mut generator: Generator,
        done: usize,
        mut sink: impl FnMut(SampleResult, Duration) -> Result<(), E>,
    ) -> Result<(), E> {
        // Results wait for those before them; not for ever, or a slow one would let them pile up.
        let window = 16 * self.batch_size.max(1);
        let mut todo = self.plan.indices.iter().copied().enumerate().skip(done).peekable();
        let mut turn = done;
        let mut early: BTreeMap<usize, (SampleResult, Duration)> = BTreeMap::new();
        let mut running: BTreeMap<usize, Running> = BTreeMap::new();
        // Request → (place in the plan, choice).
        let mut owners: HashMap<usize, (usize, usize)> = HashMap::new();
        let mut clock = Instant::now();
        loop {
            while owners.len() < 2 * self.batch_size.max(1)
                && let Some((place, index)) = todo.next_if(|(place, _)| *place < turn + window)
            {
                let (prompt, item) = self.plan.read(index)?;
                let mut sample = Running::new(index, item);
                let requests = self.plan.requests(&prompt, &sample.item, self.rule)?;
                sample.open = requests.len();
                sample.logprobs = vec![0.0; requests.len()];
                for (choice, request) in requests.into_iter().enumerate() {
                    match generator.push(request) {
                        Ok(number) => drop(owners.insert(number, (place, choice))),
                        Err(error) => sample.fail(&error),
                    }
                }
                running.insert(place, sample);
            }
            let finished: Vec<usize> =
                running.iter().filter(|(_, sample)| sample.open == 0).map(|(place, _)| *place).collect();
            for place in finished {
                let Some(sample) = running.remove(&place) else { continue };
                early.insert(place, (sample.finish(self.plan.task), clock.elapsed()));
                clock = Instant::now();
            }
            while let Some((result, time)) = early.remove(&turn) {
                turn += 1;
                sink(result, time)?;
            }
            if running.is_empty() && todo.peek().is_none() {
                return Ok(());
            }
            match generator.next() {
                Some(Ok(step)) => {
                    let Some(&(place, choice)) = owners.get(&step.request) else { continue };
                    if step.finish.is_some() {
                        owners.remove(&step.request);
                    }
                    if let Some(sample) = running.get_mut(&place) {
                        sample.step(choice, &step);
                    }
                }
                Some(Err(Error::Request { request, source })) => {
                    let Some((place, _)) = owners.remove(&request) else { continue };
                    if let Some(sample) = running.get_mut(&place) {
                        sample.fail(&source);
                    }
                }
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
        }
    }
}

impl Running {
    fn new(index: usize, item: Item) -> Self {
        let result = SampleResult { index, ..SampleResult::default() };
        Self { item, open: 0, logprobs: Vec::new(), alpha: 0.0, alphas: 0, result }
    }

    fn step(&mut self, choice: usize, step: &Step) {
        self.result.tokens += 1;
        if let Some(logprob) = self.logprobs.get_mut(choice) {
            *logprob += step.decision.logprob_fused;
        }
        if !step.decision.alpha.is_empty() {
            self.alpha += step.decision.alpha.iter().sum::<f64>();
            self.alphas += 1;
        }
        if matches!(self.item, Item::References(_)) {
            self.result.text.get_or_insert_default().push_str(&step.text);
        }
        if let Some(finish) = step.finish {
            self.result.finish_reason = Some(FinishReason::as_str(finish));
            self.open -= 1;
        }
    }

    fn fail(&mut self, error: &Error) {
        self.open -= 1;
        self.result.error.get_or_insert_with(|| error.to_string());
    }

    /// Scores what came.
    fn finish(self, task: &Task) -> SampleResult {
        let mut result = self.result;
        let failed = result.error.is_some();
        result.mean_alpha = (self.alphas > 0).then(|| self.alpha / self.alphas as f64);
        let score = |metric: &Metric, value: f64| (metric.name(), if failed { 0.0 } else { value });
        match self.item {
            Item::References(references) => {
                let (rule, stem) = match task.kind() {
                    Kind::Generate(generate) => (generate.extract.clone(), generate.stemmer),
                    Kind::Choice(_) => Default::default(),
                };
                result.answer = result.text.as_deref().and_then(|text| rule.apply(text));
                let answer = result.answer.as_deref();
                let scores = task.metrics().iter();
                result.scores = scores.map(|m| score(m, m.of_text(answer, &references, stem))).collect();
                result.references = references;
            }
            Item::Choices(Choices { bytes, right, .. }) => {
                let scores = task.metrics().iter();
                result.scores =
                    scores.map(|m| score(m, m.of_choices(&self.logprobs, &bytes, &right))).collect();
                result.right = (0..right.len()).filter(|&k| right[k]).collect();
                result.choice = argmax(&self.logprobs).filter(|_| !failed);
                result.logprobs = if failed { Vec::new() } else { self.logprobs };
                result.finish_reason = None;
            }
        }
        result
    }
}
