//! The launch of the fusion kernel: rows in, decisions out. One launch for all rows, whatever the number of experts
//! and candidates.

mod rows;

use std::sync::Arc;

use cudarc::driver::{CudaStream, DeviceRepr, ValidAsZeroBits};

use super::device::{Gpu, Grid, Kernel};
use super::forward::LogitsPlace;
use super::memory::{Buffer, Landing};
use crate::backend::FuseRow;
use crate::error::{Error, Result};
use crate::fusion::Decision;
use crate::model::Role;

pub(crate) use rows::is_on_device;
pub(super) use rows::{DeviceResult, DeviceRow, Encoded, Roles};
use rows::{Lane, decode, encode, most_lanes};

/// Tokens of a slice of the vocabulary.
const SLICE: usize = 1024;
/// Rounds of 32 lanes that there are kernels for.
const ROUNDS: [usize; 4] = [1, 2, 4, 9];
const WARP: usize = 32;
const WARPS: usize = 8;

/// `Partial` in fusion.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Partial([u32; 6]);

/// `FuseArgs` in fusion.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct FuseArgs {
    models: u64,
    rows: u64,
    lanes: u64,
    partial: u64,
    tickets: u64,
    not_finite: u64,
    results: u64,
    stamps: u64,
    vocab_stride: u32,
    vocab_size: u32,
    small_model: u32,
    first_expert: u32,
    slice: u32,
    lane_stride: u32,
    model_count: u32,
}

// SAFETY: plain numbers in the layout of C, which is that of the kernel's structs.
unsafe impl DeviceRepr for Lane {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceRow {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceResult {}
// SAFETY: as above.
unsafe impl DeviceRepr for Partial {}
// SAFETY: as above.
unsafe impl DeviceRepr for FuseArgs {}
// SAFETY: zeros are zeros.
unsafe impl ValidAsZeroBits for Lane {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceRow {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceResult {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Partial {}

/// What the size of a launch follows from: launches of one shape differ only in what lies in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FuseShape {
    pub(super) rows: usize,
    lanes: usize,
    experts: usize,
}

/// Fuses rows of logits that lie on the GPU.
pub(crate) struct DeviceFuser {
    kernels: [Kernel; 4],
    place: LogitsPlace,
    roles: Roles,
    small_model: usize,
    first_expert: usize,
    slices: usize,
    /// Rows of a launch at most.
    capacity: usize,
    lane_stride: usize,
    rows: Buffer<DeviceRow>,
    lanes: Buffer<Lane>,
    partial: Buffer<Partial>,
    tickets: Buffer<u32>,
    not_finite: Buffer<u64>,
    results: Buffer<DeviceResult>,
    /// Where results come to the host: those of even and of odd steps.
    host: [Landing<DeviceResult>; 2],
}

impl DeviceFuser {
    /// Room for one row for each slot of `place`.
    ///
    /// # Errors
    /// [`Error::Device`] where the GPU has too little memory, [`Error::Cuda`].
    pub(crate) fn new(gpu: &Gpu, stream: &Arc<CudaStream>, roles: Roles, place: LogitsPlace) -> Result<Self> {
        let experts = roles.num_experts();
        let lane_stride = most_lanes(experts);
        let slices = place.vocab_size.div_ceil(SLICE).max(1);
        let capacity = place.slots.max(1);
        let [a, b, c, d] = ROUNDS.map(|rounds| gpu.kernel("fusion", &format!("fuse_{rounds}")));
        let kernels = [a?, b?, c?, d?];
        let most = shared_bytes(experts, lane_stride);
        // Beside what the kernel declares by itself.
        if most > 44 << 10 {
            gpu.allow_shared(&kernels[3], most)?;
        }
        let mut not_finite = gpu.zeros(stream, capacity, "fusion")?;
        gpu.write(stream, &mut not_finite, 0, &vec![u64::MAX; capacity])?;
        Ok(Self {
            kernels,
            place,
            small_model: roles.index(Role::Small).unwrap_or(0),
            first_expert: roles.index(Role::Expert(0)).unwrap_or(0),
            roles,
            slices,
            capacity,
            lane_stride,
            rows: gpu.zeros(stream, capacity, "fusion")?,
            lanes: gpu.zeros(stream, capacity * lane_stride, "fusion")?,
            partial: gpu.zeros(stream, capacity * slices * lane_stride, "fusion")?,
            tickets: gpu.zeros(stream, capacity, "fusion")?,
            not_finite,
            results: gpu.zeros(stream, capacity, "fusion")?,
            host: [gpu.landing(capacity)?, gpu.landing(capacity)?],
        })
    }

    /// Rows of a launch at most.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Where the rows lie: `(capacity,)` of [`DeviceRow`].
    pub(super) fn rows_address(&self) -> u64 {
        self.rows.address()
    }

    /// Where the results lie: `(capacity,)` of [`DeviceResult`].
    pub(super) fn results_address(&self) -> u64 {
        self.results.address()
    }

    /// Decides `rows`, for each of which [`is_on_device`] holds, from the models' logits: one decision or error
    /// a row. Waits for the results.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub(crate) fn fuse(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        models: u64,
        rows: &[FuseRow<'_>],
    ) -> Result<Vec<Result<Decision>>> {
        let mut decisions = Vec::with_capacity(rows.len());
        for part in rows.chunks(self.capacity) {
            let encoded: Vec<_> = part.iter().map(|row| self.encode(row)).collect();
            let good = encoded.iter().filter_map(|row| row.as_ref().ok());
            if let Some(shape) = self.upload(gpu, stream, good)? {
                self.launch(gpu, stream, shape, models, 0)?;
                self.fetch(gpu, stream, shape, 0)?;
                gpu.synchronize(stream)?;
            }
            // SAFETY: the stream was waited for, or nothing was ever copied.
            let mut results = unsafe { self.results(0) }.iter();
            for (row, encoded) in part.iter().zip(encoded) {
                decisions.push(encoded.and_then(|encoded| {
                    let result = results.next().ok_or(Error::NoCandidate { step: row.step })?;
                    self.decode(row, &encoded, result)
                }));
            }
        }
        Ok(decisions)
    }

    /// A row as the kernel reads it.
    pub(super) fn encode(&self, row: &FuseRow<'_>) -> Result<Encoded> {
        encode(&self.roles, &self.place, row)
    }

    /// What the kernel found for a row.
    pub(super) fn decode(
        &self,
        row: &FuseRow<'_>,
        encoded: &Encoded,
        result: &DeviceResult,
    ) -> Result<Decision> {
        decode(&self.roles, row, encoded, result, &self.place)
    }

    /// Copies rows, at most [`capacity`](Self::capacity), to the GPU; `None` where there are none.
    pub(super) fn upload<'a>(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        encoded: impl Iterator<Item = &'a Encoded>,
    ) -> Result<Option<FuseShape>> {
        let (mut rows, mut lanes) = (Vec::new(), Vec::new());
        let (mut most_lanes, mut experts) = (1, 0);
        for encoded in encoded {
            let mut row = encoded.row;
            row.first_lane = lanes.len() as u32;
            most_lanes = most_lanes.max(encoded.lanes.len());
            experts = experts.max(row.experts as usize);
            rows.push(row);
            lanes.extend_from_slice(&encoded.lanes);
        }
        gpu.write(stream, &mut self.rows, 0, &rows)?;
        gpu.write(stream, &mut self.lanes, 0, &lanes)?;
        Ok((!rows.is_empty()).then_some(FuseShape { rows: rows.len(), lanes: most_lanes, experts }))
    }

    /// Puts the launch for the rows that were uploaded into `stream`. `models` is where the addresses of the models'
    /// logits lie, `stamps` where the times of the step do, or 0.
    pub(super) fn launch(
        &self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        shape: FuseShape,
        models: u64,
        stamps: u64,
    ) -> Result<()> {
        let args = FuseArgs {
            models,
            rows: self.rows.address(),
            lanes: self.lanes.address(),
            partial: self.partial.address(),
            tickets: self.tickets.address(),
            not_finite: self.not_finite.address(),
            results: self.results.address(),
            stamps,
            vocab_stride: self.place.vocab_stride as u32,
            vocab_size: self.place.vocab_size as u32,
            small_model: self.small_model as u32,
            first_expert: self.first_expert as u32,
            slice: SLICE as u32,
            lane_stride: self.lane_stride as u32,
            model_count: self.roles.0.len() as u32,
        };
        let rounds = shape.lanes.div_ceil(WARP);
        let index = ROUNDS.iter().position(|&most| rounds <= most).unwrap_or(ROUNDS.len() - 1);
        let grid = Grid {
            blocks: (self.slices as u32, shape.rows as u32, 1),
            threads: ((WARPS * WARP) as u32, 1, 1),
            shared: shared_bytes(shape.experts, shape.lanes) as u32,
        };
        // SAFETY: rows name slots and models that exist (`encode` checks), at most `capacity` of them with at most
        // `lane_stride` lanes each, for which the buffers have room; 9 rounds are enough for 8 experts of 32
        // candidates and 3 more lanes. Tickets are zero and `not_finite` all ones between launches: the kernel
        // leaves them so.
        unsafe { gpu.launch(stream, &self.kernels[index], grid, &args) }
    }

    /// Bytes of device memory that a launch of this shape reads and writes: each logit once, and the partial states of
    /// the slices twice. A few hundred bytes a block, which say what it is to do, are left out.
    #[cfg(feature = "cli")]
    pub(super) fn bytes(&self, shape: FuseShape) -> usize {
        let logits = (2 + shape.experts) * self.place.vocab_size * size_of::<f32>();
        shape.rows * (logits + 2 * self.slices * shape.lanes * size_of::<Partial>())
    }

    /// Puts the copy of the results of an even (0) or odd (1) step into `stream`.
    pub(super) fn fetch(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        shape: FuseShape,
        parity: usize,
    ) -> Result<()> {
        gpu.fetch(stream, &self.results, shape.rows, &mut self.host[parity % 2])
    }

    /// What was fetched last: at least as many as there were rows.
    ///
    /// # Safety
    /// The last copy of this parity must have been waited for.
    pub(super) unsafe fn results(&self, parity: usize) -> &[DeviceResult] {
        // SAFETY: the caller's promise.
        unsafe { self.host[parity % 2].numbers() }
    }
}

/// Dynamic shared memory of a launch: the tiles, or the states of all warps, or the merged lanes.
fn shared_bytes(experts: usize, lanes: usize) -> usize {
    let tiles = WARPS * (5 + 2 * experts) * WARP * size_of::<f32>();
    let states = WARPS * lanes * size_of::<Partial>();
    let merged = lanes * 32;
    tiles.max(states).max(merged)
}

#[cfg(test)]
mod tests;
