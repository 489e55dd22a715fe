//! What a client is told when something is wrong: OpenAI's shape, with the right status.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::Error;

/// Seconds after which a client that found the queue full may come again.
const RETRY_AFTER: u64 = 1;

/// An answer of `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    kind: &'static str,
    pub(super) message: String,
    /// The field of the body.
    pub(super) param: Option<String>,
    code: Option<&'static str>,
}

/// The result of whatever a client may have got wrong.
pub(super) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None }
    }

    /// 400, or what else the client can mend.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 for the value of a field.
    pub(super) fn field(name: &str, expected: &str, found: impl std::fmt::Display) -> Self {
        let message = format!("`{name}`: expected {expected}, found {found}");
        Self { param: Some(name.to_owned()), ..Self::invalid(message) }
    }

    /// 400: the prompt, or the prompt and what was asked for, is too long.
    pub(super) fn too_long(message: String) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    /// 401.
    pub(super) fn unauthorized() -> Self {
        let message = "a valid API key is needed, as in `Authorization: Bearer KEY`";
        let code = Some("invalid_api_key");
        Self { status: StatusCode::UNAUTHORIZED, code, ..Self::invalid(message) }
    }

    /// 404 for a path.
    pub(super) fn no_such_path(method: &str, path: &str) -> Self {
        Self { status: StatusCode::NOT_FOUND, ..Self::invalid(format!("there is no {method} {path}")) }
    }

    /// 404 for the `model` of a request.
    pub(super) fn no_such_model(model: &str, known: &[String]) -> Self {
        let message = format!("there is no model {model:?}; there are {}", known.join(", "));
        Self {
            status: StatusCode::NOT_FOUND,
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..Self::invalid(message)
        }
    }

    /// 405.
    pub(super) fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} doesn't take {method}");
        Self { status: StatusCode::METHOD_NOT_ALLOWED, ..Self::invalid(message) }
    }

    /// 408: the body did not come.
    pub(super) fn too_slow() -> Self {
        let message = "the body of the request did not come in time";
        Self { status: StatusCode::REQUEST_TIMEOUT, ..Self::invalid(message) }
    }

    /// 413.
    pub(super) fn body_too_large(limit: usize) -> Self {
        let message = format!("the body of a request may have {limit} bytes");
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, ..Self::invalid(message) }
    }

    /// 415.
    pub(super) fn not_json() -> Self {
        let message = "the body must be JSON, with `Content-Type: application/json`";
        Self { status: StatusCode::UNSUPPORTED_MEDIA_TYPE, ..Self::invalid(message) }
    }

    /// 429: the queue is full.
    pub(super) fn busy() -> Self {
        let message = "the queue is full; try again";
        let code = Some("rate_limit_exceeded");
        Self { code, ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message) }
    }

    /// 500.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503.
    pub(super) fn unavailable(message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    /// The same error about a field.
    pub(super) fn about(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    /// The body of the answer.
    pub(super) fn to_json(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// What the engine says of a request. Paths of the server's files stay with the server.
impl From<&Error> for ApiError {
    fn from(error: &Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Request { source, .. } => Self::from(&**source),
            Error::Parameter { name, expected, found } => Self::field(name, expected, found),
            Error::PromptTooLong { .. } | Error::CacheFull { .. } => Self::too_long(message),
            Error::EmptyPrompt { .. } | Error::TokenOutOfRange { .. } => {
                Self::invalid(message).about("prompt")
            }
            Error::MissingModel { .. } => Self::invalid(message).about("dlf.method"),
            Error::NoCandidate { .. } => Self::invalid(message),
            Error::NoTokenizer { role, .. } => {
                Self::invalid(format!("the {role} model has no tokenizer: give token ids")).about("prompt")
            }
            Error::Template { reason, .. } => {
                Self::invalid(format!("the chat template: {reason}")).about("messages")
            }
            Error::Tokenizer { reason, .. } => {
                Self::invalid(format!("the tokenizer: {reason}")).about("prompt")
            }
            Error::NotFinite { .. } => Self::failed(message),
            _ => Self::failed("the engine failed"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
