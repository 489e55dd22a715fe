//! `eval`, `eval merge` and `sweep`, as a user types them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;

const RUN: [&str; 7] = ["eval", "--task", "sums", "--limit", "10", "--method", "large,expert:sums,dynamic"];

fn run(args: &[&str]) -> Output {
    Command::new(cargo_bin("dlf-engine")).args(args).output().unwrap()
}

fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fails(args: &[&str], code: i32, says: &str) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(says), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}: nothing half-done on stdout");
}

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, more].concat()
}

/// The files that must not depend on how a run was cut.
fn results(dir: &Path) -> Vec<String> {
    let names = ["large.jsonl", "expert-sums.jsonl", "dynamic.jsonl", "run.json"];
    names.iter().map(|name| fs::read_to_string(dir.join(name)).unwrap()).collect()
}

/// A summary without its times.
fn timeless(json: &str) -> Value {
    let mut summary: Value = serde_json::from_str(json).unwrap();
    for row in summary["rows"].as_array_mut().unwrap() {
        assert!(row["seconds_per_sample"].take().as_f64().unwrap() > 0.0);
    }
    summary
}

#[test]
fn a_table_has_all_that_is_said_of_a_method() {
    let table = succeeds(&RUN);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("| method"), "{table}");
    assert!(lines[2].starts_with("| large") && lines[3].starts_with("| expert:sums"), "{table}");
    assert!(lines[4].starts_with("| dynamic") && lines.len() == 7, "{table}");
    let json: Value = serde_json::from_str(&succeeds(&with(&RUN, &["--json"]))).unwrap();
    let row = &json["rows"][2];
    assert_eq!((json["task"].as_str(), row["n"].as_u64()), (Some("sums"), Some(10)));
    assert_eq!(row["interval"]["method"], "wilson");
    let difference = row["difference"][0].as_f64().unwrap();
    let score = |k: usize| json["rows"][k]["score"].as_f64().unwrap();
    assert_eq!(difference, score(2) - score(0));
    assert!(json["rows"][0]["difference"].is_null());
}

#[test]
fn a_killed_run_goes_on_and_its_files_are_those_of_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let (whole_name, cut_name) = (whole.to_str().unwrap(), cut.to_str().unwrap());
    let table = succeeds(&with(&RUN, &["--output", whole_name, "--json"]));
    fails(&with(&RUN, &["--output", whole_name]), 1, "holds the results of a run");

    // As a kill leaves it: one method whole, one with a torn line, one without a line.
    fs::create_dir(&cut).unwrap();
    for name in ["run.json", "large.jsonl", "large.seconds.jsonl", "expert-sums.seconds.jsonl"] {
        fs::copy(whole.join(name), cut.join(name)).unwrap();
    }
    let expert = fs::read_to_string(whole.join("expert-sums.jsonl")).unwrap();
    let fourth = expert.match_indices('\n').nth(3).unwrap().0;
    fs::write(cut.join("expert-sums.jsonl"), &expert[..fourth + 30]).unwrap();
    let resumed = succeeds(&with(&RUN, &["--output", cut_name, "--resume", "--json"]));
    assert_eq!(results(&cut), results(&whole));
    assert_eq!(timeless(&resumed), timeless(&table));
    let seconds = fs::read_to_string(cut.join("expert-sums.seconds.jsonl")).unwrap();
    assert_eq!(seconds.lines().count(), 10);
    // Nothing is left to do: the table comes at once, from the files alone.
    let again = succeeds(&with(&RUN, &["--output", cut_name, "--resume", "--json"]));
    assert_eq!(again, resumed);
    assert_eq!(timeless(&fs::read_to_string(cut.join("summary.json")).unwrap()), timeless(&table));

    let other = ["eval", "--task", "sums", "--limit", "9", "--method", "large,expert:sums,dynamic"];
    fails(&with(&other, &["--output", cut_name, "--resume"]), 1, "another run: `samples` was 10, and is 9");
    fails(&with(&RUN, &["--output", cut_name, "--resume", "--seed", "1"]), 1, "`seed` was 0, and is 1");
    assert_eq!(results(&cut), results(&whole), "what was refused changed nothing");
    fs::write(cut.join("large.jsonl"), "{\"index\":3,\"scores\":{\"exact_match\":0.0}}\n").unwrap();
    fails(
        &with(&RUN, &["--output", cut_name, "--resume"]),
        1,
        "large.jsonl:1: this is not the result of sample 0",
    );
}

#[test]
fn a_run_that_is_really_killed_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let all = [
        "eval",
        "--task",
        "sums",
        "--limit",
        "60",
        "--method",
        "dynamic",
        "--batch-size",
        "2",
        "--threads",
        "1",
    ];
    succeeds(&with(&all, &["--output", whole.to_str().unwrap()]));
    let args = with(&all, &["--output", cut.to_str().unwrap()]);
    let mut child = Command::new(cargo_bin("dlf-engine")).args(&args).spawn().unwrap();
    // Killed as soon as there are results; on a machine that is faster than this it ends by itself, which is as good.
    let lines = || fs::read_to_string(cut.join("dynamic.jsonl")).unwrap_or_default().lines().count();
    while lines() < 3 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    succeeds(&with(&args, &["--resume"]));
    let read = |dir: &Path| fs::read_to_string(dir.join("dynamic.jsonl")).unwrap();
    assert_eq!(read(&cut), read(&whole));
}

#[test]
fn merged_shards_are_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let table = succeeds(&with(&RUN, &["--output", &path("whole"), "--json"]));
    for i in 1..=3 {
        let shard = format!("{i}/3");
        succeeds(&with(&RUN, &["--output", &path(&i.to_string()), "--shard", &shard]));
    }
    let again = ["eval", "merge", &path("1"), &path("2"), &path("3"), "--output", &path("whole")];
    fails(&again, 1, "holds the results of a run: name another directory");
    // In any order.
    let merged = succeeds(&[
        "eval",
        "merge",
        &path("2"),
        &path("3"),
        &path("1"),
        "--output",
        &path("merged"),
        "--json",
    ]);
    assert_eq!(results(Path::new(&path("merged"))), results(Path::new(&path("whole"))));
    assert_eq!(timeless(&merged), timeless(&table));

    let merge = |dirs: &[&str], says: &str| {
        let names: Vec<String> = dirs.iter().map(|name| path(name)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let out = path("other");
        fails(&with(&with(&["eval", "merge"], &names), &["--output", &out]), 1, says);
        assert!(!Path::new(&out).exists(), "{says}: nothing is written");
    };
    merge(&["1", "2"], "shard 3/3 is missing");
    merge(&["1", "2", "2"], "shard 2/3 is there twice");
    merge(&["1", "2", "whole"], "not the result of a --shard");
    merge(&["1", "2", "none"], "run.json");
    let seeded = ["--output", &path("seeded"), "--shard", "3/3", "--seed", "5"];
    succeeds(&with(&RUN, &seeded));
    merge(&["1", "2", "seeded"], "`seed` was 5, and is 0");
    let large = Path::new(&path("3")).join("large.jsonl");
    let text = fs::read_to_string(&large).unwrap();
    fs::write(&large, &text[..text.find('\n').unwrap() + 1]).unwrap();
    merge(&["1", "2", "3"], "large: 1 of 3 samples are there: finish it with --resume");
    fails(&with(&RUN, &["--shard", "11/11"]), 1, "there are only 10 samples");
}

#[test]
fn a_task_file_with_choices_from_csv() {
    let dir = tempfile::tempdir().unwrap();
    let (task, data) = (dir.path().join("t.toml"), dir.path().join("d.csv"));
    let text = "name = \"pick\"\nprompt = \"Question: {{ question }}\\nAnswer:\"\nmetrics = [\"acc\", \"acc_norm\"]\n\
                [choice]\nchoices = \"[right, wrong]\"\nanswer = \"0\"\n";
    fs::write(&task, text).unwrap();
    fs::write(&data, "question,right,wrong\n\"Where was Simon Dalman born?\",Warsaw,52\n").unwrap();
    let args =
        ["eval", "--task", task.to_str().unwrap(), "--data", data.to_str().unwrap(), "--method", "large"];
    let json: Value = serde_json::from_str(&succeeds(&with(&args, &["--json"]))).unwrap();
    assert_eq!((&json["rows"][0]["metric"], &json["rows"][0]["score"]), (&"acc".into(), &1.0.into()));
    assert_eq!(json["rows"][1]["metric"], "acc_norm");
    fs::write(&data, "question,right\nx,y\n").unwrap();
    fails(&args, 1, "d.csv:2: choices: expected a list of texts that isn't empty, found [\"y\",null]");
}

#[test]
fn what_a_newcomer_mistypes_is_named() {
    fails(&["eval"], 2, "--task");
    fails(&["eval", "--task", "gsm8k"], 1, "give the samples of gsm8k: --data FILE");
    fails(&["eval", "--task", "gsm9k"], 1, "the built-in tasks are gsm8k");
    fails(&["eval", "--task", "sums", "--data", "/no/such.jsonl"], 1, "/no/such.jsonl");
    fails(&["eval", "--task", "sums", "--method", "dynamc"], 2, "static[:ALPHA] or dynamic[:grid|:refine]");
    fails(&["sweep", "--task", "sums", "--svg", "s.png"], 1, "must end in .svg");
    fails(&["eval", "--task", "sums", "--limit", "0"], 2, "expected a whole number, 1 or more");
    fails(
        &["eval", "--task", "sums", "--limit", "1", "--output", "README.md"],
        1,
        "README.md: this is a file",
    );
    fails(&["eval", "--task", "sums", "--method", "large,large"], 1, "large is there twice");
    fails(&["eval", "--task", "sums", "--method", "expert:x"], 1, "the experts are facts, sums");
    fails(&["eval", "--task", "sums", "--shard", "0/2"], 2, "I from 1 to N");
    fails(&["eval", "--task", "sums", "--resume"], 2, "--output");
    fails(&["eval", "--task", "sums", "--num-fewshot", "2"], 1, "give --fewshot-data");
    fails(&["eval", "--task", "sums", "--temperature=-1"], 1, "temperature");
    fails(&["sweep", "--task", "sums", "--alpha", "0:2"], 2, "START:STOP:STEP");
}

#[test]
fn a_sweep_draws_static_fusion_beside_dynamic() {
    let dir = tempfile::tempdir().unwrap();
    let (svg, csv) = (dir.path().join("s.svg"), dir.path().join("s.csv"));
    let args = ["sweep", "--task", "facts", "--limit", "6", "--alpha", "0:1:0.5:inclusive", "--json"];
    let files = ["--svg", svg.to_str().unwrap(), "--csv", csv.to_str().unwrap()];
    let json: Value = serde_json::from_str(&succeeds(&with(&args, &files))).unwrap();
    let methods: Vec<&str> =
        json["rows"].as_array().unwrap().iter().map(|row| row["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["dynamic", "static:0", "static:0.5", "static:1"]);
    // α = 0 is the large model alone.
    let large: Value = serde_json::from_str(&succeeds(&[
        "eval", "--task", "facts", "--limit", "6", "--method", "large", "--json",
    ]))
    .unwrap();
    assert_eq!(json["rows"][1]["score"], large["rows"][0]["score"]);
    let lines = fs::read_to_string(&csv).unwrap();
    assert_eq!(lines.lines().next(), Some("method,alpha,exact_match,low,high"));
    assert_eq!(lines.lines().count(), 5);
    let picture = fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.matches("<circle").count() == 3, "{picture}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let prompts: String = (0..400).map(|k| format!("{{\"prompt\": \"There are {k}\"}}\n")).collect();
    fs::write(path("in.jsonl"), prompts).unwrap();
    let (input, texts, scores) = (path("in.jsonl"), path("out.jsonl"), path("scores"));
    let slow = ["--batch-size", "1", "--threads", "1"];
    let generate = ["generate", "--input", &input, "--ignore-eos", "--output", &texts];
    let eval = ["eval", "--task", "sums", "--method", "dynamic", "--output", &scores];
    for (args, file, begins) in [
        (with(&generate, &slow), texts.clone(), "stopped after "),
        (with(&eval, &slow), format!("{scores}/dynamic.jsonl"), "dynamic: stopped after "),
    ] {
        let mut command = Command::new(cargo_bin("dlf-engine"));
        let child = command.args(&args).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let lines = || fs::read_to_string(&file).unwrap_or_default().lines().count();
        while lines() < 3 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let signal = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(signal.success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        let told = stderr.strip_prefix(begins).and_then(|rest| rest.split_once(" of 400; the same command"));
        // A line is written before it is counted.
        let (done, rest) = told.unwrap_or_else(|| panic!("{stderr}"));
        assert!(rest == " with --resume goes on\n" && done.parse::<usize>().unwrap() >= 2, "{stderr}");
    }
}
