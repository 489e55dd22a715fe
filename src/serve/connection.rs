//! Connections: taking them, bounding them, and letting them end.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::mpsc::Receiver;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::handlers::router;
use super::{Server, Shared};

/// Threads that read, check and write; the engine has its own.
const WORKERS: usize = 2;
/// How long to wait when the system has no file descriptor left for a connection.
const OUT_OF_FILES: Duration = Duration::from_millis(100);

impl Server {
    /// Serves until `stop` gets a message or loses its senders, then takes no more requests and waits for those in
    /// flight, for [`Options::grace`](super::Options::grace) at most; a second message ends that at once.
    ///
    /// # Errors
    /// Where the system refuses the listener or a thread.
    pub fn run(self, listener: TcpListener, mut stop: Receiver<()>) -> io::Result<()> {
        let Self { shared, engine } = self;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
        let served = runtime.block_on(serve(shared, listener, &mut stop));
        // What is still running loses its receiver; with the last of it, the engine's thread ends.
        runtime.shutdown_timeout(Duration::from_secs(1));
        let ended = engine.join().map_err(|_| io::Error::other("the engine's thread panicked"));
        served.and(ended)
    }
}

async fn serve(shared: Arc<Shared>, listener: TcpListener, stop: &mut Receiver<()>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let limits = &shared.options.limits;
    let places = Arc::new(Semaphore::new(limits.connections.clamp(1, Semaphore::MAX_PERMITS)));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head_time);
    let graceful = GracefulShutdown::new();
    let router = router(Arc::clone(&shared));
    loop {
        let (stream, place) = tokio::select! {
            _ = stop.recv() => break,
            connection = next_connection(&listener, &places) => match connection {
                Ok(connection) => connection,
                Err(_) => {
                    tokio::time::sleep(OUT_OF_FILES).await;
                    continue;
                }
            },
        };
        // Tokens go out one by one: they mustn't wait for each other.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // A client that leaves or breaks the protocol harms only itself.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    shared.draining.store(true, Ordering::Relaxed);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(shared.options.grace) => {}
        Some(()) = stop.recv() => {}
    }
    Ok(())
}

async fn next_connection(
    listener: &tokio::net::TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}
