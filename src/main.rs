//! The `dlf-engine` binary: parse, run, exit code.

fn main() {}
