//! The real binary, as a user types it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;

#[path = "support/command.rs"]
mod command;

use command::{fails, golden, json_lines, refused, run, trace};

const SUM: &str = "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\nAnswer:";

#[test]
fn generate_without_anything_runs_the_demo() {
    let run = run(&["generate"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert!(!run.stdout.trim().is_empty());
    assert!(!run.stdout.contains('\x1b'), "no colours where stdout is no terminal");
    assert!(run.stdout.ends_with('\n'));
}

#[test]
fn json_has_what_was_promised_and_text_is_the_same_without_it() {
    let lines = json_lines(&["generate", "--prompt", SUM, "--json", "-n", "12"]);
    let [result] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!(result["prompt"], SUM);
    let ids = result["token_ids"].as_array().unwrap().len();
    assert_eq!(result["usage"]["completion_tokens"], ids);
    let total = result["usage"]["prompt_tokens"].as_u64().unwrap() + ids as u64;
    assert_eq!(result["usage"]["total_tokens"], total);
    assert!(["stop", "length"].contains(&result["finish_reason"].as_str().unwrap()));
    for time in ["total_ms", "large_ms", "small_ms", "fusion_ms", "tokens_per_second"] {
        assert!(result["timings"][time].as_f64().unwrap() > 0.0, "{time}");
    }
    let plain = run(&["generate", "--prompt", SUM, "-n", "12"]);
    assert_eq!(plain.stdout, format!("{}\n", result["text"].as_str().unwrap()));
}

#[test]
fn a_trace_has_one_record_a_token_with_every_field() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.jsonl");
    let args = ["generate", "--prompt", SUM, "-n", "8", "--json", "--trace", path.to_str().unwrap()];
    let result = json_lines(&args).remove(0);
    let records = trace(&path);
    let ids: Vec<Value> = records.iter().map(|record| record["token_id"].clone()).collect();
    assert_eq!(Value::from(ids), result["token_ids"]);
    assert_eq!(records[0]["prompt"], SUM);
    assert_eq!(records[0]["experts"], serde_json::json!(["facts", "sums"]));
    assert!(records[1..].iter().all(|record| record["prompt"].is_null() && record["experts"].is_null()));
    for (step, record) in records.iter().enumerate() {
        assert_eq!(record["prompt_index"], 0);
        assert_eq!(record["step"], step);
        assert!(["facts", "sums"].contains(&record["expert"].as_str().unwrap()));
        for field in ["alpha", "kl_expert_small", "kl_small_expert", "logprob_expert", "argmax_expert"] {
            assert_eq!(record[field].as_array().unwrap().len(), 2, "{field}");
        }
        for field in ["loss", "kl_fused_large", "kl_large_fused", "ms"] {
            assert!(record[field].as_f64().unwrap() >= 0.0, "{field}");
        }
        for field in ["logprob_fused", "logprob_large", "logprob_small"] {
            assert!(record[field].as_f64().unwrap() <= 0.0, "{field}");
        }
        assert!(!record["argmax_large_text"].as_str().unwrap().is_empty());
        assert_eq!(record["argmax_expert_text"].as_array().unwrap().len(), 2);
        if record["argmax_expert"][0] == record["argmax_large"] {
            assert_eq!(record["argmax_expert_text"][0], record["argmax_large_text"]);
        }
        let differs = record["token_id"] != record["argmax_large"];
        assert_eq!(record["changed"], differs);
        let alphas: Vec<f64> =
            record["alpha"].as_array().unwrap().iter().map(|a| a.as_f64().unwrap()).collect();
        assert!(alphas.iter().filter(|&&alpha| alpha != 0.0).count() <= 1, "one expert acts: {alphas:?}");
    }
    let text: String = records.iter().map(|record| record["text"].as_str().unwrap()).collect();
    assert_eq!(text, result["text"]);
}

#[test]
fn results_say_how_alpha_was_sought() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (records, output) = (path("trace.jsonl"), path("out.jsonl"));
    let go = |more: &[&str]| {
        let base = ["generate", "--prompt", SUM, "-n", "2"];
        let result = json_lines(&[&base[..], &["--json", "--trace", &records], more].concat()).remove(0);
        json_lines(&[&base[..], &["--output", &output], more].concat());
        let settings: Value =
            serde_json::from_str(&fs::read_to_string(path("out.jsonl.run.json")).unwrap()).unwrap();
        assert_eq!(settings["rule"], result["fusion"]);
        let grids: Vec<Value> =
            trace(Path::new(&records)).iter().map(|record| record["alpha_grid"].clone()).collect();
        assert!(grids.iter().all(|grid| *grid == result["fusion"]["alpha_grid"]), "{grids:?}");
        result["fusion"].clone()
    };
    let paper = serde_json::json!({"method": "dynamic", "alpha_grid": "0:2:0.1", "alpha_every": 1, "search": "grid",
        "objective": "both"});
    assert_eq!(go(&[]), paper);
    // Twenty and twenty-one candidates aren't the same.
    assert_eq!(go(&["--alpha-grid", "0:2:0.1:inclusive"])["alpha_grid"], "0:2:0.1:inclusive");
    let other = serde_json::json!({"method": "dynamic", "alpha_grid": "-0.5:1:0.25,0:1.5:0.05", "alpha_every": 4,
        "search": "refine", "objective": "reverse"});
    let flags = ["--alpha-grid", "-0.5:1:0.25,0:1.5:0.05", "--alpha-every", "4", "--search", "refine"];
    assert_eq!(go(&[&flags[..], &["--objective", "reverse"]].concat()), other);
    let fixed = go(&["--method", "static", "--alpha", "0.5,1"]);
    assert_eq!(fixed, serde_json::json!({"method": "static", "alpha": [0.5, 1.0]}));
    assert_eq!(go(&["--method", "expert:sums"]), serde_json::json!({"method": "expert", "expert": "sums"}));
    assert_eq!(go(&["--method", "large"]), serde_json::json!({"method": "large"}));

    let scored = json_lines(&["score", "--ids", "5,6,7", "--json", "--alpha-grid", "0:1:0.5"]).remove(0);
    assert_eq!(scored["fusion"]["alpha_grid"], "0:1:0.5");
    assert!(scored["tokens"].as_array().unwrap().iter().all(|token| token["alpha_grid"] == "0:1:0.5"));
}

#[test]
fn identities_hold_on_the_command_line() {
    let ids = |args: &[&str]| {
        let base = ["generate", "--prompt", SUM, "-n", "16", "--json"];
        json_lines(&[&base[..], args].concat()).remove(0)["token_ids"].clone()
    };
    assert_eq!(ids(&["--method", "large"]), ids(&["--alpha-grid", "0:0:1:inclusive"]));
    assert_eq!(ids(&["--method", "large"]), ids(&["--method", "static", "--alpha", "0"]));
    assert_ne!(ids(&["--method", "large"]), ids(&["--method", "static"]), "α = 1 changes something");
    assert_eq!(ids(&["--method", "static"]), ids(&["--method", "static", "--alpha", "1,1"]));
    assert_eq!(ids(&["--method", "expert"]), ids(&["--method", "expert:facts"]));
    assert_ne!(ids(&["--method", "expert:facts"]), ids(&["--method", "expert:sums"]));

    // large = small ⇒ the fused model is the expert.
    let (tiny, expert) = (golden("ensemble/small"), golden("ensemble/expert_0"));
    let expert = format!("x={expert}");
    let models = ["--large", &tiny, "--small", &tiny, "--expert", &expert];
    let run = |method: &str| {
        let args = ["generate", "--prompt-ids", "1,2,3", "-n", "8", "--json", "--method", method];
        json_lines(&[&args[..], &models[..]].concat()).remove(0)["token_ids"].clone()
    };
    assert_eq!(run("dynamic"), run("expert"));
}

#[test]
fn batches_keep_their_order_and_their_texts() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let prompts: Vec<String> = (0..7)
        .map(|k| format!("Question: Tom has {k} apples and buys {}2 more.", "1".repeat(k % 3)))
        .collect();
    let lines: Vec<String> = prompts.iter().map(|p| serde_json::json!({ "prompt": p }).to_string()).collect();
    fs::write(&input, lines.join("\n")).unwrap();
    let sampling = ["-n", "10", "--temperature", "0.8", "--seed", "7", "--json"];
    let batch =
        [&["generate", "--input", input.to_str().unwrap(), "--batch-size", "3"][..], &sampling].concat();
    let together = json_lines(&batch);
    assert_eq!(together.len(), 7);
    for (prompt, result) in prompts.iter().zip(&together) {
        let alone = json_lines(&[&["generate", "--prompt", prompt][..], &sampling].concat()).remove(0);
        assert_eq!(result["prompt"], prompt.as_str());
        assert_eq!(result["text"], alone["text"]);
        assert_eq!(result["token_ids"], alone["token_ids"]);
    }
}

#[test]
fn scores_are_those_of_generation() {
    let args = ["generate", "--prompt", SUM, "-n", "8", "--json", "--trace"];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.jsonl");
    let result = json_lines(&[&args[..], &[path.to_str().unwrap()]].concat()).remove(0);
    let generated = trace(&path);

    let input = dir.path().join("in.jsonl");
    let line = serde_json::json!({ "prompt": SUM, "text": result["token_ids"] });
    fs::write(&input, line.to_string()).unwrap();
    let scored = json_lines(&["score", "--input", input.to_str().unwrap(), "--json"]).remove(0);
    assert_eq!(scored["ids"], result["token_ids"]);
    let strip = |record: &Value| {
        let mut record = record.clone();
        // A token's time is its own, and text is flushed only where it ends.
        let fields = record.as_object_mut().unwrap();
        // Nor does a score repeat what a trace begins with.
        fields.retain(|key, _| !["ms", "text", "prompt", "experts"].contains(&key.as_str()));
        record
    };
    let tokens = scored["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().map(strip).collect::<Vec<_>>(), generated.iter().map(strip).collect::<Vec<_>>());
    let sum: f64 = tokens.iter().map(|token| token["logprob_fused"].as_f64().unwrap()).sum();
    assert!((scored["sum_logprob_fused"].as_f64().unwrap() - sum).abs() < 1e-12);
}

#[test]
fn ids_are_scored_as_they_are() {
    let scored = json_lines(&["score", "--ids", "5,6,7,8", "--json"]).remove(0);
    assert_eq!(scored["ids"], serde_json::json!([5, 6, 7, 8]));
    let ids: Vec<u64> = scored["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token["token_id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, [6, 7, 8]);
    let one = json_lines(&["score", "--ids", "5", "--json"]).remove(0);
    assert_eq!(
        (&one["tokens"], &one["sum_logprob_fused"]),
        (&serde_json::json!([]), &serde_json::json!(0.0))
    );
}

#[test]
fn a_method_needs_only_its_models() {
    let large = golden("ensemble/large");
    let base = ["generate", "--prompt-ids", "1,2,3", "-n", "4"];
    let alone = run(&[&base[..], &["--large", &large, "--method", "large"]].concat());
    assert_eq!(alone.code, 0, "{}", alone.stderr);
    assert_eq!(alone.stdout.split_whitespace().count(), 4, "ids, for want of a tokenizer: {}", alone.stdout);
    fails(&[&base[..], &["--large", &large]].concat(), "needs --small DIR and --expert DIR as well");
    fails(&[&base[..], &["--large", &large, "--method", "expert"]].concat(), "expert");
}

#[test]
fn wrong_input_is_named() {
    let large = golden("ensemble/large");
    let large_only = |dir| ["generate", "--large", dir, "--method", "large", "--prompt", "x"];
    fails(&large_only("no/such/dir"), "--large no/such/dir: no such directory; nothing is downloaded");
    fails(&large_only("README.md"), "--large README.md is a file; a model is a directory with a config.json");
    fails(
        &["generate", "--expert", "x=", "--method", "expert", "--prompt", "x"],
        "--expert x=: the directory",
    );
    fails(&["generate", "--large", &large, "--method", "large", "--prompt", "x"], "no tokenizer");
    fails(&["generate", "--large", &large, "--method", "large", "--prompt-ids", "9999"], "token id 9999");
    fails(&["generate", "--large", &large, "--method", "large"], "give a prompt");
    fails(&["generate", "--prompt", SUM, "--method", "expert:nobody"], "facts, sums");
    fails(&["generate", "--prompt", SUM, "--alpha", "1,2,3", "--method", "static"], "alpha");
    fails(&["generate", "--prompt", SUM, "--top-p", "0"], "top_p");
    fails(&["generate", "--prompt", SUM, "--stop", ""], "stop");
    fails(&["generate", "--prompt", &"1 ".repeat(9000)], "context");
    fails(&["generate", "--prompt", SUM, "-n", "0"], "max_new_tokens");
    fails(&["generate", "--prompt", SUM, "--device", "cuda:7"], "cuda:7");
    fails(&["generate", "--prompt", SUM, "--trace", "no/such/dir/trace.jsonl"], "no/such/dir");
    fails(&["generate", "--input", "no-such-file.jsonl"], "no-such-file.jsonl");
    fails(&["score", "--text", ""], "the text is empty");
    fails(&["generate", "--prompt", ""], "empty");
    fails(&["score", "--ids", "1,99999"], "99999");
    refused(&["generate", "--alpha-grid", "0:9:0.1"], "32 candidates");
    refused(&["generate", "--alpha-every", "0"], "alpha-every");
    refused(&["generate", "--device", "tpu"], "tpu");
    refused(&["generate", "--method", "magic"], "dynamic");
    refused(&["generate", "--method", "dynamic:refine"], "use --method dynamic --search refine");
    refused(&["generate", "--alpha-grid", "1:0:0.1"], "expected STOP after START, found 1:0:0.1");
    refused(&["generate", "--alpha-grid", "0:2:0.01"], "found 0:2:0.01, which has 200");
    refused(&["generate", "--prompt", "a", "--prompt-ids", "1"], "cannot be used with");
    refused(&["generate", "--resume"], "--output");
    refused(&["score"], "--text");
}

#[test]
fn a_broken_line_of_input_is_named_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    fs::write(&input, "{\"prompt\": \"a\"}\n\n{\"prompt\": 7}\n").unwrap();
    fails(&["generate", "--input", input.to_str().unwrap()], "in.jsonl:3");
}

#[test]
fn nan_weights_are_an_error_that_names_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let source = PathBuf::from(golden("ensemble/small"));
    for file in ["config.json", "model.safetensors"] {
        fs::copy(source.join(file), dir.path().join(file)).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, data) = {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        (header["model.norm.weight"].clone(), 8 + length)
    };
    let start = data + header["data_offsets"][0].as_u64().unwrap() as usize;
    assert_eq!(header["dtype"], "BF16");
    bytes[start..start + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let dir = dir.path().to_str().unwrap();
    let run = run(&["generate", "--small", dir, "--method", "small", "--prompt-ids", "1,2", "--json"]);
    assert_eq!(run.code, 1);
    assert!(
        run.stderr.contains("the small model computed NaN") && run.stderr.contains("step 0"),
        "{}",
        run.stderr
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    for flag in ["--trace", "--output"] {
        let run = run(&["generate", "--prompt", SUM, "-n", "4", flag, "/dev/full"]);
        assert_eq!(run.code, 1, "{flag}");
        assert!(run.stderr.contains("/dev/full"), "{}", run.stderr);
    }
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_a_quiet_end() {
    for args in [&["generate", "-n", "64", "--ignore-eos"][..], &["inspect", "--help"]] {
        // Closed before the program starts: it never writes to a pipe that somebody might still read.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(cargo_bin("dlf-engine")).args(args).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(141), "{args:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
}

#[test]
fn inspect_tells_what_models_are() {
    let dirs = ["large", "small", "expert_0", "expert_1"].map(|name| golden(&format!("ensemble/{name}")));
    let args: Vec<&str> = std::iter::once("inspect").chain(dirs.iter().map(String::as_str)).collect();
    let fits = run(&args);
    assert_eq!(fits.code, 0, "{}", fits.stderr);
    assert!(fits.stdout.contains("They can form an ensemble."), "{}", fits.stdout);
    let report = json_lines(&[&args[..], &["--json"]].concat()).remove(0);
    assert_eq!(report["models"].as_array().unwrap().len(), 4);
    assert_eq!(report["ensemble"]["possible"], true);
    let wrong = run(&["inspect", &dirs[1], &dirs[0], &dirs[2], "--json"]);
    assert_eq!(wrong.code, 1, "two or more that don't fit: {}", wrong.stderr);
    let wrong: Value = serde_json::from_str(&wrong.stdout).unwrap();
    assert_eq!(wrong["ensemble"]["possible"], false);
    let reason = wrong["ensemble"]["reason"].as_str().unwrap();
    assert!(reason.starts_with("the small model and the expert ") && reason.contains("expert_0"), "{reason}");
    let roles: Vec<&str> =
        wrong["models"].as_array().unwrap().iter().map(|model| model["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["large", "small", "expert 0"]);
    fails(&["inspect", "no/such/dir"], "no/such/dir");

    // A BOS that one of them doesn't get.
    let demo = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo").join(name);
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(demo("expert-sums")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>", "add_bos_token": false}"#)
        .unwrap();
    let (large, small) = (demo("large"), demo("small"));
    let dirs = [large.to_str().unwrap(), small.to_str().unwrap(), dir.path().to_str().unwrap()];
    let wrong = run(&[&["inspect", "--json"][..], &dirs].concat());
    assert_eq!(wrong.code, 1, "{}", wrong.stderr);
    let report: Value = serde_json::from_str(&wrong.stdout).unwrap();
    let reason = " differ in what their tokenizers put before a prompt: token 0, \"<s>\" and nothing";
    let found = report["ensemble"]["reason"].as_str().unwrap();
    assert!(found.starts_with("the large model and the expert ") && found.contains(reason), "{found}");
    let models = ["--large", dirs[0], "--small", dirs[1], "--expert", dirs[2]];
    fails(&[&["generate", "--prompt", "a"][..], &models].concat(), reason);
}

#[test]
fn completions_are_scripts() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let run = run(&["completions", shell]);
        assert_eq!(run.code, 0);
        assert!(run.stdout.contains("alpha-grid"), "{shell}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let go = |more: &[&str], says: &str| {
        let args: Vec<&str> = ["generate", "--prompt", "a"].iter().chain(more).copied().collect();
        fails(&args, says);
    };
    go(&["-n", "4", "--min-new-tokens", "5"], "at most max_new_tokens, 4");
    go(&["--logit-bias", "99999=1"], "logit_bias");
    go(&["--stop-token-id", "99999"], "stop_token_ids");
    go(&["--kv-memory", "1", "--batch-size", "1", "-n", "1000"], "--kv-memory 1: the longest sequence takes");
}

#[test]
fn input_may_come_from_windows_and_name_roles_that_a_method_leaves_out() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let line = r#"{"prompt": "There are 3", "prompts": {"small": "Five", "expert": "Six"}}"#;
    fs::write(&input, format!("\u{feff}{line}\r\n\r\n{line}\r\n")).unwrap();
    let input = input.to_str().unwrap();
    let lines = json_lines(&["generate", "--input", input, "--json", "-n", "3", "--method", "large"]);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["text"], lines[1]["text"]);
    json_lines(&["generate", "--input", input, "--json", "-n", "3"]);
}

#[test]
fn what_changes_nothing_is_said_once() {
    let stderr = |arguments: &[&str]| {
        let output = Command::new(cargo_bin("dlf-engine")).args(arguments).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let dropped = ["generate", "-n", "1", "--device", "cpu", "--alpha", "0.5", "--top-k", "3"];
    let notes = stderr(&dropped);
    assert!(notes.contains("note: --alpha is") && notes.contains("note: --top-k"), "{notes}");
    assert_eq!(notes.lines().count(), 2);
    assert_eq!(stderr(&[&dropped[..], &["--quiet"]].concat()), "");
    let moot = ["--search", "refine", "--objective", "forward", "--alpha-every", "2"];
    let notes = stderr(&[&["generate", "-n", "1", "--method", "large"], &moot[..]].concat());
    for flag in ["--search", "--objective", "--alpha-every"] {
        assert!(notes.contains(&format!("note: {flag} is a setting of --method dynamic")), "{notes}");
    }
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    fs::write(&input, "{\"prompt\": \"a\", \"promts\": {}}\n{\"prompt\": \"b\", \"n\": 1}\n").unwrap();
    let notes = stderr(&["generate", "-n", "1", "--input", input.to_str().unwrap()]);
    assert!(notes.contains("in.jsonl: ignored: `promts`, `n`; the fields"), "{notes}");
    let demo = |name: &str| format!("{}/models/demo/{name}", env!("CARGO_MANIFEST_DIR"));
    let (large, small) = (demo("large"), demo("small"));
    let swapped = ["--large", &small, "--small", &large, "--method", "large", "--prompt", "a", "-n", "1"];
    assert_eq!(stderr(&[&["generate"], &swapped[..]].concat()), "", "one model alone is neither");
    let inspected = Command::new(cargo_bin("dlf-engine")).args(["inspect", &small, &large]).output().unwrap();
    let notes = String::from_utf8(inspected.stderr).unwrap();
    assert!(notes.contains("the large model has fewer parameters than the small one"), "{notes}");
    assert_eq!(stderr(&["generate", "-n", "1", "--method", "static", "--alpha", "0.5"]), "");
}

#[test]
fn an_error_says_its_cause_once() {
    for (arguments, says) in [
        (&["inspect", "nowhere-at-all"][..], "no such directory"),
        (&["inspect", "models/demo"], "no such file"),
        (&["generate", "--temperature", "-1"], "temperature: expected 0 or more, found -1"),
        (&["generate", "-n", "-1"], "invalid digit"),
        (&["generate", "--threads", "0"], "expected a whole number, 1 or more"),
    ] {
        let output = Command::new(cargo_bin("dlf-engine")).args(arguments).output().unwrap();
        assert!(!output.status.success());
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.matches(says).count(), 1, "{text}");
    }
}
