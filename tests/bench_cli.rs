//! `dlf-engine bench`: its formats, its names, and what it says on a device without a clock.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Whether it ended well, what it printed, and what it complained of; `driver` holds a `libcuda.so`.
fn bench_with(driver: Option<&Path>, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dlf-engine"));
    if let Some(driver) = driver {
        command.env("LD_LIBRARY_PATH", driver);
    }
    let output = command.arg("bench").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn bench(arguments: &[&str]) -> (bool, String, String) {
    bench_with(None, arguments)
}

/// The rows that a bench prints as JSON.
fn rows_with(driver: Option<&Path>, arguments: &[&str]) -> Vec<Value> {
    let (fine, stdout, stderr) = bench_with(driver, &[arguments, &["-o", "json"]].concat());
    assert!(fine, "{arguments:?}: {stderr}");
    serde_json::from_str(&stdout).unwrap()
}

fn rows(arguments: &[&str]) -> Vec<Value> {
    rows_with(None, arguments)
}

fn names(row: &Value) -> Vec<&str> {
    row.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The columns of `bench fusion`.
const FUSION: [&str; 15] = [
    "vocab",
    "experts",
    "candidates",
    "batch",
    "device",
    "search",
    "caches",
    "µs",
    "±",
    "× fused",
    "launches",
    "MB of logits",
    "MB moved",
    "step",
    "% of a step",
];

/// Those of `bench decode` and `bench prefill`.
const MODELS: [&str; 10] =
    ["model", "MiB", "device", "test", "tokens/s", "±", "ms/token", "GB/s", "% of memory", "launches/token"];

#[test]
fn every_combination_is_a_row_in_every_format() {
    let lists = ["--vocab", "100,200", "--experts", "1,2", "--batch", "1,3", "--threads", "1,2", "-r", "2"];
    let steps = ["--step", "llama-2-7b,llama-2-13b+tinyllama-1.1b", "--candidates", "5", "--device", "cpu"];
    let arguments = [&["fusion"], &lists[..], &steps].concat();
    let rows = rows(&arguments);
    // Twice two searches and two steps.
    assert_eq!(rows.len(), 2 * 2 * 2 * 2 * 4);
    let key = |row: &Value| FUSION.map(|name| row[name].to_string()).map(|text| text.replace('"', ""));
    let mut keys: Vec<_> =
        rows.iter().map(|row| [0, 1, 3, 4, 5, 13].map(|at| key(row)[at].clone())).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), rows.len());
    for pair in rows.chunks(4) {
        for row in pair {
            let number = |name: &str| row[name].as_f64().unwrap();
            assert_eq!(names(row), FUSION);
            assert!(number("µs") > 0.0 && number("±") >= 0.0 && number("% of a step") > 0.0);
            // Rounding of a quotient.
            let quotient = number("µs") / pair[0]["µs"].as_f64().unwrap();
            assert!((quotient / number("× fused") - 1.0).abs() < 1e-9);
            let logits = (2.0 + number("experts")) * number("vocab") * number("batch") * 4.0;
            assert!((number("MB of logits") * 1e6 - logits).abs() < 1e-3);
            assert_eq!((&row["launches"], &row["caches"]), (&Value::Null, &"warm".into()));
        }
        let searches: Vec<&str> = pair.iter().map(|row| row["search"].as_str().unwrap()).collect();
        assert_eq!(searches, ["fused", "fused", "loop", "loop"]);
    }
    let run = |format: &str| bench(&[&arguments[..], &["-o", format]].concat()).1;
    let jsonl = run("jsonl");
    let parsed: Vec<Value> = jsonl.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(parsed.len() == rows.len() && parsed.iter().all(|row| names(row) == FUSION));
    let csv = run("csv");
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    assert_eq!(reader.headers().unwrap().iter().collect::<Vec<_>>(), FUSION);
    assert_eq!(reader.records().map(Result::unwrap).count(), rows.len());
    let markdown = run("md");
    assert_eq!(markdown.lines().count(), rows.len() + 2);
    assert!(markdown.lines().all(|line| line.matches('|').count() == FUSION.len() + 1));
}

#[test]
fn tests_have_the_names_of_llama_bench() {
    let decode = ["decode", "-n", "3", "--depth", "0,20", "--batch", "1,2", "-r", "1", "--device", "cpu"];
    let rows_of = rows(&decode);
    let of = |rows: &[Value], name: &str| -> Vec<String> {
        rows.iter().map(|row| row[name].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(of(&rows_of, "test"), ["tg3", "tg3 × 2", "tg3 @ d20", "tg3 @ d20 × 2"]);
    for row in &rows_of {
        let number = |name: &str| row[name].as_f64().unwrap();
        assert_eq!(names(row), MODELS);
        assert_eq!(
            (&row["model"], &row["±"], &row["launches/token"]),
            (&"demo bf16".into(), &Value::Null, &Value::Null)
        );
        assert!((number("tokens/s") * number("ms/token") / 1e3 - 1.0).abs() < 1e-9);
        assert!(number("GB/s") > 0.0 && number("% of memory") > 0.0);
    }
    let prefill =
        ["prefill", "-p", "9,20", "-r", "2", "--device", "cpu", "--threads", "1,2", "--warm-up", "0"];
    let rows_of = rows(&prefill);
    assert_eq!(of(&rows_of, "test"), ["pp9", "pp20", "pp9", "pp20"]);
    assert_eq!(of(&rows_of, "device")[1..3], ["cpu, 1 thread", "cpu, 2 threads"]);
    assert!(rows_of.iter().all(|row| names(row) == MODELS && row["±"].as_f64().is_some()));
}

#[test]
fn random_weights_of_a_named_shape_are_measured() {
    let shape = ["--shape", "smollm2-135m+smollm2-135m", "--dtype", "bf16", "--num-experts", "0,1"];
    let (fine, _, stderr) = bench(&[&["decode"], &shape[..]].concat());
    assert!(!fine && stderr.contains("1..=8"), "{stderr}");
    let shape = ["--shape", "smollm2-135m", "--dtype", "bf16,f16", "-n", "1", "-r", "1", "--warm-up", "0"];
    let rows = rows(&[&["decode", "--device", "cpu"], &shape[..]].concat());
    let models: Vec<&str> = rows.iter().map(|row| row["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["smollm2-135m bf16", "smollm2-135m f16"]);
    assert!(rows.iter().all(|row| (row["MiB"].as_f64().unwrap() - 256.6).abs() < 0.1));
}

#[test]
fn ensembles_of_directories_are_named_by_all_their_models() {
    let demo = |name: &str| format!("{}/models/demo/{name}", env!("CARGO_MANIFEST_DIR"));
    let (large, small) = (demo("large"), demo("small/"));
    let experts = [demo("expert-facts"), format!("adder={}", demo("expert-sums"))];
    let alone = ["--large", &large];
    let pair = [&alone[..], &["--small", &small]].concat();
    let with_one = [&pair[..], &["--expert", &experts[0]]].concat();
    let with_two = [&with_one[..], &["--expert", &experts[1]]].concat();
    for (models, expected) in [
        (&alone[..], "large bf16"),
        (&pair, "large+small bf16"),
        (&with_one, "large+small+1 expert bf16"),
        (&with_two, "large+small+2 experts bf16"),
        (&with_two[2..], "small+2 experts bf16"),
    ] {
        let prefill = ["prefill", "-p", "1", "-r", "1", "--warm-up", "0", "--device", "cpu"];
        let rows = rows(&[&prefill[..], models].concat());
        assert_eq!(rows[0]["model"], expected);
    }
}

#[test]
fn wrong_input_is_named() {
    for (arguments, expected) in [
        (&["decode", "--shape", "llama-9"][..], "there are llama-2-7b"),
        (&["decode", "--shape", "llama-2-13b+smollm2-135m"], "49152"),
        (&["decode", "--dtype", "q4"], "f32, f16 or bf16"),
        (&["decode", "--dtype", "f16"], "--shape"),
        (&["decode", "--num-experts", "2"], "--shape"),
        (&["decode", "--shape", "llama-2-7b", "--large", "somewhere"], "cannot be used with"),
        (&["decode", "-n", "100000"], "positions"),
        (&["decode", "-n", "0"], "--generate"),
        (&["decode", "--batch", "0"], "1..=256"),
        (&["prefill", "-p", "1000,x"], "--prompt"),
        (&["prefill", "--device", "cpu", "--threads", "1,0"], "--threads"),
        (&["prefill", "--device", "cpu,tpu"], "auto, cpu, cuda or cuda:N"),
        (&["fusion", "--experts", "9"], "1..=8"),
        (&["fusion", "--candidates", "33"], "2..=32"),
        (&["fusion", "--vocab", "1"], "--vocab"),
        (&["fusion", "-r", "0"], "--repetitions"),
        (&["fusion", "-o", "xml"], "jsonl"),
        (&["fusion", "--search", "plain"], "--search"),
        (&["fusion", "--caches", "cold"], "--caches"),
        (&["fusion", "--step", "llama-9"], "there are llama-2-7b"),
        (&["fusion", "--device", "cpu", "--search", "fused,broadcast"], "--search broadcast is for GPUs"),
    ] {
        let (fine, stdout, stderr) = bench(arguments);
        assert!(!fine && stdout.is_empty() && stderr.contains(expected), "{arguments:?}: {stdout} {stderr}");
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use tempfile::TempDir;
    use virtual_gpu::host::Driver;

    use super::*;

    /// The virtual device as a driver that a child process finds.
    fn driver() -> TempDir {
        let dir = TempDir::new().unwrap();
        std::os::unix::fs::symlink(Driver::path().unwrap(), dir.path().join("libcuda.so")).unwrap();
        dir
    }

    #[test]
    fn fusion_counts_on_a_device_without_a_clock() {
        let driver = driver();
        let lists =
            ["fusion", "--vocab", "2000", "--experts", "1,2", "--candidates", "3,20", "--batch", "1,3"];
        // Both are asked for, and nothing is timed: a row of each.
        let rows = rows_with(Some(driver.path()), &[&lists[..], &["--caches", "flushed,warm"]].concat());
        assert_eq!(rows.len(), 2 * 2 * 2 * 3 * 2);
        for row in &rows {
            let number = |name: &str| row[name].as_u64().unwrap();
            let (experts, candidates, batch) = (number("experts"), number("candidates"), number("batch"));
            let logits = (2 + experts) * 2000 * 4 * batch;
            // Three slices of 768 ids; a state of 16 bytes for each candidate, the large model, and twice for the targets.
            let states = batch * 2 * 3 * experts * (candidates + 3) * 16;
            let tensors = 3 * (2 + experts) + experts * (3 + 8) + experts * candidates * 14 + 4;
            let (launches, moved) = match row["search"].as_str().unwrap() {
                "fused" => (1, logits + states),
                "loop" => (5 + 6 * experts + 7 * experts * candidates, tensors * 2000 * 4 * batch),
                "broadcast" => (5 + 6 * experts + 7 * experts, tensors * 2000 * 4 * batch),
                other => panic!("{other}"),
            };
            assert_eq!(number("launches"), launches, "{row}");
            assert!((row["MB moved"].as_f64().unwrap() * 1e6 - moved as f64).abs() < 1e-3, "{row}");
            assert_eq!(names(row), FUSION);
            for time in ["µs", "±", "× fused", "% of a step"] {
                assert_eq!(row[time], Value::Null, "{row}");
            }
        }
    }

    #[test]
    fn the_searches_that_are_asked_for_are_run_eagerly_too() {
        let driver = driver();
        let arguments =
            ["fusion", "--vocab", "300", "--experts", "1", "--search", "broadcast,fused", "--device"];
        for (more, device) in [(&["cuda"][..], "cuda:0"), (&["cuda", "--eager"], "cuda:0, eager")] {
            let rows = rows_with(Some(driver.path()), &[&arguments[..], more].concat());
            let cells: Vec<_> =
                rows.iter().map(|row| (row["search"].clone(), row["launches"].clone())).collect();
            assert_eq!(cells, [("broadcast".into(), 18.into()), ("fused".into(), 1.into())]);
            assert!(rows.iter().all(|row| row["device"] == device), "{rows:?}");
        }
    }

    #[test]
    fn models_count_launches_and_tell_no_time() {
        let driver = driver();
        let run = |arguments: &[&str]| rows_with(Some(driver.path()), arguments);
        let of = |row: &Value| row["launches/token"].as_f64().unwrap();
        let decode = run(&["decode", "-n", "4", "-r", "3", "--batch", "1,2", "--depth", "0,20"]);
        let eager = run(&["decode", "-n", "4", "--eager"]);
        let prefill = run(&["prefill", "-p", "20", "-d", "0,20"]);
        for row in decode.iter().chain(&eager).chain(&prefill) {
            assert_eq!(names(row), MODELS);
            for time in ["tokens/s", "±", "ms/token", "GB/s", "% of memory"] {
                assert_eq!(row[time], Value::Null, "{row}");
            }
        }
        let tests: Vec<&str> = decode.iter().map(|row| row["test"].as_str().unwrap()).collect();
        assert_eq!(tests, ["tg4", "tg4 × 2", "tg4 @ d20", "tg4 @ d20 × 2"]);
        // Two sequences share the launches of a step.
        assert!((of(&decode[0]) / of(&decode[1]) - 2.0).abs() < 1e-9, "{decode:?}");
        // Launches on demand: both groups' layers, and embedding, output and fusion.
        assert!(of(&eager[0]) > 10.0 && of(&eager[0]).fract() == 0.0, "{eager:?}");
        assert!(of(&prefill[0]) < of(&eager[0]), "{prefill:?}");
    }

    #[test]
    fn a_cpu_and_a_gpu_stand_in_one_table() {
        let driver = driver();
        let device = ["--device", "cpu,cuda", "--threads", "1,2"];
        let of_models =
            rows_with(Some(driver.path()), &[&["decode", "-n", "2", "-r", "1"], &device[..]].concat());
        let names: Vec<&str> = of_models.iter().map(|row| row["device"].as_str().unwrap()).collect();
        assert_eq!(names, ["cpu, 1 thread", "cpu, 2 threads", "cuda:0"]);
        let timed: Vec<bool> = of_models.iter().map(|row| row["tokens/s"].is_number()).collect();
        assert_eq!(timed, [true, true, false]);
        // The models on two GPUs; the virtual driver has one for a program.
        let (fine, _, stderr) = bench_with(Some(driver.path()), &["decode", "--small-device", "1"]);
        assert!(!fine && stderr.contains("there is one NVIDIA GPU"), "{stderr}");
        let (fine, _, stderr) = bench_with(Some(driver.path()), &["fusion", "--device", "cuda:7"]);
        assert!(!fine && stderr.contains("there is one NVIDIA GPU"), "{stderr}");
    }
}
