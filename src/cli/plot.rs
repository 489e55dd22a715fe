//! `dlf-engine plot`: traces in, a picture out.

use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::args::PlotArgs;
use crate::plot;

pub(crate) fn run(args: &PlotArgs) -> anyhow::Result<ExitCode> {
    let draw = match args.output.extension().and_then(|e| e.to_str()) {
        Some("svg") => plot::svg,
        Some("html") => plot::html,
        _ => bail!("--output {}: the name must end in .svg or .html", args.output.display()),
    };
    let mut texts = Vec::new();
    for trace in &args.traces {
        if let (Ok(from), Ok(to)) = (fs::canonicalize(trace), fs::canonicalize(&args.output))
            && from == to
        {
            bail!("{}: a trace can't be its own picture", trace.display());
        }
        texts.extend(plot::read(trace)?);
    }
    fs::write(&args.output, draw(&texts)).with_context(|| args.output.display().to_string())?;
    let tokens: usize = texts.iter().map(|text| text.records.len()).sum();
    let (prompts, path) = (texts.len(), args.output.display());
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    writeln!(
        io::stdout(),
        "{path}: {tokens} token{} of {prompts} prompt{}",
        plural(tokens),
        plural(prompts)
    )?;
    Ok(ExitCode::SUCCESS)
}
