//! The server over models that fail: each client is told, and the others are served.
#![cfg(all(feature = "serve", feature = "demo"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use more of it")]
#[path = "support/http.rs"]
mod http;
#[allow(dead_code, reason = "other tests use more of it")]
#[path = "support/server.rs"]
mod server;
#[path = "support/spoilt.rs"]
mod spoilt;

use dlf_engine::FusionRule;
use dlf_engine::serve::Options;
use http::{Reply, get, post};
use serde_json::{Value, json};
use server::{Running, options};

/// A token of the vocabulary that is no byte and no special token.
const TOKEN: u32 = 700;

fn large_alone() -> Options {
    Options { rule: FusionRule::Large, ..options() }
}

/// The message of an error in OpenAI's shape.
fn message(error: &Value, kind: &str) -> String {
    let error = &error["error"];
    let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    assert_eq!(error["type"], kind);
    error["message"].as_str().unwrap().to_owned()
}

fn answers(server: &Running) {
    let reply = post(server.at, "/v1/completions", &json!({ "prompt": "The", "max_tokens": 2 }));
    assert_eq!((reply.status, get(server.at, "/health").status), (200, 200), "{reply:?}");
}

#[test]
fn a_template_that_fails_is_an_error_of_its_request() {
    let doubling =
        "{% set ns = namespace(a='a') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}";
    let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    for (template, says) in [
        ("{{ raise_exception('only the user may speak') }}", "only the user may speak"),
        ("{{ messages[0].content + 1 }}", "line 1"),
        ("{{ messages | no_such_filter }}", "line 1"),
        ("{% if %}", "syntax error"),
        (endless, "doesn't come to an end"),
        (doubling, "takes too much memory"),
    ] {
        let server = Running::with(spoilt::large(|dir| spoilt::chat_template(dir, template)), large_alone());
        let messages = json!([{ "role": "user", "content": "a" }]);
        for (path, stream) in
            [("/v1/chat/completions", false), ("/v1/chat/completions", true), ("/tokenize", false)]
        {
            let reply = post(server.at, path, &json!({ "messages": messages, "stream": stream }));
            assert_eq!(reply.status, 400, "{template}: {reply:?}");
            let error = reply.json();
            assert!(message(&error, "invalid_request_error").contains(says), "{template}: {reply:?}");
            assert_eq!(error["error"]["param"], "messages");
        }
        answers(&server);
    }
}

#[test]
fn a_model_that_computes_nan_fails_the_request_that_met_it() {
    let server = Running::with(spoilt::large(|dir| spoilt::nan_embedding(dir, TOKEN)), large_alone());
    let ask = |body: Value| post(server.at, "/v1/completions", &body);
    let fails = |reply: &Reply| {
        assert_eq!(reply.status, 500, "{reply:?}");
        assert!(message(&reply.json(), "server_error").contains("large"), "{reply:?}");
    };
    for stream in [false, true] {
        fails(&ask(json!({ "prompt": [5, TOKEN], "stream": stream })));
        // One of two prompts fails: there is no half of an answer.
        fails(&ask(json!({ "prompt": [[5, TOKEN], [5, TOKEN, 6]], "stream": stream })));
        answers(&server);
    }

    // The first token is computed soundly, and is the one that spoils the second.
    let late = |stream: bool| {
        let bias = json!({ TOKEN.to_string(): 100 });
        ask(json!({ "prompt": [5], "logit_bias": bias, "max_tokens": 5, "stream": stream, "logprobs": 1 }))
    };
    fails(&late(false));
    let reply = late(true);
    assert_eq!(reply.status, 200, "it had begun: {reply:?}");
    let events = reply.events();
    assert_eq!(events.len(), 3, "a token, the error, the end: {events:?}");
    let error: Value = serde_json::from_str(&events[1]).unwrap();
    assert!(message(&error, "server_error").contains("large"), "{events:?}");
    assert_eq!(events[2], "[DONE]");
    answers(&server);
    for name in ["dlf_running_sequences", "dlf_waiting_sequences", "dlf_cache_used_blocks"] {
        server.wait_for(name, |value| value == 0.0);
    }
}
