//! The pictures of traces, by the real binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use quick_xml::events::Event;
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
    // "ab" is narrower than the narrowest, 46 less a gap of 4; α = 0.5 of 2 is a quarter of 48, ending at 46 + 48.
    assert!(
        svg.contains(r##"<rect x="16.0" y="82.0" width="42.0" height="12.0" fill="#0072b2"/>"##),
        "{svg}"
    );
    // α above 2 fills the bar and is still written.
    assert!(
        svg.contains(r##"<rect x="62.0" y="46.0" width="42.0" height="48.0" fill="#0072b2"/>"##),
        "{svg}"
    );
    assert!(svg.contains(r#"class="alpha">3.0</text>"#));
    assert!(svg.contains(r#"class="token changed">ab</text>"#) && svg.contains(r#"class="token">c</text>"#));
}

#[test]
fn tokens_are_escaped_and_control_characters_shown() {
    let records = [record(0, "</script><b>", &[1.0], None), record(1, "\u{1}\n字", &[1.0], None)];
    for (name, shown) in [("p.svg", "\u{fffd}↵字"), ("p.html", "\u{fffd}↵\n字")] {
        let text = picture(&records, name);
        assert!(text.contains("&lt;/script&gt;&lt;b&gt;") && !text.contains("</script><b>"), "{text}");
        assert!(text.contains(shown) && !text.contains('\u{1}'), "{text}");
        assert!(!text.contains("href") && !text.contains("src="), "no way out of the page");
    }
    assert!(picture(&records, "p.svg").contains("a&amp;b</text>"));
}

#[test]
fn an_empty_trace_is_named() {
    for (lines, name) in [(&[][..], "p.svg"), (&[" ".to_owned(), String::new()], "p.html")] {
        let (run, picture) = plot(lines, name);
        let message = String::from_utf8(run.stderr).unwrap();
        assert_eq!((run.status.code(), picture), (Some(1), None));
        assert!(message.contains("t.jsonl: the trace has no tokens"), "{message}");
    }
}

#[test]
fn a_model_alone_is_drawn() {
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

/// All elements' texts of a document, which must be well-formed XML.
fn texts(document: &str) -> Vec<String> {
    let mut reader = quick_xml::Reader::from_str(document);
    let (mut texts, mut open) = (vec![String::new()], 0);
    loop {
        let event = reader.read_event().unwrap();
        match event {
            Event::Start(_) => open += 1,
            Event::End(_) => open -= 1,
            _ => {}
        }
        match event {
            Event::Eof => {
                assert_eq!(open, 0, "every element ends");
                return texts;
            }
            Event::Text(text) => texts.last_mut().unwrap().push_str(&text.decode().unwrap()),
            Event::GeneralRef(name) => {
                let c = match name.decode().unwrap().as_ref() {
                    "amp" => '&',
                    "lt" => '<',
                    "gt" => '>',
                    "quot" => '"',
                    other => panic!("{other}"),
                };
                texts.last_mut().unwrap().push(c);
            }
            _ => texts.push(String::new()),
        }
    }
}

#[test]
fn pictures_are_well_formed_and_have_every_token() {
    let tokens = ["a", "\"]]>", "&amp;", "字", "👩‍👩‍👧", "\u{202e}x", "'<!--", "\u{0}", " ", ""];
    let mut records = Vec::new();
    for (step, token) in tokens.iter().enumerate() {
        let mut record = record(step, token, &[0.0, 1.5], Some(step % 2 == 0));
        record["loss"] = json!(10f64.powi(-(step as i32)));
        record["argmax_large"] = json!(7);
        record["argmax_large_text"] = json!(token);
        record["prompt_index"] = json!(step / 5);
        records.push(record);
    }
    for name in ["p.svg", "p.html"] {
        let picture = picture(&records, name);
        let texts = texts(&picture);
        for shown in ["a", "\"]]>", "&amp;", "字", "👩‍👩‍👧", "\u{fffd}x", "'<!--", "\u{fffd}", "·", "∅"]
        {
            assert!(texts.iter().any(|text| text == shown), "{name}: {shown:?} in {texts:?}");
        }
        assert!(texts.iter().any(|text| text == "prompt 1"), "{name}: prompts are told apart");
    }
}

#[test]
fn the_page_has_what_its_script_shows() {
    let mut first = record(0, "x", &[0.0, 0.5], Some(true));
    first["argmax_large"] = json!(7);
    first["experts"] = json!(["idle", "a&b"]);
    first["argmax_large_text"] = json!("</script>");
    first["argmax_expert"] = json!([8, 9]);
    first["argmax_expert_text"] = json!([" y", "\n"]);
    first["kl_fused_large"] = json!(0.25);
    first["kl_expert_small"] = json!([0.5, 0.125]);
    let html = picture(&[first], "p.html");
    let json = html.split("id=\"records\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(json).unwrap();
    assert_eq!(data[0]["large"], json!(["</script>", 7]));
    assert_eq!(data[0]["experts"], json!([["idle", ["·y", 8]], ["a&b", ["↵", 9]]]));
    assert_eq!(data[0]["kl"], json!([[0.25, [0.5, 0.125]], [null, []]]));
    assert_eq!(html.matches("tabindex=\"0\"").count(), 1, "one tab stop");
    assert!(html.contains("aria-label=\"x, α 0.5, a&amp;b, changed by fusion\""), "{html}");
    // One token is 36 wide, its middle at 18; α = 0.5 lies three quarters down the 120 of the chart that begins at 30. The
    // second expert is a square, whether the first acts or not.
    assert!(html.contains("<path d=\"M13.5 115.5L22.5 115.5L22.5 124.5L13.5 124.5z\""), "{html}");
    // Log axis: the values 0.125 to 0.5 are within one decade, 10⁻¹ to 10⁰; log10 0.25 = -0.602, so 72.2 below 190.
    assert!(html.contains("<path d=\"M18.0 262.2h0\" class=\"reached\"/>"), "{html}");
}

#[test]
fn texts_are_called_by_their_prompts_and_experts_keep_their_colours() {
    let mut asked = record(0, "x", &[0.0, 1.0], None);
    asked["prompt"] = json!("Question: a <b>?\nAnswer:");
    asked["experts"] = json!(["idle", "a&b"]);
    let mut long = record(0, "y", &[0.0, 1.0], None);
    long["prompt_index"] = json!(1);
    long["prompt"] = json!(format!("{}end", "word ".repeat(99)));
    let svg = picture(&[asked.clone(), long], "p.svg");
    assert!(svg.contains(">Question: a &lt;b&gt;? ↵ Answer:</text>"), "{svg}");
    assert!(svg.contains(">…word ") && svg.contains(" word end</text>"), "its end: {svg}");
    // The second of Okabe and Ito's colours, though the first expert never acts.
    assert!(svg.contains(r##"height="24.0" fill="#d55e00"/>"##), "{svg}");

    // Traces of several runs are told apart by their paths.
    let dir = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for name in ["one", "two"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        paths.push(dir.path().join(name).join("t.jsonl"));
        fs::write(paths.last().unwrap(), asked.to_string()).unwrap();
    }
    let output = dir.path().join("p.svg");
    let run =
        Command::new(cargo_bin("dlf-engine")).arg("plot").args(&paths).arg("--output").arg(&output).output();
    assert!(run.unwrap().status.success());
    let svg = fs::read_to_string(output).unwrap();
    assert!(svg.contains("one/t.jsonl: Question") && svg.contains("two/t.jsonl: Question"), "{svg}");
}

#[test]
fn several_experts_at_once_are_drawn_as_a_sum() {
    let svg = picture(&[record(0, "x", &[0.5, 1.0], None)], "p.svg");
    assert!(svg.contains("bar: Σα, 0 to 2") && svg.contains(r#"class="alpha">1.5</text>"#), "{svg}");
}

#[test]
fn a_token_wider_than_the_picture_is_wrapped() {
    let svg = picture(&[record(0, &"=".repeat(200), &[1.0], None), record(1, "x", &[1.0], None)], "p.svg");
    // 854 units of room hold 94 characters: three rows, and the next line two rows further down.
    assert_eq!(svg.matches(&format!(">{}<", "=".repeat(94))).count(), 2, "{svg}");
    assert!(svg.contains(&format!(">{}<", "=".repeat(12))), "{svg}");
    assert!(svg.contains("viewBox=\"0 0 900 276\""), "46 + 2 lines of 96 + 2 rows of 19: {svg}");
}

/// The README's picture is what the command draws, and its trace is still what the demo says.
#[test]
fn the_picture_of_the_readme_is_up_to_date() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let dir = tempfile::tempdir().unwrap();
    let (trace, svg) = (dir.path().join("t.jsonl"), dir.path().join("g.svg"));
    let run = |args: &[&OsStr]| {
        let run = Command::new(cargo_bin("dlf-engine")).args(args).output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    };
    let committed = docs.join("generation.jsonl");
    run(&["plot".as_ref(), committed.as_ref(), "--output".as_ref(), svg.as_ref()]);
    assert_eq!(
        fs::read_to_string(&svg).unwrap(),
        fs::read_to_string(docs.join("generation.svg")).unwrap(),
        "dlf-engine plot docs/generation.jsonl --output docs/generation.svg"
    );
    let input = docs.join("generation-prompts.jsonl");
    run(&["generate".as_ref(), "--input".as_ref(), input.as_ref(), "--trace".as_ref(), trace.as_ref()]);
    let told = |path: &Path| -> Vec<Value> {
        let lines = fs::read_to_string(path).unwrap();
        let records = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        // The other numbers may differ in their last digits from machine to machine.
        let fields = [
            "prompt",
            "experts",
            "token_id",
            "text",
            "expert",
            "alpha",
            "changed",
            "argmax_large_text",
            "argmax_expert_text",
        ];
        records.map(|record| fields.map(|field| record[field].clone()).into_iter().collect()).collect()
    };
    assert_eq!(told(&trace), told(&committed));
}
