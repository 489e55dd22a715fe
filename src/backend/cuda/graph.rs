//! Graphs: launches that were recorded once, with their parameters, and go to the GPU as one.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream, DriverError, result};

use super::device::Gpu;
use super::pending::Recorded;
use crate::error::{Error, Result};

/// What was put into a stream while it was recorded.
pub(crate) struct Graph {
    graph: CudaGraph,
    launches: u64,
    recorded: Recorded,
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
        let mut recording = Recording(Some(stream));
        let before = self.launches();
        let (done, recorded) = self.pending().recorded(stream, record);
        // Recorded, not launched.
        let launches = self.launches() - before;
        self.count_launches(launches.wrapping_neg());
        done?;
        let graph =
            self.call(|| "cuStreamEndCapture and cuGraphInstantiate".to_owned(), || recording.end())?;
        graph.map(|graph| Graph { graph, launches, recorded }).ok_or_else(|| Error::Cuda {
            device: self.ordinal(),
            operation: "cuStreamEndCapture".to_owned(),
            reason: "nothing was recorded".to_owned(),
        })
    }

    /// Puts a graph into the stream that it was recorded in.
    pub(crate) fn launch_graph(&self, graph: &Graph) -> Result<()> {
        self.count_launches(graph.launches);
        let operation = || format!("cuGraphLaunch of {} kernels", graph.launches);
        self.call(operation, || graph.graph.launch())?;
        self.pending().launched_graph(&graph.recorded, graph.launches);
        Ok(())
    }
}

/// Ends a recording where nobody else did.
struct Recording<'a>(Option<&'a Arc<CudaStream>>);

impl Recording<'_> {
    /// Ends it and makes it ready to run. Where that fails, the drop ends it: cudarc may have given up before it asked the
    /// driver.
    fn end(&mut self) -> Result<Option<CudaGraph>, DriverError> {
        let Some(stream) = self.0 else { return Ok(None) };
        let graph = stream.end_capture(CUgraphInstantiate_flags(0))?;
        self.0 = None;
        Ok(graph)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            // SAFETY: the stream is there, and the graph is nobody else's. An error says only that the recording is broken
            // or has ended, and the first error is known.
            unsafe {
                if let Ok(graph) = result::stream::end_capture(stream.cu_stream())
                    && !graph.is_null()
                {
                    let _ = result::graph::destroy(graph);
                }
            }
        }
    }
}
