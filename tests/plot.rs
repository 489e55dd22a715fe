//! The pictures of traces, by the real binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::fs;
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};

fn record(step: usize, text: &str, alpha: &[f64], changed: Option<bool>) -> Value {
    let expert = (!alpha.is_empty()).then_some("a&b");
    json!({"prompt_index": 0, "step": step, "token_id": 1, "text": text, "expert": expert, "alpha": alpha, "loss": null,
        "kl_fused_large": null, "kl_large_fused": null, "kl_expert_small": [], "kl_small_expert": [],
        "logprob_fused": -1.0, "logprob_large": null, "logprob_small": null, "logprob_expert": [],
        "argmax_large": null, "argmax_expert": [], "changed": changed, "ms": 1.0})
}

/// Runs `plot` on these lines; the run and the picture, if there is one.
fn plot(lines: &[String], name: &str) -> (Output, Option<String>) {
    let dir = tempfile::tempdir().unwrap();
    let (trace, picture) = (dir.path().join("t.jsonl"), dir.path().join(name));
    fs::write(&trace, lines.join("\n")).unwrap();
    let run =
        Command::new(cargo_bin("dlf-engine")).arg("plot").arg(&trace).arg("--output").arg(&picture).output();
    (run.unwrap(), fs::read_to_string(picture).ok())
}

fn picture(records: &[Value], name: &str) -> String {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    let (run, picture) = plot(&lines, name);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    picture.unwrap()
}

#[test]
fn bars_stand_where_alpha_puts_them() {
    let svg =
        picture(&[record(0, "ab", &[0.0, 0.5], Some(true)), record(1, "c", &[3.0], Some(false))], "p.svg");
    // "ab" is narrower than the narrowest, 34 less a gap of 4; α = 0.5 of 2 is a quarter of 48, ending at 46 + 48.
    assert!(
        svg.contains(r##"<rect x="16.0" y="82.0" width="30.0" height="12.0" fill="#0072b2"/>"##),
        "{svg}"
    );
    // α above 2 fills the bar and is still written.
    assert!(
        svg.contains(r##"<rect x="50.0" y="46.0" width="30.0" height="48.0" fill="#0072b2"/>"##),
        "{svg}"
    );
    assert!(svg.contains(r#"class="alpha">3.0</text>"#));
    assert!(svg.contains(r#"class="token changed">ab</text>"#) && svg.contains(r#"class="token">c</text>"#));
}

#[test]
fn tokens_are_escaped_and_control_characters_shown() {
    let records = [record(0, "</script><b>", &[1.0], None), record(1, "\u{1}\n字", &[1.0], None)];
    for name in ["p.svg", "p.html"] {
        let text = picture(&records, name);
        assert!(text.contains("&lt;/script&gt;&lt;b&gt;") && !text.contains("</script><b>"), "{text}");
        assert!(text.contains("\u{fffd}↵字") && !text.contains('\u{1}'), "{text}");
        assert!(!text.contains("href") && !text.contains("src="), "no way out of the page");
    }
    assert!(picture(&records, "p.svg").contains("a&amp;b</text>"));
}

#[test]
fn an_empty_trace_and_a_model_alone_are_drawn() {
    assert!(picture(&[], "p.svg").contains("viewBox=\"0 0 900 46\""));
    let svg = picture(&[record(0, "x", &[], None)], "p.svg");
    assert!(svg.contains(r#"class="alpha">–</text>"#), "no α was computed: {svg}");
}

#[test]
fn a_broken_line_is_named() {
    let good = record(0, "x", &[1.0], None).to_string();
    let (run, picture) = plot(&[good, "{\"prompt_index\": 0".into()], "p.svg");
    let message = String::from_utf8(run.stderr).unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(message.contains("t.jsonl, line 2: not a record"), "{message}");
    assert!(picture.is_none(), "nothing half-written");
}

#[test]
fn another_kind_of_file_is_refused() {
    let (run, picture) = plot(&[], "p.png");
    assert!(!run.status.success() && picture.is_none());
    assert!(String::from_utf8(run.stderr).unwrap().contains("must end in .svg or .html"));
}
