//! The server under load, and against clients that are wrong, slow, impatient or many.
#![cfg(all(feature = "serve", feature = "demo"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

#[path = "support/http.rs"]
mod http;
#[path = "support/server.rs"]
mod server;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use dlf_engine::serve::RequestLimits;
use dlf_engine::{Request, SamplingParams};
use http::{JSON, Reply, get, post, receive, send};
use serde_json::{Value, json};
use server::{Running, ensemble, generator, options};

/// Checks OpenAI's shape, and returns `param`.
fn error(reply: &Reply, status: u16) -> Value {
    assert_eq!(reply.status, status, "{reply:?}");
    let error = &reply.json()["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{reply:?}");
    assert!(error["type"].is_string(), "{reply:?}");
    let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    error["param"].clone()
}

fn answers(server: &Running) {
    let reply = post(server.at, "/v1/completions", &json!({ "prompt": "The", "max_tokens": 2 }));
    assert_eq!(reply.status, 200, "{reply:?}");
}

/// That no sequence runs or waits, and all blocks are back.
fn is_idle(server: &Running) {
    for name in ["dlf_running_sequences", "dlf_waiting_sequences", "dlf_cache_used_blocks"] {
        server.wait_for(name, |value| value == 0.0);
    }
}

#[test]
fn bad_input_gets_the_error_shape_and_the_server_goes_on() {
    let server = Running::new(options());
    let (completions, chat) = ("/v1/completions", "/v1/chat/completions");
    let message = json!([{ "role": "user", "content": "a" }]);
    for (path, body, param) in [
        (completions, json!([]), None),
        (completions, json!({}), Some("prompt")),
        (completions, json!({ "prompt": 3 }), Some("prompt")),
        (completions, json!({ "prompt": [] }), Some("prompt")),
        (completions, json!({ "prompt": [[]] }), Some("prompt")),
        (completions, json!({ "prompt": ["a", 3] }), Some("prompt")),
        (completions, json!({ "prompt": [[1, "a"]] }), Some("prompt")),
        (completions, json!({ "prompt": [-1] }), Some("prompt")),
        (completions, json!({ "prompt": [1_000_000] }), Some("prompt")),
        (completions, json!({ "prompt": vec![5; 300] }), None),
        (completions, json!({ "prompt": "a", "max_tokens": -1 }), Some("max_tokens")),
        (completions, json!({ "prompt": "a", "max_tokens": "9" }), Some("max_tokens")),
        (completions, json!({ "prompt": "a", "max_tokens": 1_000_000 }), Some("max_tokens")),
        (completions, json!({ "prompt": "a", "n": 0 }), Some("n")),
        (completions, json!({ "prompt": "a", "n": 1000 }), Some("n")),
        (completions, json!({ "prompt": vec!["a"; 100], "n": 2 }), Some("prompt")),
        (completions, json!({ "prompt": "a", "best_of": 3 }), Some("best_of")),
        (completions, json!({ "prompt": "a", "suffix": "b" }), Some("suffix")),
        (completions, json!({ "prompt": "a", "tools": [{}] }), Some("tools")),
        (completions, json!({ "prompt": "a", "stop": "" }), Some("stop")),
        (completions, json!({ "prompt": "a", "stop": ["", ""] }), Some("stop")),
        (completions, json!({ "prompt": "a", "stop": vec!["x"; 65] }), Some("stop")),
        (completions, json!({ "prompt": "a", "temperature": -1 }), Some("temperature")),
        (completions, json!({ "prompt": "a", "temperature": 1e300 }), Some("temperature")),
        (completions, json!({ "prompt": "a", "temperature": "hot" }), Some("temperature")),
        (completions, json!({ "prompt": "a", "top_p": 0 }), Some("top_p")),
        (completions, json!({ "prompt": "a", "logprobs": 21 }), Some("logprobs")),
        (completions, json!({ "prompt": "a", "logit_bias": { "x": 1 } }), Some("logit_bias")),
        (completions, json!({ "prompt": "a", "logit_bias": { "1": 1e9 } }), Some("logit_bias")),
        (completions, json!({ "prompt": "a", "stream": "yes" }), Some("stream")),
        (completions, json!({ "prompt": "a", "seed": 1.5 }), Some("seed")),
        (completions, json!({ "prompt": "a", "dlf": 1 }), Some("dlf")),
        (completions, json!({ "prompt": "a", "dlf": { "mode": "x" } }), Some("dlf.mode")),
        (completions, json!({ "prompt": "a", "dlf": { "method": "x" } }), Some("dlf.method")),
        (completions, json!({ "prompt": "a", "dlf": { "alpha": "x" } }), Some("dlf.alpha")),
        (
            completions,
            json!({ "prompt": "a", "dlf": { "method": "static", "alpha": [1, 2, 3] } }),
            Some("dlf"),
        ),
        // The server's own method is dynamic, which has none.
        (completions, json!({ "prompt": "a", "dlf": { "alpha": 1 } }), Some("dlf.alpha")),
        (completions, json!({ "prompt": "a", "dlf": { "method": "large", "alpha": 1 } }), Some("dlf.alpha")),
        (completions, json!({ "prompt": "a", "dlf": { "method": "large", "every": 1 } }), Some("dlf.every")),
        (completions, json!({ "prompt": "a", "dlf": { "grid": "0:9:0.1" } }), Some("dlf.grid")),
        (completions, json!({ "prompt": "a", "dlf": { "grid": { "start": 0 } } }), Some("dlf.grid")),
        (completions, json!({ "prompt": "a", "dlf": { "every": 0 } }), Some("dlf.every")),
        (completions, json!({ "prompt": "a", "dlf": { "search": "best" } }), Some("dlf.search")),
        (completions, json!({ "prompt": "a", "dlf": { "objective": "none" } }), Some("dlf.objective")),
        (chat, json!({}), Some("messages")),
        (chat, json!({ "messages": [] }), Some("messages")),
        (chat, json!({ "messages": ["a"] }), Some("messages")),
        (chat, json!({ "messages": [{ "role": "user" }] }), Some("messages")),
        (
            chat,
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            Some("messages"),
        ),
        (chat, json!({ "messages": message, "top_logprobs": 3 }), Some("top_logprobs")),
        (chat, json!({ "messages": message, "tools": [{}] }), Some("tools")),
        (
            chat,
            json!({ "messages": message, "response_format": { "type": "json_object" } }),
            Some("response_format"),
        ),
        (chat, json!({ "messages": message, "max_tokens": 0 }), Some("max_tokens")),
        ("/tokenize", json!({}), Some("prompt")),
        ("/detokenize", json!({ "tokens": "a" }), Some("tokens")),
        ("/detokenize", json!({ "tokens": [99999] }), Some("tokens")),
    ] {
        for stream in [false, true] {
            let mut body = body.clone();
            if let (true, Some(body)) = (stream && body.get("stream").is_none(), body.as_object_mut()) {
                body.insert("stream".to_owned(), json!(true));
            }
            let reply = post(server.at, path, &body);
            assert_eq!(error(&reply, 400), json!(param), "{body}: {reply:?}");
        }
    }
    let unknown = json!({ "prompt": "a", "model": "gpt-4" });
    assert_eq!(error(&post(server.at, completions, &unknown), 404), "model");
    answers(&server);
    is_idle(&server);
}

#[test]
fn what_is_no_request_is_told_so() {
    let server = Running::new(options());
    let path = "/v1/completions";
    let raw = |headers: &str, body: &[u8]| receive(send(server.at, "POST", path, headers, body));
    for body in ["", "{", "nul", "\"\\ud800\"", "{\"prompt\": \"a\"} x", &"[".repeat(100_000)] {
        error(&raw(JSON, body.as_bytes()), 400);
    }
    error(&raw(JSON, b"{\"prompt\": \"\xff\xfe\"}"), 400);
    error(&raw("", b"{\"prompt\": \"a\"}"), 415);
    error(&raw("Content-Type: text/plain\r\n", b"{\"prompt\": \"a\"}"), 415);
    assert_eq!(raw("Content-Type: application/json; charset=utf-8\r\n", b"{\"prompt\": \"a\"}").status, 200);
    error(&get(server.at, path), 405);
    error(&get(server.at, "/v1/nothing"), 404);
    error(&get(server.at, "/../../etc/passwd"), 404);
    error(&post(server.at, "/metrics", &json!({})), 405);
    // What isn't HTTP ends its connection, and no more.
    for noise in [
        &b"\x16\x03\x01\x02\x00"[..],
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(server.at).unwrap();
        stream.write_all(noise).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    }
    answers(&server);
}

#[test]
fn limits_hold() {
    let limits = RequestLimits {
        body_bytes: 2000,
        prompt_tokens: 20,
        new_tokens: 8,
        sequences: 3,
        body_time: Duration::from_millis(300),
        head_time: Duration::from_millis(300),
        ..RequestLimits::default()
    };
    let server = Running::new(dlf_engine::serve::Options { limits, ..options() });
    let ask = |body: Value| post(server.at, "/v1/completions", &body);
    error(&ask(json!({ "prompt": "a".repeat(3000) })), 413);
    error(&ask(json!({ "prompt": "a".repeat(1_000_000) })), 413);
    let long = ask(json!({ "prompt": vec![5; 21] }));
    assert_eq!(
        (error(&long, 400), long.json()["error"]["code"].clone()),
        (json!("prompt"), json!("context_length_exceeded"))
    );
    assert_eq!(error(&ask(json!({ "prompt": "a", "max_tokens": 9 })), 400), "max_tokens");
    assert_eq!(error(&ask(json!({ "prompt": "a", "n": 4 })), 400), "n");
    assert_eq!(ask(json!({ "prompt": vec![5; 20], "max_tokens": 8, "n": 3 })).status, 200);

    // A body that never comes, and a head that never ends.
    let mut slow = TcpStream::connect(server.at).unwrap();
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{").unwrap();
    error(&receive(slow), 408);
    let mut slow = TcpStream::connect(server.at).unwrap();
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nHost:").unwrap();
    slow.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut answer = Vec::new();
    slow.read_to_end(&mut answer).expect("the server closes the connection");
    answers(&server);
}

#[test]
fn a_key_is_asked_for() {
    let server = Running::new(dlf_engine::serve::Options { api_key: Some("secret".to_owned()), ..options() });
    let with = |header: &str| receive(send(server.at, "GET", "/v1/models", header, b""));
    for wrong in [
        "",
        "Authorization: Bearer secre\r\n",
        "Authorization: Bearer secret2\r\n",
        "Authorization: Bearer Secret\r\n",
        "Authorization: secret\r\n",
        "Authorization: Basic secret\r\n",
    ] {
        let reply = with(wrong);
        error(&reply, 401);
        assert!(reply.head.contains("www-authenticate: bearer"));
    }
    assert_eq!(with("Authorization: Bearer secret\r\n").status, 200);
    error(&get(server.at, "/metrics"), 401);
    error(&get(server.at, "/nothing"), 401);
    assert_eq!(get(server.at, "/health").status, 200);
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let server = Running::new(options());
    let body = |stream: bool| {
        let body =
            json!({ "prompt": "The", "max_tokens": 230, "ignore_eos": true, "n": 8, "stream": stream });
        body.to_string()
    };
    for stream in [false, true] {
        let before = server.metric("dlf_cancelled_sequences_total");
        let client = send(server.at, "POST", "/v1/completions", JSON, body(stream).as_bytes());
        // As many as run at once wait behind them, and leave as well.
        let behind = send(server.at, "POST", "/v1/completions", JSON, body(stream).as_bytes());
        server.wait_for("dlf_cache_used_blocks", |blocks| blocks > 0.0);
        server.wait_for("dlf_waiting_sequences", |waiting| waiting > 0.0);
        drop((client, behind));
        server.wait_for("dlf_cancelled_sequences_total", |cancelled| cancelled > before);
        is_idle(&server);
        assert_eq!(server.metric("dlf_cancelled_sequences_total"), before + 16.0);
    }
    answers(&server);
}

#[test]
fn a_client_that_does_not_read_stops_nobody() {
    let server = Running::new(options());
    let body = json!({ "prompt": "The", "max_tokens": 200, "ignore_eos": true, "n": 4, "stream": true, "logprobs": 5 });
    let slow = send(server.at, "POST", "/v1/completions", JSON, body.to_string().as_bytes());
    answers(&server);
    is_idle(&server);
    let events = receive(slow).events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert_eq!(events.iter().filter(|event| event.contains("\"finish_reason\":\"length\"")).count(), 4);
}

#[test]
fn a_full_queue_is_told_at_once() {
    let server = Running::new(dlf_engine::serve::Options { sequences: 2, queue: 2, ..options() });
    let long = json!({ "prompt": "The", "max_tokens": 200, "ignore_eos": true, "n": 4 });
    let running = send(server.at, "POST", "/v1/completions", JSON, long.to_string().as_bytes());
    server.wait_for("dlf_running_sequences", |running| running > 0.0);
    for stream in [false, true] {
        let reply = post(server.at, "/v1/completions", &json!({ "prompt": "a", "stream": stream }));
        error(&reply, 429);
        assert!(reply.head.contains("retry-after: 1"), "{}", reply.head);
    }
    // More than would ever fit isn't worth a second try.
    error(&post(server.at, "/v1/completions", &json!({ "prompt": "a", "n": 5 })), 400);
    assert_eq!(receive(running).status, 200);
    is_idle(&server);
    answers(&server);
}

/// Requests of mixed length and kind; every eighth begins like the one before.
fn mixed(index: usize) -> Value {
    let words =
        ["apples", "Tom", "buys", "25", "more", "a red house", "Where was", "born?", "日本", "letters"];
    let prompt: Vec<&str> =
        (0..1 + index * 7 % 40).map(|k| words[(index / 8 * 3 + k * k) % words.len()]).collect();
    let method = ["dynamic", "static", "large", "dynamic"][index % 4];
    json!({
        "prompt": prompt.join(" "),
        "max_tokens": 1 + index * 5 % 32,
        "temperature": if index.is_multiple_of(2) { 0.0 } else { 0.9 },
        "seed": index,
        "stream": index.is_multiple_of(3),
        "dlf": { "method": method },
    })
}

/// The text that a request of [`mixed`] gives alone.
fn mixed_alone(index: usize) -> String {
    let body = mixed(index);
    let tokenizer = ensemble().tokenizer(0).unwrap().clone();
    let prompt = tokenizer.encode(body["prompt"].as_str().unwrap(), true).unwrap();
    let sampling = SamplingParams {
        temperature: body["temperature"].as_f64().unwrap() as f32,
        seed: index as u64,
        ..SamplingParams::default()
    };
    let request = Request::new(prompt, body["max_tokens"].as_u64().unwrap() as usize).sampling(sampling);
    let request = match body["dlf"]["method"].as_str().unwrap() {
        "static" => request.rule(dlf_engine::FusionRule::Static(std::iter::once(1.0).collect())),
        "large" => request.rule(dlf_engine::FusionRule::Large),
        _ => request,
    };
    let mut generator = generator();
    generator.push(request).unwrap();
    generator.map(|step| step.unwrap().text).collect()
}

fn text_of(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{reply:?}");
    if !reply.head.contains("text/event-stream") {
        return reply.json()["choices"][0]["text"].as_str().unwrap().to_owned();
    }
    let mut events = reply.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let text = |event: &String| {
        serde_json::from_str::<Value>(event).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    events.iter().map(text).collect()
}

#[test]
fn two_hundred_at_once_lose_nothing_and_change_nothing() {
    const CLIENTS: usize = 200;
    let server = Running::new(options());
    let expected: Vec<String> = (0..CLIENTS).map(mixed_alone).collect();
    for _round in 0..2 {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|index| {
                let at = server.at;
                std::thread::spawn(move || text_of(&post(at, "/v1/completions", &mixed(index))))
            })
            .collect();
        for (index, client) in clients.into_iter().enumerate() {
            assert_eq!(client.join().unwrap(), expected[index], "request {index}: {}", mixed(index));
        }
        is_idle(&server);
    }
    assert_eq!(server.metric("dlf_cancelled_sequences_total"), 0.0);
    assert_eq!(server.metric("dlf_cache_blocks"), server::BLOCKS as f64);
}

#[test]
fn shutting_down_ends_what_is_in_flight_first() {
    let mut server = Running::new(options());
    let body = json!({ "prompt": "The", "max_tokens": 60, "ignore_eos": true, "stream": true });
    let client = send(server.at, "POST", "/v1/completions", JSON, body.to_string().as_bytes());
    server.wait_for("dlf_running_sequences", |running| running > 0.0);
    server.join();
    let events = receive(client).events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert!(TcpStream::connect(server.at).is_err());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Running::new(options());
    let body = json!({ "prompt": "The", "max_tokens": 250, "ignore_eos": true, "n": 100, "stream": true });
    let _client = send(server.at, "POST", "/v1/completions", JSON, body.to_string().as_bytes());
    server.wait_for("dlf_running_sequences", |running| running > 0.0);
    let stop = server.stop.clone().unwrap();
    let start = Instant::now();
    stop.blocking_send(()).unwrap();
    stop.blocking_send(()).unwrap();
    drop(stop);
    server.join();
    // Far less than the 20 s of grace, or the minute that 25,000 tokens take.
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
