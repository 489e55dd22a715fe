//! `dlf-engine bench`: its formats, its names, and what it says on a device without a clock.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::process::Command;

use serde_json::Value;

fn bench(arguments: &[&str]) -> (bool, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_dlf-engine")).arg("bench").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn every_combination_is_a_row() {
    let arguments = ["fusion", "--vocab", "100,200", "--experts", "1,2", "--batch", "1,3", "-r", "2"];
    let device = ["--device", "cpu", "--threads", "1"];
    let run = |format: &str| {
        let all: Vec<&str> =
            arguments.iter().chain(&device).chain(&["-o"]).chain(&[format]).copied().collect();
        let (fine, stdout, stderr) = bench(&all);
        assert!(fine, "{stderr}");
        stdout
    };
    let rows: Vec<Value> = serde_json::from_str(&run("json")).unwrap();
    assert_eq!(rows.len(), 8);
    let key = |row: &Value| (row["vocab"].as_u64(), row["experts"].as_u64(), row["batch"].as_u64());
    let mut keys: Vec<_> = rows.iter().map(key).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 8);
    for row in &rows {
        let number = |name: &str| row[name].as_f64().unwrap();
        assert!(number("µs") > 0.0);
        // Rounding of a quotient.
        assert!((number("plain µs") / number("µs") / number("times faster") - 1.0).abs() < 1e-9);
    }
    assert_eq!(run("jsonl").lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count(), 8);
    let (csv, markdown) = (run("csv"), run("md"));
    assert_eq!((csv.lines().count(), markdown.lines().count()), (9, 10));
    assert!(
        markdown
            .lines()
            .all(|line| line.matches('|').count() == markdown.lines().next().unwrap().matches('|').count())
    );
}

#[test]
fn tests_have_the_names_of_llama_bench() {
    let decode = [
        "decode", "-n", "3", "--depth", "0,20", "--batch", "1,2", "-r", "1", "-o", "json", "--device", "cpu",
    ];
    let (fine, stdout, stderr) = bench(&decode);
    assert!(fine, "{stderr}");
    let rows: Vec<Value> = serde_json::from_str(&stdout).unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(names, ["tg3", "tg3 × 2", "tg3 @ d20", "tg3 @ d20 × 2"]);
    assert!(rows.iter().all(|row| row["tokens/s"].as_f64().unwrap() > 0.0 && row["model"] == "demo"));
    let (fine, stdout, _) = bench(&["prefill", "-p", "9", "-r", "1", "-o", "json", "--device", "cpu"]);
    let rows: Vec<Value> = serde_json::from_str(&stdout).unwrap();
    assert!(fine && rows[0]["test"] == "pp9");
}

#[test]
fn wrong_input_is_named() {
    for (arguments, expected) in [
        (&["decode", "--shape", "llama-9"][..], "there are llama-2-7b"),
        (&["decode", "--shape", "llama-2-13b+smollm2-135m"], "49152"),
        (&["decode", "--dtype", "q4"], "f32, f16 or bf16"),
        (&["decode", "-n", "100000"], "positions"),
        (&["fusion", "--experts", "9"], "1..=8"),
        (&["fusion", "-r", "0"], "-r"),
    ] {
        let (fine, _, stderr) = bench(arguments);
        assert!(!fine && stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_device_without_a_clock_counts() {
    use virtual_gpu::host::Driver;

    let dir = tempfile::TempDir::new().unwrap();
    std::os::unix::fs::symlink(Driver::path().unwrap(), dir.path().join("libcuda.so")).unwrap();
    let run = |arguments: &[&str]| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dlf-engine"));
        let output =
            command.arg("bench").args(arguments).env("LD_LIBRARY_PATH", dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        rows[0].clone()
    };
    let fusion = run(&["fusion", "--vocab", "2000", "--experts", "2", "-r", "1", "-o", "json"]);
    assert_eq!(
        (&fusion["launches"], &fusion["µs"], &fusion["% of a step"]),
        (&1.into(), &Value::Null, &Value::Null)
    );
    let decode = run(&["decode", "-n", "3", "-r", "1", "-o", "json"]);
    assert!(decode["launches/token"].as_f64().unwrap() > 10.0);
    assert_eq!((&decode["tokens/s"], &decode["GB/s"]), (&Value::Null, &Value::Null));
}
