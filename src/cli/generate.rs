//! `dlf-engine generate`.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::GenerateArgs;
use super::color;
use super::input::{Encoder, Input, Item, Source, can_be_read_again, read_jsonl, read_text};
use super::interrupt::Interrupt;
use super::output::{InOrder, JsonLines, check_distinct, check_resumed};
use super::record::TokenRecord;
use super::settings;
use super::setup::swapped;
use crate::ensemble::Ensemble;
use crate::error::Error;
use crate::fusion::FusionRule;
use crate::generate::{FinishReason, Request, Step, StepTime};

/// What the demo ensemble is asked where nobody asks anything.
const DEMO_PROMPT: &str = crate::demo::PROMPT;

pub(super) fn run(args: &GenerateArgs) -> Result<ExitCode> {
    let Input { items, note: unknown } = input(args)?;
    let ensemble = Arc::new(args.models.load(&args.fusion.method)?);
    let rule = args.fusion.rule(&ensemble)?;
    let encoder = Encoder { ensemble: &ensemble, chat: args.chat };
    encoder.check_chat()?;

    let mut requests = Vec::with_capacity(items.len());
    for item in &items {
        let prompts = encoder.prompts(item).with_context(|| item.place("prompt"))?;
        requests.push(args.sampling.request(prompts, &rule)?);
    }
    let settings = settings_of(args, &ensemble, &rule);
    let mut view = View::open(args, &ensemble, &items, &rule, &settings)?;
    let done = view.done;
    let mut generator = args.run.generator(Arc::clone(&ensemble), &requests)?;
    let prompt_tokens: Vec<usize> = requests.iter().map(prompt_tokens).collect();
    for (index, request) in requests.into_iter().enumerate().skip(done) {
        generator.push(request).with_context(|| items[index].place("prompt"))?;
    }
    args.run.note(args.fusion.moot(Some(&args.sampling)));
    args.run.note(unknown);
    args.run.note(swapped(&ensemble));
    view.question(args)?;
    let stop = Interrupt::new(
        args.input.as_deref().is_some_and(can_be_read_again) && args.run.output.is_some() && !args.run.quiet,
    )?;
    stop.watch(&view.progress, "");
    let mut runs: Vec<Run> = prompt_tokens.into_iter().map(Run::new).collect();
    for step in generator {
        match step {
            Ok(mut step) => {
                step.request += done;
                view.step(&mut runs, step)?;
            }
            Err(Error::Request { request, source }) => {
                let index = request + done;
                runs[index].failure = Some(source.to_string());
                view.finish(&mut runs, index)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    view.close()
}

/// All that the results depend on besides the prompts.
fn settings_of(args: &GenerateArgs, ensemble: &Ensemble, rule: &FusionRule) -> Value {
    let sampling = &args.sampling;
    // As it was typed, where f32 as f64 would show more digits.
    let number = |value: f32| value.to_string().parse().unwrap_or(f64::from(value));
    json!({
        "models": settings::models(ensemble),
        "rule": settings::rule(rule, ensemble),
        "chat": args.chat,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": sampling.min_new_tokens,
        "temperature": number(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": number(sampling.top_p),
        "min_p": number(sampling.min_p),
        "repetition_penalty": number(sampling.repetition_penalty),
        "presence_penalty": number(sampling.presence_penalty),
        "frequency_penalty": number(sampling.frequency_penalty),
        "logit_bias": format!("{:?}", sampling.logit_bias),
        "seed": sampling.seed,
        "stop": sampling.stop,
        "stop_token_id": sampling.stop_token_id,
        "ignore_eos": sampling.ignore_eos,
    })
}

fn input(args: &GenerateArgs) -> Result<Input> {
    let one = |source| Input::typed(Item { prompt: Some(source), ..Item::default() });
    if let Some(path) = &args.input {
        return read_jsonl(path, "prompt");
    }
    Ok(one(match (&args.prompt, &args.prompt_file, &args.prompt_ids) {
        (Some(text), _, _) => Source::Text(text.clone()),
        (_, Some(path), _) => Source::Text(read_text(path)?),
        (_, _, Some(ids)) => Source::Ids(ids.clone()),
        _ if asks_the_demo(args) => Source::Text(DEMO_PROMPT.to_owned()),
        _ => bail!("give a prompt: --prompt, --prompt-file, --prompt-ids or --input"),
    }))
}

/// Whether nobody asks anything, and the demo ensemble is asked its own question.
fn asks_the_demo(args: &GenerateArgs) -> bool {
    let given = args.prompt.is_some() || args.prompt_file.is_some() || args.prompt_ids.is_some();
    args.models.is_demo() && !given && args.input.is_none()
}

fn prompt_tokens(request: &Request) -> usize {
    request.prompts.first().map_or(0, Vec::len)
}

/// The prompt as results repeat it.
fn prompt_json(item: &Item) -> Value {
    match &item.prompt {
        Some(prompt) => prompt.to_json(),
        None => item.prompts.iter().map(|(role, p)| (role.clone(), p.to_json())).collect(),
    }
}

/// One prompt's result so far.
struct Run {
    prompt_tokens: usize,
    steps: Vec<Step>,
    text: String,
    finish: Option<FinishReason>,
    /// `None` from a device without a clock.
    time: Option<StepTime>,
    failure: Option<String>,
}

impl Run {
    fn new(prompt_tokens: usize) -> Self {
        let time = Some(StepTime::default());
        Self { prompt_tokens, steps: Vec::new(), text: String::new(), finish: None, time, failure: None }
    }

    fn add(&mut self, step: Step) {
        self.text.push_str(&step.text);
        self.finish = step.finish;
        self.time = both(self.time, step.time);
        self.steps.push(step);
    }

    fn to_json(&self, item: &Item, fusion: &Value) -> Value {
        let prompt = prompt_json(item);
        if let Some(failure) = &self.failure {
            return json!({ "prompt": prompt, "error": failure });
        }
        let ms = |of: fn(&StepTime) -> Duration| self.time.map(|time| of(&time).as_secs_f64() * 1e3);
        let tokens = self.steps.len();
        let speed = |time: StepTime| tokens as f64 / time.total().as_secs_f64().max(1e-9);
        json!({
            "prompt": prompt,
            "text": self.text,
            "token_ids": self.steps.iter().map(|step| step.token).collect::<Vec<_>>(),
            "finish_reason": self.finish.map(FinishReason::as_str),
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": tokens,
                "total_tokens": self.prompt_tokens + tokens,
            },
            "fusion": fusion,
            "timings": {
                "total_ms": ms(StepTime::total),
                "large_ms": ms(|time| time.large),
                "small_ms": ms(|time| time.small),
                "fusion_ms": ms(|time| time.fusion),
                "tokens_per_second": self.time.map(speed),
            },
        })
    }
}

/// The sum, where both are known.
fn both(a: Option<StepTime>, b: Option<StepTime>) -> Option<StepTime> {
    Some(a? + b?)
}

/// What the closing line tells of all prompts.
#[derive(Debug)]
struct Totals {
    tokens: usize,
    time: Option<StepTime>,
    /// Summed over the experts.
    alpha: f64,
    with_alpha: usize,
    experts: usize,
}

impl Totals {
    fn new() -> Self {
        Self { tokens: 0, time: Some(StepTime::default()), alpha: 0.0, with_alpha: 0, experts: 0 }
    }

    /// Takes in a prompt that is done, and leaves nothing of it: there may be many thousands.
    fn take(&mut self, run: &mut Run) {
        let run = std::mem::replace(run, Run::new(0));
        self.tokens += run.steps.len();
        self.time = both(self.time, run.time);
        for alpha in run.steps.iter().filter_map(alpha) {
            self.alpha += alpha;
            self.with_alpha += 1;
        }
        self.experts = run.steps.first().map_or(self.experts, |step| step.decision.alpha.len());
    }
}

/// Where results go while they come.
struct View<'a> {
    ensemble: &'a Ensemble,
    items: &'a [Item],
    /// As results and traces repeat them.
    fusion: Value,
    alpha_grid: Option<String>,
    json: Option<JsonLines>,
    trace: Option<JsonLines>,
    order: InOrder<usize>,
    /// Prompts that an earlier run has finished.
    done: usize,
    /// How much of the prompt whose turn it is has been shown.
    shown: usize,
    color: bool,
    closing_line: bool,
    progress: ProgressBar,
    started: Instant,
    failed: bool,
    totals: Totals,
}

impl<'a> View<'a> {
    fn open(
        args: &GenerateArgs,
        ensemble: &'a Ensemble,
        items: &'a [Item],
        rule: &FusionRule,
        settings: &Value,
    ) -> Result<Self> {
        check_distinct(&[
            ("--input", args.input.as_deref()),
            ("--prompt-file", args.prompt_file.as_deref()),
            ("--output", args.run.output.as_deref()),
            ("--trace", args.trace.as_deref()),
        ])?;
        let mut done = 0;
        let json = match &args.run.output {
            Some(path) if args.run.resume => {
                settings::check(path, settings)?;
                let (lines, kept) = JsonLines::resume(path, |index, line| {
                    check_resumed(line, "prompt", items.get(index).map(prompt_json))
                })?;
                done = kept;
                Some(lines)
            }
            Some(path) => Some(JsonLines::create(path)?),
            None if args.run.json => Some(JsonLines::stdout()),
            None => None,
        };
        if let Some(output) = &args.run.output {
            settings::keep(output, settings)?;
        }
        let trace = match &args.trace {
            Some(path) if args.run.resume => {
                let of_done = |_, line: &Value| {
                    let index = line["prompt_index"].as_u64().context("not a line of a trace")?;
                    Ok(index < done as u64)
                };
                Some(JsonLines::resume(path, of_done)?.0)
            }
            Some(path) => Some(JsonLines::create(path)?),
            None => None,
        };
        // JSON that scrolls over a terminal shows its progress itself.
        let elsewhere = args.run.output.is_some() || !io::stdout().is_terminal();
        let progress = if items.len() > 1 && !args.run.quiet && (json.is_none() || elsewhere) {
            progress_bar(items.len())?
        } else {
            ProgressBar::hidden()
        };
        progress.set_length(items.len() as u64);
        progress.set_position(done as u64);
        let text = json.is_none();
        Ok(Self {
            ensemble,
            items,
            fusion: settings::rule(rule, ensemble),
            alpha_grid: settings::alpha_grid(rule),
            json,
            trace,
            order: InOrder::from(done),
            done,
            shown: 0,
            color: text && !args.run.quiet && color::enabled(),
            closing_line: text && !args.run.quiet && io::stdout().is_terminal(),
            progress,
            started: Instant::now(),
            failed: false,
            totals: Totals::new(),
        })
    }

    /// Shows the question that nobody asked, on a terminal.
    fn question(&self, args: &GenerateArgs) -> Result<()> {
        if self.closing_line && asks_the_demo(args) {
            print(&if self.color { color::dimmed(DEMO_PROMPT) } else { DEMO_PROMPT.to_owned() })?;
        }
        Ok(())
    }

    /// Takes a step in; shows it if its prompt's turn has come.
    fn step(&mut self, runs: &mut [Run], step: Step) -> Result<()> {
        let (index, finished) = (step.request, step.finish.is_some());
        runs[index].add(step);
        if index == self.order.turn() {
            self.show(&runs[index], index)?;
        }
        if finished { self.finish(runs, index) } else { Ok(()) }
    }

    /// Ends a prompt, and shows all results whose turn has come.
    fn finish(&mut self, runs: &mut [Run], index: usize) -> Result<()> {
        for index in self.order.push(index, index) {
            self.show(&runs[index], index)?;
            self.shown = 0;
            self.failed |= runs[index].failure.is_some();
            if let Some(failure) = &runs[index].failure {
                writeln!(io::stderr(), "error: {}: {failure}", self.items[index].place("prompt"))?;
            }
            match &mut self.json {
                Some(json) => json.write(&runs[index].to_json(&self.items[index], &self.fusion))?,
                None => print("\n")?,
            }
            self.totals.take(&mut runs[index]);
            self.progress.inc(1);
        }
        // What has begun of the next one, whose turn it is now.
        let turn = self.order.turn();
        if let Some(run) = runs.get(turn) { self.show(run, turn) } else { Ok(()) }
    }

    /// Shows what is new of the prompt whose turn it is.
    fn show(&mut self, run: &Run, index: usize) -> Result<()> {
        for step in &run.steps[self.shown..] {
            if let Some(trace) = &mut self.trace {
                let (prompt, grid) = (self.items[index].prompt.as_ref(), self.alpha_grid.as_deref());
                let record = TokenRecord::new(index, step, self.ensemble, grid);
                trace.write(&record.with_beginning(prompt, self.ensemble))?;
            }
            if self.json.is_none() {
                self.progress.suspend(|| print(&self.token(step)))?;
            }
        }
        self.shown = run.steps.len();
        Ok(())
    }

    fn token(&self, step: &Step) -> String {
        if self.ensemble.tokenizer_of_any().is_none() {
            return format!("{}{}", if step.index == 0 { "" } else { " " }, step.token);
        }
        match (self.color, alpha(step)) {
            (true, Some(alpha)) => color::by_alpha(&step.text, alpha),
            _ => step.text.clone(),
        }
    }

    fn close(self) -> Result<ExitCode> {
        self.progress.finish_and_clear();
        if self.closing_line {
            let mut stderr = io::stderr().lock();
            writeln!(stderr, "{}", closing_line(&self.totals, self.started.elapsed(), self.color))?;
        }
        Ok(if self.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// α of the step, summed over the experts; `None` where the method has none.
fn alpha(step: &Step) -> Option<f64> {
    (!step.decision.alpha.is_empty()).then(|| step.decision.alpha.iter().sum())
}

fn closing_line(totals: &Totals, elapsed: Duration, color: bool) -> String {
    let Totals { tokens, time, alpha, with_alpha, experts } = totals;
    let each = |time: Duration| time.as_secs_f64() * 1e3 / (*tokens).max(1) as f64;
    let mut parts = Vec::new();
    match time {
        // The device has no clock, and the host's would pass for its speed.
        None => parts.push(format!("{tokens} tokens")),
        Some(time) => {
            parts.push(format!("{:.1} tokens/s", *tokens as f64 / elapsed.as_secs_f64().max(1e-9)));
            parts.push(format!("{:.2} ms/token", each(time.total())));
            for (name, time) in
                [("large", time.large), ("small and experts", time.small), ("fusion", time.fusion)]
            {
                if !time.is_zero() {
                    parts.push(format!("{name} {:.2}", each(time)));
                }
            }
        }
    }
    if *with_alpha > 0 {
        let sum = if *experts > 1 { "Σα" } else { "α" };
        parts.push(format!("mean {sum} {:.2}", alpha / *with_alpha as f64));
    }
    let line = parts.join(" · ");
    if color && *with_alpha > 0 { format!("{line}\nα: {}", color::legend()) } else { line }
}

/// A bar on stderr, which indicatif hides where that is no terminal.
pub(super) fn progress_bar(prompts: usize) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} · {elapsed} · {eta} left")?;
    Ok(ProgressBar::new(prompts as u64).with_style(style))
}

fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("stdout")
}
