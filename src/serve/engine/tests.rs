//! An engine thread that dies: every client is told, and the server can still be shut down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::fusion::FusionRule;
use crate::serve::{Options, RequestLimits, Server, Shared};

#[allow(dead_code, reason = "other tests use more of it")]
#[path = "../../../tests/support/http.rs"]
mod http;

/// A server whose engine is `thread`.
fn server(thread: impl FnOnce(UnboundedReceiver<Job>) + Send + 'static) -> Server {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let (jobs, incoming) = mpsc::unbounded_channel();
    let places = Arc::new(Semaphore::new(8));
    let options = Options {
        model: "demo".to_owned(),
        rule: FusionRule::default(),
        api_key: None,
        sequences: 4,
        queue: 4,
        limits: RequestLimits::default(),
        grace: Duration::from_secs(60),
    };
    let shared = Shared {
        metrics: Arc::new(Metrics::new(ensemble.models().len())),
        ensemble,
        options,
        engine: Engine { jobs, places, capacity: 8, blocks: 100 },
        draining: AtomicBool::new(false),
        answers: AtomicU64::new(0),
        created: 0,
    };
    Server { shared: Arc::new(shared), engine: std::thread::spawn(move || thread(incoming)) }
}

fn ask(at: SocketAddr, stream: bool) -> http::Reply {
    http::post(at, "/v1/completions", &json!({ "prompt": "The", "max_tokens": 9, "stream": stream }))
}

fn is_error(error: &Value) {
    assert_eq!(error["error"]["message"], "the engine has stopped");
    assert_eq!(error["error"]["type"], "server_error");
    assert!(error["error"]["param"].is_null() && error["error"]["code"].is_null());
}

#[test]
fn all_are_told_when_the_engine_dies() {
    // Two requests have been taken from the queue, and one stream of them has begun; a third waits in the queue.
    let dies = |mut incoming: UnboundedReceiver<Job>| {
        let taken = [incoming.blocking_recv().unwrap(), incoming.blocking_recv().unwrap()];
        taken.iter().filter(|job| job.stream).for_each(|job| job.deliver(Ok(Vec::new())));
        while incoming.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // As a panic, without its message in the test's output.
        std::panic::resume_unwind(Box::new("the engine's end"));
    };
    let server = server(dies);
    let shared = Arc::clone(&server.shared);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let at = listener.local_addr().unwrap();
    let (stop, stopped) = mpsc::channel(1);
    let running = std::thread::spawn(move || server.run(listener, stopped));

    let taken = [true, false].map(|stream| std::thread::spawn(move || ask(at, stream)));
    while shared.engine.places.available_permits() > 6 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let third = ask(at, false);
    let [stream, whole] = taken.map(|client| client.join().unwrap());
    assert_eq!(stream.status, 200, "{stream:?}");
    let events = stream.events();
    assert_eq!((events.len(), events[1].as_str()), (2, "[DONE]"), "{events:?}");
    is_error(&serde_json::from_str(&events[0]).unwrap());
    // And whoever comes later.
    for reply in [whole, third, ask(at, false), ask(at, true)] {
        assert_eq!(reply.status, 503, "{reply:?}");
        assert!(reply.head.contains("retry-after"), "{reply:?}");
        is_error(&reply.json());
    }
    let health = http::get(at, "/health");
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("the engine has stopped")));
    assert_eq!(http::get(at, "/metrics").status, 200);
    assert_eq!(shared.engine.places.available_permits(), 8, "no place is lost");

    drop((stop, shared));
    let ended = running.join().unwrap();
    assert!(ended.unwrap_err().to_string().contains("the engine's thread panicked"));
}
