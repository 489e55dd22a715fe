//! What a terminal gets to see, and what a pipe doesn't: the binary on pseudo-terminals of the kernel's.
#![cfg(all(target_os = "linux", feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use assert_cmd::cargo::cargo_bin;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What an end of the binary is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Terminal,
    Pipe,
}
use Place::{Pipe, Terminal};

/// What a run printed; a terminal's line ends are those that were printed.
struct Run {
    stdout: String,
    stderr: String,
}

/// The end that is written to, and all that comes out of the other.
fn open(place: Place) -> (Stdio, JoinHandle<String>) {
    let (reader, writer): (OwnedFd, OwnedFd) = match place {
        Pipe => {
            let (reader, writer) = std::io::pipe().unwrap();
            (reader.into(), writer.into())
        }
        Terminal => {
            // No child of another test may hold it open.
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let terminal = openpt(flags).unwrap();
            grantpt(&terminal).unwrap();
            unlockpt(&terminal).unwrap();
            let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
            tcsetwinsize(&terminal, size).unwrap();
            let end = ioctl_tiocgptpeer(&terminal, flags).unwrap();
            (terminal, end)
        }
    };
    let read = move || {
        let (mut reader, mut bytes, mut piece) = (File::from(reader), Vec::new(), [0; 4096]);
        // A terminal whose other end is closed answers with an error.
        while let Ok(count @ 1..) = reader.read(&mut piece) {
            bytes.extend(&piece[..count]);
        }
        String::from_utf8(bytes).unwrap().replace("\r\n", "\n")
    };
    (writer.into(), thread::spawn(read))
}

fn run(stdout: Place, stderr: Place, variables: &[(&str, &str)], arguments: &[&str]) -> Run {
    let (out, read_out) = open(stdout);
    let (err, read_err) = open(stderr);
    let mut command = Command::new(cargo_bin("dlf-engine"));
    command
        .args(arguments)
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR")
        .envs(variables.iter().copied());
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap();
    // It holds the ends that are written to.
    drop(command);
    let status = child.wait().unwrap();
    let run = Run { stdout: read_out.join().unwrap(), stderr: read_err.join().unwrap() };
    assert!(status.success(), "{arguments:?}: {}", run.stderr);
    run
}

const SUM: &str = "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\nAnswer:";
const GENERATE: [&str; 7] = ["generate", "--prompt", SUM, "-n", "12", "--device", "cpu"];

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A token in its colour, line by line: grey at α = 0, then by quarters.
fn colored(record: &Value) -> String {
    let alpha: f64 = record["alpha"].as_array().unwrap().iter().map(|alpha| alpha.as_f64().unwrap()).sum();
    let scale = [250, 117, 81, 79, 78, 148, 220, 214, 203];
    let color = scale[((alpha * 4.0).round() as usize).min(8)];
    let line = |line: &str| {
        if line.is_empty() { String::new() } else { format!("\x1b[38;5;{color}m{line}\x1b[0m") }
    };
    record["text"].as_str().unwrap().split('\n').map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_terminal_gets_colours_by_alpha_and_a_closing_line() {
    let dir = TempDir::new().unwrap();
    let trace = dir.path().join("trace.jsonl");
    let run = run(Terminal, Terminal, &[], &[&GENERATE[..], &["--trace", trace.to_str().unwrap()]].concat());
    let records = lines(&trace);
    let expected: String = records.iter().map(colored).collect();
    assert_eq!(run.stdout, format!("{expected}\n"));
    let alphas: Vec<f64> = records
        .iter()
        .flat_map(|record| record["alpha"].as_array().unwrap())
        .filter_map(Value::as_f64)
        .collect();
    let mut colors: Vec<&str> =
        expected.split("\x1b[38;5;").skip(1).filter_map(|rest| rest.split('m').next()).collect();
    colors.sort_unstable();
    colors.dedup();
    assert!(colors.len() > 1, "{colors:?}");

    let mean = alphas.iter().sum::<f64>() / records.len() as f64;
    let (numbers, legend) = run.stderr.trim_end().split_once("\nα: ").unwrap();
    let parts: Vec<&str> = numbers.split(" · ").collect();
    let [speed, each, large, small, fusion, alpha] = parts[..] else { panic!("{}", run.stderr) };
    assert!(speed.ends_with(" tokens/s") && each.ends_with(" ms/token"), "{}", run.stderr);
    for (part, name) in [(large, "large "), (small, "small and experts "), (fusion, "fusion ")] {
        assert!(part.strip_prefix(name).unwrap().parse::<f64>().is_ok(), "{part}");
    }
    assert_eq!(alpha, format!("mean Σα {mean:.2}"));
    assert!(
        legend.contains("\x1b[38;5;250m0.0\x1b[0m") && legend.contains("\x1b[38;5;203m2.0\x1b[0m"),
        "{legend}"
    );
}

#[test]
fn no_colours_with_no_color_in_a_pipe_or_where_quiet() {
    let plain = run(Pipe, Pipe, &[], &GENERATE);
    assert_eq!(plain.stderr, "");
    let without = run(Terminal, Terminal, &[("NO_COLOR", "1")], &GENERATE);
    assert_eq!(without.stdout, plain.stdout);
    let closing = without.stderr.trim_end();
    assert!(
        closing.contains("tokens/s") && closing.contains("mean Σα") && !closing.contains('\x1b'),
        "{closing}"
    );
    // An empty one isn't set.
    assert!(run(Terminal, Pipe, &[("NO_COLOR", "")], &GENERATE).stdout.contains('\x1b'));
    let piped = run(Pipe, Terminal, &[], &GENERATE);
    assert_eq!((piped.stdout, piped.stderr.as_str()), (plain.stdout.clone(), ""));
    let quiet = run(Terminal, Terminal, &[], &[&GENERATE[..], &["--quiet"]].concat());
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (plain.stdout, ""));
}

#[test]
fn long_work_has_a_progress_bar_where_nothing_else_shows_it() {
    let dir = TempDir::new().unwrap();
    let (prompts, texts) = (dir.path().join("prompts.jsonl"), dir.path().join("texts.jsonl"));
    let write = |path: &Path, field: &str| {
        let lines = ["There are 3", "Tom has 7", "Anna"].map(|text| json!({ field: text }).to_string());
        fs::write(path, lines.join("\n")).unwrap();
    };
    write(&prompts, "prompt");
    write(&texts, "text");
    let output = dir.path().join("out.jsonl");
    let generate = ["generate", "--input", prompts.to_str().unwrap(), "-n", "4", "--device", "cpu"];
    let score = ["score", "--input", texts.to_str().unwrap(), "--device", "cpu"];
    for command in [&generate[..], &score[..]] {
        let go = |stdout, stderr, more: &[&str]| run(stdout, stderr, &[], &[command, more].concat());
        let shows = |run: &Run| run.stderr.contains("/3 · ");
        let json = go(Pipe, Terminal, &["--json"]);
        assert!(shows(&json), "{command:?}: {:?}", json.stderr);
        assert_eq!(
            json.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).count(),
            3
        );
        assert!(shows(&go(Pipe, Terminal, &[])), "text");
        assert!(shows(&go(Terminal, Terminal, &["--output", output.to_str().unwrap()])), "results in a file");
        // JSON that scrolls by is progress enough, and a bar would be in it.
        assert!(!shows(&go(Terminal, Terminal, &["--json"])));
        assert_eq!(go(Pipe, Terminal, &["--json", "--quiet"]).stderr, "");
        assert_eq!(go(Pipe, Pipe, &["--json"]).stderr, "");
    }
    assert!(
        !run(Pipe, Terminal, &[], &[&GENERATE[..], &["--json"]].concat()).stderr.contains("/1"),
        "one prompt"
    );
}
