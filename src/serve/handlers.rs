//! The paths, and what each answers.

use std::sync::Arc;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::Shared;
use super::answer::Answer;
use super::error::{ApiError, ApiResult};
use super::request::{Form, Prepared, text_of, tokens_of};
use super::stream::EventStream;
use crate::generate::Step;

type Server = State<Arc<Shared>>;

/// How much of a body that is too large is read all the same, as a multiple of the limit: a client that is still
/// sending sees the answer only after it has sent.
const READ_PAST_LIMIT: usize = 16;

/// All paths.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(async |method: Method, uri: Uri| ApiError::no_such_path(method.as_str(), uri.path()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::wrong_method(method.as_str(), uri.path())
        })
        .layer(from_fn_with_state(Arc::clone(&shared), guard))
        .with_state(shared)
}

/// Asks for the key, and counts the answers.
async fn guard(State(shared): Server, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let open = path == "/health";
    let response = if open || has_key(&shared, request.headers()) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    };
    shared.metrics.answer(&path, response.status().as_u16());
    response
}

fn has_key(shared: &Shared, headers: &HeaderMap) -> bool {
    let Some(key) = &shared.options.api_key else { return true };
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let Some((scheme, given)) = given.and_then(|given| given.split_at_checked(7)) else { return false };
    // All bytes are compared, so that the time says nothing of where they differ.
    let differs = given.iter().zip(key.as_bytes()).fold(0, |differs, (a, b)| differs | (a ^ b));
    scheme.eq_ignore_ascii_case(b"bearer ") && given.len() == key.len() && differs == 0
}

async fn completions(State(shared): Server, request: Request) -> ApiResult<Response> {
    answer(shared, Form::Completion, request).await
}

async fn chat_completions(State(shared): Server, request: Request) -> ApiResult<Response> {
    answer(shared, Form::Chat, request).await
}

/// Both APIs: read, check, decode, answer.
async fn answer(shared: Arc<Shared>, form: Form, request: Request) -> ApiResult<Response> {
    let body = read_json(&shared, request).await?;
    let prepared = {
        let shared = Arc::clone(&shared);
        blocking(move || Prepared::new(&shared, form, &body)).await?
    };
    let answer = Answer::new(Arc::clone(&shared), &prepared);
    let choices = prepared.choices.into_iter().enumerate();
    let requests: Vec<_> = choices.filter_map(|(index, choice)| Some((index, choice.request?))).collect();
    let mut left = requests.len();
    if shared.is_draining() {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    let mut deliveries = shared.engine.submit(requests, prepared.stream)?;
    let stopped = || ApiError::unavailable("the engine has stopped");
    if prepared.stream {
        // The first step decides the status.
        let first = match answer.is_finished() {
            true => None,
            false => Some(deliveries.recv().await.ok_or_else(stopped)?),
        };
        if let Some(Err(error)) = first.as_ref().map(|delivery| &delivery.steps) {
            return Err(error.clone());
        }
        let stream = EventStream::new(answer, deliveries, first);
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        return Ok((headers, Body::new(stream)).into_response());
    }
    let mut steps: Vec<Vec<Step>> = (0..answer.len()).map(|_| Vec::new()).collect();
    while left > 0 {
        let delivery = deliveries.recv().await.ok_or_else(stopped)?;
        if let Some(steps) = steps.get_mut(delivery.sequence) {
            *steps = delivery.steps?;
        }
        left -= 1;
    }
    Ok(Json(answer.whole(steps)).into_response())
}

/// Runs what may take long aside from the connections; a panic in it is one failed request.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> ApiResult<T> + Send + 'static) -> ApiResult<T> {
    let failed = |_| Err(ApiError::failed("the server failed on this request"));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(failed)
}

/// The body of a request, which must be JSON, not too large, and not too slow.
async fn read_json(shared: &Shared, request: Request) -> ApiResult<Bytes> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).map(str::trim);
    if !kind.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json")) {
        return Err(ApiError::not_json());
    }
    let limits = &shared.options.limits;
    let read = read_body(request.into_body(), limits.body_bytes);
    tokio::time::timeout(limits.body_time, read).await.unwrap_or_else(|_| Err(ApiError::too_slow()))
}

async fn read_body(mut body: Body, limit: usize) -> ApiResult<Bytes> {
    let (mut bytes, mut length) = (Vec::new(), 0);
    let patience = limit.saturating_mul(READ_PAST_LIMIT);
    if body.size_hint().lower() > patience as u64 {
        return Err(ApiError::body_too_large(limit));
    }
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|_| ApiError::invalid("the body of the request broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length <= limit {
            bytes.extend_from_slice(&data);
        } else if length > patience {
            break;
        }
    }
    if length > limit { Err(ApiError::body_too_large(limit)) } else { Ok(bytes.into()) }
}

async fn models(State(shared): Server) -> Json<Value> {
    let models: Vec<Value> = shared.model_ids().iter().map(|id| describe(&shared, id)).collect();
    Json(json!({ "object": "list", "data": models }))
}

async fn model(
    State(shared): Server,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> ApiResult<Json<Value>> {
    let (id, _) = shared.model(Some(&id))?;
    Ok(Json(describe(&shared, &id)))
}

fn describe(shared: &Shared, id: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": shared.created,
        "owned_by": "dlf-engine",
        "max_model_len": shared.context(),
    })
}

async fn tokenize(State(shared): Server, request: Request) -> ApiResult<Json<Value>> {
    let body = read_json(&shared, request).await?;
    blocking(move || {
        let tokens = tokens_of(&shared, &body)?;
        Ok(Json(json!({ "count": tokens.len(), "max_model_len": shared.context(), "tokens": tokens })))
    })
    .await
}

async fn detokenize(State(shared): Server, request: Request) -> ApiResult<Json<Value>> {
    let body = read_json(&shared, request).await?;
    blocking(move || {
        let text = text_of(&shared, &body)?;
        // vLLM's name, and llama.cpp's.
        Ok(Json(json!({ "prompt": text, "content": text })))
    })
    .await
}

async fn tokenizer_info(State(shared): Server) -> ApiResult<Json<Value>> {
    let (ensemble, tokenizer) = (&shared.ensemble, shared.tokenizer()?);
    let eos = tokenizer.special_token("eos_token").map(str::to_owned);
    let eos = eos.or_else(|| ensemble.eos_token_ids().first().and_then(|&id| tokenizer.token(id)));
    Ok(Json(json!({
        "bos_token": tokenizer.special_token("bos_token"),
        "eos_token": eos,
        "unk_token": tokenizer.special_token("unk_token"),
        "pad_token": tokenizer.special_token("pad_token"),
        "eos_token_ids": ensemble.eos_token_ids(),
        "chat_template": tokenizer.chat_template(),
        "vocab_size": ensemble.vocab_size(),
        "model_max_length": shared.context(),
    })))
}

async fn health(State(shared): Server) -> Response {
    let (status, word) = match (shared.is_draining(), shared.engine.runs()) {
        (false, true) => (StatusCode::OK, "ok"),
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "shutting down"),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped"),
    };
    (status, Json(json!({ "status": word }))).into_response()
}

async fn metrics(State(shared): Server) -> Response {
    let page = shared.metrics.page(&shared.ensemble, shared.engine.blocks);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}
