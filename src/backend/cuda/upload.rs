//! From mapped files to the GPU, through pinned memory: while one half of the staging area is on its way, the other
//! is filled.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice};
use half::{bf16, f16};

use super::device::Gpu;
use super::memory::Buffer;
use crate::error::Result;
use crate::weights::{Dtype, Tensor, TensorData};

/// One half of the staging area, in bytes: long enough for the full speed of the bus.
const HALF: usize = 8 << 20;

/// Copies tensors to the GPU, converted and padded on the way.
pub(crate) struct Uploader<'a> {
    gpu: &'a Gpu,
    stream: &'a Arc<CudaStream>,
    progress: &'a mut dyn FnMut(usize),
    halves: [PinnedHostSlice<u8>; 2],
    /// When the copy from each half is over.
    copied: [Option<CudaEvent>; 2],
    next: usize,
}

impl<'a> Uploader<'a> {
    pub(crate) fn new(
        gpu: &'a Gpu,
        stream: &'a Arc<CudaStream>,
        progress: &'a mut dyn FnMut(usize),
    ) -> Result<Self> {
        let halves = [gpu.pinned(HALF)?, gpu.pinned(HALF)?];
        Ok(Self { gpu, stream, progress, halves, copied: [None, None], next: 0 })
    }

    /// Copies the first `shape.0` rows of a matrix of `shape.1` columns to the byte `at` of `arena`, as numbers of a
    /// dtype with a stride.
    pub(crate) fn rows(
        &mut self,
        arena: &mut Buffer<u8>,
        at: usize,
        tensor: &Tensor,
        (height, width): (usize, usize),
        (dtype, stride): (Dtype, usize),
    ) -> Result<()> {
        let row_bytes = stride * dtype.size();
        // A row longer than the staging area goes in pieces; any piece of a row keeps its padding at its end.
        let piece = width.min(HALF / dtype.size()).max(1);
        let rows_at_once = if piece < width { 1 } else { (HALF / row_bytes.max(1)).max(1) };
        let mut row = 0;
        while row < height {
            let rows = rows_at_once.min(height - row);
            for first in (0..width).step_by(piece) {
                let numbers = piece.min(width - first);
                let target = at + row * row_bytes + first * dtype.size();
                let bytes = if rows > 1 { rows * row_bytes } else { numbers * dtype.size() };
                self.send(arena, target, bytes, |staging| {
                    for (index, to) in staging.chunks_mut(row_bytes).enumerate() {
                        let start = (row + index) * width + first;
                        let numbers_bytes = numbers * dtype.size();
                        convert(tensor, start..start + numbers, dtype, &mut to[..numbers_bytes]);
                        to[numbers_bytes..].fill(0);
                    }
                })?;
            }
            row += rows;
        }
        Ok(())
    }

    /// Fills `bytes` of staging and puts their copy into the stream.
    fn send(
        &mut self,
        arena: &mut Buffer<u8>,
        at: usize,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let half = self.next;
        self.next = 1 - half;
        if let Some(event) = self.copied[half].take() {
            self.gpu.call(|| "cuEventSynchronize".to_owned(), || event.synchronize())?;
        }
        let staging =
            self.gpu.call(|| "cuEventSynchronize".to_owned(), || self.halves[half].as_mut_slice())?;
        let staging = &mut staging[..bytes];
        fill(staging);
        self.gpu.write(self.stream, arena, at, staging)?;
        self.copied[half] = Some(self.gpu.record(self.stream)?);
        (self.progress)(bytes);
        Ok(())
    }

    /// Waits for the last copies: the staging area goes away.
    pub(crate) fn finish(self) -> Result<()> {
        self.gpu.synchronize(self.stream)
    }
}

/// Writes the numbers `range` of `tensor` as `dtype`. The engine never rounds a weight: `dtype` is the tensor's own or
/// f32.
fn convert(tensor: &Tensor, range: std::ops::Range<usize>, dtype: Dtype, to: &mut [u8]) {
    if tensor.dtype() == dtype {
        let size = dtype.size();
        to.copy_from_slice(&tensor.as_bytes()[range.start * size..range.end * size]);
        return;
    }
    let mut write = |numbers: &mut dyn Iterator<Item = f32>| {
        for (to, number) in to.chunks_exact_mut(size_of::<f32>()).zip(numbers) {
            to.copy_from_slice(&number.to_le_bytes());
        }
    };
    match tensor.data() {
        TensorData::F32(numbers) => write(&mut numbers[range].iter().copied()),
        TensorData::F16(numbers) => write(&mut numbers[range].iter().copied().map(f16::to_f32)),
        TensorData::Bf16(numbers) => write(&mut numbers[range].iter().copied().map(bf16::to_f32)),
    }
}
