//! The binary on the virtual CUDA device: the same command line, the same results.
#![cfg(all(feature = "cuda", feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use virtual_gpu::host::Driver;

/// Runs the binary with the virtual driver as the system's.
fn run(arguments: &[&str]) -> Output {
    run_on("h100", arguments)
}

fn run_on(card: &str, arguments: &[&str]) -> Output {
    run_with(card, "12080", arguments)
}

/// On this card, under a driver of this version.
fn run_with(card: &str, driver: &str, arguments: &[&str]) -> Output {
    let dir = TempDir::new().unwrap();
    std::os::unix::fs::symlink(Driver::path().unwrap(), dir.path().join("libcuda.so")).unwrap();
    Command::new(Path::new(env!("CARGO_BIN_EXE_dlf-engine")))
        .args(arguments)
        .env("LD_LIBRARY_PATH", dir.path())
        .env("VCUDA_PROFILE", card)
        .env("VCUDA_DRIVER_VERSION", driver)
        .output()
        .unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let output = run(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

const PROMPT: [&str; 7] = [
    "generate",
    "--json",
    "--prompt",
    "Question: What is 3 plus 4?\nAnswer:",
    "--max-new-tokens",
    "6",
    "--device",
];

#[test]
fn generate_says_on_a_gpu_what_it_says_on_the_cpu() {
    let with = |device: &str, more: &[&str]| {
        let arguments: Vec<&str> =
            PROMPT.iter().copied().chain([device]).chain(more.iter().copied()).collect();
        json(&arguments)
    };
    let sampled: &[&str] = &["--temperature", "0.7", "--top-p", "0.9", "--seed", "3"];
    for more in [&[][..], sampled, &["--search", "refine"], &["--method", "static", "--alpha", "0.8"]] {
        let (cpu, gpu) = (with("cpu", more), with("cuda", more));
        for field in ["text", "token_ids", "finish_reason", "usage"] {
            assert_eq!(gpu[field], cpu[field], "{more:?} {field}");
        }
    }
    // Auto takes the GPU, and one launch at a time is the same.
    let expected = with("cpu", &[]);
    assert_eq!(with("auto", &[])["token_ids"], expected["token_ids"]);
    assert_eq!(with("cuda:0", &["--eager"])["token_ids"], expected["token_ids"]);
    assert_eq!(with("cuda", &["--kv-memory", "8"])["token_ids"], expected["token_ids"]);
}

#[test]
fn score_gives_the_numbers_of_the_cpu() {
    let score = |device| json(&["score", "--json", "--text", "Tom has 3 apples.", "--device", device]);
    let (cpu, gpu) = (score("cpu"), score("cuda"));
    assert_eq!(gpu["ids"], cpu["ids"]);
    let tokens = |value: &Value| value["tokens"].as_array().unwrap().clone();
    for (a, b) in tokens(&gpu).iter().zip(&tokens(&cpu)) {
        assert_eq!((&a["token_id"], &a["alpha"], &a["expert"]), (&b["token_id"], &b["alpha"], &b["expert"]));
        let difference = a["logprob_fused"].as_f64().unwrap() - b["logprob_fused"].as_f64().unwrap();
        // The bound for 16-bit weights; sums are f32 on both, in another order.
        assert!(difference.abs() < 2e-3, "{a} {b}");
    }
    assert_eq!(tokens(&gpu).len(), tokens(&cpu).len());
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    let output = run(&["generate", "--prompt", "x", "--device", "cuda:7"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cuda:7") && message.contains("there is one NVIDIA GPU, cuda:0"), "{message}");
    let output = run(&["generate", "--prompt", "x", "--device", "cuda", "--kv-memory", "1", "-n", "4000"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{message}");
    assert!(message.contains("--kv-memory 1"), "{message}");
}

/// The virtual device has no clock: what it takes on the host would pass for a GPU's speed.
#[test]
fn no_time_of_the_virtual_device_is_told() {
    let dir = TempDir::new().unwrap();
    let trace = dir.path().join("trace.jsonl");
    let records = || -> Vec<Value> {
        let text = std::fs::read_to_string(&trace).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let go = |device: &str, more: &[&str]| {
        let traced = ["--trace", trace.to_str().unwrap()];
        json(&[&PROMPT[..], &[device], &traced, more].concat())
    };
    // In graphs, eagerly, and where only one model runs.
    for more in [&[][..], &["--eager"], &["--method", "large"]] {
        let result = go("cuda", more);
        let timings = result["timings"].as_object().unwrap();
        assert_eq!(timings.len(), 5);
        assert!(timings.values().all(Value::is_null), "{more:?}: {timings:?}");
        assert!(
            records().iter().all(|record| record["ms"].is_null() && record.get("ms").is_some()),
            "{more:?}"
        );
    }
    let scored = json(&["score", "--json", "--text", "Tom has 3 apples.", "--device", "cuda"]);
    assert!(scored["tokens"].as_array().unwrap().iter().all(|token| token["ms"].is_null()));
    // On the CPU all are numbers.
    let result = go("cpu", &[]);
    assert!(result["timings"].as_object().unwrap().values().all(Value::is_number));
    assert!(records().iter().all(|record| record["ms"].is_number()));
}

#[test]
fn auto_is_the_cpu_where_the_gpu_or_its_driver_is_too_old() {
    let with = |card, driver, device, more: &[&str]| {
        let output = run_with(card, driver, &[&PROMPT[..], &[device], more].concat());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let ids = |stdout: &str| serde_json::from_str::<Value>(stdout).unwrap()["token_ids"].clone();
    let expected = ids(&with("h100", "12080", "cpu", &[]).1);
    for (card, driver, reason) in [
        ("t4", "12080", "Tesla T4 has compute capability 7.5, and 8.0 is needed (Ampere or newer)"),
        ("h100", "11080", "the driver is for CUDA 11.8, and 12.1 is needed (r530 or newer)"),
    ] {
        let (code, stdout, stderr) = with(card, driver, "auto", &[]);
        assert_eq!((code, stderr), (Some(0), format!("note: --device auto is the CPU here: {reason}\n")));
        assert_eq!(ids(&stdout), expected);
        let (code, stdout, stderr) = with(card, driver, "auto", &["--quiet"]);
        assert_eq!((code, stderr.as_str(), ids(&stdout)), (Some(0), "", expected.clone()));
        for device in ["cuda", "cuda:0"] {
            let (code, stdout, stderr) = with(card, driver, device, &[]);
            assert_eq!((code, stdout.as_str()), (Some(1), ""));
            assert_eq!(stderr, format!("error: device cuda:0: {reason}\n"));
        }
    }
    // Whoever names the CPU isn't told of GPUs, and 12.1 is new enough.
    assert_eq!(with("t4", "12080", "cpu", &[]).2, "");
    assert_eq!(with("h100", "12010", "auto", &[]).2, "");
}

/// A typing error in a test's environment would else be another card, unnoticed.
#[test]
fn a_card_that_is_not_there_is_named() {
    let output = run_on("h10", &["generate", "--prompt", "x", "--device", "cuda"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    let expected = "CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected \
                    [VCUDA_PROFILE: no card `h10`; there are a100, rtx4090, h100, t4])";
    assert!(message.contains(expected), "{message}");
}
