//! The binary on the virtual CUDA device: the same command line, the same results.
#![cfg(all(feature = "cuda", feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs;
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

/// JSON lines of a file or of stdout.
fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Whether both say the same, but for times. Numbers that aren't whole may differ by the bound for 16-bit weights: sums are
/// f32 on both, in another order. α are those of a grid, and equal.
fn assert_alike(gpu: &Value, cpu: &Value, what: &str) {
    match (gpu, cpu) {
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{what}: {gpu} and {cpu}");
            let timed = |key: &str| key == "timings" || key == "ms";
            for (key, a) in a.iter().filter(|(key, _)| !timed(key)) {
                assert!(key != "alpha" || *a == b[key], "{what}.{key}: {a} and {}", b[key]);
                assert_alike(a, &b[key], &format!("{what}.{key}"));
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{what}");
            a.iter().zip(b).for_each(|(a, b)| assert_alike(a, b, what));
        }
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let difference = a.as_f64().unwrap() - b.as_f64().unwrap();
            assert!(difference.abs() < 2e-3, "{what}: {a} and {b}");
        }
        _ => assert_eq!(gpu, cpu, "{what}"),
    }
}

/// What a command line writes: to stdout and to the files `trace.jsonl` and `out.jsonl` of its folder.
struct Written {
    stdout: Vec<Value>,
    files: [Option<String>; 2],
}

/// Runs `arguments` on `device`, with `DIR` replaced by a folder that holds `in.jsonl`; `torn` is what `out.jsonl` and
/// `trace.jsonl` hold before.
fn write(arguments: &[&str], device: &[&str], torn: Option<&Written>) -> Written {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let prompt =
        |k: usize| serde_json::json!({ "prompt": format!("Question: What is {k} plus 4?\nAnswer:") });
    let input: Vec<String> = (0..4).map(|k| prompt(k).to_string()).collect();
    fs::write(path("in.jsonl"), input.join("\n")).unwrap();
    if let Some(Written { files, .. }) = torn {
        // Killed in the middle of the second result, and of its trace.
        let [trace, out] = files.each_ref().map(|file| file.as_ref().unwrap());
        let lines =
            |text: &str, count: usize| text.lines().take(count).map(|line| line.len() + 1).sum::<usize>();
        fs::write(path("out.jsonl"), &out[..lines(out, 1) + 20]).unwrap();
        fs::write(path("trace.jsonl"), &trace[..lines(trace, 6) + 9]).unwrap();
    }
    let arguments: Vec<String> = arguments
        .iter()
        .chain(device)
        .map(|argument| argument.replace("DIR", dir.path().to_str().unwrap()))
        .collect();
    let output = run_on("h100,rtx4090", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let files = ["trace.jsonl", "out.jsonl"].map(|name| fs::read_to_string(path(name)).ok());
    Written { stdout: lines(std::str::from_utf8(&output.stdout).unwrap()), files }
}

fn assert_written_alike(gpu: &Written, cpu: &Written, what: &str) {
    assert_alike(&gpu.stdout.clone().into(), &cpu.stdout.clone().into(), what);
    for (gpu, cpu) in gpu.files.iter().zip(&cpu.files) {
        let values = |file: &Option<String>| file.as_deref().map(lines).unwrap_or_default();
        assert_eq!(gpu.is_some(), cpu.is_some(), "{what}");
        assert_alike(&values(gpu).into(), &values(cpu).into(), what);
    }
}

const ANSWER: [&str; 6] = ["generate", "--json", "-p", "Question: What is 3 plus 4?\nAnswer:", "-n", "4"];

#[test]
fn every_way_of_asking_gives_what_the_cpu_gives() {
    let golden = |name: &str| format!("{}/tests/goldens/tiny/{name}", env!("CARGO_MANIFEST_DIR"));
    let (base, adapter) = (golden("mha_untied_f32/model"), golden("lora_q_v/adapter"));
    let (large, other) = (golden("head_dim_128/model"), golden("rslora_all/adapter"));
    let lora = ["--large", &large, "--small", &base, "--expert", &adapter, "--expert", &other];
    let batch = ["generate", "--json", "--input", "DIR/in.jsonl", "-n", "4", "--batch-size", "3"];
    let cases: [(&str, Vec<&str>); 9] = [
        ("a trace", [&ANSWER[..], &["--trace", "DIR/trace.jsonl"]].concat()),
        ("a batch", [&batch[..], &["--temperature", "0.8", "--seed", "7"]].concat()),
        ("a chat", [&ANSWER[..], &["--chat"]].concat()),
        ("a stop", [&ANSWER[..4], &["--stop", "7", "-n", "8"]].concat()),
        ("large", [&ANSWER[..], &["--method", "large"]].concat()),
        ("small", [&ANSWER[..], &["--method", "small"]].concat()),
        ("an expert", [&ANSWER[..], &["--method", "expert:sums"]].concat()),
        ("scores", vec!["score", "--json", "--text", "Tom has 3 apples.", "--method", "static"]),
        ("adapters", [&["generate", "--json", "--prompt-ids", "1,2,3", "-n", "4"][..], &lora].concat()),
    ];
    for (what, arguments) in cases {
        let [cpu, gpu] = ["cpu", "cuda"].map(|device| write(&arguments, &["--device", device], None));
        assert_written_alike(&gpu, &cpu, what);
        assert!(!gpu.stdout.is_empty(), "{what}");
    }
}

#[test]
fn a_killed_run_resumes_on_a_gpu() {
    let base = ["generate", "--input", "DIR/in.jsonl", "-n", "4"];
    let files = ["--output", "DIR/out.jsonl", "--trace", "DIR/trace.jsonl"];
    let whole = write(&[&base[..], &files].concat(), &["--device", "cuda"], None);
    let resumed = write(&[&base[..], &files, &["--resume"]].concat(), &["--device", "cuda"], Some(&whole));
    assert_written_alike(&resumed, &whole, "resumed");
    assert_eq!(whole.files[1].as_ref().unwrap().lines().count(), 4);
}

#[test]
fn two_gpus_of_the_command_line_give_what_one_gives() {
    let arguments = [&ANSWER[..], &["--trace", "DIR/trace.jsonl"]].concat();
    let one = write(&arguments, &["--device", "cuda:1"], None);
    for devices in
        [["--large-device", "0", "--small-device", "1"], ["--large-device", "1", "--small-device", "0"]]
    {
        assert_written_alike(&write(&arguments, &devices, None), &one, "two GPUs");
    }
    let absent = [&ANSWER[..], &["--large-device", "0", "--small-device", "2"]].concat();
    let message = String::from_utf8_lossy(&run_on("h100,rtx4090", &absent).stderr).into_owned();
    assert!(message.contains("device cuda:2: there are 2 NVIDIA GPUs, cuda:0 to cuda:1"), "{message}");
}
