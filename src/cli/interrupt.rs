//! What Ctrl-C says where a run can be gone on with.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use indicatif::ProgressBar;

/// The exit code of a program that SIGINT ended, as a shell reports it.
const INTERRUPTED: i32 = 130;

/// The run that Ctrl-C ends: it says how far the run came, and how to go on with it.
pub(super) struct Interrupt {
    watched: Arc<Mutex<Option<(ProgressBar, String)>>>,
}

impl Interrupt {
    /// Ctrl-C is taken over where the run `can_be_resumed`. Lines are written whole, or cut off by `--resume`, so that the
    /// program may end anywhere.
    pub(super) fn new(can_be_resumed: bool) -> Result<Self> {
        let watched: Arc<Mutex<Option<(ProgressBar, String)>>> = Arc::default();
        if can_be_resumed {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let seen = Arc::clone(&watched);
            std::thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
                if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                    tell(&seen);
                    std::process::exit(INTERRUPTED);
                }
            })?;
        }
        Ok(Self { watched })
    }

    /// What is told of: the place of this bar; `what` comes before it.
    pub(super) fn watch(&self, bar: &ProgressBar, what: &str) {
        let watched = Some((bar.clone(), what.to_owned()));
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = watched;
    }
}

fn tell(watched: &Mutex<Option<(ProgressBar, String)>>) {
    let Some((bar, what)) = watched.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    bar.abandon();
    let (done, all) = (bar.position(), bar.length().unwrap_or_default());
    let line = format!("{what}stopped after {done} of {all}; the same command with --resume goes on");
    // Nothing is left to do where stderr is closed.
    let _ = writeln!(io::stderr(), "{line}");
}
