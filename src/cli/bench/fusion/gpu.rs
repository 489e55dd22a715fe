//! Fusion on a GPU: the one launch of the engine beside the many of a tensor framework, both timed with events.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use cudarc::driver::CudaStream;

use super::unfused::{Unfused, stride};
use super::{Caches, Case, FusionBenchArgs, Measured, Order, Search, rows};
use crate::backend::cuda::{Buffer, ColdCaches, CudaFusion, DeviceLogits, Gpu, Graph, Prepared};
use crate::cli::bench::Target;
use crate::cli::bench::plain::Models;
use crate::fusion::{FusionRule, ModelLogits};

/// Puts the launches of a search into the stream.
pub(super) type Enqueue<'a> = dyn Fn(&Bed) -> Result<()> + 'a;

/// Logits on a GPU, and what is measured over them.
pub(super) struct Bed {
    fusion: CudaFusion,
    /// `(2 + experts, batch, stride(vocab))`
    pub(super) logits: Buffer<f32>,
    rows: Prepared,
    caches: ColdCaches,
}

impl Bed {
    /// The logits of the large model, the small one and the experts, rows of `case.vocab` numbers.
    pub(super) fn new(ordinal: usize, case: Case, rule: &FusionRule, models: &[&[f32]]) -> Result<Self> {
        let Case { vocab, experts, batch, .. } = case;
        let shape = DeviceLogits { rows: batch, vocab_size: vocab, stride: stride(vocab) };
        let mut fusion = CudaFusion::new(ordinal, experts, shape)?;
        let (gpu, stream) = fusion.place();
        let mut numbers = Vec::with_capacity((2 + experts) * batch * shape.stride);
        for row in models.iter().flat_map(|model| model.chunks(vocab)) {
            numbers.extend_from_slice(row);
            numbers.resize(numbers.len() + shape.stride - vocab, 0.0);
        }
        let logits = gpu.upload(stream, &numbers, "logits")?;
        gpu.synchronize(stream)?;
        let address = |model: usize| logits.address() + 4 * (model * batch * shape.stride) as u64;
        let addresses = ModelLogits {
            large: Some(address(0)),
            small: Some(address(1)),
            experts: (0..experts).map(|t| address(2 + t)).collect(),
        };
        let (rows, mut decisions) = (rows(case, rule), Vec::new());
        // SAFETY: the addresses are those of `batch` rows each, which nobody writes; null is the default stream.
        unsafe { fusion.fuse(&addresses, std::ptr::null_mut(), &rows, &mut decisions)? };
        decisions.into_iter().collect::<Result<Vec<_>, _>>().context("a row of the benchmark")?;
        let Some(rows) = fusion.prepare(&rows)? else { bail!("no rows") };
        let (gpu, stream) = fusion.place();
        Ok(Self { caches: ColdCaches::new(gpu, stream)?, fusion, logits, rows })
    }

    /// Puts the fused search into the stream.
    pub(super) fn fused(&self) -> Result<()> {
        // SAFETY: the logits live as long as this, and nobody writes them.
        Ok(unsafe { self.fusion.launch(self.rows) }?)
    }

    /// Makes the unfused search ready.
    pub(super) fn unfused(&self, case: Case, candidates: &[f64], order: Order) -> Result<Unfused> {
        Ok(Unfused::new(self.place(), self.logits.address(), (case, candidates), order)?)
    }

    /// Records the launches of the unfused search, so that they follow each other as fast as the GPU can.
    pub(super) fn record(&self, unfused: &Unfused) -> Result<Graph> {
        let (gpu, stream) = self.place();
        let record = || {
            // SAFETY: the logits live as long as this, and the graph is launched only while it does.
            unsafe { unfused.launch() }
        };
        Ok(gpu.capture(stream, record)?)
    }

    /// The GPU, and the stream that all runs in.
    pub(super) fn place(&self) -> (&Arc<Gpu>, &Arc<CudaStream>) {
        self.fusion.place()
    }

    /// Bytes that the fused search reads and writes.
    pub(super) fn fused_bytes(&self) -> usize {
        self.fusion.bytes(self.rows)
    }

    /// Kernels that `search` puts into the stream.
    fn count(&self, search: &Enqueue<'_>) -> Result<u64> {
        let (gpu, stream) = self.place();
        let before = gpu.launches();
        search(self)?;
        gpu.synchronize(stream)?;
        Ok(gpu.launches() - before)
    }

    /// Seconds of `search`, which puts launches into the stream, each time by events around them; `None` where events
    /// have no time. `Caches::Warm` are those that the search itself has left.
    pub(super) fn time(
        &mut self,
        caches: Caches,
        repetitions: u16,
        search: &Enqueue<'_>,
    ) -> Result<Vec<Option<f64>>> {
        let once = |_| {
            let (gpu, stream) = self.place();
            let (gpu, stream) = (Arc::clone(gpu), Arc::clone(stream));
            // Whatever comes first keeps the GPU busy while the host puts the rest into the stream.
            match caches {
                Caches::Warm => search(self)?,
                Caches::Flushed => self.caches.sweep(&gpu, &stream)?,
            }
            let start = gpu.stamp(&stream)?;
            search(self)?;
            let end = gpu.stamp(&stream)?;
            Ok(gpu.seconds(&start, &end)?)
        };
        (0..repetitions).map(once).collect()
    }
}

/// Measures what is asked for.
pub(super) fn measure(
    args: &FusionBenchArgs,
    case: Case,
    rule: &FusionRule,
    (target, ordinal): (&Target, usize),
) -> Result<Vec<Measured>> {
    let FusionRule::Dynamic(dynamic) = rule else { bail!("only the dynamic rule searches") };
    let candidates = dynamic.grids[0].candidates();
    let models = Models::new(case.vocab * case.batch, case.experts);
    let all: Vec<&[f32]> =
        [&models.large, &models.small].into_iter().chain(&models.experts).map(Vec::as_slice).collect();
    let mut bed = Bed::new(ordinal, case, rule, &all)?;
    let mut measured = Vec::new();
    for search in args.searches(&[Search::Fused, Search::Loop, Search::Broadcast]) {
        let order = search.order();
        let unfused = order.map(|order| bed.unfused(case, candidates, order)).transpose()?;
        let graph = unfused
            .as_ref()
            .filter(|_| !target.device.eager())
            .map(|unfused| bed.record(unfused))
            .transpose()?;
        let run = |bed: &Bed| match (&graph, &unfused) {
            (Some(graph), _) => Ok(bed.place().0.launch_graph(graph)?),
            // SAFETY: the logits live as long as `bed`.
            (None, Some(unfused)) => Ok(unsafe { unfused.launch() }?),
            (None, None) => bed.fused(),
        };
        let launches = Some(bed.count(&run)?);
        for caches in args.caches(Caches::Flushed) {
            let mut seconds = Vec::new();
            if target.bandwidth.has_clock() {
                bed.time(caches, args.common.warm_up, &run)?;
                seconds = bed.time(caches, args.common.repetitions, &run)?.into_iter().flatten().collect();
            }
            let bytes = if unfused.is_some() { Unfused::bytes(case) } else { bed.fused_bytes() };
            measured.push(Measured { search, caches, seconds, launches, bytes: Some(bytes) });
        }
    }
    Ok(measured)
}
