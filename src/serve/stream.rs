//! An answer as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use hyper::body::Frame;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::answer::Answer;
use super::engine::Delivery;
use super::error::ApiError;

/// A comment goes out after so long without an event: proxies close what is silent.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The body. Dropped with the connection, it drops the receiver, and the engine cancels what it still decodes.
pub(super) struct EventStream {
    answer: Answer,
    deliveries: UnboundedReceiver<Delivery>,
    ready: VecDeque<Bytes>,
    keep_alive: Interval,
    ended: bool,
}

impl EventStream {
    /// A stream that begins with `first`, which has come already where anything is computed.
    pub(super) fn new(
        mut answer: Answer,
        deliveries: UnboundedReceiver<Delivery>,
        first: Option<Delivery>,
    ) -> Self {
        let ready =
            (0..answer.len()).filter_map(|index| answer.opening(index)).map(|chunk| event(&chunk)).collect();
        let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stream = Self { answer, deliveries, ready, keep_alive, ended: false };
        match first {
            Some(delivery) => stream.take(delivery),
            None => stream.end_if_finished(),
        }
        stream
    }

    fn take(&mut self, delivery: Delivery) {
        match delivery.steps {
            Ok(steps) => {
                let chunks = steps.into_iter().filter_map(|step| self.answer.step(delivery.sequence, step));
                self.ready.extend(chunks.map(|chunk| event(&chunk)));
                self.end_if_finished();
            }
            // The status is out already: all that is left is to say it in the stream.
            Err(error) => self.end(Some(event(&error.to_json()))),
        }
    }

    fn end_if_finished(&mut self) {
        if self.answer.is_finished() {
            let closing = self.answer.closing();
            self.end(closing.map(|chunk| event(&chunk)));
        }
    }

    fn end(&mut self, last: Option<Bytes>) {
        self.ready.extend(last);
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.ended = true;
        self.deliveries.close();
    }
}

fn event(chunk: &Value) -> Bytes {
    Bytes::from(format!("data: {chunk}\n\n"))
}

impl HttpBody for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                self.keep_alive.reset();
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            match self.deliveries.poll_recv(cx) {
                Poll::Ready(Some(delivery)) => self.take(delivery),
                Poll::Ready(None) => {
                    let error = ApiError::unavailable("the engine has stopped").to_json();
                    self.end(Some(event(&error)));
                }
                Poll::Pending => {
                    return match self.keep_alive.poll_tick(cx) {
                        Poll::Ready(_) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b": \n\n"))))),
                        Poll::Pending => Poll::Pending,
                    };
                }
            }
        }
    }
}
