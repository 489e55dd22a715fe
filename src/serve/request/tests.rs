//! Arbitrary bodies: whatever comes is a request that can run or an error in OpenAI's shape, and never a panic.
//!
//! `DLF_PROPTEST_CASES` sets the number of cases; the gate runs a minute of them.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::Config;
use serde_json::Map;

use super::*;
use crate::backend::{BackendOptions, Device, Limits};
use crate::ensemble::Ensemble;
use crate::fusion::FusionRule;
use crate::serve::{Options, RequestLimits, Server};

fn shared() -> &'static Shared {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = SERVER.get_or_init(|| {
        let ensemble = Arc::new(Ensemble::demo().unwrap());
        let limits = Limits::for_vocabulary(ensemble.vocab_size(), 2, 40);
        let backend = BackendOptions { threads: Some(1), ..BackendOptions::new(Device::Cpu, limits) };
        let options = Options {
            model: "demo".to_owned(),
            rule: FusionRule::default(),
            api_key: None,
            sequences: 2,
            queue: 20,
            limits: RequestLimits::default(),
            grace: Duration::ZERO,
        };
        Server::new(ensemble, backend, options).unwrap()
    });
    &server.shared
}

fn cases() -> Config {
    let cases = std::env::var("DLF_PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    Config { failure_persistence: None, ..Config::with_cases(cases.unwrap_or(256)) }
}

/// Any JSON, most of it small.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(json!(0.5)),
        ".{0,12}".prop_map(Value::from),
        prop::sample::select(known_words()).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((key(), inner), 0..5)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

fn known_words() -> Vec<&'static str> {
    vec![
        "",
        "demo",
        "demo:large",
        "demo:expert:",
        "user",
        "system",
        "text",
        "dynamic",
        "static",
        "large",
        "expert",
        "expert:sums",
        "refine",
        "both",
        "0:2:0.1",
        "0:1:0.5:inclusive",
        "::",
        "\u{0}",
        "日本",
        "👍🏽",
        "{{ x }}",
        "<s>",
        "</s>",
    ]
}

/// The fields that mean something, and some that don't.
fn key() -> impl Strategy<Value = String> {
    let known = vec![
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "best_of",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "include_usage",
        "echo",
        "logprobs",
        "top_logprobs",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "add_special_tokens",
        "dlf",
        "method",
        "alpha",
        "grid",
        "search",
        "objective",
        "every",
        "return_alpha",
        "start",
        "step",
        "inclusive",
        "suffix",
        "tools",
        "tool_choice",
        "response_format",
        "role",
        "content",
        "type",
        "text",
        "tokens",
    ];
    prop_oneof![8 => prop::sample::select(known).prop_map(str::to_owned), 1 => ".{0,6}"]
}

/// Values that their fields take, so that a body gets as far as its last check.
fn good_field() -> impl Strategy<Value = (String, Value)> {
    let ids = || prop::collection::vec(0u32..1529, 1..20);
    prop_oneof![
        prop_oneof![
            ".{0,30}".prop_map(Value::from),
            ids().prop_map(Value::from),
            prop::collection::vec(ids(), 1..4).prop_map(|lists| json!(lists)),
            prop::collection::vec(".{0,20}", 1..4).prop_map(Value::from),
        ]
        .prop_map(|prompt| ("prompt".to_owned(), prompt)),
        prop::collection::vec((prop::sample::select(vec!["user", "assistant", "system"]), ".{0,20}"), 1..4)
            .prop_map(|messages| {
                let message = |(role, content)| json!({ "role": role, "content": content });
                ("messages".to_owned(), messages.into_iter().map(message).collect())
            }),
        (0u32..20).prop_map(|n| ("max_tokens".to_owned(), json!(n))),
        (0u32..6).prop_map(|n| ("n".to_owned(), json!(n))),
        (0u32..6).prop_map(|n| ("logprobs".to_owned(), json!(n))),
        any::<bool>().prop_map(|echo| ("echo".to_owned(), json!(echo))),
        prop::sample::select(vec!["dynamic", "static", "large", "small", "expert"])
            .prop_map(|method| ("dlf".to_owned(), json!({ "method": method }))),
    ]
}

fn body() -> impl Strategy<Value = Value> {
    let fields = prop::collection::vec(good_field(), 0..5);
    let others = prop::collection::vec((key(), any_json()), 0..4);
    (fields, others)
        .prop_map(|(fields, others)| Value::Object(fields.into_iter().chain(others).collect::<Map<_, _>>()))
}

/// That an error has OpenAI's shape and blames the client.
fn check_error(error: &ApiError) -> Result<(), TestCaseError> {
    prop_assert!(error.status.is_client_error(), "{error:?}");
    prop_assert!(!error.message.is_empty());
    let json = error.to_json();
    let keys: Vec<&str> = json["error"].as_object().unwrap().keys().map(String::as_str).collect();
    prop_assert_eq!(keys, ["message", "type", "param", "code"]);
    Ok(())
}

/// That all of a request can run.
fn check(prepared: ApiResult<Prepared>) -> Result<bool, TestCaseError> {
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return check_error(&error).map(|()| false),
    };
    prop_assert!(!prepared.choices.is_empty());
    for request in prepared.choices.iter().filter_map(|choice| choice.request.as_ref()) {
        let valid = request.validate(&shared().ensemble);
        prop_assert!(valid.is_ok(), "{valid:?}: {request:?}");
    }
    Ok(true)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn any_body_runs_or_is_refused(body in body()) {
        let bytes = body.to_string();
        for form in [Form::Completion, Form::Chat] {
            check(Prepared::new(shared(), form, bytes.as_bytes()))?;
        }
    }

    #[test]
    fn any_json_runs_or_is_refused(body in any_json()) {
        let bytes = body.to_string();
        for form in [Form::Completion, Form::Chat] {
            check(Prepared::new(shared(), form, bytes.as_bytes()))?;
        }
        if let Err(error) = tokens_of(shared(), bytes.as_bytes()) {
            check_error(&error)?;
        }
        if let Err(error) = text_of(shared(), bytes.as_bytes()) {
            check_error(&error)?;
        }
    }

    #[test]
    fn any_bytes_are_refused_or_run(
        body in body(),
        cut in any::<prop::sample::Index>(),
        noise in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut bytes = body.to_string().into_bytes();
        let at = cut.index(bytes.len());
        bytes.splice(at..(at + noise.len()).min(bytes.len()), noise);
        check(Prepared::new(shared(), Form::Completion, &bytes))?;
    }
}

/// The bodies that are made up above do reach the engine: they are not all refused for one reason.
#[test]
fn many_of_the_bodies_can_run() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let runs = (0..400).filter(|_| {
        let body = body().new_tree(&mut runner).unwrap().current().to_string();
        [Form::Completion, Form::Chat]
            .into_iter()
            .any(|form| check(Prepared::new(shared(), form, body.as_bytes())).unwrap())
    });
    let runs = runs.count();
    assert!(runs > 40, "{runs} of 400");
}
