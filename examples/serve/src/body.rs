//! Reading the body of a request, within bounds.

use crate::refusal::Refusal;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use std::convert::Infallible;

/// The largest body that is kept.
const KEPT: usize = 1 << 20;
/// The largest that is read to its end. A client that is answered while it
/// still sends finds the connection closed instead of the answer.
const READ: usize = 64 << 20;

/// A body, or why there is none.
pub struct Body(Result<Bytes, Refusal>);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Infallible;

    async fn from_request(request: Request, _: &S) -> Result<Self, Infallible> {
        Ok(Body(read(request).await))
    }
}

async fn read(request: Request) -> Result<Bytes, Refusal> {
    let mut body = request.into_body();
    let (mut kept, mut length) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::Invalid(format!("the body: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length > READ {
            break;
        }
        if length <= KEPT {
            kept.extend_from_slice(&data);
        }
    }
    if length > KEPT { Err(Refusal::TooLarge(KEPT)) } else { Ok(kept.into()) }
}

impl Body {
    pub fn parse<T: DeserializeOwned>(self) -> Result<T, Refusal> {
        serde_json::from_slice(&self.0?).map_err(|error| Refusal::Invalid(format!("the body: {error}")))
    }
}
