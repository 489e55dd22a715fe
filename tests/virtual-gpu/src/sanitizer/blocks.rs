//! Conflicts between blocks in device memory: two blocks that meet in one byte, one of them writing, must be
//! ordered by a release (fence, then a strong write or atomic) and an acquire (a strong read or atomic, then a
//! fence) on one address, with block barriers carrying the order to other warps. Atomics do not conflict among
//! themselves.
//!
//! A sector is tracked as one as long as every access to it covers the same bytes, by groups of bytes with one
//! history afterwards.

use crate::zeroed::Zero;
use std::collections::HashMap;

/// How memory is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Plain load.
    Read,
    /// Plain store.
    Write,
    /// Volatile, relaxed or acquiring load.
    StrongRead,
    /// Atomic, or a volatile, relaxed or releasing store.
    StrongWrite,
}

/// A block (linear index plus one; 0 is nobody) at a point of its time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct When {
    /// Linear block index plus one.
    pub block: u32,
    /// The block's clock, which barriers and fences advance, times 64, plus the warp (`ANY_WARP` for several).
    pub stamp: u32,
}

const ANY_WARP: u32 = 63;

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    writer: When,
    strong: bool,
    reader: When,
    /// The latest reader of a block other than `reader.block`.
    other_reader: When,
}

/// What the running launch did to a sector, in short: enough as long as one block reads it, between the same two
/// steps of its clock. Most sectors of most launches get no further.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sector {
    /// Launch times four, and bits for the kinds of traffic seen.
    tag: u32,
    /// The bytes that the block below has read since then: reading them again changes nothing as long as nobody
    /// writes.
    bytes: u32,
    /// The block that read here last (plus one), and [`TOLD`]; 0 for none in this launch, [`WRITTEN`] after a write.
    block: u32,
    /// When that block read.
    time: u32,
}

// SAFETY: numbers only.
unsafe impl Zero for Sector {}

/// Beside a block: the sector has a [`History`] in this launch. No launch has as many blocks.
const TOLD: u32 = 1 << 31;
/// In the place of a block: the last to come here wrote.
const WRITTEN: u32 = u32::MAX;

/// A block and its time, as a [`Sector`] keeps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    block: u32,
    time: u32,
}

impl Sector {
    /// Forgets what an earlier launch did. Launches count from 1 and stay below 2^30.
    #[inline(always)]
    pub fn open(&mut self, launch: u32) {
        if self.tag >> 2 != launch {
            *self = Sector { tag: launch << 2, ..Sector::default() };
        }
    }

    /// Marks a kind of traffic, 0 or 1; true the first time in the open launch.
    #[inline(always)]
    pub fn touch(&mut self, kind: u32) -> bool {
        let first = self.tag >> kind & 1 == 0;
        self.tag |= 1 << kind;
        first
    }

    /// Whether a plain read needs no more than this record: it is by the only block so far, or by the last reader and
    /// of bytes it has read. Otherwise [`Conflicts::access`] must look at it.
    #[inline(always)]
    pub fn reads(&mut self, bytes: u32, reader: Reader) -> bool {
        if self.block == 0 {
            (self.bytes, self.block, self.time) = (bytes, reader.block, reader.time);
            return true;
        }
        if self.block & !TOLD != reader.block || self.time != reader.time {
            return false;
        }
        // Without a history, all bytes read so far have the same: one reader.
        let known = bytes & !self.bytes == 0;
        if self.block & TOLD == 0 {
            self.bytes |= bytes;
            return true;
        }
        known
    }
}

/// All that the running launch did to a sector, kept from the first access on that [`Sector`] can't tell.
#[derive(Debug, Clone, Copy, Default)]
pub struct History {
    launch: u32,
    mask: u32,
    cell: Cell,
    /// The first of its parts: an index plus one in [`Conflicts::parts`], once its bytes have different histories.
    parts: u32,
}

// SAFETY: numbers, and a bool, of which zero is false.
unsafe impl Zero for History {}

/// Bytes of a sector that have one history.
struct Part {
    mask: u32,
    cell: Cell,
    /// The next part of the sector, an index plus one.
    next: u32,
}

/// The histories of one launch that are finer than sectors, and what was released.
#[derive(Default)]
pub struct Conflicts {
    parts: Vec<Part>,
    order: HashMap<u64, View>,
}

/// What one block has released, as another sees it.
#[derive(Debug, Clone, Copy, Default)]
struct Released {
    /// All accesses before this clock.
    all_before: u32,
    /// And those of these warps …
    warps: u32,
    /// … up to this clock.
    upto: u32,
}

type View = HashMap<u32, Released>;

fn merge(into: &mut View, from: &View) {
    for (&block, &r) in from {
        add(into, block, r);
    }
}

fn add(into: &mut View, block: u32, r: Released) {
    let slot = into.entry(block).or_default();
    slot.all_before = slot.all_before.max(r.all_before);
    slot.upto = slot.upto.max(r.upto);
    slot.warps |= r.warps;
}

#[derive(Default)]
struct WarpOrder {
    fenced: Option<Released>,
    pending: View,
    own: View,
}

/// A block's place in the order of its launch.
pub struct BlockOrder {
    block: u32,
    clock: u32,
    barrier: u32,
    view: View,
    warps: Vec<WarpOrder>,
    /// Whether the kernel orders blocks, so that it matters which warp read.
    exact: bool,
}

impl BlockOrder {
    /// For block `linear` of `warps` warps, of a kernel that orders blocks or does not.
    pub fn new(linear: u32, warps: usize, exact: bool) -> Self {
        let warps = std::iter::repeat_with(WarpOrder::default).take(warps).collect();
        BlockOrder { block: linear + 1, clock: 1, barrier: 1, view: View::new(), warps, exact }
    }

    /// Now, for an access of `warp`.
    #[inline(always)]
    pub fn now(&self, warp: usize) -> When {
        When { block: self.block, stamp: self.clock << 6 | warp as u32 }
    }

    /// Now, as [`Sector`] keeps it. Where nothing orders blocks, the warp makes no difference.
    #[inline(always)]
    pub fn reader(&self, warp: usize) -> Reader {
        let When { block, stamp } = self.now(warp);
        Reader { block, time: if self.exact { stamp } else { stamp >> 6 } }
    }

    /// When a [`Reader`] of any block of the launch read.
    fn when(&self, Reader { block, time }: Reader) -> When {
        When { block, stamp: if self.exact { time } else { time << 6 } }
    }

    /// A block barrier.
    pub fn barrier(&mut self) {
        self.clock += 1;
        self.barrier = self.clock;
        for warp in &mut self.warps {
            merge(&mut self.view, &warp.own);
            warp.own.clear();
        }
    }

    /// A fence by `warp`: what it read strongly is acquired, what it did is ready for release.
    pub fn fence(&mut self, warp: usize) {
        let released = Released { all_before: self.barrier, warps: 1 << warp, upto: self.clock };
        self.clock += 1;
        let w = &mut self.warps[warp];
        w.fenced = Some(released);
        let pending = std::mem::take(&mut w.pending);
        merge(&mut w.own, &pending);
    }

    fn sees(&self, warp: usize, other: When) -> bool {
        let seen = |view: &View| {
            view.get(&other.block).is_some_and(|r| {
                let (clock, by) = (other.stamp >> 6, other.stamp & 63);
                clock < r.all_before || (clock <= r.upto && (by == ANY_WARP || r.warps >> by & 1 == 1))
            })
        };
        seen(&self.view) || seen(&self.warps[warp].own)
    }
}

impl Conflicts {
    /// A strong write of `warp` to `address`: publishes what the warp has fenced.
    pub fn publish(&mut self, order: &BlockOrder, warp: usize, address: u64) {
        let w = &order.warps[warp];
        let Some(released) = w.fenced else { return };
        let view = self.order.entry(address).or_default();
        add(view, order.block, released);
        merge(view, &order.view);
        merge(view, &w.own);
    }

    /// A strong read of `warp` from `address`: what was published there waits for the warp's next fence.
    pub fn observe(&mut self, order: &mut BlockOrder, warp: usize, address: u64) {
        if let Some(view) = self.order.get(&address) {
            merge(&mut order.warps[warp].pending, view);
        }
    }

    /// Notes an access to the bytes `mask` of a sector in `launch`; the block it conflicts with, if any.
    pub fn access(
        &mut self,
        (sector, history): (&mut Sector, &mut History),
        launch: u32,
        mask: u32,
        order: &BlockOrder,
        warp: usize,
        how: Use,
    ) -> Option<u32> {
        if history.launch != launch {
            // So far there was nothing, or reads by one block at one time.
            let cell = Cell {
                reader: order.when(Reader { block: sector.block, time: sector.time }),
                ..Cell::default()
            };
            *history = if sector.block == 0 {
                History { launch, mask, ..History::default() }
            } else {
                History { launch, mask: sector.bytes, cell, parts: 0 }
            };
        }
        if how == Use::Read {
            let now = order.reader(warp);
            if sector.block & !TOLD == now.block && sector.time == now.time {
                if mask & !sector.bytes == 0 {
                    return None;
                }
                sector.bytes |= mask;
            } else {
                (sector.bytes, sector.block, sector.time) = (mask, now.block | TOLD, now.time);
            }
        } else {
            sector.block = WRITTEN;
        }
        if history.parts == 0 && history.mask == mask {
            return history.cell.access(order, warp, how);
        }
        self.by_part(history, mask, order, warp, how)
    }

    /// An access to a sector whose bytes have different histories, or get them now: each part of them is either
    /// accessed as a whole or not at all, so that a part that the access cuts becomes two.
    #[inline(never)]
    fn by_part(
        &mut self,
        history: &mut History,
        mask: u32,
        order: &BlockOrder,
        warp: usize,
        how: Use,
    ) -> Option<u32> {
        if history.parts == 0 {
            self.parts.push(Part { mask: history.mask, cell: history.cell, next: 0 });
            history.parts = self.parts.len() as u32;
        }
        // The conflict of the lowest byte that has one.
        let mut found: Option<(u32, u32)> = None;
        let mut note = |bytes: u32, conflict: Option<u32>| {
            let byte = bytes.trailing_zeros();
            if let Some(other) = conflict.filter(|_| found.is_none_or(|(lowest, _)| byte < lowest)) {
                found = Some((byte, other));
            }
        };
        let (mut left, mut at) = (mask, history.parts);
        while at != 0 && left != 0 {
            let new = self.parts.len() as u32 + 1;
            let part = &mut self.parts[at as usize - 1];
            let (common, rest) = (part.mask & left, part.mask & !left);
            at = part.next;
            if common == 0 {
                continue;
            }
            let before = part.cell;
            note(common, part.cell.access(order, warp, how));
            left &= !common;
            if rest != 0 {
                (part.mask, part.next) = (common, new);
                self.parts.push(Part { mask: rest, cell: before, next: at });
            }
        }
        if left != 0 {
            let mut cell = Cell::default();
            note(left, cell.access(order, warp, how));
            self.parts.push(Part { mask: left, cell, next: history.parts });
            history.parts = self.parts.len() as u32;
        }
        found.map(|(_, other)| other)
    }
}

impl Cell {
    #[inline(always)]
    fn access(&mut self, order: &BlockOrder, warp: usize, how: Use) -> Option<u32> {
        let now = order.now(warp);
        let foreign = |when: When| when.block != 0 && when.block != now.block;
        let strong = matches!(how, Use::StrongRead | Use::StrongWrite);
        let mut conflict = None;
        if foreign(self.writer) && !(strong && self.strong) && !order.sees(warp, self.writer) {
            conflict = Some(self.writer.block - 1);
        }
        if matches!(how, Use::Read | Use::StrongRead) {
            // A strong read never conflicts with a later strong write; it is not kept.
            if how == Use::Read {
                self.note_reader(now);
            }
            return conflict;
        }
        for reader in [self.reader, self.other_reader] {
            if conflict.is_none() && foreign(reader) && !order.sees(warp, reader) {
                conflict = Some(reader.block - 1);
            }
        }
        let same_clock = self.writer.block == now.block && self.writer.stamp >> 6 == now.stamp >> 6;
        let stamp =
            if same_clock && self.writer.stamp != now.stamp { now.stamp | ANY_WARP } else { now.stamp };
        self.writer = When { stamp, ..now };
        self.strong = how == Use::StrongWrite;
        conflict
    }

    #[inline(always)]
    fn note_reader(&mut self, now: When) {
        if self.reader.block == now.block {
            let same_clock = self.reader.stamp >> 6 == now.stamp >> 6;
            let several = same_clock && self.reader.stamp != now.stamp;
            self.reader.stamp = if several { now.stamp | ANY_WARP } else { now.stamp };
        } else {
            if self.reader.block != 0 {
                self.other_reader = self.reader;
            }
            self.reader = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sector as it would be kept without short cuts: a history for each byte, and who read what last.
    #[derive(Default)]
    struct Plain {
        cells: [Cell; 32],
        again: (u32, u32, u32),
    }

    impl Plain {
        fn access(&mut self, mask: u32, order: &BlockOrder, warp: usize, how: Use) -> Option<u32> {
            let Reader { block, time } = order.reader(warp);
            if how == Use::Read {
                if (self.again.0, self.again.1) == (block, time) {
                    if mask & !self.again.2 == 0 {
                        return None;
                    }
                    self.again.2 |= mask;
                } else {
                    self.again = (block, time, mask);
                }
            } else {
                self.again.0 = 0;
            }
            let bytes = (0..32).filter(|byte| mask >> byte & 1 == 1);
            bytes.fold(None, |found: Option<u32>, byte| found.or(self.cells[byte].access(order, warp, how)))
        }
    }

    /// Accesses of four blocks to one sector, with barriers, fences and releases, over several launches.
    #[test]
    fn short_records_find_what_single_bytes_find() {
        let mut state = 11;
        let mut draw = |below: u64| crate::exec::draw(&mut state) % below;
        let (mut sector, mut history) = (Sector::default(), History::default());
        let mut found = 0;
        for launch in 1..2000 {
            let exact = draw(2) == 0;
            let mut orders: Vec<BlockOrder> = (0..4).map(|n| BlockOrder::new(n, 2, exact)).collect();
            let (mut conflicts, mut plain) = (Conflicts::default(), Plain::default());
            let writes = draw(4);
            for _ in 0..draw(60) {
                let (block, warp) = (draw(4) as usize, draw(2) as usize);
                match draw(8) {
                    0 if exact => orders[block].barrier(),
                    1 if exact => {
                        orders[block].fence(warp);
                        conflicts.publish(&orders[block], warp, 64);
                    }
                    2 if exact => {
                        conflicts.observe(&mut orders[block], warp, 64);
                        orders[block].fence(warp);
                    }
                    _ => {}
                }
                let mask = match draw(4) {
                    0 => u32::MAX,
                    1 => 0xffff << (16 * draw(2)),
                    _ => 0xf << (4 * draw(8)),
                };
                let how = match draw(12) {
                    n if n < writes => [Use::Write, Use::StrongWrite, Use::StrongRead][n as usize],
                    _ => Use::Read,
                };
                let order = &orders[block];
                let want = plain.access(mask, order, warp, how);
                sector.open(launch);
                let got = if how == Use::Read && sector.reads(mask, order.reader(warp)) {
                    None
                } else {
                    conflicts.access((&mut sector, &mut history), launch, mask, order, warp, how)
                };
                assert_eq!(
                    got, want,
                    "launch {launch}, {how:?} of {mask:#010x} by block {block} warp {warp}"
                );
                found += u32::from(got.is_some());
            }
        }
        assert!(found > 1000, "only {found} conflicts");
    }
}
