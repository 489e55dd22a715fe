//! Graphs: launches that were recorded once, with their parameters, and go to the GPU as one.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream};

use super::device::Gpu;
use crate::error::{Error, Result};

/// What was put into a stream while it was recorded.
pub(crate) struct Graph {
    graph: CudaGraph,
    launches: u64,
}

impl Gpu {
    /// Records what `record` puts into `stream`, and into streams that wait for its events, instead of running it.
    ///
    /// Everything recorded must outlive the graph: the addresses are in it. Streams that joined must be waited for
    /// by `stream` before `record` returns. The recording ends whatever happens, so that the stream works again.
    ///
    /// # Errors
    /// What `record` fails with; [`Error::Cuda`].
    pub(crate) fn capture(
        &self,
        stream: &Arc<CudaStream>,
        record: impl FnOnce() -> Result<()>,
    ) -> Result<Graph> {
        // This thread's mode: what other threads do with the GPU meanwhile is no business of this recording.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.call(|| "cuStreamBeginCapture".to_owned(), || stream.begin_capture(mode))?;
        let recording = Recording(Some(stream));
        let before = self.launches();
        record()?;
        // Recorded, not launched.
        let launches = self.launches() - before;
        self.count_launches(launches.wrapping_neg());
        let graph =
            self.call(|| "cuStreamEndCapture and cuGraphInstantiate".to_owned(), || recording.end())?;
        graph.map(|graph| Graph { graph, launches }).ok_or_else(|| Error::Cuda {
            device: self.ordinal(),
            operation: "cuStreamEndCapture".to_owned(),
            reason: "nothing was recorded".to_owned(),
        })
    }

    /// Puts a graph into the stream that it was recorded in.
    pub(crate) fn launch_graph(&self, graph: &Graph) -> Result<()> {
        self.count_launches(graph.launches);
        self.call(|| "cuGraphLaunch".to_owned(), || graph.graph.launch())
    }
}

/// Ends a recording where nobody else did.
struct Recording<'a>(Option<&'a Arc<CudaStream>>);

impl Recording<'_> {
    fn end(mut self) -> Result<Option<CudaGraph>, cudarc::driver::DriverError> {
        self.0.take().map_or(Ok(None), |stream| stream.end_capture(CUgraphInstantiate_flags(0)))
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            // Its error says only that the recording is broken, and the first error is known.
            let _ = stream.end_capture(CUgraphInstantiate_flags(0));
        }
    }
}
