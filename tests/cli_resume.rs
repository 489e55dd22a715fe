//! Runs of the real binary that are cut, killed, or gone on with.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "a test")]

use std::fs;
use std::path::Path;

use serde_json::Value;

#[path = "support/command.rs"]
mod command;

use command::{fails, json_lines, run, trace};

#[test]
fn a_killed_run_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let lines: Vec<String> =
        (0..5).map(|k| serde_json::json!({ "prompt": format!("There are {k}") }).to_string()).collect();
    fs::write(path("in.jsonl"), lines.join("\n")).unwrap();
    let go = |output: &str, trace: &str, more: &[&str]| {
        let base =
            ["generate", "--input", &path("in.jsonl"), "-n", "6", "--output", output, "--trace", trace];
        let run = run(&[&base[..], more].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
    };
    go(&path("whole.jsonl"), &path("whole-trace.jsonl"), &[]);
    let whole = fs::read_to_string(path("whole.jsonl")).unwrap();
    let whole_trace = fs::read_to_string(path("whole-trace.jsonl")).unwrap();
    // Killed in the middle of the third result, and of the fourth prompt's trace.
    let third = whole.lines().take(2).map(|line| line.len() + 1).sum::<usize>() + 20;
    fs::write(path("torn.jsonl"), &whole[..third]).unwrap();
    let traced: usize = whole_trace.lines().take(20).map(|line| line.len() + 1).sum::<usize>() + 9;
    fs::write(path("torn-trace.jsonl"), &whole_trace[..traced]).unwrap();
    go(&path("torn.jsonl"), &path("torn-trace.jsonl"), &["--resume"]);

    let without_times = |text: &str| {
        let strip = |line: &str| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            value.as_object_mut().unwrap().retain(|key, _| key != "timings" && key != "ms");
            value
        };
        text.lines().map(strip).collect::<Vec<_>>()
    };
    for (file, whole) in [("torn.jsonl", whole), ("torn-trace.jsonl", whole_trace)] {
        assert_eq!(without_times(&fs::read_to_string(path(file)).unwrap()), without_times(&whole), "{file}");
    }
}

#[test]
fn resume_refuses_what_it_did_not_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("in.jsonl"), "{\"prompt\": \"There are 3\"}\n").unwrap();
    let go = |command: &str, input: &str, output: &str, says: &str| {
        fs::write(path("input"), input).unwrap();
        let before = fs::read_to_string(output).unwrap();
        let mut args =
            vec![command.to_owned(), "--input".into(), path("input"), "--output".into(), output.into()];
        args.push("--resume".into());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        fails(&args, says);
        assert_eq!(fs::read_to_string(output).unwrap(), before, "left as it was");
    };
    json_lines(&["generate", "--input", &path("in.jsonl"), "--output", &path("out.jsonl")]);
    go("generate", "{\"prompt\": \"There were 3\"}", &path("out.jsonl"), "another `prompt`");
    fs::write(path("ids.jsonl"), "{\"text\": [1, 2, 3]}\n").unwrap();
    json_lines(&["score", "--input", &path("ids.jsonl"), "--output", &path("scores.jsonl")]);
    go("score", "{\"text\": [1, 2, 4]}", &path("scores.jsonl"), "another `ids`");
    fs::write(path("notes.txt"), "my notes\nof a year\n").unwrap();
    go("generate", "{\"prompt\": \"There are 3\"}", &path("notes.txt"), "notes.txt:1");
}

#[test]
fn no_file_is_read_and_written_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let line = "{\"prompt\": \"There are 3\", \"text\": \"a\"}\n";
    fs::write(&input, line).unwrap();
    let input = input.to_str().unwrap();
    fails(&["generate", "--input", input, "--output", input], "one file");
    fails(&["generate", "--input", input, "--trace", input], "one file");
    fails(&["score", "--input", input, "--output", input], "one file");
    assert_eq!(fs::read_to_string(input).unwrap(), line);
    let new = dir.path().join("new.jsonl");
    let new = new.to_str().unwrap();
    fails(&["generate", "--input", input, "--output", new, "--trace", new], "one file");
}

#[test]
fn what_failed_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (input, output) = (path("in.jsonl"), path("out.jsonl"));
    fs::write(&input, "{\"prompt\": \"There are 3\"}\n{\"prompt\": \"Tom has\"}\n").unwrap();
    json_lines(&["generate", "--input", &input, "-n", "3", "--output", &output]);
    let whole = trace(Path::new(&output));
    let first = serde_json::to_string(&whole[0]).unwrap();
    fs::write(&output, format!("{first}\n{{\"prompt\": \"Tom has\", \"error\": \"out of luck\"}}\n"))
        .unwrap();
    json_lines(&["generate", "--input", &input, "-n", "3", "--output", &output, "--resume"]);
    let again = trace(Path::new(&output));
    assert_eq!(again.len(), 2);
    assert_eq!(again[0], whole[0]);
    assert_eq!(again[1]["text"], whole[1]["text"]);
}

#[test]
fn a_run_with_other_settings_is_not_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (input, output) = (path("in.jsonl"), path("out.jsonl"));
    fs::write(&input, "{\"prompt\": \"There are 3\"}\n{\"prompt\": \"Tom has\"}\n").unwrap();
    let base = ["generate", "--input", &input, "--output", &output];
    json_lines(&[&base[..], &["-n", "3", "--temperature", "0.7"]].concat());
    let before = fs::read_to_string(&output).unwrap();
    let go = |more: &[&str], says: &str| {
        fails(&[&base[..], more, &["--resume"]].concat(), says);
        assert_eq!(fs::read_to_string(&output).unwrap(), before, "left as it was");
    };
    go(&["-n", "4", "--temperature", "0.7"], "this is another run: `max_new_tokens` was 3, and is 4");
    go(&["-n", "3", "--temperature", "0.5"], "`temperature` was 0.7");
    go(&["-n", "3", "--temperature", "0.7", "--seed", "1"], "`seed` was 0, and is 1");
    go(&["-n", "3", "--temperature", "0.7", "--stop", "x"], "`stop` was [], and is [\"x\"]");
    go(&["-n", "3", "--temperature", "0.7", "--method", "static"], "`rule` was");
    go(&["-n", "3", "--temperature", "0.7", "--alpha-grid", "0:1:0.1"], "`rule` was");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let large = demo.join("large").to_str().unwrap().to_owned();
    let small = demo.join("small").to_str().unwrap().to_owned();
    let expert = |name: &str| format!("E={}", demo.join(name).to_str().unwrap());
    let same = ["-n", "3", "--temperature", "0.7", "--resume"];
    json_lines(&[&base[..], &same].concat());
    assert_eq!(fs::read_to_string(&output).unwrap(), before);

    // Of the same shape, name and size, with other weights.
    let models = |name: &str| {
        ["--large", &large, "--small", &small, "--expert", &expert(name), "-n", "3"].map(str::to_owned)
    };
    let go = |name: &str, more: &[&str]| {
        let models = models(name);
        run(&[&base[..], &models.each_ref().map(String::as_str), more].concat())
    };
    assert_eq!(go("expert-sums", &[]).code, 0);
    let other = go("expert-facts", &["--resume"]);
    assert_eq!(other.code, 1);
    assert!(other.stderr.contains("`models` was"), "{}", other.stderr);
    assert_eq!(go("expert-sums", &["--resume"]).code, 0);

    fs::write(path("ids.jsonl"), "{\"text\": [1, 2, 3]}\n").unwrap();
    let (ids, scores) = (path("ids.jsonl"), path("scores.jsonl"));
    let score = ["score", "--input", &ids, "--output", &scores];
    json_lines(&score);
    fails(&[&score[..], &["--method", "large", "--resume"]].concat(), "`rule` was");
    json_lines(&[&score[..], &["--resume"]].concat());
}

#[test]
fn a_run_that_is_really_killed_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let lines: String = (0..60).map(|k| format!("{{\"prompt\": \"There are {k}\"}}\n")).collect();
    fs::write(path("in.jsonl"), lines).unwrap();
    let args = |output: &str| {
        let base =
            ["generate", "--input", &path("in.jsonl"), "-n", "16", "--batch-size", "2", "--threads", "1"];
        base.iter()
            .map(|arg| (*arg).to_owned())
            .chain(["--output".to_owned(), path(output)])
            .collect::<Vec<_>>()
    };
    let go = |args: &[String]| run(&args.iter().map(String::as_str).collect::<Vec<_>>()).code;
    assert_eq!(go(&args("whole.jsonl")), 0);
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("dlf-engine"))
        .args(args("cut.jsonl"))
        .spawn()
        .unwrap();
    // Killed as soon as there are results; on a machine that is faster than this it ends by itself, which is as good.
    let done = || fs::read_to_string(path("cut.jsonl")).unwrap_or_default().lines().count();
    while done() < 3 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(go(&[args("cut.jsonl"), vec!["--resume".to_owned()]].concat()), 0);
    let results = |name: &str| {
        let of = |line: &Value| (line["prompt"].clone(), line["token_ids"].clone(), line["text"].clone());
        trace(Path::new(&path(name))).iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(results("cut.jsonl"), results("whole.jsonl"));
}
