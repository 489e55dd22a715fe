//! The command line: flags in, a validated request out.

mod args;
mod bench;
mod color;
mod eval;
mod generate;
mod input;
mod inspect;
mod interrupt;
mod output;
mod plot;
mod record;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod settings;
mod setup;
mod sweep;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};

/// Ended by a closed pipe: what a shell reports for a program killed by SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// Runs the program: 0 is success, 1 an error that stderr names, 2 a wrong usage, 141 a closed pipe.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => {
            // Help and version come this way, too.
            return match message.print() {
                Ok(()) => ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(2)),
                Err(_) => ExitCode::from(BROKEN_PIPE),
            };
        }
    };
    let result = match &cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Score(args) => score::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Sweep(args) => sweep::run(args),
        Command::Plot(args) => plot::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Completions { shell } => completions(*shell),
    };
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::from(BROKEN_PIPE),
        Err(error) => {
            // Nothing is left to do where stderr is closed as well.
            let _ = writeln!(io::stderr(), "error: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each once: some tell theirs themselves.
fn told(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| match cause.to_string() {
        cause if text.is_empty() => cause,
        cause if text.ends_with(&cause) => text,
        cause => format!("{text}: {cause}"),
    })
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dlf-engine", &mut script);
    let mut stdout = io::stdout().lock();
    stdout.write_all(&script)?;
    stdout.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is_pipe = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_pipe))
}
