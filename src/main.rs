//! The `dlf-engine` binary: parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    dlf_engine::cli::main()
}
