//! The launch of the fusion kernel: rows in, decisions out. One launch for all rows, whatever the number of experts
//! and candidates; and one of the sampler's, where a row has biases, bans, penalties or a truncated distribution.

mod result;
mod rows;
mod sample;

use std::sync::Arc;

use cudarc::driver::{CudaStream, DeviceRepr, ValidAsZeroBits};

use super::device::{Gpu, Grid, Kernel};
use super::forward::LogitsPlace;
use super::memory::{Buffer, Landing};
use crate::backend::FuseRow;
use crate::error::{Error, Result};
use crate::fusion::Decision;
use crate::model::Role;

pub(super) use result::DeviceResult;
use result::decode;
pub(super) use rows::{DeviceRow, Encoded, Roles};
use rows::{Lane, encode, most_lanes, most_lanes_of_row};
pub(super) use sample::DeviceSample;
use sample::{Chunk, SAMPLED_CHUNKS, SAMPLED_SLICE, SAMPLER};

/// Slices of the vocabulary at most: about as many as GPUs have multiprocessors.
const SLICES: usize = 128;
/// Tokens of a slice are a multiple of it: as many as the threads of a block.
const SLICE: usize = WARPS * WARP;
/// Tokens of a slice at least: of fewer, the partial states would weigh too much beside the logits.
const LEAST_SLICE: usize = 768;
/// Numbers of a tile's row, and what is between one row and the next.
const TILE_STRIDE: usize = 36;
/// Rounds of 32 lanes that there are kernels for.
const ROUNDS: [usize; 4] = [1, 2, 4, 9];
const WARP: usize = 32;
const WARPS: usize = 8;

/// The sums of a lane over a slice, as fusion.cu writes them: m, s, u, and the best id.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
struct Sums([u32; 4]);

/// What was drawn there: the largest key, and its id.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(8))]
struct Drawn([u32; 2]);

/// `FuseArgs` in fusion.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct FuseArgs {
    models: u64,
    rows: u64,
    lanes: u64,
    partial: u64,
    drawn: u64,
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

/// `SampleArgs` in sample.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct SampleArgs {
    models: u64,
    rows: u64,
    samples: u64,
    results: u64,
    fused: u64,
    chunks: u64,
    tickets: u64,
    stamps: u64,
    vocab_stride: u32,
    vocab_size: u32,
    small_model: u32,
    first_expert: u32,
}

// SAFETY: plain numbers in the layout of C, which is that of the kernel's structs.
unsafe impl DeviceRepr for Lane {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceRow {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceResult {}
// SAFETY: as above.
unsafe impl DeviceRepr for Sums {}
// SAFETY: as above.
unsafe impl DeviceRepr for Drawn {}
// SAFETY: as above.
unsafe impl DeviceRepr for FuseArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for DeviceSample {}
// SAFETY: as above.
unsafe impl DeviceRepr for Chunk {}
// SAFETY: as above.
unsafe impl DeviceRepr for SampleArgs {}
// SAFETY: zeros are zeros.
unsafe impl ValidAsZeroBits for Lane {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceRow {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceResult {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Sums {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Drawn {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for DeviceSample {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Chunk {}

/// What the size of a launch follows from: launches of one shape differ only in what lies in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FuseShape {
    pub(super) rows: usize,
    lanes: usize,
    experts: usize,
    /// Whether the sampler chooses tokens, too.
    sampled: bool,
}

/// Rows of a launch at most, where there are so many slots: what a grid can be along y, and far less.
pub(super) fn capacity_of(slots: usize) -> usize {
    slots.clamp(1, 1024)
}

/// Fuses rows of logits that lie on the GPU.
pub(crate) struct DeviceFuser {
    kernels: [Kernel; 4],
    sampler: Kernel,
    place: LogitsPlace,
    roles: Roles,
    small_model: usize,
    first_expert: usize,
    /// Tokens of a slice, and how many slices there are. The same whatever the rows, so that results don't depend on them.
    slice: usize,
    slices: usize,
    /// Rows of a launch at most.
    capacity: usize,
    lane_stride: usize,
    rows: Buffer<DeviceRow>,
    lanes: Buffer<Lane>,
    partial: Buffer<Sums>,
    drawn: Buffer<Drawn>,
    tickets: Buffer<u32>,
    not_finite: Buffer<u64>,
    results: Buffer<DeviceResult>,
    samples: Buffer<DeviceSample>,
    /// The sampler's rows: `(capacity, slices of the sampler, SAMPLED_SLICE)`.
    fused: Buffer<f32>,
    /// What its slices tell of them: `(capacity, slices of the sampler, SAMPLED_CHUNKS)`.
    chunks: Buffer<Chunk>,
    /// Histories and biases; rows know where theirs lie.
    lists: Buffer<u32>,
    /// Where results come to the host: those of even and of odd steps.
    host: [Landing<DeviceResult>; 2],
}

impl DeviceFuser {
    /// Room for one row for each slot of `place`, up to [`capacity_of`].
    ///
    /// # Errors
    /// [`Error::Device`] where the GPU has too little memory, [`Error::Cuda`].
    pub(crate) fn new(gpu: &Gpu, stream: &Arc<CudaStream>, roles: Roles, place: LogitsPlace) -> Result<Self> {
        let experts = roles.num_experts();
        let lane_stride = most_lanes(experts);
        let slice = place.vocab_size.div_ceil(SLICES).next_multiple_of(SLICE).max(LEAST_SLICE);
        let slices = place.vocab_size.div_ceil(slice).max(1);
        let capacity = capacity_of(place.slots);
        let sampled = sampled_slices(&place);
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
            sampler: gpu.kernel("sample", "sample")?,
            place,
            small_model: roles.index(Role::Small).unwrap_or(0),
            first_expert: roles.index(Role::Expert(0)).unwrap_or(0),
            roles,
            slice,
            slices,
            capacity,
            lane_stride,
            rows: gpu.zeros(stream, capacity, "fusion")?,
            lanes: gpu.zeros(stream, capacity * most_lanes_of_row(experts), "fusion")?,
            partial: gpu.zeros(stream, capacity * slices * lane_stride, "fusion")?,
            drawn: gpu.zeros(stream, capacity * slices * lane_stride, "fusion")?,
            tickets: gpu.zeros(stream, capacity, "fusion")?,
            not_finite,
            results: gpu.zeros(stream, capacity, "fusion")?,
            samples: gpu.zeros(stream, capacity, "sampling")?,
            fused: gpu.zeros(stream, capacity * sampled * SAMPLED_SLICE, "sampling")?,
            chunks: gpu.zeros(stream, capacity * sampled * SAMPLED_CHUNKS, "sampling")?,
            lists: gpu.zeros(stream, 0, "sampling")?,
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

    /// Where the sampler's rows lie: `(capacity,)` of [`DeviceSample`].
    pub(super) fn samples_address(&self) -> u64 {
        self.samples.address()
    }

    /// Where the results lie: `(capacity,)` of [`DeviceResult`].
    pub(super) fn results_address(&self) -> u64 {
        self.results.address()
    }

    /// Decides `rows` from the models' logits: one decision or error a row. Waits for the results.
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
            if let Some(shape) = self.upload(gpu, stream, good, 0)? {
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

    /// Copies rows, at most [`capacity`](Self::capacity), to the GPU, with room for `room` more tokens in the history of
    /// each; `None` where there are no rows. Nothing that was launched for earlier rows may be on its way.
    pub(super) fn upload<'a>(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        encoded: impl Iterator<Item = &'a Encoded>,
        room: usize,
    ) -> Result<Option<FuseShape>> {
        let encoded: Vec<&Encoded> = encoded.collect();
        if encoded.is_empty() {
            return Ok(None);
        }
        let (mut rows, mut lanes) = (Vec::with_capacity(encoded.len()), Vec::new());
        let mut shape = FuseShape { rows: encoded.len(), lanes: 1, experts: 0, sampled: false };
        for encoded in &encoded {
            let mut row = encoded.row;
            row.first_lane = lanes.len() as u32;
            rows.push(row);
            lanes.extend_from_slice(&encoded.lanes);
            shape.lanes = shape.lanes.max(encoded.most_lanes());
            shape.experts = shape.experts.max(encoded.row.experts as usize);
            shape.sampled |= encoded.sampled.is_some();
        }
        gpu.write(stream, &mut self.rows, 0, &rows)?;
        gpu.write(stream, &mut self.lanes, 0, &lanes)?;
        self.upload_samples(gpu, stream, &encoded, room)?;
        Ok(Some(shape))
    }

    /// Copies what the sampler reads.
    fn upload_samples(
        &mut self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        encoded: &[&Encoded],
        room: usize,
    ) -> Result<()> {
        let lay_out = |address: u64| {
            let mut lists = Vec::new();
            let place = |encoded: &&Encoded| {
                let sampled = encoded.sampled.as_ref();
                sampled.map(|sampled| sampled.lay_out(room, &mut lists, address)).unwrap_or_default()
            };
            let samples: Vec<DeviceSample> = encoded.iter().map(place).collect();
            (samples, lists)
        };
        let (mut samples, lists) = lay_out(self.lists.address());
        if lists.len() > self.lists.len() {
            self.lists = gpu.zeros(stream, lists.len().next_power_of_two(), "sampling")?;
            samples = lay_out(self.lists.address()).0;
        }
        gpu.write(stream, &mut self.lists, 0, &lists)?;
        gpu.write(stream, &mut self.samples, 0, &samples)
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
            drawn: self.drawn.address(),
            tickets: self.tickets.address(),
            not_finite: self.not_finite.address(),
            results: self.results.address(),
            stamps,
            vocab_stride: self.place.vocab_stride as u32,
            vocab_size: self.place.vocab_size as u32,
            small_model: self.small_model as u32,
            first_expert: self.first_expert as u32,
            slice: self.slice as u32,
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
        unsafe { gpu.launch(stream, &self.kernels[index], grid, &args) }?;
        if shape.sampled { self.launch_sampler(gpu, stream, shape, &args) } else { Ok(()) }
    }

    /// Puts the sampler's launch behind that of `fuse`.
    fn launch_sampler(
        &self,
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        shape: FuseShape,
        fuse: &FuseArgs,
    ) -> Result<()> {
        let args = SampleArgs {
            models: fuse.models,
            rows: fuse.rows,
            samples: self.samples.address(),
            results: fuse.results,
            fused: self.fused.address(),
            chunks: self.chunks.address(),
            tickets: fuse.tickets,
            stamps: fuse.stamps,
            vocab_stride: fuse.vocab_stride,
            vocab_size: fuse.vocab_size,
            small_model: fuse.small_model,
            first_expert: fuse.first_expert,
        };
        let slices = sampled_slices(&self.place) as u32;
        let grid =
            Grid { blocks: (slices, shape.rows as u32, 1), threads: (SAMPLER as u32, 1, 1), shared: 0 };
        // SAFETY: `fuse` has written as many results, and left its tickets zero, as this kernel does; lists lie where the
        // rows say and are as long, with each id among the biases once (`lay_out`); slices and chunks have room for
        // `capacity` rows, and each is a multiple of 16 bytes.
        unsafe { gpu.launch(stream, &self.sampler, grid, &args) }
    }

    /// Bytes of device memory that a launch of this shape reads and writes: each logit once, and the partial states of
    /// the slices twice, of rows that fusion doesn't draw for. A few hundred bytes a block, which say what it is to do,
    /// are left out.
    #[cfg(feature = "cli")]
    pub(super) fn bytes(&self, shape: FuseShape) -> usize {
        let logits = (2 + shape.experts) * self.place.vocab_size * size_of::<f32>();
        shape.rows * (logits + 2 * self.slices * shape.lanes * size_of::<Sums>())
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

/// Blocks of the sampler for a row. The same whatever the rows.
fn sampled_slices(place: &LogitsPlace) -> usize {
    place.vocab_size.div_ceil(SAMPLED_SLICE).max(1)
}

/// Dynamic shared memory of a launch: the tiles, or the states of all warps, or the merged lanes.
fn shared_bytes(experts: usize, lanes: usize) -> usize {
    let tiles = WARPS * (5 + 2 * experts) * TILE_STRIDE * size_of::<f32>();
    let states = WARPS * lanes * (size_of::<Sums>() + size_of::<Drawn>());
    let merged = lanes * 32;
    tiles.max(states).max(merged)
}

#[cfg(test)]
mod tests;
