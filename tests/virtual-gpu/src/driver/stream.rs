//! Streams and events.

use super::*;
use crate::device::{Event, Stream, Work};
use std::ffi::{c_int, c_uint};

const NON_BLOCKING: c_uint = 1;
const DISABLE_TIMING: c_uint = 2;

unsafe fn create(to: *mut Handle, flags: c_uint, name: &'static str) -> Result<(), Code> {
    let ordinal = current()?;
    let id = perform(ordinal, name, Call::Stream, |d| {
        let id = d.fresh_id();
        let blocking = flags & NON_BLOCKING == 0;
        d.streams.insert(id, Stream { blocking, ..Stream::default() });
        Ok(id)
    })?;
    // SAFETY: the caller's promise.
    unsafe { give(to, handle(ordinal, Kind::Stream, id)) }
}

/// Waiting for a stream that is being captured breaks the capture.
fn refuse_capture(d: &mut Device, stream: u64) -> Result<(), Code> {
    let Some((id, _)) = d.streams.get(&stream).ok_or(code::INVALID_HANDLE)?.capture.clone() else {
        return Ok(());
    };
    if let Some(capture) = d.captures.get_mut(&id) {
        capture.invalid = true;
    }
    Err(code::CAPTURE_UNSUPPORTED)
}

fn record(d: &mut Device, event: u64, stream: u64) -> Result<(), Code> {
    let capture = d.streams.get(&stream).ok_or(code::INVALID_HANDLE)?.capture.clone();
    let found = d.events.get_mut(&event).ok_or(code::INVALID_HANDLE)?;
    if capture.is_some() {
        found.captured = capture;
        return Ok(());
    }
    found.captured = None;
    found.issued += 1;
    let number = found.issued;
    d.enqueue(stream, Work::Record(event, number))
}

fn wait(d: &mut Device, stream: u64, event: u64) -> Result<(), Code> {
    let found = d.events.get(&event).ok_or(code::INVALID_HANDLE)?.clone();
    let waiting = d.streams.get(&stream).ok_or(code::INVALID_HANDLE)?.capture.clone();
    match (waiting, found.captured) {
        (Some((id, mut after)), Some((other, nodes))) if id == other => {
            after.extend(nodes);
            after.sort_unstable();
            after.dedup();
            set_capture(d, stream, id, after);
            Ok(())
        }
        // The stream joins the capture behind the event.
        (None, Some((id, nodes))) if d.captures.contains_key(&id) => {
            set_capture(d, stream, id, nodes);
            Ok(())
        }
        (None, Some(_)) => Err(code::CAPTURE_ISOLATION),
        (Some((id, _)), _) => {
            if let Some(capture) = d.captures.get_mut(&id) {
                capture.invalid = true;
            }
            Err(code::CAPTURE_ISOLATION)
        }
        (None, None) if found.issued == 0 => Ok(()),
        (None, None) => d.enqueue(stream, Work::Wait(event, found.issued)),
    }
}

fn set_capture(d: &mut Device, stream: u64, id: u64, after: Vec<usize>) {
    if let Some(stream) = d.streams.get_mut(&stream) {
        stream.capture = Some((id, after));
    }
}

entry! {
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) {
        create(stream, flags, "cuStreamCreate")
    }

    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, _priority: c_int) {
        create(stream, flags, "cuStreamCreateWithPriority")
    }

    fn cuStreamDestroy_v2(stream: Handle) {
        let (ordinal, id) = open(stream, Kind::Stream)?;
        perform(ordinal, "cuStreamDestroy_v2", Call::Query, |d| {
            // The real call returns at once and lets the work finish.
            let _ = d.drain(id);
            d.streams.remove(&id).map(|_| ()).ok_or(code::INVALID_HANDLE)
        })
    }

    fn cuStreamSynchronize(stream: Handle) {
        let (ordinal, id) = open_stream(stream)?;
        perform(ordinal, "cuStreamSynchronize", Call::Synchronise, |d| {
            refuse_capture(d, id)?;
            d.drain(id)
        })
    }

    fn cuStreamQuery(stream: Handle) {
        let (ordinal, id) = open_stream(stream)?;
        perform(ordinal, "cuStreamQuery", Call::Synchronise, |d| {
            refuse_capture(d, id)?;
            if d.streams.get(&id).is_none_or(|s| s.queue.is_empty()) {
                return Ok(());
            }
            d.step();
            Err(d.sticky.unwrap_or(code::NOT_READY))
        })
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) {
        let (ordinal, id) = open_stream(stream)?;
        let (_, event) = open(event, Kind::Event)?;
        perform(ordinal, "cuStreamWaitEvent", Call::Stream, |d| wait(d, id, event))
    }

    fn cuStreamAttachMemAsync(_stream: Handle, _address: u64, _len: usize, _flags: c_uint) {
        errors::remember("cuStreamAttachMemAsync: managed memory is not modelled");
        Err(code::NOT_SUPPORTED)
    }

    fn cuEventCreate(event: *mut Handle, flags: c_uint) {
        let ordinal = current()?;
        let id = perform(ordinal, "cuEventCreate", Call::Stream, |d| {
            let id = d.fresh_id();
            d.events.insert(id, Event { untimed: flags & DISABLE_TIMING != 0, ..Event::default() });
            Ok(id)
        })?;
        give(event, handle(ordinal, Kind::Event, id))
    }

    fn cuEventDestroy_v2(event: Handle) {
        let (ordinal, id) = open(event, Kind::Event)?;
        perform(ordinal, "cuEventDestroy_v2", Call::Query, |d| {
            let found = d.events.get_mut(&id).ok_or(code::INVALID_HANDLE)?;
            found.destroyed = true;
            if found.reached >= found.issued {
                d.events.remove(&id);
            }
            Ok(())
        })
    }

    fn cuEventRecord(event: Handle, stream: Handle) {
        let (_, event) = open(event, Kind::Event)?;
        let (ordinal, id) = open_stream(stream)?;
        perform(ordinal, "cuEventRecord", Call::Stream, |d| record(d, event, id))
    }

    fn cuEventSynchronize(event: Handle) {
        let (ordinal, id) = open(event, Kind::Event)?;
        perform(ordinal, "cuEventSynchronize", Call::Synchronise, |d| {
            if d.events.get(&id).ok_or(code::INVALID_HANDLE)?.captured.is_some() {
                return Err(code::CAPTURE_UNSUPPORTED);
            }
            d.run_until(|d| d.events.get(&id).is_none_or(|e| e.reached >= e.issued))
        })
    }

    fn cuEventQuery(event: Handle) {
        let (ordinal, id) = open(event, Kind::Event)?;
        perform(ordinal, "cuEventQuery", Call::Synchronise, |d| {
            let found = d.events.get(&id).ok_or(code::INVALID_HANDLE)?;
            if found.reached >= found.issued {
                return Ok(());
            }
            d.step();
            Err(d.sticky.unwrap_or(code::NOT_READY))
        })
    }

    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) {
        let (ordinal, start) = open(start, Kind::Event)?;
        let (_, end) = open(end, Kind::Event)?;
        perform(ordinal, "cuEventElapsedTime", Call::Query, |d| {
            for id in [start, end] {
                let event = d.events.get(&id).ok_or(code::INVALID_HANDLE)?;
                if event.untimed || event.issued == 0 {
                    return Err(code::INVALID_HANDLE);
                }
                if event.reached < event.issued {
                    return Err(code::NOT_READY);
                }
            }
            Ok(())
        })?;
        // There is no time here, and no number may look like one.
        give(milliseconds, 0.0)
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) {
        match cuEventElapsedTime(milliseconds, start, end) {
            0 => Ok(()),
            code => Err(code),
        }
    }
}
