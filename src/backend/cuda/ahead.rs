//! The step ahead: while the host looks at the tokens of one step, the GPU computes the next.
//!
//! When the same sequences have decoded two steps in a row, their next step is foreseen: the same rows one position
//! on, with the tokens that fusion leaves on the GPU, decided in the same way. It is one graph: `advance` moves the
//! rows on, both groups run side by side, fusion decides, and the results go to the host.
//!
//! ```text
//! host   forward n       fuse n      forward n+1      fuse n+1
//!           │ launch n+1    │ read      │ launch n+2     │ read
//! GPU    … step n ────────── step n+1 ───────── step n+2 ────────
//! ```
//!
//! A step that was foreseen wrongly (a sequence ended, another came) is forgotten: it wrote only to the cache past
//! the end of its sequences, and to the half of the logits that nobody reads.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaStream};

use super::device::{Gpu, Grid, Kernel};
use super::forward::{Group, GroupShape, LogitsPlace};
use super::fusion::{DeviceFuser, DeviceResult, Encoded, FuseShape};
use super::graph::Graph;
use super::kernels::{AdvanceArgs, StampArgs};
use super::memory::Buffer;
use crate::backend::{Batch, Choice, ForwardTime, FuseRow, Row};
use crate::error::Result;
use crate::kv_cache::BLOCK_SIZE;

/// Recorded steps that are kept: batch sizes in use, lengths as powers of two, and two halves of the logits.
const MOST_GRAPHS: usize = 32;

/// The block that moves all rows on.
const ONE: Grid = Grid { blocks: (1, 1, 1), threads: (256, 1, 1), shared: 0 };

/// What a step runs on.
pub(crate) struct Machine<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) stream: &'a Arc<CudaStream>,
    pub(crate) large: Option<&'a Group>,
    pub(crate) small: Option<&'a Group>,
    pub(crate) fuser: &'a mut DeviceFuser,
    /// The two halves of the logits.
    pub(crate) places: [LogitsPlace; 2],
}

/// What a recorded step follows from: steps of one shape differ only in what lies in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct StepShape {
    /// Which half of the logits it writes.
    half: usize,
    large: Option<GroupShape>,
    small: Option<GroupShape>,
    fused: FuseShape,
}

/// A step that was launched before it was asked for.
struct Flying {
    half: usize,
    done: CudaEvent,
}

/// Steps that follow each other on the GPU.
struct Chain {
    /// The rows of fusion at the last step that was asked for, or as they were foreseen for it.
    fused: Vec<Encoded>,
    shape: FuseShape,
    /// The end of the last step that was asked for.
    done: CudaEvent,
    /// Launched, and not asked for yet.
    flying: Option<Flying>,
    /// Steps that the tables have blocks for, beyond what was launched.
    room: usize,
}

/// Launches steps before they are asked for.
pub(crate) struct Ahead {
    // Graphs go first: what they use must outlive them.
    graphs: HashMap<StepShape, Graph>,
    chain: Option<Chain>,
    advance: Kernel,
    stamp: Kernel,
    /// When the step began, and when the large model was done: nanoseconds.
    stamps: Buffer<u64>,
    /// The rows of the last step that was asked for, where each decodes one token; else empty.
    rows: Vec<Row>,
    /// The blocks of each of them.
    blocks: Vec<Vec<u32>>,
    /// Whether that step followed the one before it.
    steady: bool,
    enabled: bool,
}

impl Ahead {
    /// Nothing is launched ahead unless `enabled`.
    pub(crate) fn new(gpu: &Gpu, stream: &Arc<CudaStream>, enabled: bool) -> Result<Self> {
        let (advance, stamp) = (gpu.kernel("step", "advance")?, gpu.kernel("step", "stamp")?);
        if enabled {
            gpu.load_all(&[&advance, &stamp], || Ok(()))?;
        }
        let ahead = Self {
            graphs: HashMap::new(),
            chain: None,
            advance,
            stamp,
            stamps: gpu.zeros(stream, 2, "the times of a step")?,
            rows: Vec::new(),
            blocks: Vec::new(),
            steady: false,
            enabled,
        };
        if enabled {
            // A driver that loads lazily may put a kernel's code into place only when it is first launched, which must not
            // happen while a graph is recorded. All other kernels of a graph ran in the steps before it.
            let nothing = AdvanceArgs { slots: 1, stamps: ahead.stamps.address(), ..AdvanceArgs::default() };
            // SAFETY: there are no rows, and two stamps.
            unsafe { gpu.launch(stream, &ahead.advance, ONE, &nothing) }?;
            ahead.launch_stamp(gpu, stream)?;
        }
        Ok(ahead)
    }

    /// Puts the stamp of the large model's end into `stream`.
    fn launch_stamp(&self, gpu: &Gpu, stream: &CudaStream) -> Result<()> {
        let args = StampArgs { to: self.stamps.address() + size_of::<u64>() as u64 };
        // SAFETY: there are two stamps.
        unsafe { gpu.launch(stream, &self.stamp, Grid { threads: (1, 1, 1), ..ONE }, &args) }
    }

    /// Notes a batch that was computed on demand; `whole` where each group computed its rows in one turn.
    pub(crate) fn observe(&mut self, batch: &Batch<'_>, whole: bool) {
        self.steady = whole && self.follows(batch);
        self.rows.clear();
        self.blocks.clear();
        if self.enabled && decodes(batch.rows) {
            self.rows.extend_from_slice(batch.rows);
            self.blocks.extend(batch.rows.iter().map(|row| batch.tables[row.table].blocks.clone()));
        }
    }

    /// Whether `batch` is the last one, one position on.
    fn follows(&self, batch: &Batch<'_>) -> bool {
        let next = |(old, new): (&Row, &Row)| {
            (old.model, old.table, old.slot, old.position + 1)
                == (new.model, new.table, new.slot, new.position)
        };
        !self.rows.is_empty()
            && self.rows.len() == batch.rows.len()
            && self.rows.iter().zip(batch.rows).all(next)
            && self
                .rows
                .iter()
                .zip(&self.blocks)
                .all(|(row, blocks)| batch.tables[row.table].blocks == *blocks)
    }

    /// Where `batch` was computed ahead: waits for it, after launching the step behind it. The half of the logits
    /// that it is in, and the time it took.
    pub(crate) fn take(
        &mut self,
        machine: &mut Machine<'_>,
        batch: &Batch<'_>,
    ) -> Result<Option<(usize, ForwardTime)>> {
        let flying = self.chain.as_mut().and_then(|chain| chain.flying.take());
        let Some(flying) = flying else { return self.forget(machine).map(|()| None) };
        // SAFETY: the step before the one in flight was waited for when it was taken, or when the chain began.
        let last = unsafe { machine.fuser.results(1 - flying.half) };
        let chose = |row: &Row| row.slot.and_then(|slot| last.get(slot)).map(|result| result.token);
        if !self.follows(batch) || batch.rows.iter().any(|row| chose(row) != Some(row.token)) {
            return self.forget(machine).map(|()| None);
        }
        for row in &mut self.rows {
            row.position += 1;
        }
        let Flying { half, done } = flying;
        if let Some(chain) = &mut self.chain {
            chain.fused.iter_mut().zip(last).for_each(|(row, found)| row.advance(found));
            chain.done = done;
        }
        self.launch(machine, 1 - half)?;
        self.wait(machine)?;
        // SAFETY: it was just waited for, and the step behind it writes the other half.
        let results = unsafe { machine.fuser.results(half) };
        Ok(Some((half, results.first().map(|result| forward_time(machine, result)).unwrap_or_default())))
    }

    /// The end of the last step that was asked for, where another may be in flight behind it.
    pub(crate) fn end(&self) -> Option<&CudaEvent> {
        self.chain.as_ref().map(|chain| &chain.done)
    }

    fn wait(&self, machine: &Machine<'_>) -> Result<()> {
        self.end().map_or(Ok(()), |end| machine.gpu.wait_for(end))
    }

    /// Waits for what is in flight, and leaves it.
    pub(crate) fn forget(&mut self, machine: &Machine<'_>) -> Result<()> {
        if self.chain.take().is_some() {
            // A step in flight has moved the lists on: they are those of the last one no more.
            self.steady = false;
            machine.gpu.synchronize(machine.stream)?;
        }
        Ok(())
    }

    /// Where the step that was taken decided exactly these rows: they are now the last ones. Else nothing in flight
    /// is of use any more.
    pub(crate) fn decided(&mut self, machine: &Machine<'_>, encoded: Option<Vec<Encoded>>) -> Result<bool> {
        let chain = self.chain.as_mut();
        if let (Some(chain), Some(encoded)) = (chain, encoded) {
            let mut pairs = encoded.iter().zip(&chain.fused);
            if encoded.len() == chain.fused.len() && pairs.all(|(asked, foreseen)| asked.is_as(foreseen)) {
                chain.fused = encoded;
                return Ok(true);
            }
        }
        self.forget(machine)?;
        Ok(false)
    }

    /// The rows of fusion at the last step, where there is one ahead of it.
    pub(crate) fn fused(&self) -> &[Encoded] {
        self.chain.as_ref().map_or(&[], |chain| &chain.fused)
    }

    /// Whether the step after the last one can be foreseen, when `rows` decide that one.
    pub(crate) fn foresees(&self, rows: &[FuseRow<'_>]) -> bool {
        let again = |row: &FuseRow<'_>| matches!(row.choice, Choice::Sample { .. });
        // Results stand in the order of `rows`, and the next step looks for them by slot.
        let in_order = |(index, row): (usize, &FuseRow<'_>)| row.slot == index;
        self.steady
            && self.chain.is_none()
            && self.rows.iter().all(|row| row.slot.is_some_and(|slot| slot < rows.len()))
            && rows.iter().all(again)
            && rows.iter().enumerate().all(in_order)
    }

    /// Steps that the blocks of the last one have positions for.
    pub(crate) fn room(&self, machine: &Machine<'_>) -> usize {
        let groups = [machine.large, machine.small];
        let positions = groups.iter().flatten().map(|group| group.positions()).min().unwrap_or(0);
        let left = |(row, blocks): (&Row, &Vec<u32>)| {
            (blocks.len() * BLOCK_SIZE).min(positions).saturating_sub(row.position + 1)
        };
        self.rows.iter().zip(&self.blocks).map(left).min().unwrap_or(0)
    }

    /// Launches the step after one that was computed on demand, whose rows of fusion were just launched in half 0, with
    /// room for `room` steps; and waits for that one, which ends with `done`.
    pub(crate) fn begin(
        &mut self,
        machine: &mut Machine<'_>,
        (fused, shape): (Vec<Encoded>, FuseShape),
        room: usize,
        done: CudaEvent,
    ) -> Result<()> {
        self.chain = Some(Chain { fused, shape, done, flying: None, room });
        self.launch(machine, 1)?;
        self.wait(machine)
    }

    /// Launches the step after the last one that was asked for.
    fn launch(&mut self, machine: &mut Machine<'_>, half: usize) -> Result<()> {
        let Some(chain) = self.chain.as_mut().filter(|chain| chain.room > 0) else { return Ok(()) };
        chain.room -= 1;
        // The furthest row of any model: a group's own may be less far, and then has splits without positions.
        let last = self.rows.iter().map(|row| row.position).max().unwrap_or(0) + 1;
        let shape = StepShape {
            half,
            large: machine.large.and_then(|group| group.shape(last)),
            small: machine.small.and_then(|group| group.shape(last)),
            fused: chain.shape,
        };
        if !self.graphs.contains_key(&shape) {
            if self.graphs.len() >= MOST_GRAPHS {
                machine.gpu.synchronize(machine.stream)?;
                self.graphs.clear();
            }
            let graph = machine.gpu.capture(&Arc::clone(machine.stream), || self.record(machine, shape))?;
            self.graphs.insert(shape, graph);
        }
        if let Some(graph) = self.graphs.get(&shape) {
            machine.gpu.launch_graph(graph)?;
        }
        let done = machine.gpu.stamp(machine.stream)?;
        if let Some(chain) = &mut self.chain {
            chain.flying = Some(Flying { half, done });
        }
        Ok(())
    }

    /// All that a step is, in streams that are being recorded.
    fn record(&self, machine: &mut Machine<'_>, shape: StepShape) -> Result<()> {
        let (gpu, stream, place) = (machine.gpu, machine.stream, machine.places[shape.half % 2]);
        let rows = |group: Option<&Group>| group.map(Group::step_rows).unwrap_or_default();
        let args = AdvanceArgs {
            large: rows(machine.large),
            small: rows(machine.small),
            results: machine.fuser.results_address(),
            fused: machine.fuser.rows_address(),
            samples: machine.fuser.samples_address(),
            stamps: self.stamps.address(),
            slots: place.slots as u32,
            fused_rows: shape.fused.rows as u32,
            vocab_size: place.vocab_size as u32,
        };
        // SAFETY: the groups' lists have `rows` entries each, every row wants its logits (`decodes`), and the slots
        // are those that fusion decided (`foresees`). The groups wait for this launch, and fusion for them.
        unsafe { gpu.launch(stream, &self.advance, ONE, &args) }?;
        let begun = gpu.record(stream)?;
        let large = machine.large.zip(shape.large);
        let running = [large, machine.small.zip(shape.small)];
        for (group, shape) in running.iter().flatten() {
            gpu.wait(group.stream(), &begun)?;
            group.run(shape.splits, place)?;
        }
        if let Some((group, _)) = large {
            self.launch_stamp(gpu, group.stream())?;
        }
        for (group, _) in running.iter().flatten() {
            let done = gpu.record(group.stream())?;
            gpu.wait(stream, &done)?;
        }
        machine.fuser.launch(gpu, stream, shape.fused, place.table, self.stamps.address())?;
        machine.fuser.fetch(gpu, stream, shape.fused, shape.half)
    }
}

/// How long the fusion of a step took that was computed ahead.
pub(crate) fn fusion_time(results: &[DeviceResult]) -> Duration {
    let took = results.iter().map(|result| result.done.saturating_sub(result.joined)).max();
    Duration::from_nanos(took.unwrap_or(0))
}

fn forward_time(machine: &Machine<'_>, result: &DeviceResult) -> ForwardTime {
    let since = |end: u64| Duration::from_nanos(end.saturating_sub(result.begun));
    let all = since(result.joined);
    let ran = |group: Option<&Group>| group.is_some_and(|group| group.step_rows().rows > 0);
    let large = match (ran(machine.large), ran(machine.small)) {
        (true, true) => since(result.large_done).min(all),
        (true, false) => all,
        (false, _) => Duration::ZERO,
    };
    ForwardTime { large, small: all - large }
}

/// Whether every row is the only one of its sequence in its model, and wants its logits. Rows stand in order.
fn decodes(rows: &[Row]) -> bool {
    let apart = |pair: &[Row]| (pair[0].model, pair[0].table) != (pair[1].model, pair[1].table);
    rows.iter().all(|row| row.slot.is_some()) && rows.windows(2).all(apart)
}
