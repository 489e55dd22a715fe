//! `dlf-engine score`.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use super::args::ScoreArgs;
use super::generate::progress_bar;
use super::input::{Encoder, Input, Item, Source, can_be_read_again, read_jsonl};
use super::interrupt::Interrupt;
use super::output::{InOrder, JsonLines, check_distinct, check_resumed};
use super::record::TokenRecord;
use super::settings;
use super::setup::swapped;
use crate::ensemble::Ensemble;
use crate::error::Error;
use crate::fusion::FusionRule;
use crate::generate::{Request, Step};

pub(super) fn run(args: &ScoreArgs) -> Result<ExitCode> {
    let Input { items, note: unknown } = input(args)?;
    let ensemble = Arc::new(args.models.load(&args.fusion.method)?);
    let rule = args.fusion.rule(&ensemble)?;
    args.run.note(args.fusion.moot(None));
    args.run.note(unknown);
    args.run.note(swapped(&ensemble));
    let encoder = Encoder { ensemble: &ensemble, chat: false };
    let mut texts = Vec::with_capacity(items.len());
    for item in &items {
        texts.push(Text::new(&encoder, item).with_context(|| item.place("text"))?);
    }

    let settings = json!({ "models": settings::models(&ensemble), "rule": settings::rule(&rule, &ensemble) });
    let mut out = Output::open(args, &ensemble, &texts, &rule, &settings)?;
    let requests: Vec<Request> = texts.iter().map(|text| text.request().rule(rule.clone())).collect();
    let mut generator = args.run.generator(Arc::clone(&ensemble), &requests)?;
    // Which text each request is: a text of one id has no position to score.
    let mut numbers = Vec::new();
    for (index, request) in requests.into_iter().enumerate().skip(out.order.turn()) {
        if request.forced.is_empty() {
            check_ids(&ensemble, &request)?;
            out.finish(index, Vec::new(), None)?;
            continue;
        }
        generator.push(request).with_context(|| items[index].place("text"))?;
        numbers.push(index);
    }
    let stop = Interrupt::new(
        args.input.as_deref().is_some_and(can_be_read_again) && args.run.output.is_some() && !args.run.quiet,
    )?;
    stop.watch(&out.progress, "");
    let mut steps: Vec<Vec<Step>> = numbers.iter().map(|_| Vec::new()).collect();
    for step in generator {
        match step {
            Ok(step) => {
                let (request, finished) = (step.request, step.finish.is_some());
                steps[request].push(step);
                if finished {
                    out.finish(numbers[request], std::mem::take(&mut steps[request]), None)?;
                }
            }
            Err(Error::Request { request, source }) => {
                out.finish(numbers[request], Vec::new(), Some(source.to_string()))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    out.progress.finish_and_clear();
    Ok(if out.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn input(args: &ScoreArgs) -> Result<Input> {
    let one = |source| Input::typed(Item { text: Some(source), ..Item::default() });
    Ok(match (&args.text, &args.ids, &args.input) {
        (Some(text), _, _) => one(Source::Text(text.clone())),
        (_, Some(ids), _) => one(Source::Ids(ids.clone())),
        (_, _, Some(path)) => read_jsonl(path, "text")?,
        _ => bail!("give a text: --text, --ids or --input"),
    })
}

fn check_ids(ensemble: &Ensemble, request: &Request) -> Result<(), Error> {
    let (vocab_size, ids) = (ensemble.vocab_size(), request.prompts.iter().flatten());
    let role = ensemble.models()[0].role;
    ids.copied()
        .find(|&id| id as usize >= vocab_size)
        .map_or(Ok(()), |id| Err(Error::TokenOutOfRange { role, id, vocab_size }))
}

/// A text as ids: what each model reads first, and what is scored.
struct Text {
    prompts: Vec<Vec<u32>>,
    scored: Vec<u32>,
    /// Whether the first prompt's only id belongs to the text: a text without a prompt.
    begins: bool,
    /// What messages call it.
    place: String,
}

impl Text {
    fn new(encoder: &Encoder<'_>, item: &Item) -> Result<Self> {
        let (begins, place) = (item.prompt.is_none() && item.prompts.is_empty(), item.place("text"));
        let mut ids = match &item.text {
            Some(text) => encoder.text(text, begins)?,
            None => bail!("no text"),
        };
        if ids.is_empty() {
            bail!("the text is empty");
        }
        if begins {
            let scored = ids.split_off(1);
            return Ok(Self { prompts: vec![ids], scored, begins, place });
        }
        Ok(Self { prompts: encoder.prompts(item)?, scored: ids, begins, place })
    }

    fn request(&self) -> Request {
        Request { prompts: self.prompts.clone(), forced: self.scored.clone(), ..Request::score(Vec::new()) }
    }

    /// All ids of the text, that of its first position included.
    fn ids(&self) -> Vec<u32> {
        let first = if self.begins { self.prompts.concat() } else { Vec::new() };
        first.into_iter().chain(self.scored.iter().copied()).collect()
    }
}

#[derive(Serialize)]
struct Scored<'a> {
    ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    fusion: &'a Value,
    tokens: Vec<TokenRecord<'a>>,
    sum_logprob_fused: Option<f64>,
}

/// Where results go, in the order of the input.
struct Output<'a> {
    ensemble: &'a Ensemble,
    texts: &'a [Text],
    /// As results repeat them.
    fusion: Value,
    alpha_grid: Option<String>,
    json: Option<JsonLines>,
    order: InOrder<(usize, Vec<Step>, Option<String>)>,
    progress: indicatif::ProgressBar,
    failed: bool,
}

impl<'a> Output<'a> {
    fn open(
        args: &ScoreArgs,
        ensemble: &'a Ensemble,
        texts: &'a [Text],
        rule: &FusionRule,
        settings: &Value,
    ) -> Result<Self> {
        check_distinct(&[("--input", args.input.as_deref()), ("--output", args.run.output.as_deref())])?;
        let (json, done) = match &args.run.output {
            Some(path) if args.run.resume => {
                settings::check(path, settings)?;
                let (lines, kept) = JsonLines::resume(path, |index, line| {
                    check_resumed(line, "ids", texts.get(index).map(|text| Value::from(text.ids())))
                })?;
                (Some(lines), kept)
            }
            Some(path) => (Some(JsonLines::create(path)?), 0),
            None => (args.run.json.then(JsonLines::stdout), 0),
        };
        if let Some(output) = &args.run.output {
            settings::keep(output, settings)?;
        }
        // On a terminal, the tables show it.
        let elsewhere = args.run.output.is_some() || !io::stdout().is_terminal();
        let progress = if texts.len() > 1 && !args.run.quiet && elsewhere {
            progress_bar(texts.len())?
        } else {
            indicatif::ProgressBar::hidden()
        };
        progress.set_length(texts.len() as u64);
        progress.set_position(done as u64);
        Ok(Self {
            ensemble,
            texts,
            fusion: settings::rule(rule, ensemble),
            alpha_grid: settings::alpha_grid(rule),
            json,
            order: InOrder::from(done),
            progress,
            failed: false,
        })
    }

    fn finish(&mut self, index: usize, steps: Vec<Step>, failure: Option<String>) -> Result<()> {
        for (index, steps, failure) in self.order.push(index, (index, steps, failure)) {
            if let Some(failure) = &failure {
                self.failed = true;
                writeln!(io::stderr(), "error: {}: {failure}", self.texts[index].place)?;
            }
            let scored = Scored {
                ids: self.texts[index].ids(),
                error: failure.as_deref(),
                fusion: &self.fusion,
                tokens: steps
                    .iter()
                    .map(|step| TokenRecord::new(index, step, self.ensemble, self.alpha_grid.as_deref()))
                    .collect(),
                sum_logprob_fused: failure
                    .is_none()
                    .then(|| steps.iter().map(|step| step.decision.logprob_fused).sum()),
            };
            match &mut self.json {
                Some(json) => json.write(&scored)?,
                None => {
                    io::stdout()
                        .lock()
                        .write_all(table(&steps, self.ensemble).as_bytes())
                        .context("stdout")?;
                }
            }
            self.progress.inc(1);
        }
        Ok(())
    }
}

/// One line a token: its log-probability, fused and by the large model alone; and the sum.
fn table(steps: &[Step], ensemble: &Ensemble) -> String {
    let name = |step: &Step| step.decision.expert.and_then(|t| ensemble.expert_name(t)).unwrap_or("-");
    // Which expert acts is a question only where there are several.
    let several = ensemble.num_experts() > 1 && steps.iter().any(|step| step.decision.expert.is_some());
    let width = steps.iter().map(|step| name(step).chars().count()).max().unwrap_or(0).max("expert".len());
    let expert = |cell: &str| if several { format!("{cell:<width$} ") } else { String::new() };
    let mut text = format!(
        "{:>6} {:>8} {}{:>6} {:>10} {:>10}  text\n",
        "step",
        "token",
        expert("expert"),
        "α",
        "log fused",
        "log large"
    );
    for step in steps {
        let decision = &step.decision;
        let large = decision.logprob_large.map_or("-".to_owned(), logprob);
        text.push_str(&format!(
            "{:>6} {:>8} {}{:>6} {:>10} {large:>10}  {:?}\n",
            step.index,
            step.token,
            expert(name(step)),
            alpha(step),
            logprob(decision.logprob_fused),
            step.piece
        ));
    }
    let sum = steps.iter().map(|step| step.decision.logprob_fused).sum::<f64>();
    let plural = if steps.len() == 1 { "" } else { "s" };
    text.push_str(&format!("log-probability, fused, of {} token{plural}: {}\n", steps.len(), logprob(sum)));
    text
}

/// α of the expert that acts, or of each; a dash where the method has none.
fn alpha(step: &Step) -> String {
    let decision = &step.decision;
    let acting = |(t, alpha): (usize, &f64)| {
        decision.expert.is_none_or(|expert| expert == t).then(|| format!("{alpha:.2}"))
    };
    let alphas: Vec<String> = decision.alpha.iter().enumerate().filter_map(acting).collect();
    if alphas.is_empty() { "-".to_owned() } else { alphas.join(",") }
}

/// A log-probability of four decimals, never −0.
fn logprob(value: f64) -> String {
    let text = format!("{value:.4}");
    if text == "-0.0000" { "0.0000".to_owned() } else { text }
}
