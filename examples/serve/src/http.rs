//! The HTTP API: checks what comes in, leaves it for the model's thread, and
//! waits for the answer without holding a thread.

use crate::adapters::BASE;
use crate::body::Body;
use crate::llama::Result;
use crate::queue::{Change, Completion, Job};
use crate::refusal::Refusal;
use crate::shared::Shared;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// What is served, and within which bounds.
pub struct App {
    pub shared: Arc<Shared>,
    pub vocabulary: i64,
    /// Of a prompt and its answer, in tokens.
    pub max_length: usize,
    /// Where adapters may be loaded from while the server runs.
    pub adapters: Option<PathBuf>,
}

pub fn router(app: App) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(models))
        .route("/v1/adapters/{name}", put(load_adapter).delete(unload_adapter))
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok"))
        .fallback(async |uri: Uri| Refusal::NotFound(uri.path().into()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| Refusal::Method {
            method: method.to_string(),
            path: uri.path().into(),
        })
        .with_state(Arc::new(app))
}

/// The fields of OpenAI's that matter here. Others are refused, since an answer
/// that silently leaves one out isn't the one that was asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompletionRequest {
    model: String,
    prompt: Prompt,
    #[serde(default = "sixteen")]
    max_tokens: usize,
    #[serde(default = "one")]
    temperature: f64,
    seed: Option<u64>,
    stop: Option<OneOrMany>,
    #[serde(default)]
    stream: bool,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "prompt: expected a text or a list of token ids")]
enum Prompt {
    Text(String),
    Tokens(Vec<i64>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "stop: expected a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn sixteen() -> usize {
    16
}

fn one() -> f64 {
    1.0
}

async fn completions(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let answered = complete(&app, body).await;
    if !matches!(answered, Ok(_) | Err(Refusal::Failed(_))) {
        app.shared.metrics.refused();
    }
    answered
}

async fn complete(app: &App, body: Body) -> Result<Response, Refusal> {
    let request: CompletionRequest = body.parse()?;
    let model = request.model.clone();
    let (answer, completion) = oneshot::channel();
    let job = app.job(request, answer)?;
    let prompt_tokens = job.prompt.len();
    app.shared.queue.push(job)?;
    let Completion { text, tokens, finish_reason } = received(completion).await?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(reply(json!({
        "id": format!("cmpl-{:016x}", fastrand::u64(..)),
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [{ "index": 0, "text": text, "finish_reason": finish_reason }],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        },
    })))
}

impl App {
    fn job(&self, request: CompletionRequest, answer: crate::queue::Answer<Completion>) -> Result<Job, Refusal> {
        let invalid = |message: String| Err(Refusal::Invalid(message));
        let CompletionRequest { model, prompt, max_tokens, temperature, seed, stop, stream } = request;
        if stream {
            return invalid("stream: answers come as a whole; leave it out".into());
        }
        if !(0.0..=100.0).contains(&temperature) {
            return invalid(format!("temperature: expected 0 to 100, found {temperature}"));
        }
        let known = self.shared.models();
        if !known.contains(&model) {
            return Err(Refusal::UnknownAdapter { name: model, known });
        }
        let prompt = match prompt {
            Prompt::Text(text) => self.shared.text.encode(&text).map_err(Refusal::Invalid)?,
            Prompt::Tokens(tokens) => tokens,
        };
        if prompt.is_empty() {
            return invalid("prompt: expected at least one token".into());
        }
        if let Some(id) = prompt.iter().find(|id| !(0..self.vocabulary).contains(id)) {
            return invalid(format!("prompt: the model has no token {id}, only those below {}", self.vocabulary));
        }
        let (length, most) = (prompt.len(), self.max_length);
        if max_tokens == 0 || length + max_tokens > most {
            let found = format!("the prompt has {length} tokens and max_tokens is {max_tokens}");
            return invalid(format!("max_tokens: expected at least 1, and at most {most} with the prompt; {found}"));
        }
        let stop = match stop {
            None => Vec::new(),
            Some(OneOrMany::One(text)) => vec![text],
            Some(OneOrMany::Many(texts)) => texts,
        };
        if stop.iter().any(String::is_empty) {
            return invalid("stop: expected texts that aren't empty".into());
        }
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        Ok(Job { adapter: model, prompt, max_tokens, temperature, seed, stop, arrived: Instant::now(), answer })
    }

    /// The folder of an adapter, which must be in that of all adapters.
    fn folder(&self, path: &std::path::Path) -> Result<PathBuf, Refusal> {
        let Some(all) = &self.adapters else {
            return Err(Refusal::Forbidden("start the server with --adapters DIR to load adapters from there".into()));
        };
        let absolute = |path: PathBuf| {
            path.canonicalize().map_err(|error| Refusal::Adapter(format!("{}: {error}", path.display())))
        };
        let (all, path) = (absolute(all.clone())?, absolute(all.join(path))?);
        if path.starts_with(&all) {
            return Ok(path);
        }
        Err(Refusal::Forbidden(format!("{} isn't in {}; move the adapter there", path.display(), all.display())))
    }
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let models: Vec<Value> = app.shared.models().iter().map(|id| json!({ "id": id, "object": "model" })).collect();
    reply(json!({ "object": "list", "data": models }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AdapterRequest {
    path: PathBuf,
}

async fn load_adapter(State(app): State<Arc<App>>, Path(name): Path<String>, body: Body) -> Result<Response, Refusal> {
    check_name(&name).map_err(Refusal::Invalid)?;
    let AdapterRequest { path } = body.parse()?;
    let folder = app.folder(&path)?;
    let (answer, loaded) = oneshot::channel();
    app.shared.queue.change(Change::Load { name: name.clone(), folder, answer })?;
    let loaded = received(loaded).await?;
    let status = if loaded.swapped { StatusCode::OK } else { StatusCode::CREATED };
    let body = json!({ "name": name, "swapped": loaded.swapped, "milliseconds": loaded.milliseconds });
    Ok((status, reply(body)).into_response())
}

async fn unload_adapter(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    check_name(&name).map_err(Refusal::Invalid)?;
    let (answer, unloaded) = oneshot::channel();
    app.shared.queue.change(Change::Unload { name: name.clone(), answer })?;
    received(unloaded).await?;
    Ok(reply(json!({ "name": name, "deleted": true })))
}

/// Names that fit into a URL.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name == BASE || name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        let expected = format!("up to 64 letters, digits, dots, dashes and underscores, other than {BASE}");
        return Err(format!("the adapter's name: expected {expected}, found {name:?}"));
    }
    Ok(())
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.shared.metrics.text(app.shared.queue.len());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn received<T>(answer: oneshot::Receiver<Result<T, Refusal>>) -> Result<T, Refusal> {
    answer.await.unwrap_or(Err(Refusal::Failed("the model's thread ended".into())))
}

fn reply(body: Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
