//! C programs against the header and both libraries: those of `examples/c`, and the one of `docs/embedding.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Which of the two libraries a program is linked with.
#[derive(Clone, Copy)]
enum Library {
    Shared,
    Static,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..").canonicalize().unwrap()
}

/// Builds the libraries, which cargo doesn't do for a test of a crate that no Rust program can link with.
fn libraries() -> PathBuf {
    // …/target/PROFILE/deps/programs-…
    let profile = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    let mut cargo = Command::new(env!("CARGO"));
    // The whole workspace, since that is what is built already; one package would have other features.
    cargo.args(["build", "--quiet", "--locked", "--workspace", "--target-dir"]);
    cargo.arg(profile.parent().unwrap()).current_dir(root());
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success());
    profile
}

/// Compiles a program, every warning an error, runs it, and returns what it printed.
fn run(source: &Path, library: Library, arguments: &[&str]) -> String {
    let (dir, libraries) = (TempDir::new().unwrap(), libraries());
    let program = dir.path().join("program");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"))
        .arg(source)
        .arg("-o")
        .arg(&program)
        .arg("-lm");
    match library {
        Library::Shared => {
            cc.arg(libraries.join("libdlf_engine.so")).arg(format!("-Wl,-rpath,{}", libraries.display()))
        }
        Library::Static => cc.arg(libraries.join("libdlf_engine.a")).args(["-lpthread", "-ldl", "-lm"]),
    };
    let compiled = cc.output().expect("a C compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&program).args(arguments).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}: {stdout}{stderr}", output.status);
    stdout.into_owned()
}

#[test]
fn the_border_holds() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/border.c");
    let expected = concat!(env!("CARGO_PKG_VERSION"), "\nall held\n");
    assert_eq!(run(&source, Library::Shared, &[]), expected);
    assert_eq!(run(&source, Library::Static, &[]), expected);
}

#[test]
fn fuse_moves_the_large_model_to_the_expert() {
    let printed = run(&root().join("examples/c/fuse.c"), Library::Shared, &[]);
    assert_eq!(printed.lines().count(), 2, "{printed}");
    assert!(printed.starts_with("row 0: large 1, fused 2, alpha "), "{printed}");
}

#[test]
fn generate_gives_what_the_rust_library_gives() {
    use std::sync::Arc;

    use engine::generate::limits_for;
    use engine::{BackendOptions, Device, Ensemble, Generator, Request};

    let question = "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\nAnswer:";
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let request = Request::new(ensemble.tokenizer(0).unwrap().encode(question, true).unwrap(), 32);
    let limits = limits_for(&ensemble, std::slice::from_ref(&request), 1);
    let options = BackendOptions { threads: Some(1), ..BackendOptions::new(Device::Cpu, limits) };
    let mut generator = Generator::new(Arc::clone(&ensemble), options.open(ensemble).unwrap());
    generator.push(request).unwrap();
    let text: String = generator.map(|step| step.unwrap().text).collect();
    assert!(text.contains("42"), "{text}");

    let printed = run(&root().join("examples/c/generate.c"), Library::Shared, &[question]);
    assert_eq!(printed, format!("{text}\n"));
}

#[test]
fn the_documentation_runs() {
    let text = std::fs::read_to_string(root().join("docs/embedding.md")).unwrap();
    let program = text.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("example.c");
    std::fs::write(&source, program).unwrap();
    let printed = run(&source, Library::Shared, &[]);
    assert!(printed.contains("42"), "{printed}");
}
