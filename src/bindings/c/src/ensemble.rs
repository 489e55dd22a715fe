//! Ensembles, generation and scoring.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use engine::generate::{FinishReason, Generator, limits_for};
use engine::tokenizer::Tokenizer;
use engine::{BackendOptions, Device, Ensemble, EnsembleSpec, Error, ExpertSpec, Request, Step};

use crate::border::{
    Failure, dlf_status, dlf_tokens, free, guard, optional, optional_text, out, outs, required, slice, texts,
};
use crate::decision::dlf_decision;
use crate::rule::{dlf_rule, dlf_sampling, rule, sampling};

/// Requests that are decoded together; the others wait.
const MOST_SEQUENCES: usize = 16;

/// An ensemble and where it runs. Nothing in it changes: any number of threads may use one at once.
pub struct dlf_engine {
    ensemble: Arc<Ensemble>,
    device: Device,
    threads: Option<usize>,
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<dlf_engine>();
};

/// The directories of an ensemble, in the Hugging Face layout. Models that the rules in use don't need may be null.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_models {
    /// The large model.
    pub large: *const c_char,
    /// The small model.
    pub small: *const c_char,
    /// Fine-tuned small models, or LoRA adapters over the small one.
    pub experts: *const *const c_char,
    /// How many; at most `DLF_MAX_EXPERTS`.
    pub num_experts: usize,
}

/// Where to compute.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_options {
    /// "auto", "cpu", "cuda" or "cuda:N"; null is "auto".
    pub device: *const c_char,
    /// Threads of the CPU; 0 is one a core.
    pub threads: usize,
}

/// The generation goes on.
pub const DLF_FINISH_NONE: u32 = 0;
/// An end token or a stop string.
pub const DLF_FINISH_STOP: u32 = 1;
/// `max_new_tokens`, or the end of a model's context.
pub const DLF_FINISH_LENGTH: u32 = 2;

/// What to decode. Begin with `dlf_request_default`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_request {
    /// One prompt for all models, or one each for large, small and the experts in order.
    pub prompts: *const dlf_tokens,
    /// How many.
    pub num_prompts: usize,
    /// Tokens that follow the prompt as they are and are scored.
    pub forced: dlf_tokens,
    /// Null is the paper's rule.
    pub rule: *const dlf_rule,
    /// Null is greedy.
    pub sampling: *const dlf_sampling,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Tokens to generate at least.
    pub min_new_tokens: usize,
    /// Texts that end the generation and are not part of it.
    pub stop: *const *const c_char,
    /// How many.
    pub num_stop: usize,
    /// Tokens that end the generation, besides the models' own.
    pub stop_tokens: dlf_tokens,
    /// Whether the generation goes on past end-of-sequence tokens.
    pub ignore_eos: bool,
}

/// One decided token. It and what it points to are valid during the callback.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_token {
    /// Which request.
    pub request: usize,
    /// Counted from the first token after the prompt.
    pub index: usize,
    /// The token.
    pub id: u32,
    /// Whether the request gave it.
    pub forced: bool,
    /// The text that may be shown now, UTF-8 with a NUL behind it. A character may need several tokens, and what may
    /// begin a stop string is held back.
    pub text: *const c_char,
    /// Bytes of it, without the NUL behind it.
    pub text_len: usize,
    /// How it was decided.
    pub decision: *const dlf_decision,
    /// `DLF_FINISH_NONE`, `DLF_FINISH_STOP` or `DLF_FINISH_LENGTH`.
    pub finish: u32,
}

/// Called with each token on the thread that called `dlf_generate`. False ends the request whose token it is; the
/// others go on.
pub type dlf_on_token = Option<unsafe extern "C" fn(token: *const dlf_token, user_data: *mut c_void) -> bool>;

/// Opens an ensemble. `options` may be null. On failure `*engine` is left as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_open(
    models: *const dlf_models,
    options: *const dlf_options,
    engine: *mut *mut dlf_engine,
) -> dlf_status {
    guard(|| {
        let engine = out(engine, "engine")?;
        // SAFETY: the caller's promise.
        let (models, options) = unsafe { (required(models, "models")?, optional(options, "options")?) };
        // SAFETY: the caller's promise.
        let (large, small) =
            unsafe { (optional_text(models.large, "large")?, optional_text(models.small, "small")?) };
        // SAFETY: the caller's promise.
        let experts = unsafe { texts(models.experts, models.num_experts, "experts") }?;
        let expert = |path: &str| ExpertSpec { name: None, path: path.into() };
        let spec = EnsembleSpec {
            large: large.map(Into::into),
            small: small.map(Into::into),
            experts: experts.into_iter().map(expert).collect(),
        };
        // SAFETY: the caller's promise; `engine` was checked by `out`.
        unsafe { open(|| Ensemble::load(&spec), options, engine) }
    })
}

/// Opens the demo ensemble, which is inside the library. `options` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_open_demo(
    options: *const dlf_options,
    engine: *mut *mut dlf_engine,
) -> dlf_status {
    guard(|| {
        let engine = out(engine, "engine")?;
        // SAFETY: the caller's promise; `engine` was checked by `out`.
        unsafe { open(Ensemble::demo, optional(options, "options")?, engine) }
    })
}

/// # Safety
/// What `options` points to is valid; `engine` may be written.
unsafe fn open(
    load: impl FnOnce() -> engine::Result<Ensemble>,
    options: Option<&dlf_options>,
    engine: *mut *mut dlf_engine,
) -> Result<(), Failure> {
    let (mut device, mut threads) = (Device::default(), None);
    if let Some(options) = options {
        // SAFETY: the caller's promise.
        if let Some(name) = unsafe { optional_text(options.device, "device") }? {
            device = name.parse()?;
        }
        threads = (options.threads > 0).then_some(options.threads);
    }
    let ensemble = Arc::new(load()?);
    // SAFETY: the caller's promise.
    unsafe { engine.write(Box::into_raw(Box::new(dlf_engine { ensemble, device, threads }))) };
    Ok(())
}

/// Frees an ensemble; null is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_close(engine: *mut dlf_engine) {
    // SAFETY: the caller's promise.
    unsafe { free(engine) };
}

/// The number of token ids that all models share; 0 where `engine` is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_vocab_size(engine: *const dlf_engine) -> usize {
    // SAFETY: the caller's promise.
    unsafe { engine.as_ref() }.map_or(0, |engine| engine.ensemble.vocab_size())
}

/// How many experts there are; 0 where `engine` is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_num_experts(engine: *const dlf_engine) -> usize {
    // SAFETY: the caller's promise.
    unsafe { engine.as_ref() }.map_or(0, |engine| engine.ensemble.num_experts())
}

/// The tokens of `text_len` bytes of UTF-8. `add_special` also adds what the model wants around a prompt: for most a
/// BOS in front. `*len` gets their number, also where `capacity` is too small for them; `ids` may be null where it is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_tokenize(
    engine: *const dlf_engine,
    text: *const c_char,
    text_len: usize,
    add_special: bool,
    ids: *mut u32,
    capacity: usize,
    len: *mut usize,
) -> dlf_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (engine, text) =
            unsafe { (required(engine, "engine")?, slice(text.cast::<u8>(), text_len, "text")?) };
        let (ids, len) = (outs(ids, capacity, "ids")?, out(len, "len")?);
        let text = std::str::from_utf8(text).map_err(|_| Failure::invalid("text is not UTF-8"))?;
        let tokens = tokenizer(engine)?.encode(text, add_special)?;
        // SAFETY: checked by `out` and `outs`; the rest is the caller's promise.
        unsafe { give(&tokens, ids, capacity, len) }
    })
}

/// The text of `tokens` without special tokens, UTF-8 with a NUL behind it. `*len` gets its bytes without that NUL,
/// also where `capacity` is too small for both; `text` may be null where it is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_detokenize(
    engine: *const dlf_engine,
    tokens: dlf_tokens,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
) -> dlf_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (engine, tokens) = unsafe { (required(engine, "engine")?, tokens.get("tokens")?) };
        let (text, len) = (outs(text, capacity, "text")?, out(len, "len")?);
        let mut bytes = tokenizer(engine)?.decode(tokens).into_bytes();
        bytes.push(0);
        // SAFETY: checked by `out` and `outs`; the rest is the caller's promise.
        unsafe {
            let given = give(&bytes, text.cast::<u8>(), capacity, len);
            len.write(bytes.len() - 1);
            given
        }
    })
}

fn tokenizer(engine: &dlf_engine) -> Result<&Tokenizer, Failure> {
    engine.ensemble.tokenizer_of_any().ok_or_else(|| Failure {
        status: dlf_status::DLF_MODEL,
        message: "no model has a tokenizer: give token ids".to_owned(),
    })
}

/// Copies what fits entirely, and says how much there is.
///
/// # Safety
/// `buffer` has room for `capacity`, `len` may be written.
unsafe fn give<T: Copy>(
    values: &[T],
    buffer: *mut T,
    capacity: usize,
    len: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { len.write(values.len()) };
    if values.len() > capacity {
        let message = format!("the buffer has room for {capacity}, and {} are needed", values.len());
        return Err(Failure { status: dlf_status::DLF_BUFFER_TOO_SMALL, message });
    }
    if !values.is_empty() {
        // SAFETY: there is room for `capacity`, which is no less.
        unsafe { buffer.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
    Ok(())
}

/// No prompt, the paper's rule, greedy, at most 128 tokens.
#[unsafe(no_mangle)]
pub extern "C" fn dlf_request_default() -> dlf_request {
    dlf_request {
        prompts: std::ptr::null(),
        num_prompts: 0,
        forced: dlf_tokens::NONE,
        rule: std::ptr::null(),
        sampling: std::ptr::null(),
        max_new_tokens: 128,
        min_new_tokens: 0,
        stop: std::ptr::null(),
        num_stop: 0,
        stop_tokens: dlf_tokens::NONE,
        ignore_eos: false,
    }
}

/// Decodes requests together and calls `on_token` with each token as it is decided. A request that is wrong fails the
/// call before anything is computed; one that fails later ends there, the others go on, and the call then returns the
/// status of the first that did.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_generate(
    engine: *const dlf_engine,
    requests: *const dlf_request,
    num_requests: usize,
    on_token: dlf_on_token,
    user_data: *mut c_void,
) -> dlf_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let engine = unsafe { required(engine, "engine") }?;
        let on_token = on_token.ok_or_else(|| Failure::invalid("on_token is null"))?;
        // SAFETY: the caller's promise.
        let given = unsafe { slice(requests, num_requests, "requests") }?;
        let mut requests = Vec::with_capacity(given.len());
        for (index, given) in given.iter().enumerate() {
            // SAFETY: the caller's promise.
            let request = unsafe { request(engine, given) };
            requests.push(request.map_err(|failure| Failure {
                message: format!("request {index}: {}", failure.message),
                ..failure
            })?);
        }
        run(engine, requests, |step| {
            let decision = dlf_decision::from(&step.decision);
            let mut text = step.text.clone().into_bytes();
            text.push(0);
            let token = dlf_token {
                request: step.request,
                index: step.index,
                id: step.token,
                forced: step.forced,
                text: text.as_ptr().cast(),
                text_len: text.len() - 1,
                decision: &raw const decision,
                finish: match step.finish {
                    None => DLF_FINISH_NONE,
                    Some(FinishReason::Stop) => DLF_FINISH_STOP,
                    Some(FinishReason::Length) => DLF_FINISH_LENGTH,
                },
            };
            // SAFETY: it is the caller's function, called as its type says.
            unsafe { on_token(&raw const token, user_data) }
        })
    })
}

/// # Safety
/// What `given` points to is valid.
unsafe fn request(engine: &dlf_engine, given: &dlf_request) -> Result<Request, Failure> {
    // SAFETY: the caller's promise.
    let prompts = unsafe { slice(given.prompts, given.num_prompts, "prompts") }?;
    let models = engine.ensemble.models().len();
    if prompts.len() != 1 && prompts.len() != models {
        let message = format!("num_prompts: expected 1 or {models}, one a model, found {}", prompts.len());
        return Err(Failure::invalid(message));
    }
    let mut ids = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        // SAFETY: the caller's promise.
        ids.push(unsafe { prompt.get("a prompt") }?.to_vec());
    }
    // SAFETY: the caller's promise.
    let (forced, stop_tokens) =
        unsafe { (given.forced.get("forced")?, given.stop_tokens.get("stop_tokens")?) };
    // SAFETY: the caller's promise.
    let stop = unsafe { texts(given.stop, given.num_stop, "stop") }?;
    let request = Request {
        prompts: ids,
        forced: forced.to_vec(),
        // SAFETY: the caller's promise.
        rule: unsafe { rule(given.rule) }?,
        // SAFETY: the caller's promise.
        sampling: unsafe { sampling(given.sampling) }?,
        min_new_tokens: given.min_new_tokens,
        stop_strings: stop.into_iter().map(str::to_owned).collect(),
        stop_token_ids: stop_tokens.to_vec(),
        ignore_eos: given.ignore_eos,
        ..Request::new(Vec::new(), given.max_new_tokens)
    };
    request.validate(&engine.ensemble)?;
    Ok(request)
}

/// Decodes requests; a step that is answered with false ends its request.
fn run(
    engine: &dlf_engine,
    requests: Vec<Request>,
    mut on_step: impl FnMut(&Step) -> bool,
) -> Result<(), Failure> {
    if requests.is_empty() {
        return Ok(());
    }
    let limits = limits_for(&engine.ensemble, &requests, MOST_SEQUENCES);
    let options = BackendOptions { threads: engine.threads, ..BackendOptions::new(engine.device, limits) };
    let backend = options.open(Arc::clone(&engine.ensemble))?;
    let mut generator = Generator::new(Arc::clone(&engine.ensemble), backend);
    for request in requests {
        generator.push(request)?;
    }
    let mut first = None;
    while let Some(step) = generator.next() {
        match step {
            Ok(step) if on_step(&step) => {}
            Ok(step) => generator.cancel(step.request),
            Err(error @ Error::Request { .. }) => first = first.or(Some(error)),
            Err(error) => return Err(error.into()),
        }
    }
    first.map_or(Ok(()), |error| Err(error.into()))
}

/// Scores a text: `decisions[i]` is about `ids[i + 1]` after all ids before it, so there is room for `ids.len - 1`.
/// `rule` null is the paper's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlf_score(
    engine: *const dlf_engine,
    rule: *const dlf_rule,
    ids: dlf_tokens,
    decisions: *mut dlf_decision,
) -> dlf_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (engine, ids) = unsafe { (required(engine, "engine")?, ids.get("ids")?) };
        // SAFETY: the caller's promise.
        let rule = unsafe { crate::rule::rule(rule) }?;
        if ids.len() < 2 {
            return Err(Failure::invalid(format!("ids: expected at least 2, found {}", ids.len())));
        }
        let decisions = outs(decisions, ids.len() - 1, "decisions")?;
        let request = Request::score(ids.to_vec()).rule(rule);
        request.validate(&engine.ensemble)?;
        run(engine, vec![request], |step| {
            // SAFETY: there is room for every forced token, and only those have steps.
            unsafe { decisions.add(step.index).write((&step.decision).into()) };
            true
        })
    })
}
