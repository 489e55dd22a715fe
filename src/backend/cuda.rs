//! The backend for NVIDIA GPUs: hand-written kernels, prebuilt images of them, and the driver, which is looked for
//! when the program runs.
//!
//! ```text
//! device    one GPU, and the one way to call the driver
//! bandwidth what the memory of a GPU gives
//! measure   the launch of fusion by itself, the time of steps, caches that hold nothing of either: for benchmarks
//! memory    device memory, and the ways to and from it
//! images    the kernels, embedded
//! kernels   what each kernel takes
//! weights   the weights of a group in one arena; upload, lora
//! buffers   the cache and the activations of a group
//! plan      the rows of a turn, as the kernels read them
//! forward   the layers, in the order of the paper
//! fusion    the search for α and the choice of the token, in one launch
//! needs     what memory a GPU must have
//! caller    fusion of logits that somebody else has on a GPU
//! relay     logits from one GPU to another
//! graph     launches that go to the GPU as one
//! ahead     the next step, computed before it is asked for
//! ```

mod ahead;
mod bandwidth;
mod buffers;
mod caller;
mod device;
mod forward;
mod fusion;
mod graph;
mod images;
mod kernels;
mod lora;
#[cfg(feature = "cli")]
mod measure;
mod memory;
mod needs;
mod pending;
mod plan;
mod relay;
mod upload;
mod weights;

pub use bandwidth::bandwidth;
pub use caller::{CudaFusion, DeviceLogits};
pub use device::Gpu;
pub(crate) use device::first_usable;
#[cfg(feature = "cli")]
pub(crate) use {
    device::{Grid, Kernel},
    graph::Graph,
    measure::{ColdCaches, Prepared},
};

use std::sync::Arc;
use std::time::{Duration, Instant};

use ahead::{Ahead, Machine, fusion_time};
use forward::{Group, LogitsPlace};
use fusion::{DeviceFuser, Encoded, Roles};
use kernels::excess;
pub(crate) use memory::Buffer;
use needs::Needs;
use relay::Relay;
use weights::stride;

use super::check::Checker;
use super::{Backend, Batch, ForwardTime, FuseRow, Limits};
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::Decision;
use crate::model::{LlamaModel, Role};

/// How a [`CudaBackend`] is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// The GPU of the large model, which also fuses.
    pub ordinal: usize,
    /// The GPU of the small model and its experts. Where it is another, their logits come over by way of the host,
    /// and no step runs ahead.
    pub small_ordinal: usize,
    /// What it can hold.
    pub limits: Limits,
    /// Whether steps of decoding go to the GPU as one graph, before they are asked for. Without it every kernel is
    /// launched by itself, on demand: slower, to the same bits.
    pub graphs: bool,
}

/// Runs an ensemble on one NVIDIA GPU, or on two.
///
/// Weights lie on the GPU as stored; activations, cache, logits and sums are f32, as on the CPU. Memory besides the
/// weights is the cache, the logits, and activations of at most 512 rows.
pub struct CudaBackend {
    // The graphs go first, and after what is in flight: they hold addresses of all that follows.
    ahead: Ahead,
    ensemble: Arc<Ensemble>,
    limits: Limits,
    gpu: Arc<Gpu>,
    has_clock: bool,
    checker: Checker,
    /// `(2, models, slots, vocab_stride)`: the halves take turns where a step is computed ahead.
    logits: Buffer<f32>,
    /// Where the logits of each model lie, of both halves: what the places name.
    _tables: Buffer<u64>,
    places: [LogitsPlace; 2],
    /// The half of the last step that was asked for.
    half: usize,
    /// Whether that step was computed ahead, and nobody has asked for its decisions yet.
    fused_ahead: bool,
    stream: Arc<cudarc::driver::CudaStream>,
    /// Reads logits while the next step runs.
    reader: Arc<cudarc::driver::CudaStream>,
    large: Option<Group>,
    small: Option<Group>,
    /// Where the small model and its experts are on another GPU.
    relay: Option<Relay>,
    fuser: DeviceFuser,
}

impl CudaBackend {
    /// Copies the weights of `ensemble` to the GPU and reserves its memory; `progress` gets the bytes that went up.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no such GPU, or too little memory on it, or a head has more than 256 numbers, or
    /// a projection has more than 8,388,480 outputs; [`Error::Cuda`].
    pub fn new(
        ensemble: Arc<Ensemble>,
        options: CudaOptions,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let CudaOptions { ordinal, small_ordinal, limits, graphs } = options;
        let gpu = Gpu::open(ordinal)?;
        let small_gpu = if small_ordinal == ordinal { Arc::clone(&gpu) } else { Gpu::open(small_ordinal)? };
        let models = ensemble.models();
        let of_role = |large: bool| {
            let roles = models.iter().enumerate();
            roles.filter(move |(_, model)| (model.role == Role::Large) == large).map(|(index, _)| index)
        };
        let refused = |model: &Arc<LlamaModel>| {
            let reason = format!("{}: {}", model.role, excess(&model.config)?);
            let ordinal = if model.role == Role::Large { ordinal } else { small_ordinal };
            Some(Error::Device { requested: format!("cuda:{ordinal}"), reason })
        };
        if let Some(error) = models.iter().find_map(refused) {
            return Err(error);
        }
        let vocab_size = ensemble.vocab_size();
        let half = models.len() * limits.slots * stride(vocab_size);
        let [on_large, on_small] = [true, false].map(|large| Needs::of(&ensemble, of_role(large), limits));
        let logits_bytes = half * size_of::<f32>();
        // Both halves, and the sampler's rows and counts.
        let sampled = 2 * fusion::capacity_of(limits.slots) * stride(vocab_size) * size_of::<f32>();
        let fused_bytes = 2 * logits_bytes + sampled;
        if small_ordinal == ordinal {
            (on_large + on_small).with_logits(fused_bytes).check(&gpu)?;
        } else {
            on_large.with_logits(fused_bytes).check(&gpu)?;
            on_small.with_logits(logits_bytes).check(&small_gpu)?;
        }
        let stream = gpu.stream()?;
        let start = gpu.stamp(&stream)?;
        let logits = gpu.zeros(&stream, 2 * half, "logits")?;
        gpu.synchronize(&stream)?;
        let large = Group::new(&gpu, &ensemble, of_role(true), limits, progress)?;
        let small = Group::new(&small_gpu, &ensemble, of_role(false), limits, progress)?;
        for group in [&large, &small].into_iter().flatten() {
            group.synchronize()?;
        }
        let of_model = half / models.len().max(1) * size_of::<f32>();
        let addresses: Vec<u64> =
            (0..2 * models.len()).map(|index| logits.address() + (index * of_model) as u64).collect();
        let tables = gpu.upload(&stream, &addresses, "logits")?;
        let places = [0, models.len()].map(|first| LogitsPlace {
            address: addresses.get(first).copied().unwrap_or_default(),
            table: tables.address() + (first * size_of::<u64>()) as u64,
            vocab_size,
            vocab_stride: stride(vocab_size),
            slots: limits.slots,
        });
        let roles = Roles(models.iter().map(|model| model.role).collect());
        let fuser = DeviceFuser::new(&gpu, &stream, roles, places[0])?;
        let relay = match &small {
            Some(_) if small_ordinal != ordinal => Some(Relay::new(&small_gpu, places[0], half)?),
            _ => None,
        };
        let ahead = Ahead::new(&gpu, &stream, graphs && relay.is_none())?;
        // All weights went up since the start: no real clock shows nothing for that.
        let has_clock = gpu.seconds(&start, &gpu.stamp(&stream)?)?.is_some();
        gpu.synchronize(&stream)?;
        Ok(Self {
            ahead,
            has_clock,
            checker: Checker::default(),
            limits,
            logits,
            _tables: tables,
            places,
            half: 0,
            fused_ahead: false,
            stream,
            reader: gpu.stream()?,
            large,
            small,
            relay,
            fuser,
            ensemble,
            gpu,
        })
    }

    /// The logits of `model` in `slot`.
    fn read(&self, model: usize, slot: usize) -> Result<Vec<f32>> {
        if model >= self.ensemble.models().len() || slot >= self.limits.slots {
            return Err(Error::Parameter {
                name: "slot",
                expected: format!(
                    "a model below {} and a slot below {}",
                    self.ensemble.models().len(),
                    self.limits.slots
                ),
                found: format!("model {model}, slot {slot}"),
            });
        }
        let place = self.places[self.half];
        let mut logits = vec![0.0; place.vocab_size];
        let first = self.half * self.ensemble.models().len() * place.slots;
        let at = (first + model * place.slots + slot) * place.vocab_stride;
        // The step was waited for: its logits are there, and a step ahead writes the other half.
        self.gpu.read(&self.reader, &self.logits, at, &mut logits)?;
        Ok(logits)
    }

    /// This backend as a step ahead needs it.
    fn parts(&mut self) -> (&mut Ahead, Machine<'_>) {
        let machine = Machine {
            gpu: &self.gpu,
            stream: &self.stream,
            large: self.large.as_ref(),
            small: self.small.as_ref(),
            fuser: &mut self.fuser,
            places: self.places,
        };
        (&mut self.ahead, machine)
    }

    /// Runs both groups side by side, each in its stream, and waits for them.
    fn forward_now(&mut self, batch: &Batch<'_>) -> Result<ForwardTime> {
        let started = Instant::now();
        let place = self.places[0];
        let small_place = self.relay.as_ref().map_or(place, |relay| relay.place);
        for (group, place) in [(&mut self.large, place), (&mut self.small, small_place)] {
            if let Some(group) = group {
                group.forward(batch, place)?;
            }
        }
        let wait = |group: &Option<Group>| match group {
            Some(group) => group.synchronize().map(|()| started.elapsed()),
            None => Ok(Duration::ZERO),
        };
        let large = wait(&self.large)?;
        wait(&self.small)?;
        if let (Some(relay), Some(small)) = (&mut self.relay, &self.small) {
            relay.bring(batch, small, (&self.gpu, &self.stream, &mut self.logits))?;
        }
        let both = if self.small.is_some() { started.elapsed() } else { large };
        let whole = [&self.large, &self.small].into_iter().flatten().all(Group::is_whole);
        self.ahead.observe(batch, whole);
        Ok(ForwardTime { large, small: both.saturating_sub(large) })
    }

    /// The rows as the kernels read them, where one launch has room for all and none is wrong.
    fn encode(&self, rows: &[FuseRow<'_>]) -> Option<Vec<Encoded>> {
        let fits = rows.len() <= self.fuser.capacity();
        fits.then(|| rows.iter().map(|row| self.fuser.encode(row).ok()).collect())?
    }

    /// The decisions of a step that has another ahead of it: its rows are those that `ahead` keeps.
    fn decode(&self, rows: &[FuseRow<'_>]) -> Vec<Result<Decision>> {
        // SAFETY: both callers have waited for this half's results.
        let results = unsafe { self.fuser.results(self.half) };
        let decode = |((row, encoded), result)| self.fuser.decode(row, encoded, result);
        rows.iter().zip(self.ahead.fused()).zip(results).map(decode).collect()
    }

    /// Decides rows that no step ahead has decided.
    fn fuse_now(&mut self, rows: &[FuseRow<'_>]) -> Result<Vec<Result<Decision>>> {
        let foresees = self.half == 0 && self.ahead.foresees(rows);
        if let Some(encoded) = if foresees { self.encode(rows) } else { None } {
            let (ahead, mut machine) = self.parts();
            let room = ahead.room(&machine);
            let Machine { gpu, stream, places, .. } = machine;
            if let Some(shape) = machine.fuser.upload(gpu, stream, encoded.iter(), room)? {
                machine.fuser.launch(gpu, stream, shape, places[0].table, 0)?;
                machine.fuser.fetch(gpu, stream, shape, 0)?;
                let done = gpu.stamp(stream)?;
                ahead.begin(&mut machine, (encoded, shape), room, done)?;
                return Ok(self.decode(rows));
            }
        }
        self.fuser.fuse(&self.gpu, &self.stream, self.places[self.half].table, rows)
    }

    /// An error of `row` with the number that isn't finite, which the kernels don't tell.
    fn explain(&self, row: &FuseRow<'_>, error: Error) -> Result<Error> {
        let Error::NotFinite { role, step, token, .. } = error else { return Ok(error) };
        let model = self.ensemble.models().iter().position(|model| model.role == role).unwrap_or(0);
        let value = self.read(model, row.slot)?.get(token as usize).copied().unwrap_or(f32::NAN);
        Ok(Error::NotFinite { role, step, token, value })
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // What is in flight uses memory of all streams, also where a call has failed and the others went on. What a stream
        // says of that is known, or nobody asks any more.
        let groups = [&self.large, &self.small].into_iter().flatten().map(Group::stream);
        for stream in groups.chain([&self.stream, &self.reader]) {
            let _ = stream.synchronize();
        }
    }
}

impl Backend for CudaBackend {
    fn limits(&self) -> Limits {
        self.limits
    }

    /// The two groups run side by side; the time is until both are done.
    fn forward(&mut self, batch: &Batch<'_>) -> Result<ForwardTime> {
        self.checker.check(&self.ensemble, self.limits, batch)?;
        let (ahead, mut machine) = self.parts();
        let taken = ahead.take(&mut machine, batch)?;
        self.fused_ahead = taken.is_some();
        if let Some((half, time)) = taken {
            self.half = half;
            return Ok(time);
        }
        self.half = 0;
        self.forward_now(batch)
    }

    fn fuse(&mut self, rows: &[FuseRow<'_>], decisions: &mut Vec<Result<Decision>>) -> Result<Duration> {
        let started = Instant::now();
        decisions.clear();
        let foreseen = if std::mem::take(&mut self.fused_ahead) { self.encode(rows) } else { None };
        let (ahead, machine) = self.parts();
        let (found, time) = if ahead.decided(&machine, foreseen)? {
            // SAFETY: `forward` has waited for them.
            let results = unsafe { self.fuser.results(self.half) };
            let time = fusion_time(&results[..rows.len().min(results.len())]);
            (self.decode(rows), Some(time))
        } else {
            (self.fuse_now(rows)?, None)
        };
        for (row, decision) in rows.iter().zip(found) {
            decisions.push(match decision {
                Err(error) => Err(self.explain(row, error)?),
                decision => decision,
            });
        }
        Ok(time.unwrap_or_else(|| started.elapsed()))
    }

    fn has_clock(&self) -> bool {
        self.has_clock
    }

    fn launches(&self) -> u64 {
        self.gpu.launches() + self.relay.as_ref().map_or(0, Relay::launches)
    }

    fn logits(&self, model: usize, slot: usize) -> Result<Vec<f32>> {
        self.read(model, slot)
    }
}

#[cfg(test)]
mod tests;
