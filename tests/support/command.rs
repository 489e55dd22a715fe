//! The real binary, and what its runs print.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use std::fs;
use std::path::Path;
use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;

/// What a run printed and how it ended.
pub struct Run {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

pub fn run(args: &[&str]) -> Run {
    let output = Command::new(cargo_bin("dlf-engine")).args(args).output().unwrap();
    Run {
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code().unwrap(),
    }
}

/// The lines of a run that must succeed, as JSON.
pub fn json_lines(args: &[&str]) -> Vec<Value> {
    let run = run(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn fails(args: &[&str], says: &str) {
    let run = run(args);
    assert_eq!(run.code, 1, "{args:?}: {}", run.stderr);
    assert!(run.stderr.starts_with("error: ") && run.stderr.contains(says), "{args:?}: {}", run.stderr);
    assert_eq!(run.stdout, "", "{args:?}: nothing half-done on stdout");
}

pub fn refused(args: &[&str], says: &str) {
    let run = run(args);
    assert_eq!(run.code, 2, "{args:?}: {}", run.stderr);
    assert!(run.stderr.contains(says), "{args:?}: {}", run.stderr);
}

pub fn golden(case: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(case);
    assert!(dir.is_dir(), "{}", dir.display());
    dir.to_str().unwrap().to_owned()
}

pub fn trace(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
