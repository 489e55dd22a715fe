//! `Generator`: requests in, an iterator of [`Step`]s out.
//!
//! All requests in flight advance together: one step of the engine reads as many prompt tokens as the backend
//! takes at once and decides the next token of every sequence that has read its prompt. A request that gives its
//! continuation ([`Request::forced`]) is scored: every one of its positions is fused, many in one step.

mod sequence;
mod stop;
mod text;
mod top;

use std::collections::VecDeque;
use std::ops::Add;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, Batch, Limits, Row};
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::{Decision, FusionRule};
use crate::kv_cache::{BlockPool, BlockTable, blocks_for};
use crate::sampling::SamplingParams;
use sequence::{Sequence, Stream};

/// What to decode.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt of every model, indexed like [`Ensemble::models`]; each has at least one token. One entry alone
    /// serves all models.
    pub prompts: Vec<Vec<u32>>,
    /// Tokens that follow the prompt as they are; each gets a [`Step`] with its log-probabilities.
    pub forced: Vec<u32>,
    /// How the models' logits are combined.
    pub rule: FusionRule,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; fewer where the context of a model ends.
    pub max_new_tokens: usize,
    /// Tokens to generate at least: end tokens are banned and stop strings not looked for until then.
    pub min_new_tokens: usize,
    /// Texts that end the generation; they are in no [`Step::text`].
    pub stop_strings: Vec<String>,
    /// Tokens that end the generation, besides the models' own end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Whether generation goes on past end-of-sequence tokens.
    pub ignore_eos: bool,
    /// How many of the most probable tokens each step names in [`Step::top`]; 0 spares their search.
    pub top_logprobs: usize,
}

impl Request {
    /// Greedy generation from one prompt for all models.
    pub fn new(prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompts: vec![prompt],
            forced: Vec::new(),
            rule: FusionRule::default(),
            sampling: SamplingParams::default(),
            max_new_tokens,
            min_new_tokens: 0,
            stop_strings: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            top_logprobs: 0,
        }
    }

    /// Scores `ids`: every position after the first gets a step.
    pub fn score(mut ids: Vec<u32>) -> Self {
        let forced = ids.split_off(ids.len().min(1));
        Self { forced, ..Self::new(ids, 0) }
    }

    /// The same request under another rule.
    pub fn rule(self, rule: FusionRule) -> Self {
        Self { rule, ..self }
    }

    /// The same request with other sampling parameters.
    pub fn sampling(self, sampling: SamplingParams) -> Self {
        Self { sampling, ..self }
    }

    fn prompt(&self, model: usize) -> &[u32] {
        let index = if self.prompts.len() == 1 { 0 } else { model };
        self.prompts.get(index).map_or(&[], Vec::as_slice)
    }

    /// Checks the request against the models that are to decode it, and returns the tokens that it can generate at
    /// most: `max_new_tokens`, or what the shortest context leaves.
    ///
    /// # Errors
    /// The first thing that is wrong with it, as [`Generator::push`] would say.
    pub fn validate(&self, ensemble: &Ensemble) -> Result<usize> {
        ensemble.check_rule(&self.rule)?;
        self.sampling.validate()?;
        if self.forced.is_empty() && self.max_new_tokens == 0 {
            return Err(parameter("max_new_tokens", "at least 1 where nothing is scored", "0"));
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(parameter("stop", "strings that are not empty", "an empty one"));
        }
        if self.min_new_tokens > self.max_new_tokens {
            let most = format!("at most max_new_tokens, {}", self.max_new_tokens);
            return Err(parameter("min_new_tokens", &most, &self.min_new_tokens.to_string()));
        }
        let vocab_size = ensemble.vocab_size();
        let biased = self.sampling.logit_bias.iter().map(|&(id, _)| ("logit_bias", id));
        let stops = self.stop_token_ids.iter().map(|&id| ("stop_token_ids", id));
        if let Some((name, id)) = biased.chain(stops).find(|&(_, id)| id as usize >= vocab_size) {
            return Err(parameter(name, &format!("ids below {vocab_size}"), &id.to_string()));
        }
        let mut most_new_tokens = self.max_new_tokens;
        for model in ensemble.models_for(&self.rule) {
            let role = ensemble.models()[model].role;
            let prompt = self.prompt(model);
            if prompt.is_empty() {
                return Err(Error::EmptyPrompt { role });
            }
            if let Some(&id) = prompt.iter().chain(&self.forced).find(|&&id| id as usize >= vocab_size) {
                return Err(Error::TokenOutOfRange { role, id, vocab_size });
            }
            let (tokens, context) = (prompt.len() + self.forced.len(), ensemble.context(model));
            if tokens > context {
                return Err(Error::PromptTooLong { role, tokens, context });
            }
            // The last token is decided and never read.
            most_new_tokens = most_new_tokens.min(context - tokens + 1);
        }
        Ok(most_new_tokens)
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_new_tokens`, or the end of a model's context.
    Length,
}

impl FinishReason {
    /// As the OpenAI API names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a token cost: its share of the engine's step that decided it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    /// The large model.
    pub large: Duration,
    /// The small model and its experts, which run in lockstep.
    pub small: Duration,
    /// Fusion and sampling.
    pub fusion: Duration,
}

impl StepTime {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.large + self.small + self.fusion
    }
}

impl Add for StepTime {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        Self {
            large: self.large + more.large,
            small: self.small + more.small,
            fusion: self.fusion + more.fusion,
        }
    }
}

/// One decided token.
#[derive(Clone, Debug)]
pub struct Step {
    /// The number that [`Generator::push`] gave the request.
    pub request: usize,
    /// Counted from the first token after the prompt.
    pub index: usize,
    /// The token.
    pub token: u32,
    /// Whether the token was given by the request.
    pub forced: bool,
    /// The characters that became whole with this token: all pieces together are the text of all tokens.
    pub piece: String,
    /// The text that may be shown now: a piece is held back while it may be the beginning of a stop string, and
    /// never shown where it is one.
    pub text: String,
    /// How the token was decided.
    pub decision: Decision,
    /// The [`Request::top_logprobs`] most probable tokens with log P̃, the most probable first, which is
    /// [`Decision::argmax_fused`]. Where it is the step's token, its value is [`Decision::logprob_fused`] to the bit.
    pub top: Vec<(u32, f64)>,
    /// Set on a request's last step.
    pub finish: Option<FinishReason>,
    /// What the token cost; `None` on a device without a clock.
    pub time: Option<StepTime>,
}

/// Decodes requests with one ensemble on one backend.
pub struct Generator {
    ensemble: Arc<Ensemble>,
    backend: Box<dyn Backend>,
    /// One a model.
    pools: Vec<BlockPool>,
    /// Tables of running sequences; a stream knows its own by index.
    tables: Vec<BlockTable>,
    free_tables: Vec<usize>,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Steps that were decided and not yet handed out.
    ready: VecDeque<Result<Step>>,
    pushed: usize,
    scratch: Scratch,
}

/// What one engine step is put together in, reused from step to step.
#[derive(Default)]
struct Scratch {
    /// One a model.
    rows: Vec<Vec<Row>>,
    batch: Vec<Row>,
    decisions: Vec<Result<Decision>>,
}

/// Steps of one sequence whose logits the coming `forward` makes.
struct Pending {
    sequence: usize,
    slot: usize,
    steps: usize,
}

impl Generator {
    /// A generator with an empty cache.
    pub fn new(ensemble: Arc<Ensemble>, backend: Box<dyn Backend>) -> Self {
        let models = ensemble.models().len();
        let limits = backend.limits();
        Self {
            ensemble,
            backend,
            pools: (0..models).map(|_| BlockPool::new(limits.blocks)).collect(),
            tables: Vec::new(),
            free_tables: Vec::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            ready: VecDeque::new(),
            pushed: 0,
            scratch: Scratch { rows: vec![Vec::new(); models], ..Scratch::default() },
        }
    }

    /// The ensemble.
    pub fn ensemble(&self) -> &Arc<Ensemble> {
        &self.ensemble
    }

    /// Takes a request and returns its number: 0, 1, … in the order they came.
    ///
    /// # Errors
    /// What is wrong with the request; the requests before it go on.
    pub fn push(&mut self, request: Request) -> Result<usize> {
        let sequence = self.prepare(request)?;
        self.waiting.push_back(sequence);
        self.pushed += 1;
        Ok(self.pushed - 1)
    }

    /// Checks a request and lays out its streams.
    fn prepare(&self, mut request: Request) -> Result<Sequence> {
        let ensemble = &self.ensemble;
        request.max_new_tokens = request.validate(ensemble)?;
        let used = ensemble.models_for(&request.rule);
        let mut streams = Vec::with_capacity(used.len());
        for model in used {
            let prompt = request.prompt(model);
            let tokens = prompt.iter().chain(&request.forced).copied().collect();
            streams.push(Stream { model, tokens, prompt_len: prompt.len(), table: usize::MAX, computed: 0 });
        }
        let mut end_token_ids = request.stop_token_ids.clone();
        if !request.ignore_eos {
            end_token_ids.extend(ensemble.eos_token_ids());
        }
        end_token_ids.sort_unstable();
        #[cfg(feature = "tokenizer")]
        let decoder = streams.first().and_then(|stream| {
            let tokenizer = ensemble.tokenizer(stream.model).or_else(|| ensemble.tokenizer_of_any())?;
            Some(tokenizer.decoder_after(request.prompt(stream.model)))
        });
        #[cfg(feature = "tokenizer")]
        let has_text = decoder.is_some();
        #[cfg(not(feature = "tokenizer"))]
        let has_text = false;
        if !request.stop_strings.is_empty() && !has_text {
            return Err(parameter("stop", "token ids, for want of a tokenizer", "strings"));
        }
        let text = text::Text {
            #[cfg(feature = "tokenizer")]
            decoder,
            stop: stop::StopStrings::new(request.stop_strings.clone()),
        };
        Ok(Sequence {
            id: self.pushed,
            request,
            streams,
            end_token_ids,
            decided: 0,
            held: None,
            text,
            ended: false,
        })
    }

    /// One step of the engine: fills `self.ready` with at least one step or failure, unless every sequence in
    /// flight is still reading its prompt.
    fn advance(&mut self) -> Result<()> {
        let mut pending = Vec::new();
        let mut slots = 0;
        for index in 0..self.running.len() {
            slots += self.schedule(index, slots, &mut pending);
        }
        while slots < self.backend.limits().slots && self.has_room() && self.admit() {
            // Scheduled at once, so that the next one admitted finds the blocks of their common prefix.
            slots += self.schedule(self.running.len() - 1, slots, &mut pending);
        }
        if self.running.is_empty() {
            return Ok(());
        }
        self.scratch.batch.clear();
        for rows in &mut self.scratch.rows {
            self.scratch.batch.append(rows);
        }
        let batch = Batch { rows: &self.scratch.batch, tables: &self.tables };
        let forward = self.backend.forward(&batch)?;
        let decided: usize = pending.iter().map(|pending| pending.steps).sum();
        let share = |time: Duration| time / decided.max(1) as u32;
        self.fuse(
            pending,
            StepTime { large: share(forward.large), small: share(forward.small), fusion: Duration::ZERO },
        )
    }

    fn has_room(&self) -> bool {
        self.scratch.rows.iter().map(Vec::len).max().unwrap_or(0) < self.backend.limits().rows
    }

    /// Starts the next request that waits, if the cache has room for all of it.
    fn admit(&mut self) -> bool {
        while let Some(sequence) = self.waiting.pop_front() {
            match self.allocate(&sequence) {
                Ok(allocated) => {
                    self.start(sequence, allocated);
                    return true;
                }
                // Nothing runs that could give blocks back: it will never fit.
                Err(error) if self.running.is_empty() => {
                    self.ready.push_back(Err(in_request(sequence.id, error)));
                }
                Err(_) => {
                    self.waiting.push_front(sequence);
                    return false;
                }
            }
        }
        false
    }

    /// A block table for each stream, and how many of its tokens are cached; all or none.
    fn allocate(&mut self, sequence: &Sequence) -> Result<Vec<(BlockTable, usize)>> {
        let new_tokens = sequence.request.forced.len() + sequence.request.max_new_tokens;
        let mut allocated: Vec<(BlockTable, usize)> = Vec::with_capacity(sequence.streams.len());
        for stream in &sequence.streams {
            let silent = &stream.tokens[..stream.prompt_len - 1];
            let positions = stream.prompt_len + new_tokens;
            match self.pools[stream.model].allocate(silent, positions) {
                Ok(table) => allocated.push(table),
                Err(error) => {
                    for (stream, (table, _)) in sequence.streams.iter().zip(allocated) {
                        self.pools[stream.model].release(table);
                    }
                    return Err(error);
                }
            }
        }
        Ok(allocated)
    }

    /// Puts a sequence with its blocks among those that run.
    fn start(&mut self, mut sequence: Sequence, allocated: Vec<(BlockTable, usize)>) {
        for (stream, (table, cached)) in sequence.streams.iter_mut().zip(allocated) {
            stream.computed = cached;
            stream.table = match self.free_tables.pop() {
                Some(free) => {
                    self.tables[free] = table;
                    free
                }
                None => {
                    self.tables.push(table);
                    self.tables.len() - 1
                }
            };
        }
        self.running.push(sequence);
    }

    /// Adds what fits of a sequence's rows to the batch, and returns how many logit slots they take.
    fn schedule(&mut self, index: usize, slot: usize, pending: &mut Vec<Pending>) -> usize {
        let limits = self.backend.limits();
        let sequence = &mut self.running[index];
        let mut ready = true;
        let mut steps = sequence.steps_ready().min(limits.slots - slot);
        for stream in &mut sequence.streams {
            let rows = &mut self.scratch.rows[stream.model];
            let silent = stream.silent_rows().min(limits.rows - rows.len());
            read(rows, stream, silent, None);
            ready &= stream.silent_rows() == 0;
            steps = steps.min(limits.rows - rows.len());
        }
        if !ready || steps == 0 {
            steps = 0;
        } else {
            pending.push(Pending { sequence: index, slot, steps });
        }
        for stream in &mut sequence.streams {
            if steps > 0 {
                read(&mut self.scratch.rows[stream.model], stream, steps, Some(slot));
            }
            self.pools[stream.model].register(&self.tables[stream.table], &stream.tokens[..stream.computed]);
        }
        steps
    }

    /// Decides the pending steps, hands them out, and gives back what ended sequences held.
    fn fuse(&mut self, mut pending: Vec<Pending>, time: StepTime) -> Result<()> {
        let mut failed = Vec::new();
        while !pending.is_empty() {
            let mut rows = Vec::with_capacity(pending.len());
            for p in &pending {
                let sequence = &self.running[p.sequence];
                let alike = sequence.steps_alike(p.steps);
                rows.extend((0..alike).map(|k| sequence.fuse_row(sequence.decided + k, p.slot + k)));
            }
            let count = rows.len().max(1) as u32;
            let fusion = self.backend.fuse(&rows, &mut self.scratch.decisions)?;
            let time = StepTime { fusion: fusion / count, ..time };
            let time = self.backend.has_clock().then_some(time);

            let mut decisions = self.scratch.decisions.drain(..);
            for p in &mut pending {
                let sequence = &mut self.running[p.sequence];
                let alike = sequence.steps_alike(p.steps);
                for (taken, decision) in decisions.by_ref().take(alike).enumerate() {
                    if failed.contains(&p.sequence) {
                        continue;
                    }
                    match decision {
                        Ok(decision) => {
                            let wanted = sequence.request.top_logprobs;
                            let rule = &sequence.request.rule;
                            let slot = p.slot + taken;
                            let top = top::most_probable(
                                &*self.backend,
                                &self.ensemble,
                                rule,
                                slot,
                                &decision,
                                wanted,
                            )?;
                            self.ready.push_back(Ok(sequence.advance(decision, top, time)));
                        }
                        Err(error) => {
                            failed.push(p.sequence);
                            self.ready.push_back(Err(in_request(sequence.id, error)));
                        }
                    }
                }
                p.slot += alike;
                p.steps -= alike;
            }
            pending.retain(|p| p.steps > 0 && !failed.contains(&p.sequence));
        }
        self.retire(&failed);
        Ok(())
    }

    /// Drops the sequences that have ended.
    fn retire(&mut self, failed: &[usize]) {
        for index in (0..self.running.len()).rev() {
            if self.running[index].ended || failed.contains(&index) {
                self.release(index);
            }
        }
    }

    /// Drops a running sequence and gives its blocks back.
    fn release(&mut self, index: usize) {
        let sequence = self.running.remove(index);
        for stream in sequence.streams {
            self.pools[stream.model].release(std::mem::take(&mut self.tables[stream.table]));
            self.free_tables.push(stream.table);
        }
    }

    /// Ends a request: its blocks are free at once, and none of its steps comes any more. A request that has ended
    /// already, or never was, changes nothing.
    pub fn cancel(&mut self, request: usize) {
        self.waiting.retain(|sequence| sequence.id != request);
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == request) {
            self.release(index);
        }
        self.ready.retain(|step| match step {
            Ok(step) => step.request != request,
            Err(Error::Request { request: failed, .. }) => *failed != request,
            Err(_) => true,
        });
    }

    /// Steps that are decided already: [`next`](Iterator::next) hands out so many without computing.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// How full the cache of each model is, in the ensemble's order.
    pub fn cache(&self) -> impl Iterator<Item = CacheUse> {
        let blocks = self.backend.limits().blocks;
        self.pools.iter().map(move |pool| CacheUse { blocks, used: blocks - pool.available() })
    }

    /// Forgets all requests after the device failed, and what its cache held.
    fn reset(&mut self) {
        let blocks = self.backend.limits().blocks;
        self.waiting.clear();
        self.running.clear();
        self.tables.clear();
        self.free_tables.clear();
        self.pools.iter_mut().for_each(|pool| *pool = BlockPool::new(blocks));
        self.scratch.rows.iter_mut().for_each(Vec::clear);
    }
}

/// The blocks of one model's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheUse {
    /// All of them.
    pub blocks: usize,
    /// Those that sequences in flight hold. What ended sequences left to be found again isn't counted: it makes
    /// room when its place is needed.
    pub used: usize,
}

impl Iterator for Generator {
    type Item = Result<Step>;

    /// The next decided token of any request, in the order of deciding; `None` when no request is left. A
    /// request that fails ends with one [`Error::Request`]; another error means that the device failed, and ends
    /// all.
    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !(self.running.is_empty() && self.waiting.is_empty()) {
            if let Err(error) = self.advance() {
                self.reset();
                self.ready.push_back(Err(error));
            }
        }
        self.ready.pop_front()
    }
}

/// Appends the next `count` rows of a stream; the logits go to consecutive slots from `slot` on.
fn read(rows: &mut Vec<Row>, stream: &mut Stream, count: usize, slot: Option<usize>) {
    let from = stream.computed;
    rows.extend(stream.tokens[from..from + count].iter().enumerate().map(|(k, &token)| Row {
        model: stream.model,
        table: stream.table,
        position: from + k,
        token,
        slot: slot.map(|slot| slot + k),
    }));
    stream.computed += count;
}

fn in_request(request: usize, source: Error) -> Error {
    Error::Request { request, source: Box::new(source) }
}

fn parameter(name: &'static str, expected: &str, found: &str) -> Error {
    Error::Parameter { name, expected: expected.to_owned(), found: found.to_owned() }
}

/// The blocks of one model's cache that `sequences` sequences of at most `tokens` tokens take, prompt and
/// continuation together: what [`Limits::blocks`](crate::backend::Limits::blocks) must be for them to run at once.
pub fn blocks_needed(sequences: usize, tokens: usize) -> usize {
    sequences * blocks_for(tokens)
}

/// Limits under which the longest of `requests` fits `sequences` times at once, or all of them where there are fewer.
pub fn limits_for(ensemble: &Ensemble, requests: &[Request], sequences: usize) -> Limits {
    let context = (0..ensemble.models().len()).map(|model| ensemble.context(model)).max().unwrap_or(1);
    let length = |request: &Request| {
        let prompt = request.prompts.iter().map(Vec::len).max().unwrap_or(0);
        let new_tokens = request.forced.len().saturating_add(request.max_new_tokens);
        prompt.saturating_add(new_tokens).min(context + 1)
    };
    let longest = requests.iter().map(length).max().unwrap_or(1);
    let sequences = sequences.clamp(1, requests.len().max(1));
    Limits::for_vocabulary(ensemble.vocab_size(), sequences, blocks_needed(sequences, longest))
}
