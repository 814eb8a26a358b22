//! What a client is told when it doesn't get what it asked for.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// Each says what to do about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Invalid(String),
    #[error("no adapter {name:?}; there are: {}", known.join(", "))]
    UnknownAdapter { name: String, known: Vec<String> },
    #[error("{0}")]
    Forbidden(String),
    #[error("no {0}; see docs/serving.md for what there is")]
    NotFound(String),
    #[error("{method} isn't for {path}; see docs/serving.md for what is")]
    Method { method: String, path: String },
    #[error("the body is larger than {0} bytes; send a shorter prompt")]
    TooLarge(usize),
    #[error("the adapter can't be used: {0}")]
    Adapter(String),
    #[error("{0} requests are waiting already; try again after a second")]
    Busy(usize),
    #[error("the server is shutting down; send the request to another one")]
    Closing,
    #[error("the request failed in the server: {0}")]
    Failed(String),
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Refusal::Invalid(_) => StatusCode::BAD_REQUEST,
            Refusal::UnknownAdapter { .. } | Refusal::NotFound(_) => StatusCode::NOT_FOUND,
            Refusal::Forbidden(_) => StatusCode::FORBIDDEN,
            Refusal::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Refusal::Adapter(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Refusal::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
            Refusal::Closing => StatusCode::SERVICE_UNAVAILABLE,
            Refusal::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for Refusal {
    /// In the form of OpenAI's errors.
    fn into_response(self) -> Response {
        let status = self.status();
        let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
        let body = json!({ "error": { "message": self.to_string(), "type": kind, "code": status.as_u16() } });
        let mut response = (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response();
        if matches!(self, Refusal::Busy(_) | Refusal::Closing) {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}
