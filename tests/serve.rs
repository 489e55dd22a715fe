//! The server, over real connections, on the demo ensemble.
#![cfg(all(feature = "serve", feature = "demo"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

#[path = "support/http.rs"]
mod http;
#[path = "support/server.rs"]
mod server;

use dlf_engine::{FusionRule, Request};
use http::{get, post};
use serde_json::{Value, json};
use server::{Running, ensemble, generator, options};

const QUESTION: &str =
    "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\nAnswer:";

fn encode(text: &str) -> Vec<u32> {
    ensemble().tokenizer(0).unwrap().encode(text, true).unwrap()
}

/// What a request gives on an engine of its own: text and finish reason.
fn alone(request: Request) -> (String, &'static str) {
    let mut generator = generator();
    generator.push(request).unwrap();
    let steps: Vec<_> = generator.map(Result::unwrap).collect();
    let text = steps.iter().filter(|step| !step.forced).map(|step| step.text.as_str()).collect();
    (text, steps.last().unwrap().finish.unwrap().as_str())
}

/// A greedy completion.
fn complete(server: &Running, mut body: Value) -> Value {
    body["temperature"] = json!(0);
    let reply = post(server.at, "/v1/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.json()
}

#[test]
fn a_completion_is_what_the_engine_says() {
    let server = Running::new(options());
    let ids = encode(QUESTION);
    let (text, finish) = alone(Request::new(ids.clone(), 24));
    let reply = complete(&server, json!({ "model": "demo", "prompt": QUESTION, "max_tokens": 24 }));
    let choice = &reply["choices"][0];
    assert_eq!((choice["text"].as_str(), choice["finish_reason"].as_str()), (Some(&*text), Some(finish)));
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(choice["logprobs"], Value::Null);
    let usage = &reply["usage"];
    assert_eq!(usage["prompt_tokens"], ids.len());
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        ids.len() as u64 + usage["completion_tokens"].as_u64().unwrap()
    );

    // The same prompt in every form, and several of them at once.
    let other = "Question: Where was Simon Dalman born?\nAnswer:";
    let (other_text, _) = alone(Request::new(encode(other), 24));
    for (prompt, texts) in [
        (json!([QUESTION]), vec![&text]),
        (json!(ids), vec![&text]),
        (json!([ids]), vec![&text]),
        (json!([QUESTION, other]), vec![&text, &other_text]),
        (json!([encode(other), ids]), vec![&other_text, &text]),
    ] {
        let reply = complete(&server, json!({ "prompt": prompt, "max_tokens": 24 }));
        for (index, (choice, text)) in reply["choices"].as_array().unwrap().iter().zip(&texts).enumerate() {
            assert_eq!(
                (choice["index"].as_u64(), &choice["text"]),
                (Some(index as u64), &json!(text)),
                "{prompt}"
            );
        }
        assert_eq!(reply["choices"].as_array().unwrap().len(), texts.len());
    }
}

#[test]
fn echo_with_logprobs_scores_the_prompt() {
    let server = Running::new(options());
    let ids = encode("Question: Where was Simon Dalman born?\nAnswer: Warsaw");
    let mut generator = generator();
    generator.push(Request { max_new_tokens: 1, top_logprobs: 3, ..Request::score(ids.clone()) }).unwrap();
    let steps: Vec<_> = generator.map(Result::unwrap).collect();

    let body = json!({ "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": true, "seed": 1234 });
    let reply = complete(&server, body);
    let logprobs = &reply["choices"][0]["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
    assert_eq!(lists.map(|name| list(name).len()), [ids.len() + 1; 4]);
    assert_eq!((&list("token_logprobs")[0], &list("top_logprobs")[0]), (&Value::Null, &Value::Null));
    let mut greedy = 0;
    for (position, step) in steps.iter().enumerate() {
        let logprob = list("token_logprobs")[position + 1].as_f64().unwrap();
        // The number as written is exact; serde_json reads it to the last bit or the one beside it.
        assert!((logprob / step.decision.logprob_fused - 1.0).abs() < 4.0 * f64::EPSILON);
        let top = list("top_logprobs")[position + 1].as_object().unwrap().clone();
        let most = top.values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        // So lm-eval decides what is greedy.
        assert_eq!(logprob == most, step.token == step.decision.argmax_fused, "position {position}");
        greedy += u32::from(logprob == most);
    }
    assert!(greedy > 2 && (greedy as usize) < steps.len(), "{greedy} of {} are greedy", steps.len());

    // The text is the prompt's, and offsets lead to each token.
    let text: Vec<char> = reply["choices"][0]["text"].as_str().unwrap().chars().collect();
    for (token, offset) in list("tokens").iter().zip(list("text_offset")).skip(2) {
        let token: Vec<char> = token.as_str().unwrap().chars().collect();
        let offset = offset.as_u64().unwrap() as usize;
        // The first word's space belongs to its token and not to the text; after it they agree.
        if token.first() != Some(&'<') {
            assert_eq!(
                text[offset..].iter().take(token.len()).collect::<Vec<_>>(),
                token.iter().collect::<Vec<_>>()
            );
        }
    }

    // With max_tokens 0 the same without the last one; without logprobs the prompt alone.
    let body = json!({ "prompt": [ids], "max_tokens": 0, "logprobs": 1, "echo": true });
    let scored = complete(&server, body);
    let scored = &scored["choices"][0]["logprobs"]["token_logprobs"];
    assert_eq!(scored.as_array().unwrap()[..], list("token_logprobs")[..ids.len()]);
    let body = json!({ "prompt": "ab c", "max_tokens": 0, "echo": true });
    let echoed = complete(&server, body);
    assert_eq!(
        (&echoed["choices"][0]["text"], &echoed["usage"]["completion_tokens"]),
        (&json!("ab c"), &json!(0))
    );
}

#[test]
fn top_logprobs_are_those_of_the_fused_distribution() {
    let ids = encode(QUESTION);
    let vocab_size = ensemble().vocab_size();
    for rule in [
        FusionRule::default(),
        FusionRule::Static([0.7].into_iter().cycle().take(2).collect()),
        FusionRule::Large,
    ] {
        let mut generator = generator();
        let request = Request { top_logprobs: vocab_size, ..Request::score(ids.clone()).rule(rule.clone()) };
        generator.push(request).unwrap();
        for step in generator.map(Result::unwrap) {
            assert_eq!(step.top.len(), vocab_size);
            assert_eq!(step.top[0].0, step.decision.argmax_fused);
            assert!(step.top.windows(2).all(|pair| pair[0].1 >= pair[1].1), "in order");
            let own = step.top.iter().find(|(token, _)| *token == step.token).unwrap().1;
            // Nothing may be larger than the argmax, which was found in f32 among logits of size 10: 1e-5 is ten of
            // its units.
            assert!((own - step.decision.logprob_fused).abs() < 1e-5);
            let sum: f64 = step.top.iter().map(|(_, logprob)| logprob.exp()).sum();
            // The engine's sum of 1529 weights is in f32 lanes: its error is some 1e-7 a weight at the most.
            assert!((sum - 1.0).abs() < 1e-4, "{rule:?}: {sum}");
        }
    }
}

#[test]
fn several_choices_differ_and_a_seed_repeats_them() {
    let server = Running::new(options());
    let body = json!({ "prompt": "The", "n": 4, "seed": 7, "temperature": 1.5, "max_tokens": 12 });
    let texts = |body: &Value| -> Vec<String> {
        let reply = post(server.at, "/v1/completions", body).json();
        reply["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect()
    };
    let first = texts(&body);
    assert_eq!(first.len(), 4);
    assert!(first.iter().any(|text| *text != first[0]), "{first:?}");
    assert_eq!(texts(&body), first);
    // Without a seed, another text each time: 12 tokens at temperature 1.5 hardly come twice in eight draws.
    let body = json!({ "prompt": "The", "n": 8, "temperature": 1.5, "max_tokens": 12 });
    assert_ne!(texts(&body), texts(&body));
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_in_it() {
    let server = Running::new(options());
    let (text, _) = alone(Request::new(encode(QUESTION), 24));
    let stop = &text[4..6];
    for stop in [json!(stop), json!([stop, "never said"])] {
        let reply = complete(&server, json!({ "prompt": QUESTION, "max_tokens": 24, "stop": stop }));
        assert_eq!(reply["choices"][0]["text"], text[..4]);
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    }
}

/// The choices' texts, put together from a stream.
fn streamed(events: &[String], text_of: &str) -> Vec<String> {
    assert_eq!(events.last().unwrap(), "[DONE]");
    let mut texts = Vec::new();
    for event in &events[..events.len() - 1] {
        let chunk: Value = serde_json::from_str(event).unwrap();
        assert!(chunk.get("error").is_none(), "{event}");
        for choice in chunk["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            texts.resize(texts.len().max(index + 1), String::new());
            texts[index].push_str(choice.pointer(text_of).and_then(Value::as_str).unwrap_or_default());
        }
    }
    texts
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = Running::new(options());
    let body = json!({
        "prompt": [QUESTION, "The"], "max_tokens": 20, "n": 2, "seed": 3, "temperature": 0.8, "echo": true,
        "stop": ["####", "\n\n"], "stream_options": { "include_usage": true },
    });
    let whole = post(server.at, "/v1/completions", &body).json();
    let mut stream = body.clone();
    stream["stream"] = json!(true);
    let reply = post(server.at, "/v1/completions", &stream);
    assert!(reply.head.contains("content-type: text/event-stream"), "{}", reply.head);
    let events = reply.events();
    let texts = streamed(&events, "/text");
    let expected: Vec<_> =
        whole["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, expected);
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
    let finishes = events.iter().filter(|event| event.contains("\"finish_reason\":\"")).count();
    assert_eq!(finishes, 4, "one a choice");
}

#[test]
fn a_chat_goes_through_the_template() {
    let server = Running::new(options());
    let question = "Tom has 17 apples and buys 25 more. How many apples does Tom have?";
    let tokenizer = ensemble().tokenizer(0).unwrap().clone();
    let message = dlf_engine::tokenizer::Message { role: "user".to_owned(), content: question.to_owned() };
    let prompt = tokenizer.encode(&tokenizer.apply_chat_template(&[message]).unwrap(), false).unwrap();
    let (text, finish) = alone(Request::new(prompt, 24));
    let body = json!({
        "model": "demo", "messages": [{ "role": "user", "content": question }], "temperature": 0, "max_tokens": 24,
        "logprobs": true, "top_logprobs": 2,
    });
    let reply = post(server.at, "/v1/chat/completions", &body).json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": text }));
    assert_eq!((&reply["object"], &choice["finish_reason"]), (&json!("chat.completion"), &json!(finish)));
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len() as u64, reply["usage"]["completion_tokens"].as_u64().unwrap());
    for entry in entries {
        // Greedy: the token is the most probable of the two.
        let (token, logprob) = (&entry["token"], &entry["logprob"]);
        assert_eq!(
            (token, logprob),
            (&entry["top_logprobs"][0]["token"], &entry["top_logprobs"][0]["logprob"])
        );
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
    }

    let mut body = body;
    body["stream"] = json!(true);
    body["messages"] = json!([{ "role": "user", "content": [{ "type": "text", "text": question }] }]);
    let events = post(server.at, "/v1/chat/completions", &body).events();
    assert_eq!(streamed(&events, "/delta/content"), [text]);
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(first["object"], "chat.completion.chunk");
}

#[test]
fn fusion_is_chosen_by_the_body_or_the_model_id() {
    let server = Running::new(options());
    let ids = encode(QUESTION);
    let ask = |extra: Value| {
        let mut body = json!({ "prompt": QUESTION, "max_tokens": 16 });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        complete(&server, body)["choices"][0].clone()
    };
    let text = |rule: FusionRule| json!(alone(Request::new(ids.clone(), 16).rule(rule)).0);
    assert_eq!(ask(json!({ "dlf": { "method": "large" } }))["text"], text(FusionRule::Large));
    assert_eq!(ask(json!({ "model": "demo:small" }))["text"], text(FusionRule::Small));
    let sums = ensemble().expert_name(1).unwrap().to_owned();
    assert_eq!(ask(json!({ "model": format!("demo:expert:{sums}") }))["text"], text(FusionRule::Expert(1)));
    let fixed = FusionRule::Static([0.0, 1.2].into_iter().collect());
    assert_eq!(ask(json!({ "dlf": { "method": "static", "alpha": [0.0, 1.2] } }))["text"], text(fixed));

    let choice = ask(json!({ "dlf": { "grid": "0.5:1.5:0.5:inclusive", "every": 2, "return_alpha": true } }));
    let dlf = &choice["dlf"];
    assert_eq!(dlf["experts"].as_array().unwrap().len(), 2);
    let alpha = dlf["alpha"].as_array().unwrap();
    assert_eq!(alpha.len(), dlf["expert"].as_array().unwrap().len());
    for of_experts in alpha {
        let of_experts: Vec<f64> =
            of_experts.as_array().unwrap().iter().map(|a| a.as_f64().unwrap()).collect();
        assert_eq!(
            of_experts.iter().filter(|&&a| a != 0.0).count(),
            1,
            "one expert is active: {of_experts:?}"
        );
        assert!(of_experts.iter().all(|a| [0.0, 0.5, 1.0, 1.5].contains(a)), "{of_experts:?}");
    }
    assert!(ask(json!({})).get("dlf").is_none());
}

#[test]
fn models_and_tokenizer_are_described() {
    let server = Running::new(options());
    let models = get(server.at, "/v1/models").json();
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids[..3], ["demo", "demo:dynamic", "demo:static"]);
    assert_eq!(get(server.at, "/v1/models/demo:large").json()["id"], "demo:large");
    assert_eq!(get(server.at, "/v1/models/other").status, 404);

    let text = "Héllo 42 日本";
    let reply = post(server.at, "/tokenize", &json!({ "prompt": text, "add_special_tokens": false })).json();
    let tokens = ensemble().tokenizer(0).unwrap().encode(text, false).unwrap();
    assert_eq!((&reply["tokens"], &reply["count"]), (&json!(tokens), &json!(tokens.len())));
    assert_eq!(post(server.at, "/tokenize", &json!({ "prompt": text })).json()["count"], tokens.len() + 1);
    assert_eq!(post(server.at, "/detokenize", &json!({ "tokens": tokens })).json()["prompt"], text);
    let info = get(server.at, "/tokenizer_info").json();
    assert_eq!((&info["eos_token"], &info["bos_token"]), (&json!("</s>"), &json!("<s>")));
    assert!(info["chat_template"].as_str().unwrap().contains("messages"));
    assert_eq!(get(server.at, "/health").json(), json!({ "status": "ok" }));
    server.wait_for("dlf_answers_total", |count| count > 6.0);
}

#[test]
fn parts_of_characters_are_labelled_and_whole_ones_streamed() {
    let server = Running::new(options());
    // 語 is E8 AA 9E: its bytes as tokens, each of them as likely as the bias makes it.
    let ids = ensemble().tokenizer(0).unwrap().encode("語", false).unwrap();
    assert!(ids.len() > 1, "it is no token of its own: {ids:?}");
    let body = json!({
        "prompt": "The", "max_tokens": 5, "temperature": 0, "logit_bias": { ids[0].to_string(): 100 },
        "logprobs": 0, "stop": ["語"],
    });
    let whole = post(server.at, "/v1/completions", &body).json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "\u{fffd}".repeat(5));
    let labels = choice["logprobs"]["tokens"].as_array().unwrap();
    assert!(labels.iter().all(|label| label.as_str().unwrap().starts_with("bytes:\\xe8")), "{labels:?}");
    let mut stream = body.clone();
    stream["stream"] = json!(true);
    let events = post(server.at, "/v1/completions", &stream).events();
    assert_eq!(streamed(&events, "/text"), ["\u{fffd}".repeat(5)]);

    // The prompt ends inside the character, and the text begins with the rest of it: no byte is lost or said twice.
    let mut prompt = encode("a");
    prompt.extend(&ids[..ids.len() - 1]);
    let last = ids[ids.len() - 1].to_string();
    let body = json!({ "prompt": prompt, "max_tokens": 1, "logit_bias": { last: 100 }, "echo": true, "logprobs": 0 });
    let tokens = complete(&server, body)["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
    assert_eq!(tokens.len(), prompt.len() + 1);
}

#[cfg(feature = "cli")]
#[test]
fn the_binary_serves_until_it_is_interrupted() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};

    let binary = assert_cmd::cargo::cargo_bin("dlf-engine");
    for signal in ["INT", "TERM"] {
        let mut child = Command::new(&binary)
            .args(["serve", "--port", "0", "--method", "large", "--model-name", "mine", "--threads", "1"])
            .env("DLF_ENGINE_API_KEY", "key")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let at = line.strip_prefix("mine at http://").and_then(|rest| rest.split(' ').next());
        let at: std::net::SocketAddr = at.unwrap_or_else(|| panic!("{line}")).parse().unwrap();
        assert!(at.ip().is_loopback());
        assert_eq!(get(at, "/v1/models").status, 401);
        let body = json!({ "prompt": QUESTION, "max_tokens": 8, "temperature": 0 }).to_string();
        let headers = format!("{}Authorization: Bearer key\r\n", http::JSON);
        let reply =
            http::receive(http::send(at, "POST", "/v1/completions", &headers, body.as_bytes())).json();
        let (text, _) = alone(Request::new(encode(QUESTION), 8).rule(FusionRule::Large));
        assert_eq!((&reply["model"], &reply["choices"][0]["text"]), (&json!("mine"), &json!(text)));
        let taken = Command::new(&binary).args(["serve", "--port", &at.port().to_string()]).output().unwrap();
        assert_eq!(taken.status.code(), Some(1));
        let says = String::from_utf8(taken.stderr).unwrap();
        assert!(says.contains(&format!("--port {}", at.port())) && says.contains("in use"), "{says}");
        assert!(
            Command::new("kill")
                .args([&format!("-{signal}"), &child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.wait().unwrap().code(), Some(0));
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
    }
}
