//! Every command of the README runs as it stands there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "a test")]

use std::process::Command;

use assert_cmd::cargo::cargo_bin;

/// The commands of the README's `sh` blocks, comments left out.
fn commands() -> Vec<String> {
    let readme = include_str!("../README.md");
    let blocks = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.flat_map(str::lines).filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn every_command_succeeds() {
    let mut ran = 0;
    for command in commands() {
        // The tests run themselves, and a release build is what is tested here.
        if command.starts_with("cargo test") {
            continue;
        }
        let arguments = command.replace("cargo run --release --", "dlf-engine");
        let binary = cargo_bin("dlf-engine");
        let script = arguments.replacen("dlf-engine", &format!("'{}'", binary.display()), 1);
        let output = Command::new("sh")
            .arg("-ec")
            .arg(&script)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {stderr}");
        assert!(!output.stdout.is_empty(), "{command}");
        ran += 1;
    }
    assert!(ran >= 6, "{ran}");
}

/// The answers in the README's first table are those of the demo ensemble to its own question.
#[test]
fn the_first_table_has_what_the_models_say() {
    let readme = include_str!("../README.md");
    for (method, row) in
        [("large", "large model alone"), ("expert:sums", "expert alone"), ("dynamic", "fused")]
    {
        let output =
            Command::new(cargo_bin("dlf-engine")).args(["generate", "--method", method]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let cells: Vec<String> = text.trim().lines().map(|line| format!("`{line}`")).collect();
        let line = format!("| {row} | {} |", cells.join(" "));
        assert!(readme.contains(&line), "{line}");
    }
}
