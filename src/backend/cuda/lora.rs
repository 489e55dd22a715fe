//! The adapters of a group on the GPU: one layout, padded to the largest rank, with zeros where an adapter leaves a
//! projection alone.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::device::Gpu;
use super::memory::Buffer;
use super::weights::{ROW_ALIGNMENT, stride};
use crate::adapter::{LoraAdapter, Projection};
use crate::config::LlamaConfig;
use crate::error::Result;

/// Projections that have one input, and so one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Queries, keys, values.
    Qkv,
    /// The attention's output.
    O,
    /// Gate, up.
    GateUp,
    /// The feed-forward's output.
    Down,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// The projections, in the order in which their rows are stacked.
    pub(crate) fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Self::O => &[Projection::O],
            Self::GateUp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }
}

/// Where A and B of one stage of one layer lie: numbers from the beginning of an adapter.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// `(projections · rank, in)`
    a: usize,
    /// `(out of all projections, rank)`, scaled
    b: usize,
}

/// The adapters of a group.
pub(crate) struct DeviceAdapters {
    /// Of the largest adapter, rounded up to whole vectors.
    pub(crate) rank: usize,
    places: Vec<[Place; 4]>,
    /// Numbers from one adapter to the next.
    len: usize,
    arena: Buffer<f32>,
    /// `(layers, stages, sets, 2)`: what projections that compute A x themselves count with; zero before each step.
    progress: Buffer<u32>,
    sets: usize,
}

/// The largest rank of any update, with its padding; 0 where there is none.
pub(crate) fn rank_of<'a>(adapters: impl Iterator<Item = &'a LoraAdapter>) -> usize {
    let layers = adapters.flat_map(|adapter| &adapter.layers);
    let deltas = layers.flat_map(|layer| layer.deltas.iter().flatten());
    let rank = deltas.filter_map(|delta| delta.a.shape().first().copied()).max();
    rank.unwrap_or(0).next_multiple_of(ROW_ALIGNMENT)
}

/// Where A and B of every stage of every layer lie, and the numbers of an adapter.
fn places(config: &LlamaConfig, rank: usize) -> (Vec<[Place; 4]>, usize) {
    let mut len = 0;
    let mut take = |numbers: usize| {
        len += numbers;
        len - numbers
    };
    let places = (0..config.num_hidden_layers)
        .map(|_| {
            Stage::ALL.map(|stage| {
                let shapes = stage.projections().iter().map(|projection| projection.shape(config));
                let outputs = shapes.clone().map(|(out, _)| out).sum::<usize>();
                let inputs = shapes.map(|(_, input)| input).max().unwrap_or(0);
                Place {
                    a: take(stage.projections().len() * rank * stride(inputs)),
                    b: take(outputs.next_multiple_of(ROW_ALIGNMENT) * rank),
                }
            })
        })
        .collect();
    (places, len)
}

/// Bytes that `adapters` take on the GPU.
pub(crate) fn bytes_of(config: &LlamaConfig, adapters: &[&LoraAdapter]) -> usize {
    let rank = rank_of(adapters.iter().copied());
    places(config, rank).1 * adapters.len() * size_of::<f32>()
}

impl DeviceAdapters {
    /// Copies `adapters` to the GPU, for a group of `sets` sets; `None` where there are none.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where they don't fit, [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn upload(
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        config: &LlamaConfig,
        adapters: &[&LoraAdapter],
        sets: usize,
    ) -> Result<Option<Self>> {
        let rank = rank_of(adapters.iter().copied());
        if rank == 0 {
            return Ok(None);
        }
        let (places, len) = places(config, rank);
        let mut arena = gpu.zeros::<f32>(stream, len * adapters.len(), "adapters")?;
        for (index, adapter) in adapters.iter().enumerate() {
            let mut numbers = vec![0.0; len];
            for (layer, places) in adapter.layers.iter().zip(&places) {
                for (stage, place) in Stage::ALL.iter().zip(places) {
                    let mut first = 0;
                    for (segment, &projection) in stage.projections().iter().enumerate() {
                        let (outputs, inputs) = projection.shape(config);
                        if let Some(delta) = layer.delta(projection) {
                            let (a, b) = (delta.a.data().to_f32(), delta.b.data().to_f32());
                            let own = delta.a.shape().first().copied().unwrap_or(0).max(1);
                            for (j, row) in a.chunks(inputs.max(1)).enumerate() {
                                let at = place.a + (segment * rank + j) * stride(inputs);
                                numbers[at..at + row.len()].copy_from_slice(row);
                            }
                            for (n, row) in b.chunks(own).enumerate() {
                                let at = place.b + (first + n) * rank;
                                let scaled = row.iter().map(|b| b * delta.scale);
                                numbers[at..at + row.len()]
                                    .iter_mut()
                                    .zip(scaled)
                                    .for_each(|(to, b)| *to = b);
                            }
                        }
                        first += outputs;
                    }
                }
            }
            gpu.write(stream, &mut arena, index * len, &numbers)?;
        }
        let progress = gpu.zeros(stream, places.len() * Stage::ALL.len() * sets * 2, "adapters")?;
        Ok(Some(Self { rank, places, len, arena, progress, sets }))
    }

    /// A of a stage of adapter 0.
    pub(crate) fn a(&self, layer: usize, stage: Stage) -> u64 {
        self.address(self.places[layer][stage as usize].a)
    }

    /// B of a stage of adapter 0.
    pub(crate) fn b(&self, layer: usize, stage: Stage) -> u64 {
        self.address(self.places[layer][stage as usize].b)
    }

    /// What the launch of a stage counts with: `(sets, 2)`.
    pub(crate) fn progress(&self, layer: usize, stage: Stage) -> u64 {
        let launch = layer * Stage::ALL.len() + stage as usize;
        self.progress.address() + (launch * self.sets * 2 * size_of::<u32>()) as u64
    }

    /// Where the counters of all launches lie, and how many they are.
    pub(crate) fn counters(&self) -> (u64, usize) {
        (self.progress.address(), self.progress.len())
    }

    fn address(&self, number: usize) -> u64 {
        self.arena.address() + (number * size_of::<f32>()) as u64
    }

    /// Bytes from one adapter to the next.
    pub(crate) fn stride(&self) -> u64 {
        (self.len * size_of::<f32>()) as u64
    }
}
