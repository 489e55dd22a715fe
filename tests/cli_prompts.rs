//! Prompts on the command line: from files, through chat templates, of each role's own; and an expert that is an adapter.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs the binary on the CPU; what it prints must be lines of JSON.
fn lines(arguments: &[&str], stdin: &str) -> Vec<Value> {
    let mut command = Command::new(cargo_bin("dlf-engine"));
    command.args(arguments).args(["--json", "--device", "cpu"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn result(arguments: &[&str]) -> Value {
    lines(arguments, "").remove(0)
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

const QUESTION: &str = "Tom has 17 apples and buys 25 more. How many apples does Tom have?";

#[test]
fn a_prompt_may_be_a_file_or_stdin() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("prompt.txt");
    let prompt = format!("Question: {QUESTION}\nAnswer:");
    fs::write(&path, &prompt).unwrap();
    let base = ["generate", "-n", "12"];
    let expected = result(&[&base[..], &["--prompt", &prompt]].concat());
    let of_file = result(&[&base[..], &["--prompt-file", path.to_str().unwrap()]].concat());
    let of_stdin = lines(&[&base[..], &["--prompt-file", "-"]].concat(), &prompt).remove(0);
    for found in [of_file, of_stdin] {
        assert_eq!((&found["prompt"], &found["token_ids"]), (&expected["prompt"], &expected["token_ids"]));
    }
    // An editor's line end is no part of it; another one is.
    fs::write(&path, format!("{prompt}\n")).unwrap();
    let edited = result(&[&base[..], &["--prompt-file", path.to_str().unwrap()]].concat());
    assert_eq!(edited["prompt"], expected["prompt"]);
    fs::write(&path, format!("{prompt}\n\n")).unwrap();
    let longer = result(&[&base[..], &["--prompt-file", path.to_str().unwrap()]].concat());
    let tokens = |result: &Value| result["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(tokens(&longer), tokens(&expected) + 1);
}

/// The demo's models, the expert with a chat template of its own.
fn models(dir: &Path, template: &str) -> Vec<String> {
    let expert = dir.join("expert");
    fs::create_dir(&expert).unwrap();
    for file in fs::read_dir(repository("models/demo/expert-sums")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), expert.join(file.file_name())).unwrap();
    }
    fs::write(expert.join("chat_template.jinja"), template).unwrap();
    let of = |name: &str| repository(&format!("models/demo/{name}")).to_str().unwrap().to_owned();
    let flags = ["--large".to_owned(), of("large"), "--small".to_owned(), of("small")];
    flags.into_iter().chain(["--expert".to_owned(), format!("sums={}", expert.display())]).collect()
}

/// Text, ids and the expert's log-probabilities.
fn generated(arguments: &[&str], models: &[String]) -> (Value, Vec<Value>) {
    let dir = TempDir::new().unwrap();
    let trace = dir.path().join("trace.jsonl");
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    let base = ["generate", "-n", "12", "--trace", trace.to_str().unwrap()];
    let ids = result(&[&base[..], arguments, &models].concat())["token_ids"].clone();
    let records = fs::read_to_string(&trace).unwrap();
    let logprobs = records.lines().map(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        json!([record["logprob_large"], record["logprob_small"], record["logprob_expert"]])
    });
    (ids, logprobs.collect())
}

#[test]
fn each_role_has_its_own_chat_template_and_its_own_prompt() {
    let dir = TempDir::new().unwrap();
    // Another form, so that the expert reads other tokens than the others do.
    let models = models(dir.path(), "{{ bos_token }}{{ messages[-1]['content'] }} In all there are");
    let written = |name: &str, prompts: Value| {
        let path = dir.path().join(name);
        fs::write(&path, json!({ "prompts": prompts }).to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (question, other) =
        (format!("Question: {QUESTION}\nAnswer:"), format!("{QUESTION} In all there are"));
    let by_role = json!({"large": question, "small": question, "sums": other});
    let alike = json!({"large": question, "small": question, "expert": question});
    let (by_role, alike) = (written("by_role.jsonl", by_role), written("alike.jsonl", alike));

    let chat = generated(&["--chat", "--prompt", QUESTION], &models);
    assert_eq!(chat, generated(&["--input", &by_role], &models), "what the templates write");
    let alike = generated(&["--input", &alike], &models);
    assert_eq!(alike, generated(&["--prompt", &question], &models));
    assert_ne!(chat.0, alike.0, "the expert's prompt has a say");
    assert_ne!(chat.1[0][2], alike.1[0][2]);
}

/// Ids by transformers and peft.
#[test]
fn an_expert_may_be_an_adapter() {
    let golden = fs::read_to_string(repository("tests/goldens/tiny/lora_q_v/golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let small = repository("tests/goldens/tiny/mha_untied_f32/model");
    let adapter = format!("math={}", repository("tests/goldens/tiny/lora_q_v/adapter").display());
    let models = ["--small", small.to_str().unwrap(), "--expert", &adapter];
    for prompt in golden["prompts"].as_array().unwrap() {
        let ids: Vec<String> = prompt["input_ids"].as_array().unwrap().iter().map(Value::to_string).collect();
        let expected = &prompt["greedy_ids"];
        let count = expected.as_array().unwrap().len().to_string();
        let go = |method: &str| {
            let request = [
                "generate",
                "--method",
                method,
                "--prompt-ids",
                &ids.join(","),
                "-n",
                &count,
                "--ignore-eos",
            ];
            result(&[&request[..], &models].concat())["token_ids"].clone()
        };
        assert_eq!(go("expert:math"), *expected);
        assert_ne!(go("small"), *expected, "without the adapter");
    }
}
