//! `dlf-engine serve`.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::mpsc;

use super::args::{Method, ServeArgs};
use crate::backend::Limits;
use crate::cli::setup::{affordable_blocks, note, swapped};
use crate::ensemble::Ensemble;
use crate::generate::blocks_needed;
use crate::kv_cache::BLOCK_SIZE;
use crate::serve::{Options, RequestLimits, Server};

/// The model id of the demo ensemble.
const DEMO: &str = "demo";

pub(super) fn run(args: &ServeArgs) -> Result<ExitCode> {
    if args.api_key.as_deref() == Some("") {
        bail!("--api-key: the key is empty");
    }
    let listener = listen(&args.host, args.port)?;
    let address = listener.local_addr()?;
    // All models that were given: a request may choose another method.
    let ensemble = Arc::new(args.models.load(&Method::Dynamic)?);
    note(args.quiet, args.fusion.moot(None));
    note(args.quiet, swapped(&ensemble));
    let options = options(args, &ensemble)?;
    let model = options.model.clone();
    let backend = args.device.backend(limits(args, &ensemble)?);
    args.device.note_fallback(args.quiet);
    let cached = backend.limits.blocks * BLOCK_SIZE;
    let server = Server::new(ensemble, backend, options)?;
    let stop = stop_signals()?;
    if !args.quiet {
        let mut stderr = io::stderr().lock();
        writeln!(stderr, "{model} at http://{address} · {cached} tokens of cache · Ctrl-C stops")?;
        if !address.ip().is_loopback() && args.api_key.is_none() {
            writeln!(stderr, "warning: everybody who reaches {address} can use this server; see --api-key")?;
        }
    }
    server.run(listener, stop).context("the server")?;
    Ok(ExitCode::SUCCESS)
}

fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let named = || format!("--host {host} --port {port}");
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().with_context(named)?.collect();
    TcpListener::bind(addresses.as_slice()).with_context(named)
}

fn options(args: &ServeArgs, ensemble: &Ensemble) -> Result<Options> {
    let model = match (&args.model_name, &args.models.large) {
        (Some(name), _) => name.clone(),
        (None, _) if args.models.is_demo() => DEMO.to_owned(),
        (None, Some(large)) => large
            .file_name()
            .map_or_else(|| "dlf-engine".to_owned(), |name| name.to_string_lossy().into_owned()),
        (None, None) => "dlf-engine".to_owned(),
    };
    let defaults = RequestLimits::default();
    Ok(Options {
        model,
        rule: args.fusion.rule(ensemble)?,
        api_key: args.api_key.clone(),
        sequences: args.batch_size.into(),
        queue: args.queue,
        limits: RequestLimits {
            body_bytes: args.max_body_bytes,
            prompt_tokens: args.max_prompt_tokens.unwrap_or(usize::MAX),
            new_tokens: args.max_new_tokens,
            ..defaults
        },
        grace: Duration::from_secs(args.grace),
    })
}

/// A cache of `--kv-memory`, but no more than all sequences at their longest take.
fn limits(args: &ServeArgs, ensemble: &Ensemble) -> Result<Limits> {
    let sequences = usize::from(args.batch_size);
    let context = (0..ensemble.models().len()).map(|model| ensemble.context(model)).max().unwrap_or(1);
    let blocks = affordable_blocks(ensemble, args.kv_memory)?.min(blocks_needed(sequences, context + 1));
    Ok(Limits::for_vocabulary(ensemble.vocab_size(), sequences, blocks))
}

/// A message for every SIGINT and SIGTERM.
fn stop_signals() -> Result<mpsc::Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (sender, receiver) = mpsc::channel(2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if sender.send(()).await.is_err() {
                    break;
                }
            }
        });
    })?;
    Ok(receiver)
}
