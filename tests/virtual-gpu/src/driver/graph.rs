//! Capture of streams into graphs, and their launch.

use super::*;
use crate::device::Work;
use crate::graph::Capture;
use std::ffi::{c_int, c_uint, c_ulonglong};

entry! {
    fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_int) {
        let (ordinal, id) = open_stream(stream)?;
        perform(ordinal, "cuStreamBeginCapture_v2", Call::Stream, |d| {
            if id == 0 {
                return Err(code::CAPTURE_UNSUPPORTED);
            }
            if d.capturing(id) {
                return Err(code::INVALID_VALUE);
            }
            let capture = d.fresh_id();
            d.captures.insert(capture, Capture { origin: id, ..Capture::default() });
            let stream = d.streams.get_mut(&id).ok_or(code::INVALID_HANDLE)?;
            stream.capture = Some((capture, Vec::new()));
            Ok(())
        })
    }

    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) {
        let (ordinal, id) = open_stream(stream)?;
        let number = perform(ordinal, "cuStreamEndCapture", Call::Stream, |d| {
            let capture = d.streams.get(&id).ok_or(code::INVALID_HANDLE)?.capture.clone();
            let (capture, last) = capture.ok_or(code::INVALID_VALUE)?;
            if d.captures.get(&capture).is_some_and(|c| c.origin != id) {
                return Err(code::CAPTURE_UNMATCHED);
            }
            for stream in d.streams.values_mut() {
                if stream.capture.as_ref().is_some_and(|c| c.0 == capture) {
                    stream.capture = None;
                }
            }
            let found = d.captures.remove(&capture).ok_or(code::CAPTURE_INVALIDATED)?;
            if found.invalid {
                return Err(code::CAPTURE_INVALIDATED);
            }
            if !found.graph.joined(&last) {
                return Err(code::CAPTURE_UNJOINED);
            }
            let number = d.fresh_id();
            d.graphs.insert(number, Arc::new(found.graph));
            Ok(number)
        });
        match number {
            Ok(number) => give(graph, handle(ordinal, Kind::Graph, number)),
            Err(code) => {
                on_device(ordinal, |d| {
                    abandon(d, id);
                    Ok(())
                })?;
                give(graph, std::ptr::null_mut())?;
                Err(code)
            }
        }
    }

    fn cuStreamIsCapturing(stream: Handle, status: *mut c_int) {
        let (ordinal, id) = open_stream(stream)?;
        let found = on_device(ordinal, |d| {
            let capture = d.streams.get(&id).ok_or(code::INVALID_HANDLE)?.capture.as_ref();
            Ok(capture.map_or(0, |c| if d.captures.get(&c.0).is_none_or(|c| c.invalid) { 2 } else { 1 }))
        })?;
        give(status, found)
    }

    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, _flags: c_ulonglong) {
        let (ordinal, id) = open(graph, Kind::Graph)?;
        let number = perform(ordinal, "cuGraphInstantiateWithFlags", Call::Module, |d| {
            let graph = Arc::clone(d.graphs.get(&id).ok_or(code::INVALID_HANDLE)?);
            let number = d.fresh_id();
            d.executables.insert(number, graph);
            Ok(number)
        })?;
        give(executable, handle(ordinal, Kind::Executable, number))
    }

    fn cuGraphLaunch(executable: Handle, stream: Handle) {
        let (ordinal, id) = open(executable, Kind::Executable)?;
        let (_, stream) = open_stream(stream)?;
        perform(ordinal, "cuGraphLaunch", Call::Launch, |d| {
            let graph = Arc::clone(d.executables.get(&id).ok_or(code::INVALID_HANDLE)?);
            d.enqueue(stream, Work::Graph(graph))
        })
    }

    fn cuGraphUpload(executable: Handle, _stream: Handle) {
        let (ordinal, id) = open(executable, Kind::Executable)?;
        perform(ordinal, "cuGraphUpload", Call::Launch, |d| {
            d.executables.get(&id).map(|_| ()).ok_or(code::INVALID_HANDLE)
        })
    }

    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        let (ordinal, id) = open(graph, Kind::Graph)?;
        if !nodes.is_null() {
            errors::remember("cuGraphGetNodes: nodes have no handles here, only their number can be asked for");
            return Err(code::NOT_SUPPORTED);
        }
        let found = on_device(ordinal, |d| Ok(d.graphs.get(&id).ok_or(code::INVALID_HANDLE)?.nodes.len()))?;
        give(count, found)
    }

    fn cuGraphExecDestroy(executable: Handle) {
        let (ordinal, id) = open(executable, Kind::Executable)?;
        perform(ordinal, "cuGraphExecDestroy", Call::Query, |d| {
            d.executables.remove(&id).map(|_| ()).ok_or(code::INVALID_HANDLE)
        })
    }

    fn cuGraphDestroy(graph: Handle) {
        let (ordinal, id) = open(graph, Kind::Graph)?;
        perform(ordinal, "cuGraphDestroy", Call::Query, |d| {
            d.graphs.remove(&id).map(|_| ()).ok_or(code::INVALID_HANDLE)
        })
    }
}

/// Ends the capture that began in a stream, whatever went wrong: the stream works again, the graph is lost.
fn abandon(d: &mut crate::device::Device, id: u64) {
    let capture = d.streams.get(&id).and_then(|s| s.capture.as_ref()).map(|c| c.0);
    let Some(capture) = capture.filter(|c| d.captures.get(c).is_some_and(|found| found.origin == id)) else {
        return;
    };
    d.captures.remove(&capture);
    for stream in d.streams.values_mut() {
        if stream.capture.as_ref().is_some_and(|c| c.0 == capture) {
            stream.capture = None;
        }
    }
}

/// Calls of the driver that cudarc has a name for and this driver does not offer: they say so.
macro_rules! refuse {
    ($($name:ident),* $(,)?) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(_first: c_uint) -> i32 {
            errors::remember(concat!(stringify!($name), " is not offered by the virtual device"));
            code::NOT_SUPPORTED
        }
    )*};
}

refuse!(
    cuCtxCreate_v2,
    cuCtxCreate_v3,
    cuCtxCreate_v4,
    cuCtxDestroy_v2,
    cuDestroyExternalMemory,
    cuExternalMemoryGetMappedBuffer,
    cuGraphExecKernelNodeSetParams_v2,
    cuImportExternalMemory,
    cuLaunchKernelEx,
    cuMemAdvise_v2,
    cuMemAllocManaged,
    cuMemPoolCreate,
    cuMemPoolDestroy,
    cuMemPrefetchAsync_v2,
    cuMemcpyPeerAsync,
    cuOccupancyMaxActiveClusters,
    cuOccupancyMaxPotentialClusterSize,
);
