//! Evaluation: task files, data files, metrics against outside packages, and the runner over the demo ensemble.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dlf_engine::backend::cpu::{CpuBackend, CpuOptions};
use dlf_engine::backend::{Backend, Batch, ForwardTime, FuseRow, Limits};
use dlf_engine::eval::{
    BUILT_IN, Decoding, Encoder, Item, Plan, Runner, Sample, SampleResult, Task, parse_samples, porter, rouge,
};
use dlf_engine::fusion::Decision;
use dlf_engine::generate::blocks_needed;
use dlf_engine::{Ensemble, Error, FusionRule, Generator};
use serde_json::{Value, json};

const HERE: &str = "data.jsonl";

fn task(text: &str) -> Task {
    Task::parse(Path::new("task.toml"), text).unwrap()
}

fn sample(fields: Value) -> Sample {
    Sample { line: 1, fields: fields.as_object().unwrap().clone() }
}

fn jsonl(lines: &str) -> Vec<Sample> {
    parse_samples(Path::new(HERE), lines.as_bytes(), &[], None).unwrap()
}

fn prompt(task: &Task, fields: Value) -> String {
    task.prompt(Path::new(HERE), &sample(fields), &[]).unwrap().text
}

fn item(task: &Task, fields: Value) -> Item {
    task.item(Path::new(HERE), &sample(fields)).unwrap()
}

#[test]
fn rouge_and_the_stemmer_agree_with_the_python_packages() {
    let goldens: Value = serde_json::from_str(include_str!("goldens/rouge.json")).unwrap();
    let (cases, stems) = (goldens["cases"].as_array().unwrap(), goldens["stems"].as_object().unwrap());
    assert!(cases.len() > 70 && stems.len() > 1400);
    for (word, stem) in stems {
        assert_eq!(porter::stem(word), stem.as_str().unwrap(), "{word}");
    }
    for case in cases {
        for (key, stem) in [("plain", false), ("stemmed", true)] {
            let tokens = |field: &str| rouge::tokenize(case[field].as_str().unwrap(), stem);
            let (target, prediction) = (tokens("target"), tokens("prediction"));
            let ours = [
                rouge::rouge_n(&target, &prediction, 1),
                rouge::rouge_n(&target, &prediction, 2),
                rouge::rouge_l(&target, &prediction),
            ];
            for (k, ours) in ours.into_iter().enumerate() {
                // The same operations on the same counts: rounding of the last place at most.
                assert!((ours - case[key][k].as_f64().unwrap()).abs() < 1e-15, "{case} {key} {k}: {ours}");
            }
        }
    }
}

#[test]
fn every_built_in_task_takes_a_published_sample() {
    assert_eq!(
        BUILT_IN.len(),
        std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tasks")).unwrap().count()
    );
    for (name, _) in BUILT_IN {
        assert_eq!(Task::load(name).unwrap().name(), name);
    }
    let references = |item: Item| match item {
        Item::References(references) => references,
        Item::Choices(choices) => panic!("{choices:?}"),
    };
    let choices = |item: Item| match item {
        Item::Choices(choices) => choices,
        Item::References(references) => panic!("{references:?}"),
    };

    let gsm8k = Task::load("gsm8k").unwrap();
    let problem = json!({"question": "How many?", "answer": "<<1+1=2>> so\n#### 1,002"});
    assert_eq!(prompt(&gsm8k, problem.clone()), "Question: How many?\nAnswer:");
    assert_eq!(references(item(&gsm8k, problem)), ["1002"]);

    let trivia = Task::load("triviaqa").unwrap();
    let problem = json!({"question": "Who?", "answer": {"value": "Bob", "aliases": ["Bobby", "Robert"]}});
    assert_eq!(references(item(&trivia, problem)), ["Bobby", "Robert", "Bob"]);

    let cnn = Task::load("cnn_dailymail").unwrap();
    let problem = json!({"article": "Long.", "highlights": "Short ."});
    assert_eq!(prompt(&cnn, problem.clone()), "Long.\n\nSummarize the above article:");
    assert_eq!(references(item(&cnn, problem)), ["Short ."]);

    let problem = json!({"question": "Is it?", "choices": ["Yes", "No"], "label": 1});
    let letters = Task::load("truthfulqa_mc").unwrap();
    assert_eq!(prompt(&letters, problem.clone()), "Is it?\nA. Yes\nB. No\n\nThe answer is:");
    assert_eq!(references(item(&letters, problem)), ["B"]);

    let targets = json!({"choices": ["Yes", "No"], "labels": [0, 1]});
    let problem = json!({"question": "Is it?", "mc1_targets": targets, "mc2_targets": targets});
    for name in ["truthfulqa_mc1", "truthfulqa_mc2"] {
        let task = Task::load(name).unwrap();
        assert_eq!(prompt(&task, problem.clone()), "Q: Is it?\nA:");
        let choices = choices(item(&task, problem.clone()));
        assert_eq!(choices.continuations, [" Yes", " No"]);
        assert_eq!((choices.bytes, choices.right), (vec![3, 2], vec![false, true]));
    }

    let mmlu = Task::load("mmlu").unwrap();
    let problem = json!({"question": "2+2?", "subject": "high_school_maths", "choices": ["1", "2", "3", "4"], "answer": 3});
    let header = "The following are multiple choice questions (with answers) about high school maths.\n\n";
    let body = "2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:";
    assert_eq!(prompt(&mmlu, problem.clone()), format!("{header}{body}"));
    let as_json = choices(item(&mmlu, problem));
    assert_eq!(as_json.continuations, [" A", " B", " C", " D"]);
    let rows = parse_samples(Path::new("x.csv"), b"2+2?,1,2,3,4,D\n", mmlu.columns(), None).unwrap();
    assert_eq!(mmlu.prompt(Path::new("x.csv"), &rows[0], &[]).unwrap().text, body);
    assert_eq!(choices(mmlu.item(Path::new("x.csv"), &rows[0]).unwrap()), as_json);
}

const GENERATE: &str = "name = \"t\"\nprompt = \"{{ q }}\"\nmetrics = [\"exact_match\"]\n";
const TABLE: &str = "[generate]\nmax_new_tokens = 5\nreferences = \"a\"\n";

#[test]
fn each_kind_of_broken_task_file_is_named() {
    let choice = |metrics: &str, table: &str| {
        format!("name = \"t\"\nprompt = \"x\"\nmetrics = [{metrics}]\n[choice]\nchoices = \"c\"\n{table}\n")
    };
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "missing field `name`"),
        ("name = ".to_owned(), "line 1"),
        (GENERATE.to_owned(), "one of the tables [generate] and [choice]"),
        (format!("{GENERATE}promt = \"x\"\n{TABLE}"), "line 4: unknown field `promt`"),
        (format!("{GENERATE}{TABLE}stops = []\n"), "unknown field `stops`"),
        (format!("{GENERATE}[generate]\nreferences = \"a\"\n"), "missing field `max_new_tokens`"),
        (format!("{GENERATE}[generate]\nmax_new_tokens = -1\nreferences = \"a\"\n"), "line 5: invalid value"),
        (format!("{GENERATE}[generate]\nmax_new_tokens = 0\nreferences = \"a\"\n"), "at least 1"),
        (format!("{GENERATE}{TABLE}stop = [\"\"]\n"), "`stop`: a string is empty"),
        (format!("{GENERATE}{TABLE}stop = \"x\"\n"), "line 7: invalid type"),
        (format!("{GENERATE}{TABLE}extract = \"numbers\"\n"), "unknown variant `numbers`"),
        (format!("{GENERATE}{TABLE}extract = {{ first_match = \"(\" }}\n"), "unclosed group"),
        (format!("{GENERATE}{TABLE}[choice]\nchoices = \"c\"\n"), "one of the tables"),
        (GENERATE.replace("{{ q }}", "{{ q") + TABLE, "`prompt`: syntax error"),
        (GENERATE.to_owned() + &TABLE.replace("\"a\"", "\"a +\""), "`references`: syntax error"),
        (GENERATE.replace("\"exact_match\"", "") + TABLE, "`metrics`: none"),
        (GENERATE.replace("exact_match", "bleu") + TABLE, "unknown variant `bleu`"),
        (GENERATE.replace("exact_match", "acc") + TABLE, "acc is not for a task with [generate]"),
        (GENERATE.replace("\"exact_match\"", "\"rouge1\", \"rouge1\"") + TABLE, "rouge1 is there twice"),
        (GENERATE.replace("\"t\"", "\"a/b\"") + TABLE, "`name`: expected letters"),
        (choice("\"exact_match\"", "answer = \"a\""), "exact_match is not for a task with [choice]"),
        (choice("\"acc\"", ""), "acc needs `answer`"),
        (choice("\"mc1\"", "answer = \"a\""), "mc1 needs `labels`"),
        (choice("\"acc\", \"mc2\"", "answer = \"a\""), "no other metrics"),
        (choice("\"acc\"", "answer = \"a\"\ncontinuation = \"{% if %}\""), "`continuation`: syntax error"),
    ];
    for (text, says) in cases {
        let error = Task::parse(Path::new("task.toml"), &text).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Task { .. }), "{message}");
        assert!(message.starts_with("task.toml: ") && message.contains(says), "{text}\n{message}");
    }
    let missing = Task::load("no-such-task").unwrap_err().to_string();
    assert!(missing.contains("built-in tasks are gsm8k"), "{missing}");
}

#[test]
fn a_sample_that_lacks_a_field_is_named_with_its_line() {
    let generate = task(&format!("{GENERATE}{TABLE}"));
    let samples = jsonl("\n{\"q\": \"x\"}\n");
    assert_eq!(samples[0].line, 2);
    let error = generate.item(Path::new(HERE), &samples[0]).unwrap_err().to_string();
    let says = "data.jsonl:2: `references = a` uses `a`, which this sample doesn't have (it has q)";
    assert_eq!(error, says);
    let error = generate.prompt(Path::new(HERE), &sample(json!({"a": 1})), &[]).unwrap_err().to_string();
    let says = "data.jsonl:1: the template `prompt` uses `q`, which this sample doesn't have (it has a)";
    assert_eq!(error, says);
    // Nothing but the fields is in reach, and nothing runs for ever.
    let hostile = task(
        &(GENERATE.replace(
            "{{ q }}",
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        ) + TABLE),
    );
    let error = hostile.prompt(Path::new(HERE), &sample(json!({})), &[]).unwrap_err().to_string();
    assert!(error.contains("fuel"), "{error}");

    let choose = task(
        "name = \"t\"\nprompt = \"x\"\nmetrics = [\"acc\"]\n[choice]\nchoices = \"c\"\nanswer = \"a\"\n",
    );
    let right = |answer: Value| match item(&choose, json!({"c": ["x", "yy", "B"], "a": answer})) {
        Item::Choices(choices) => choices.right.iter().position(|&right| right).unwrap(),
        Item::References(_) => unreachable!(),
    };
    assert_eq!([right(json!(2)), right(json!("B")), right(json!("yy"))], [2, 1, 1]);
    for (fields, says) in [
        (json!({"c": [], "a": 0}), "choices: expected a list"),
        (json!({"c": "x", "a": 0}), "choices: expected a list"),
        (
            json!({"c": ["x"], "a": 1}),
            "answer: expected the index, letter or text of one of 1 choices, found 1",
        ),
        (json!({"c": ["x"], "a": "B"}), "found \"B\""),
        (json!({"c": ["x", " "], "a": 0}), "one of them is empty"),
    ] {
        let error = choose.item(Path::new(HERE), &sample(fields)).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let label = task(
        "name = \"t\"\nprompt = \"x\"\nmetrics = [\"mc2\"]\n[choice]\nchoices = \"c\"\nlabels = \"l\"\n",
    );
    for labels in [json!([1]), json!([0, 0]), json!([2, 1]), json!("11")] {
        let error = label.item(Path::new(HERE), &sample(json!({"c": ["x", "y"], "l": labels}))).unwrap_err();
        assert!(error.to_string().contains("labels: expected a 0 or 1 for each choice"), "{error}");
    }
}

#[test]
fn the_task_file_of_the_documentation_works() {
    let text =
        include_str!("../docs/evaluation.md").split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let task = task(text);
    let fields = json!({"country": "France", "capital": "Paris", "aliases": ["Lutetia"]});
    let prompt = task.prompt(Path::new(HERE), &sample(fields.clone()), &[]).unwrap();
    assert_eq!(prompt.text, "Question: What is the capital of France?\nAnswer:");
    assert_eq!(
        prompt.own[0],
        ("expert".to_owned(), "[INST] What is the capital of France? [/INST]".to_owned())
    );
    assert_eq!(item(&task, fields), Item::References(vec!["Paris".to_owned(), "Lutetia".to_owned()]));
}

#[test]
fn examples_stand_in_front_with_their_answers() {
    let task = task(&format!(
        "{GENERATE}target = \" = {{{{ a }}}}\"\npreamble = \"Go.\\n\"\nseparator = \"; \"\n{TABLE}"
    ));
    let shots = jsonl("{\"q\": \"1+1\", \"a\": 2}\n{\"q\": \"1+2\", \"a\": 3}\n");
    let prompt = task.prompt(Path::new(HERE), &sample(json!({"q": "2+2", "a": 4})), &shots).unwrap();
    assert_eq!(prompt.text, "Go.\n1+1 = 2; 1+2 = 3; 2+2");
    let mmlu = Task::load("mmlu").unwrap();
    let shot = sample(json!({"question": "q", "choices": ["1", "2", "3", "4"], "answer": 2}));
    let text = mmlu.prompt(Path::new(HERE), &shot, std::slice::from_ref(&shot)).unwrap().text;
    assert!(text.contains("D. 4\nAnswer: C\n\nq\nA. 1"), "{text}");
}

#[test]
fn csv_may_have_quotes_line_ends_inside_and_a_byte_order_mark() {
    let text = "\u{feff}question,answer\r\n\"one, \"\"two\"\"\nthree\",4\r\n\r\nnext,\n";
    let samples = parse_samples(Path::new("x.CSV"), text.as_bytes(), &[], None).unwrap();
    assert_eq!(
        Value::from(samples[0].fields.clone()),
        json!({"question": "one, \"two\"\nthree", "answer": "4"})
    );
    assert_eq!(Value::from(samples[1].fields.clone()), json!({"question": "next", "answer": ""}));
    assert_eq!(samples.len(), 2);
    // Without a header by the task's columns; with one whatever its order.
    let columns = ["a".to_owned(), "b".to_owned()];
    let read = |text: &str| parse_samples(Path::new("x.csv"), text.as_bytes(), &columns, Some(1)).unwrap();
    assert_eq!(Value::from(read("1,2\n3,4\n")[0].fields.clone()), json!({"a": "1", "b": "2"}));
    assert_eq!(Value::from(read("b,a\n1,2\n")[0].fields.clone()), json!({"b": "1", "a": "2"}));
}

#[test]
fn each_kind_of_broken_data_is_named() {
    for (name, bytes, says) in [
        ("x.jsonl", &b"{\"a\": 1}\n{\"a\": \n"[..], "x.jsonl:2: not JSON at column 6"),
        ("x.jsonl", b"{\"a\": 1}\n[1]\n", "x.jsonl:2: expected an object"),
        ("x.jsonl", b"", "x.jsonl:1: no samples"),
        ("x.jsonl", b" \n\n", "no samples"),
        ("x.jsonl", b"{\"a\": 1}\n\xff\n", "x.jsonl:2: a byte that is no UTF-8"),
        ("x.json", b"{\"a\": 1}", "expected an array of objects"),
        ("x.json", b"[]", "no samples"),
        ("x.json", b"[{\"a\": 1}, 2]", "x.json:2: expected an object, found 2"),
        ("x.csv", b"", "no samples"),
        ("x.csv", b"a,b\n", "no samples"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "x.csv:3: "),
        ("x.csv", b"a,a\n1,2\n", "two columns are called \"a\""),
    ] {
        let error = parse_samples(Path::new(name), bytes, &[], None).unwrap_err().to_string();
        assert!(error.contains(says), "{name} {bytes:?}: {error}");
    }
    let columns = ["a".to_owned(), "b".to_owned()];
    let error = parse_samples(Path::new("x.csv"), b"1,2,3\n", &columns, None).unwrap_err().to_string();
    assert!(error.contains("expected the columns a, b, found 3 cells"), "{error}");
    assert!(matches!(
        dlf_engine::eval::read_samples(Path::new("/no/file"), &[], None),
        Err(Error::Io { .. })
    ));
}

/// Counts the rows of every model that reach the backend.
struct Counting {
    inner: CpuBackend,
    rows: Rc<RefCell<Vec<usize>>>,
}

impl Backend for Counting {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn forward(&mut self, batch: &Batch<'_>) -> dlf_engine::Result<ForwardTime> {
        for row in batch.rows {
            self.rows.borrow_mut()[row.model] += 1;
        }
        self.inner.forward(batch)
    }

    fn fuse(
        &mut self,
        rows: &[FuseRow<'_>],
        decisions: &mut Vec<dlf_engine::Result<Decision>>,
    ) -> dlf_engine::Result<Duration> {
        self.inner.fuse(rows, decisions)
    }

    fn launches(&self) -> u64 {
        self.inner.launches()
    }

    fn logits(&self, model: usize, slot: usize) -> dlf_engine::Result<Vec<f32>> {
        self.inner.logits(model, slot)
    }
}

/// The results of `samples`, and the rows that each model ran.
fn run(
    ensemble: &Arc<Ensemble>,
    task: &Task,
    samples: &[Sample],
    rule: &FusionRule,
    batch_size: usize,
) -> (Vec<SampleResult>, Vec<usize>) {
    let indices: Vec<usize> = (0..samples.len()).collect();
    let encoder = Encoder { ensemble, chat: false };
    let decoding = Decoding::default();
    let path = Path::new(HERE);
    let plan = Plan { task, path, samples, indices: &indices, shots: &[], encoder, decoding: &decoding };
    let (longest, choices) = plan.check().unwrap();
    let sequences = batch_size * choices;
    let limits =
        Limits::for_vocabulary(ensemble.vocab_size(), sequences, blocks_needed(sequences, longest.min(513)));
    let inner = CpuBackend::new(Arc::clone(ensemble), CpuOptions { threads: 1, limits }).unwrap();
    let rows = Rc::new(RefCell::new(vec![0; ensemble.models().len()]));
    let generator =
        Generator::new(Arc::clone(ensemble), Box::new(Counting { inner, rows: Rc::clone(&rows) }));
    let mut results = Vec::new();
    let runner = Runner { plan, rule, batch_size };
    runner
        .run(generator, 0, |result, _| -> dlf_engine::Result<()> {
            results.push(result);
            Ok(())
        })
        .unwrap();
    let rows = rows.borrow().clone();
    (results, rows)
}

const CHOOSE: &str = "name = \"t\"\nprompt = \"Question: {{ q }}\\nAnswer:\"\nmetrics = [\"acc\", \"acc_norm\"]\n\
                      [choice]\nchoices = \"c\"\nanswer = \"a\"\n";

#[test]
fn choices_have_the_likelihood_of_scoring_them_one_by_one_and_share_their_prompt() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let task = task(CHOOSE);
    let question = "Dan has 21 letters and gets 31 letters from Mark. How many letters does Dan have?";
    let choices = ["21+31=52", "21+31=53", "Warsaw", "painter"];
    let problem = sample(json!({"q": question, "c": choices, "a": 0}));
    let rule = FusionRule::default();
    let (results, rows) = run(&ensemble, &task, std::slice::from_ref(&problem), &rule, 4);

    // Each alone, by a request of its own on a generator of its own.
    let tokenizer = ensemble.tokenizer(0).unwrap();
    let text = format!("Question: {question}\nAnswer:");
    let prompt = tokenizer.encode(&text, true).unwrap();
    let mut forced_rows = 0;
    for (k, choice) in choices.iter().enumerate() {
        let forced = tokenizer.encode(&format!("{text} {choice}"), true).unwrap().split_off(prompt.len());
        forced_rows += forced.len();
        let limits = Limits::for_vocabulary(ensemble.vocab_size(), 1, 64);
        let backend = CpuBackend::new(Arc::clone(&ensemble), CpuOptions { threads: 1, limits }).unwrap();
        let mut generator = Generator::new(Arc::clone(&ensemble), Box::new(backend));
        let request = dlf_engine::Request { forced, ..dlf_engine::Request::new(prompt.clone(), 0) };
        generator.push(request).unwrap();
        let alone: f64 = generator.map(|step| step.unwrap().decision.logprob_fused).sum();
        assert_eq!(results[0].logprobs[k], alone, "{choice}: the same to the bit, whatever is shared");
    }
    assert_eq!(results[0].choice, Some(0), "{:?}", results[0].logprobs);
    assert_eq!(results[0].scores[0], ("acc", 1.0));

    // Every model reads the prompt's whole blocks once; each choice the rest of the prompt and its own tokens but the last.
    let shared = (prompt.len() - 1) / 16 * 16;
    assert!(shared >= 16, "{}", prompt.len());
    let expected = shared + choices.len() * (prompt.len() - shared) + forced_rows - choices.len();
    assert_eq!(rows, vec![expected; 4]);
}

#[test]
fn results_do_not_depend_on_the_batch_and_come_in_order() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let task = Task::load("sums").unwrap();
    let samples =
        parse_samples(Path::new(HERE), include_bytes!("../models/demo/tasks/sums.jsonl"), &[], Some(12));
    let samples = samples.unwrap();
    let rule = FusionRule::default();
    let (one, _) = run(&ensemble, &task, &samples, &rule, 1);
    let (many, _) = run(&ensemble, &task, &samples, &rule, 5);
    assert_eq!(one, many);
    assert!(one.iter().map(|result| result.index).eq(0..12));
    assert!(one.iter().any(|r| r.scores == [("exact_match", 1.0)]), "fusion solves some of them");
    let alphas: Vec<f64> = one.iter().map(|result| result.mean_alpha.unwrap()).collect();
    assert!(alphas.iter().all(|alpha| (0.0..=1.9).contains(alpha)), "{alphas:?}");
    let (large, _) = run(&ensemble, &task, &samples, &FusionRule::Large, 5);
    assert!(large.iter().all(|result| result.mean_alpha.is_none() && result.scores[0].1 == 0.0));
    assert_eq!(large[0].answer, None, "the large model alone writes no ####");
}

#[test]
fn a_sample_that_does_not_fit_fails_alone() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let context = ensemble.context(0);
    let task = task(CHOOSE);
    let problem = |q: &str| sample(json!({"q": q, "c": ["x", "y"], "a": 0}));
    let samples = [problem("short?"), problem(&"7 ".repeat(context + 1)), problem("also short?")];
    let (results, _) = run(&ensemble, &task, &samples, &FusionRule::Large, 2);
    assert_eq!(results.len(), 3);
    assert!(results[1].error.as_ref().unwrap().contains("don't fit the context"), "{:?}", results[1]);
    assert_eq!((results[1].scores[0].1, results[1].choice), (0.0, None));
    assert!(results[0].error.is_none() && results[2].error.is_none() && results[2].choice.is_some());
}

#[test]
fn roles_may_have_prompts_of_their_own() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let own = format!("{GENERATE}{TABLE}[prompts]\nfacts = \"Own {{{{ q }}}}\"\n");
    let with_own = task(&own);
    let prompt = with_own.prompt(Path::new(HERE), &sample(json!({"q": "x", "a": 1})), &[]).unwrap();
    let encoder = Encoder { ensemble: &ensemble, chat: false };
    let ids = encoder.prompts(&prompt).unwrap();
    let text = |model: usize| ensemble.tokenizer(0).unwrap().decode(&ids[model]);
    assert_eq!([text(0), text(1), text(2), text(3)].map(|t| t.trim().to_owned()), ["x", "x", "Own x", "x"]);
    let unknown = task(&own.replace("facts =", "fact ="));
    let samples = [sample(json!({"q": "x", "a": 1}))];
    let decoding = Decoding::default();
    let plan = Plan {
        task: &unknown,
        path: Path::new(HERE),
        samples: &samples,
        indices: &[0],
        shots: &[],
        encoder,
        decoding: &decoding,
    };
    let error = plan.check().unwrap_err().to_string();
    assert!(error.contains("there is no model \"fact\""), "{error}");
}
