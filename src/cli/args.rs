//! The flags, as they are typed.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::backend::{BackendOptions, Device, Limits};
use crate::fusion::{AlphaGrid, Objective, SearchMode};

/// Llama inference for ensembles: a large model steered by small experts, token by token.
#[derive(Debug, Parser)]
#[command(name = "dlf-engine", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

// There is one: a box would save nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Generate text with an ensemble (without models: the demo ensemble in the binary).
    Generate(GenerateArgs),
    /// Log-probabilities and α at every position of a text.
    Score(ScoreArgs),
    /// Serve completions and chats over HTTP as OpenAI's API has them (without models: the demo ensemble).
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
    /// What models are, their memory, and whether they can form an ensemble.
    Inspect(InspectArgs),
    /// Score methods on a task: gsm8k, triviaqa, cnn_dailymail, truthfulqa_mc, mmlu, … or a task file.
    Eval(super::eval::EvalArgs),
    /// Score static fusion over a range of α beside the dynamic rule, and draw it.
    Sweep(super::sweep::SweepArgs),
    /// Draw traces: each token with its α and the expert that acted.
    Plot(PlotArgs),
    /// Measure fusion, decoding, and the reading of prompts.
    Bench(super::bench::BenchArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// What `generate --trace` wrote.
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<PathBuf>,
    /// The picture: F.svg for a document, F.html for a page that walks through the tokens.
    #[arg(long, short, value_name = "F.svg|F.html")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct ModelArgs {
    /// The model that is steered: a Hugging Face directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) large: Option<PathBuf>,
    /// The small model that the experts were fine-tuned from.
    #[arg(long, value_name = "DIR")]
    pub(crate) small: Option<PathBuf>,
    /// An expert: a fine-tuned small model, or a PEFT LoRA adapter over it. May be given up to 8 times.
    #[arg(long = "expert", value_name = "[NAME=]DIR")]
    pub(crate) experts: Vec<String>,
}

/// The method, as it is typed: `expert` may name which.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Method {
    Dynamic,
    Static,
    Large,
    Small,
    Expert(Option<String>),
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Fusion")]
pub(crate) struct FusionArgs {
    /// dynamic: α anew at each step by matching KL divergences; static: fixed α (proxy tuning); large, small,
    /// expert[:NAME]: one model alone.
    #[arg(long, default_value = "dynamic", value_name = "dynamic|static|large|small|expert", value_parser = method)]
    pub(crate) method: Method,
    /// α of the static method: one for all experts or one for each [default: 1].
    #[arg(long, value_name = "A[,A…]", value_delimiter = ',', allow_hyphen_values = true)]
    pub(crate) alpha: Vec<f64>,
    #[command(flatten)]
    pub(crate) dynamic: DynamicArgs,
}

impl FusionArgs {
    /// What was given and changes nothing, with `sampling` where there is any.
    pub(crate) fn moot(&self, sampling: Option<&SamplingArgs>) -> Vec<String> {
        let mut notes = self.dynamic.moot(&self.alpha, &[&self.method]);
        let truncates =
            |sampling: &SamplingArgs| sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0;
        if sampling.is_some_and(|sampling| sampling.temperature == 0.0 && truncates(sampling)) {
            notes.push("--top-k, --top-p and --min-p change nothing at --temperature 0".to_owned());
        }
        notes
    }
}

/// A whole number from 1 on.
pub(crate) fn positive<T: FromStr + Default + PartialEq>(text: &str) -> Result<T, String> {
    match (text.parse(), text.parse::<u128>()) {
        (Ok(number), _) if number != T::default() => Ok(number),
        (Err(_), Ok(_)) => Err("too large".to_owned()),
        _ => Err("expected a whole number, 1 or more".to_owned()),
    }
}

/// A token id, with or without spaces around it.
fn id(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|error| format!("{error}"))
}

/// How the dynamic method searches.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Fusion")]
pub(crate) struct DynamicArgs {
    /// Candidates of the dynamic method, at most 32: one grid for all experts or one for each
    /// [default: 0:2:0.1, the twenty candidates 0.0, 0.1, … 1.9].
    #[arg(long, value_name = "START:STOP:STEP[:inclusive]", value_delimiter = ',', value_parser = grid,
          allow_hyphen_values = true)]
    pub(crate) alpha_grid: Vec<AlphaGrid>,
    /// Search for α at every N-th step and hold it in between.
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive::<u32>)]
    pub(crate) alpha_every: u32,
    /// grid: the best candidate, as in the paper; refine: the continuous minimum around it.
    #[arg(long, default_value = "grid", hide_possible_values = true, value_name = "grid|refine")]
    pub(crate) search: Search,
    /// The KL terms that are matched.
    #[arg(long, default_value = "both", hide_possible_values = true, value_name = "both|forward|reverse")]
    pub(crate) objective: ObjectiveName,
}

impl DynamicArgs {
    /// What was given, `alpha` besides, and changes nothing for any of `methods`.
    pub(crate) fn moot(&self, alpha: &[f64], methods: &[&Method]) -> Vec<String> {
        let settings = [
            ("--alpha", !alpha.is_empty(), Method::Static),
            ("--alpha-grid", !self.alpha_grid.is_empty(), Method::Dynamic),
            ("--alpha-every", self.alpha_every != 1, Method::Dynamic),
            ("--search", self.search != Search::Grid, Method::Dynamic),
            ("--objective", self.objective != ObjectiveName::Both, Method::Dynamic),
        ];
        let moot = settings.iter().filter(|(_, given, of)| *given && !methods.contains(&of));
        let note = |(flag, _, of): &(&str, bool, Method)| {
            let method = if *of == Method::Static { "static" } else { "dynamic" };
            format!("{flag} is a setting of --method {method} and changes nothing here")
        };
        moot.map(note).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Search {
    Grid,
    Refine,
}

impl From<Search> for SearchMode {
    fn from(search: Search) -> Self {
        match search {
            Search::Grid => Self::Grid,
            Search::Refine => Self::Refine,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum ObjectiveName {
    Both,
    Forward,
    Reverse,
}

impl From<ObjectiveName> for Objective {
    fn from(name: ObjectiveName) -> Self {
        match name {
            ObjectiveName::Both => Self::Both,
            ObjectiveName::Forward => Self::Forward,
            ObjectiveName::Reverse => Self::Reverse,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Generate at most N tokens.
    #[arg(long, short = 'n', value_name = "N", default_value = "128", allow_negative_numbers = true)]
    pub(crate) max_new_tokens: usize,
    /// Generate at least N tokens: no end token and no stop string before.
    #[arg(long, value_name = "N", default_value = "0", allow_negative_numbers = true)]
    pub(crate) min_new_tokens: usize,
    /// 0 is greedy.
    #[arg(long, value_name = "T", default_value = "0", allow_negative_numbers = true)]
    pub(crate) temperature: f32,
    /// Draw from the K most probable tokens; 0 is all.
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true)]
    pub(crate) top_k: usize,
    /// Draw from the smallest set of tokens whose probability reaches P.
    #[arg(long, value_name = "P", default_value = "1", allow_negative_numbers = true)]
    pub(crate) top_p: f32,
    /// Draw from tokens at least P times as probable as the most probable one.
    #[arg(long, value_name = "P", default_value = "0", allow_negative_numbers = true)]
    pub(crate) min_p: f32,
    /// Make tokens seen before less probable: 1 is off.
    #[arg(long, value_name = "X", default_value = "1", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: f32,
    /// Subtract X from the logits of tokens generated before.
    #[arg(long, value_name = "X", default_value = "0", allow_hyphen_values = true)]
    pub(crate) presence_penalty: f32,
    /// Subtract X from the logits of tokens for every time they were generated before.
    #[arg(long, value_name = "X", default_value = "0", allow_hyphen_values = true)]
    pub(crate) frequency_penalty: f32,
    /// Add X to the logit of token ID; -inf bans it. May be given several times.
    #[arg(long, value_name = "ID=X", value_parser = bias, allow_hyphen_values = true)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same text.
    #[arg(long, value_name = "N", default_value = "0", allow_negative_numbers = true)]
    pub(crate) seed: u64,
    /// End the text before this string. May be given several times.
    #[arg(long, value_name = "S")]
    pub(crate) stop: Vec<String>,
    /// End the text at this token. May be given several times.
    #[arg(long, value_name = "ID")]
    pub(crate) stop_token_id: Vec<u32>,
    /// Go on past end-of-sequence tokens.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct DeviceArgs {
    /// Where to compute: auto (a GPU where there is one), cpu, cuda or cuda:N.
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    device: Device,
    /// The GPU of the large model, which also fuses.
    #[arg(long, value_name = "N", conflicts_with = "device")]
    large_device: Option<usize>,
    /// The GPU of the small model and its experts.
    #[arg(long, value_name = "N", conflicts_with = "device")]
    small_device: Option<usize>,
    /// Launch every CUDA kernel by itself instead of one graph a token: slower, to the same bits.
    #[arg(long)]
    eager: bool,
    /// Threads of the CPU backend [default: one a core].
    #[arg(long, value_name = "N", value_parser = positive::<u16>)]
    threads: Option<u16>,
}

impl DeviceArgs {
    /// As if these had been typed.
    pub(crate) fn new(device: Device, threads: Option<u16>, eager: bool) -> Self {
        Self { device, large_device: None, small_device: None, eager, threads }
    }

    /// A backend of these limits.
    pub(crate) fn backend(&self, limits: Limits) -> BackendOptions {
        BackendOptions { device: self.device(), threads: self.threads(), limits, eager: self.eager }
    }

    /// What all the flags together name.
    pub(crate) fn device(&self) -> Device {
        match (self.large_device, self.small_device) {
            (None, None) => self.device,
            (large, small) => Device::Split { large: large.unwrap_or(0), small: small.unwrap_or(0) },
        }
    }

    /// Whether every CUDA kernel is launched by itself.
    pub(crate) fn eager(&self) -> bool {
        self.eager
    }

    /// The GPU of the large model, if any.
    pub(crate) fn gpu(&self) -> Option<usize> {
        self.device().gpus().map(|(large, _)| large)
    }

    /// Threads of the CPU backend, where they are given.
    pub(crate) fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Running")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// The most memory of the key-value caches, of all models together: fewer sequences run at once where it is
    /// short [default: what --batch-size sequences take].
    #[arg(long, value_name = "MIB", value_parser = positive::<u32>, help_heading = "Running")]
    pub(crate) kv_memory: Option<u32>,
    /// Sequences decoded together.
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Running")]
    pub(crate) batch_size: u16,
    /// Print one JSON object for each input line.
    #[arg(long, help_heading = "Running")]
    pub(crate) json: bool,
    /// Write the JSON objects to a file instead of stdout, and the settings to F.jsonl.run.json. Both are overwritten
    /// unless --resume is given.
    #[arg(long, value_name = "F.jsonl", help_heading = "Running")]
    pub(crate) output: Option<PathBuf>,
    /// Go on where a killed run stopped, with the same settings: keep the finished lines of --output (and of --trace),
    /// do the rest.
    #[arg(long, requires = "output", help_heading = "Running")]
    pub(crate) resume: bool,
    /// No progress bar, no colours, no closing line.
    #[arg(long, short, help_heading = "Running")]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").multiple(false))]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) models: ModelArgs,
    /// The prompt.
    #[arg(long, short, value_name = "T", group = "source", help_heading = "Input")]
    pub(crate) prompt: Option<String>,
    /// A file with the prompt; - is stdin. One line end at its end isn't part of the prompt.
    #[arg(long, value_name = "F", group = "source", help_heading = "Input")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// The prompt as token ids, taken as they are.
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', value_parser = id, group = "source", help_heading = "Input")]
    pub(crate) prompt_ids: Option<Vec<u32>>,
    /// One prompt a line: {"prompt": …}, optionally with "prompts": {"large": …, "small": …, "expert": …, NAME: …}
    /// for roles that have their own. Other fields are ignored.
    #[arg(long, value_name = "F.jsonl", group = "source", help_heading = "Input")]
    pub(crate) input: Option<PathBuf>,
    /// Put the prompt through each model's chat template; models without one get it as it is.
    #[arg(long, help_heading = "Input")]
    pub(crate) chat: bool,
    #[command(flatten)]
    pub(crate) fusion: FusionArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Write one JSON object for each token; F.jsonl is overwritten unless --resume is given.
    #[arg(long, value_name = "F.jsonl", help_heading = "Running")]
    pub(crate) trace: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true).multiple(false))]
pub(crate) struct ScoreArgs {
    #[command(flatten)]
    pub(crate) models: ModelArgs,
    /// The text.
    #[arg(long, short, value_name = "T", group = "source", help_heading = "Input")]
    pub(crate) text: Option<String>,
    /// The text as token ids, taken as they are.
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', value_parser = id, group = "source", help_heading = "Input")]
    pub(crate) ids: Option<Vec<u32>>,
    /// One text a line: {"text": …}, optionally with "prompt" (or "prompts" by role), which is read before the text
    /// and not scored. Other fields are ignored.
    #[arg(long, value_name = "F.jsonl", group = "source", help_heading = "Input")]
    pub(crate) input: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) fusion: FusionArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[cfg(feature = "serve")]
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) models: ModelArgs,
    #[command(flatten)]
    pub(crate) fusion: FusionArgs,
    /// The address to listen at; the default is reached from this machine alone.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    pub(crate) host: String,
    /// The port to listen at; 0 is any free one.
    #[arg(long, value_name = "PORT", default_value = "8000", help_heading = "Server")]
    pub(crate) port: u16,
    /// Ask clients for this key, as `Authorization: Bearer KEY`.
    #[arg(
        long,
        value_name = "KEY",
        env = "DLF_ENGINE_API_KEY",
        hide_env_values = true,
        help_heading = "Server"
    )]
    pub(crate) api_key: Option<String>,
    /// The model id that clients name; ID:METHOD is the same model under another method
    /// [default: the name of the large model's directory, or demo].
    #[arg(long, value_name = "ID", help_heading = "Server")]
    pub(crate) model_name: Option<String>,
    /// Sequences that may wait besides those decoded; more are answered 429.
    #[arg(long, value_name = "N", default_value = "1024", help_heading = "Server")]
    pub(crate) queue: usize,
    /// Tokens that a request may generate.
    #[arg(long, value_name = "N", default_value = "4096", help_heading = "Server")]
    pub(crate) max_new_tokens: usize,
    /// Tokens that a prompt may have [default: what the models' contexts take].
    #[arg(long, value_name = "N", help_heading = "Server")]
    pub(crate) max_prompt_tokens: Option<usize>,
    /// Bytes that the body of a request may have.
    #[arg(long, value_name = "N", default_value = "4194304", help_heading = "Server")]
    pub(crate) max_body_bytes: usize,
    /// Seconds that requests in flight get to end after Ctrl-C or SIGTERM; a second one ends them at once.
    #[arg(long, value_name = "S", default_value = "30", help_heading = "Server")]
    pub(crate) grace: u64,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Sequences decoded together.
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=256),
          help_heading = "Running")]
    pub(crate) batch_size: u16,
    /// The most memory of the key-value caches, of all models together.
    #[arg(long, alias = "cache-mib", value_name = "MIB", default_value = "1024",
          value_parser = positive::<u32>, help_heading = "Running")]
    pub(crate) kv_memory: u32,
    /// Print nothing but errors.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Model directories: the large one, the small one, then experts. Where two or more don't fit together, the exit
    /// code is 1.
    #[arg(required = true, value_name = "DIR")]
    pub(crate) dirs: Vec<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

const METHODS: &str = "expected dynamic, static, large, small, expert or expert:NAME";

pub(crate) fn method(text: &str) -> Result<Method, String> {
    match text.split_once(':') {
        None => match text {
            "dynamic" => Ok(Method::Dynamic),
            "static" => Ok(Method::Static),
            "large" => Ok(Method::Large),
            "small" => Ok(Method::Small),
            "expert" => Ok(Method::Expert(None)),
            _ => Err(METHODS.to_owned()),
        },
        Some(("expert", name)) => Ok(Method::Expert(Some(name.to_owned()))),
        Some(("static", alpha)) => {
            Err(format!("only `eval` takes α here: use --method static --alpha {alpha}"))
        }
        Some(("dynamic", search)) => {
            Err(format!("only `eval` takes the search here: use --method dynamic --search {search}"))
        }
        Some(_) => Err(METHODS.to_owned()),
    }
}

pub(crate) fn grid(text: &str) -> Result<AlphaGrid, String> {
    text.parse().map_err(|error: crate::Error| error.to_string())
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, x)| Some((id.parse().ok()?, x.parse().ok()?)));
    parsed.ok_or_else(|| "expected ID=X, as in 42=-1.5".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn grids_are_parsed() {
        assert_eq!(grid("0:2:0.1").unwrap(), AlphaGrid::default());
        assert_eq!(grid("0:2:0.1:inclusive").unwrap().candidates().len(), 21);
        assert_eq!(grid("-1:1:0.5:inclusive").unwrap().candidates(), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        for wrong in ["", "1", "0:2", "0:2:0", "0:2:x", "0:2:0.1:exclusive", "0:9:0.1", "2:0:0.1", "0:nan:1"]
        {
            assert!(grid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn methods_are_parsed() {
        assert_eq!(method("expert:sums").unwrap(), Method::Expert(Some("sums".to_owned())));
        assert!(method("large:x").is_err());
        assert!(method("static:0.5").unwrap_err().ends_with("--alpha 0.5"));
        assert!(method("dynamic:refine").unwrap_err().ends_with("--search refine"));
        assert!(method("Dynamic").is_err());
    }
}
