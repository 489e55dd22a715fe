//! A server on the demo ensemble, at a free port of this machine, for as long as a test holds it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dlf_engine::serve::{Options, RequestLimits, Server};
use dlf_engine::{BackendOptions, Device, Ensemble, FusionRule, Generator, Limits};
use tokio::sync::mpsc::{self, Sender};

use crate::http;

/// The cache of a test's server, in blocks a model: eight of the demo's contexts.
pub(crate) const BLOCKS: usize = 8 * 17;

pub(crate) fn ensemble() -> Arc<Ensemble> {
    static ENSEMBLE: OnceLock<Arc<Ensemble>> = OnceLock::new();
    Arc::clone(ENSEMBLE.get_or_init(|| Arc::new(Ensemble::demo().unwrap())))
}

fn backend(sequences: usize, blocks: usize) -> BackendOptions {
    let limits = Limits::for_vocabulary(ensemble().vocab_size(), sequences, blocks);
    BackendOptions { threads: Some(2), ..BackendOptions::new(Device::Cpu, limits) }
}

/// A generator of its own, for what a request gives alone.
pub(crate) fn generator() -> Generator {
    Generator::new(ensemble(), backend(1, 17).open(ensemble()).unwrap())
}

pub(crate) fn options() -> Options {
    Options {
        model: "demo".to_owned(),
        rule: FusionRule::default(),
        api_key: None,
        sequences: 8,
        queue: 256,
        limits: RequestLimits::default(),
        grace: Duration::from_secs(20),
    }
}

pub(crate) struct Running {
    pub(crate) at: SocketAddr,
    pub(crate) stop: Option<Sender<()>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Running {
    pub(crate) fn new(options: Options) -> Self {
        Self::with(ensemble(), options)
    }

    pub(crate) fn with(ensemble: Arc<Ensemble>, options: Options) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = listener.local_addr().unwrap();
        let server = Server::new(ensemble, backend(options.sequences, BLOCKS), options).unwrap();
        let (stop, stopped) = mpsc::channel(2);
        let thread = std::thread::spawn(move || server.run(listener, stopped));
        Self { at, stop: Some(stop), thread: Some(thread) }
    }

    /// The sum of the values of a metric.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let page = http::get(self.at, "/metrics").body;
        let named =
            |line: &&str| line.starts_with(&format!("{name} ")) || line.starts_with(&format!("{name}{{"));
        let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
        let values: Vec<f64> = page.lines().filter(named).map(value).collect();
        assert!(!values.is_empty(), "{name} is not in {page}");
        values.iter().sum()
    }

    /// Waits until a metric has a value.
    pub(crate) fn wait_for(&self, name: &str, is: impl Fn(f64) -> bool) {
        let start = Instant::now();
        while !is(self.metric(name)) {
            assert!(start.elapsed() < Duration::from_secs(60), "{name} stays at {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops the server and waits for its end.
    pub(crate) fn join(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.join();
        }
    }
}
