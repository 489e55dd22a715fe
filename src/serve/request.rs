//! From the body of a request to sequences that the engine can run. All of it is checked here: what passes fails
//! only where the engine does.

use std::hash::{BuildHasher, RandomState};

use serde_json::{Value, json};

use super::Shared;
use super::alpha::{self, Fusion};
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, ids};
use crate::generate::{Request, blocks_needed};
use crate::json::show;
use crate::sampling::SamplingParams;
use crate::tokenizer::{Message, Tokenizer};

/// Stop strings of one request.
const MOST_STOPS: usize = 64;
/// Alternatives named for each token.
const MOST_LOGPROBS: usize = 20;
/// Tokens of a completion where a request doesn't say: OpenAI's.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// Which of the two APIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `/v1/completions`
    Completion,
    /// `/v1/chat/completions`
    Chat,
}

/// A request that can run.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) form: Form,
    /// As the client named it.
    pub(super) model: String,
    pub(super) choices: Vec<Choice>,
    /// How many tokens each position's log-probabilities name; `None` where none are wanted.
    pub(super) logprobs: Option<usize>,
    pub(super) return_alpha: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Tokens of all prompts, each counted once.
    pub(super) prompt_tokens: usize,
}

/// One choice of the answer.
#[derive(Debug)]
pub(super) struct Choice {
    /// `None` where there is nothing to compute.
    pub(super) request: Option<Request>,
    /// The prompt, where the answer repeats it.
    pub(super) echo: Option<String>,
    /// The prompt's first token, where its log-probabilities are wanted: nothing predicts it.
    pub(super) first: Option<u32>,
}

/// A prompt as it was given.
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prepared {
    /// Reads and checks a body.
    pub(super) fn new(shared: &Shared, form: Form, body: &[u8]) -> ApiResult<Self> {
        let body = parse(body)?;
        let fields = Fields::of_body(&body)?;
        refuse_unsupported(&fields, form)?;
        let (model, rule) = shared.model(fields.string("model")?)?;
        let Fusion { rule, return_alpha } = alpha::read(&fields, &rule, &shared.ensemble)?;
        let logprobs = logprobs(&fields, form)?;
        let echo = form == Form::Completion && fields.flag("echo")?;
        let n = fields.count("n", 1, shared.options.limits.sequences)?.unwrap_or(1);
        if let Some(best_of) = fields.count("best_of", 1, usize::MAX)?.filter(|&best_of| best_of != n) {
            return Err(ApiError::field("best_of", &format!("n, which is {n}"), best_of));
        }
        let stream = fields.flag("stream")?;
        let include_usage = match fields.object("stream_options", "stream_options.")? {
            Some(options) => options.flag("include_usage")?,
            None => false,
        };

        let mut template = Request { rule, ..Request::new(Vec::new(), 0) };
        template.max_new_tokens = new_tokens(&fields, form, shared.options.limits.new_tokens)?;
        template.sampling = sampling(&fields)?;
        template.top_logprobs = logprobs.unwrap_or(0);
        stops(&fields, shared, &mut template)?;
        let prompts = prompts(&fields, form, shared)?;
        let sequences = prompts.len().saturating_mul(n);
        let most = shared.options.limits.sequences.min(shared.engine.capacity);
        if sequences > most {
            let expected = format!("at most {most} sequences: prompts times n");
            return Err(ApiError::field("prompt", &expected, sequences));
        }

        let mut prompt_tokens = 0;
        let mut choices = Vec::with_capacity(sequences);
        for (text, prompts) in prompts {
            let first = &template.rule;
            let used = shared.ensemble.models_for(first).first().copied().unwrap_or(0);
            let own = prompts.get(if prompts.len() == 1 { 0 } else { used }).cloned().unwrap_or_default();
            prompt_tokens += own.len();
            let scored = echo && logprobs.is_some();
            let mut request = Request { prompts, ..template.clone() };
            let mut choice = Choice { request: None, echo: None, first: None };
            if echo {
                choice.echo = Some(text.unwrap_or_else(|| shared.decode(&own)));
            }
            if scored {
                // One text for all models: that of the first.
                let mut ids = own;
                request.forced = ids.split_off(ids.len().min(1));
                choice.first = ids.first().copied();
                request.prompts = vec![ids];
            }
            check_length(shared, &request)?;
            for index in 0..n as u64 {
                let mut request = request.clone();
                request.sampling.seed = request.sampling.seed.wrapping_add(index);
                let echo = choice.echo.clone();
                let runs = request.max_new_tokens > 0 || !request.forced.is_empty();
                choices.push(Choice { request: runs.then_some(request), echo, first: choice.first });
            }
        }
        Ok(Self { form, model, choices, logprobs, return_alpha, stream, include_usage, prompt_tokens })
    }
}

/// A body as JSON.
pub(super) fn parse(body: &[u8]) -> ApiResult<Value> {
    serde_json::from_slice(body).map_err(|error| ApiError::invalid(format!("the body is not JSON: {error}")))
}

/// Refuses what would change the answer if it were computed.
fn refuse_unsupported(fields: &Fields<'_>, form: Form) -> ApiResult<()> {
    fields.unsupported("suffix", &[json!("")])?;
    fields.unsupported("response_format", &[json!({ "type": "text" })])?;
    fields.unsupported("tools", &[json!([])])?;
    fields.unsupported("functions", &[json!([])])?;
    fields.unsupported("tool_choice", &[json!("none"), json!("auto")])?;
    if form == Form::Chat {
        fields.unsupported("modalities", &[json!(["text"])])?;
        fields.unsupported("audio", &[])?;
    }
    Ok(())
}

fn logprobs(fields: &Fields<'_>, form: Form) -> ApiResult<Option<usize>> {
    match form {
        Form::Completion => fields.count("logprobs", 0, MOST_LOGPROBS),
        Form::Chat => {
            let wanted = fields.flag("logprobs")?;
            let top = fields.count("top_logprobs", 0, MOST_LOGPROBS)?;
            match top {
                Some(top) if top > 0 && !wanted => {
                    Err(ApiError::field("top_logprobs", "`logprobs` to be true", top))
                }
                top => Ok(wanted.then(|| top.unwrap_or(0))),
            }
        }
    }
}

/// Tokens to generate at most: what is asked for, or a default that the context cuts.
fn new_tokens(fields: &Fields<'_>, form: Form, most: usize) -> ApiResult<usize> {
    let asked = match form {
        Form::Completion => fields.count("max_tokens", 0, most)?,
        Form::Chat => match fields.count("max_completion_tokens", 1, most)? {
            None => fields.count("max_tokens", 1, most)?,
            some => some,
        },
    };
    Ok(asked.unwrap_or(match form {
        Form::Completion => DEFAULT_COMPLETION_TOKENS.min(most),
        Form::Chat => most,
    }))
}

fn sampling(fields: &Fields<'_>) -> ApiResult<SamplingParams> {
    let number = |name: &str, default: f32| Ok::<_, ApiError>(fields.number(name)?.unwrap_or(default));
    let params = SamplingParams {
        temperature: number("temperature", 1.0)?,
        top_k: fields.count("top_k", 0, usize::MAX)?.unwrap_or(0),
        top_p: number("top_p", 1.0)?,
        min_p: number("min_p", 0.0)?,
        repetition_penalty: number("repetition_penalty", 1.0)?,
        presence_penalty: number("presence_penalty", 0.0)?,
        frequency_penalty: number("frequency_penalty", 0.0)?,
        logit_bias: logit_bias(fields)?,
        // Without a seed, another text each time.
        seed: fields.seed("seed")?.unwrap_or_else(|| RandomState::new().hash_one(0)),
    };
    params.validate().map_err(|error| ApiError::from(&error))?;
    Ok(params)
}

fn logit_bias(fields: &Fields<'_>) -> ApiResult<Vec<(u32, f32)>> {
    const EXPECTED: &str = "an object of numbers from -100 to 100 by token id";
    let Some(biases) = fields.get("logit_bias") else { return Ok(Vec::new()) };
    let wrong = || fields.wrong("logit_bias", EXPECTED, biases);
    let read = |(id, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
        Some((id.parse().ok()?, bias as f32))
    };
    biases.as_object().and_then(|biases| biases.iter().map(read).collect()).ok_or_else(wrong)
}

/// What ends the text.
fn stops(fields: &Fields<'_>, shared: &Shared, request: &mut Request) -> ApiResult<()> {
    let expected = format!("a string that isn't empty, or up to {MOST_STOPS} of them");
    let text = |stop: &Value| stop.as_str().filter(|stop| !stop.is_empty()).map(str::to_owned);
    request.stop_strings = fields.one_or_more("stop", &expected, MOST_STOPS, text)?.unwrap_or_default();
    if !request.stop_strings.is_empty() && shared.ensemble.tokenizer_of_any().is_none() {
        return Err(ApiError::invalid("`stop`: no model has a tokenizer").about("stop"));
    }
    request.stop_token_ids = fields.ids("stop_token_ids")?.unwrap_or_default();
    request.ignore_eos = fields.flag("ignore_eos")?;
    request.min_new_tokens = fields.count("min_tokens", 0, request.max_new_tokens)?.unwrap_or(0);
    Ok(())
}

/// The text where there is one, and the ids for each model, of every prompt.
type Encoded = Vec<(Option<String>, Vec<Vec<u32>>)>;

fn prompts(fields: &Fields<'_>, form: Form, shared: &Shared) -> ApiResult<Encoded> {
    if form == Form::Chat {
        return Ok(vec![(None, chat_prompts(&messages(fields)?, shared)?)]);
    }
    let add_special = fields.get("add_special_tokens").is_none() || fields.flag("add_special_tokens")?;
    let encode = |prompt| {
        Ok(match prompt {
            Prompt::Ids(ids) => (None, vec![ids]),
            Prompt::Text(text) => {
                let prompts = each_model(shared, |tokenizer| tokenizer.encode(&text, add_special))?;
                (Some(text), prompts)
            }
        })
    };
    raw_prompts(fields)?.into_iter().map(encode).collect()
}

/// `prompt`: a text, a list of texts, token ids, or a list of lists of them.
fn raw_prompts(fields: &Fields<'_>) -> ApiResult<Vec<Prompt>> {
    const EXPECTED: &str = "a string, a list of strings, token ids, or a list of lists of token ids";
    let Some(prompt) = fields.get("prompt") else {
        return Err(ApiError::field("prompt", EXPECTED, "nothing"));
    };
    let text = |value: &Value| value.as_str().map(|text| Prompt::Text(text.to_owned()));
    let read = match prompt {
        Value::String(text) => Some(vec![Prompt::Text(text.clone())]),
        Value::Array(list) if list.is_empty() => None,
        Value::Array(list) => ids(list).map(|ids| vec![Prompt::Ids(ids)]).or_else(|| {
            list.iter().map(|one| text(one).or_else(|| ids(one.as_array()?).map(Prompt::Ids))).collect()
        }),
        _ => None,
    };
    read.ok_or_else(|| fields.wrong("prompt", EXPECTED, prompt))
}

/// `encode` for each model; one entry where it is the same for all.
fn each_model(
    shared: &Shared,
    encode: impl Fn(&Tokenizer) -> crate::Result<Vec<u32>>,
) -> ApiResult<Vec<Vec<u32>>> {
    let ensemble = &shared.ensemble;
    let mut prompts = Vec::with_capacity(ensemble.models().len());
    for model in 0..ensemble.models().len() {
        let tokenizer = ensemble.tokenizer(model).or_else(|| ensemble.tokenizer_of_any());
        let tokenizer = tokenizer
            .ok_or_else(|| ApiError::invalid("no model has a tokenizer: give token ids").about("prompt"))?;
        prompts.push(encode(tokenizer).map_err(|error| ApiError::from(&error))?);
    }
    if prompts.windows(2).all(|pair| pair[0] == pair[1]) {
        prompts.truncate(1);
    }
    Ok(prompts)
}

/// `messages`: contents are texts, or lists of parts of type `text`.
fn messages(fields: &Fields<'_>) -> ApiResult<Vec<Message>> {
    const EXPECTED: &str = "a list of {\"role\": …, \"content\": …}, at least one";
    let wrong = |found: &Value| fields.wrong("messages", EXPECTED, found);
    let list = fields.get("messages").ok_or_else(|| ApiError::field("messages", EXPECTED, "nothing"))?;
    let list = list.as_array().filter(|list| !list.is_empty()).ok_or_else(|| wrong(list))?;
    list.iter().map(|message| read_message(message).ok_or_else(|| wrong(message))).collect()
}

fn read_message(message: &Value) -> Option<Message> {
    let role = message.get("role")?.as_str()?.to_owned();
    let part = |part: &Value| {
        let is_text = part.get("type")?.as_str()? == "text";
        is_text.then(|| part.get("text")?.as_str().map(str::to_owned))?
    };
    let content = match message.get("content")? {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(part).collect::<Option<Vec<_>>>()?.concat(),
        _ => return None,
    };
    Some(Message { role, content })
}

/// Each model's own template; a model that has none gets the contents alone.
fn chat_prompts(messages: &[Message], shared: &Shared) -> ApiResult<Vec<Vec<u32>>> {
    let ensemble = &shared.ensemble;
    let mut tokenizers = (0..ensemble.models().len()).filter_map(|model| ensemble.tokenizer(model));
    if !tokenizers.any(Tokenizer::has_chat_template) {
        return Err(ApiError::invalid("none of the models has a chat template; use /v1/completions")
            .about("messages"));
    }
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    let contents = contents.join("\n\n");
    each_model(shared, |tokenizer| match tokenizer.has_chat_template() {
        true => tokenizer.encode(&tokenizer.apply_chat_template(messages)?, false),
        false => tokenizer.encode(&contents, true),
    })
}

/// Checks a request against the models, the limits and the cache.
fn check_length(shared: &Shared, request: &Request) -> ApiResult<()> {
    // Where nothing is generated, the prompt is checked as if one token were.
    let checked = Request { max_new_tokens: request.max_new_tokens.max(1), ..request.clone() };
    let new_tokens = checked.validate(&shared.ensemble).map_err(|error| ApiError::from(&error))?;
    let prompt = request.prompts.iter().map(Vec::len).max().unwrap_or(0) + request.forced.len();
    let most = shared.options.limits.prompt_tokens;
    if prompt > most {
        return Err(
            ApiError::too_long(format!("a prompt may have {most} tokens, found {prompt}")).about("prompt")
        );
    }
    if blocks_needed(1, prompt + new_tokens) > shared.engine.blocks {
        let message = format!("{prompt} tokens and {new_tokens} more don't fit the key-value cache");
        return Err(ApiError::too_long(message));
    }
    Ok(())
}

/// The ids that a body of `/tokenize` asks for.
pub(super) fn tokens_of(shared: &Shared, body: &[u8]) -> ApiResult<Vec<u32>> {
    let body = parse(body)?;
    let fields = Fields::of_body(&body)?;
    shared.model(fields.string("model")?)?;
    if fields.get("messages").is_some() {
        return Ok(chat_prompts(&messages(&fields)?, shared)?.into_iter().next().unwrap_or_default());
    }
    // llama.cpp's servers call it `content`.
    let text = match fields.string("prompt")? {
        None => fields.string("content")?,
        text => text,
    };
    let text = text.ok_or_else(|| ApiError::field("prompt", "a string", "nothing"))?;
    let add_special = fields.get("add_special_tokens").is_none() || fields.flag("add_special_tokens")?;
    shared.tokenizer()?.encode(text, add_special).map_err(|error| ApiError::from(&error))
}

/// The text that a body of `/detokenize` asks for.
pub(super) fn text_of(shared: &Shared, body: &[u8]) -> ApiResult<String> {
    let body = parse(body)?;
    let fields = Fields::of_body(&body)?;
    shared.model(fields.string("model")?)?;
    let tokens = fields.ids("tokens")?.ok_or_else(|| ApiError::field("tokens", "token ids", "nothing"))?;
    let tokenizer = shared.tokenizer()?;
    let vocab_size = shared.ensemble.vocab_size();
    match tokens.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(ApiError::field("tokens", &format!("ids below {vocab_size}"), show(&json!(id)))),
        None => Ok(tokenizer.decode(&tokens)),
    }
}

#[cfg(all(test, feature = "demo"))]
mod tests;
