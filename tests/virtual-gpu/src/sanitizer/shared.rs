//! Races in shared memory, by thread: two accesses of different threads to one byte, one of them a write, must
//! have a block barrier between them, or a warp barrier when both threads are of one warp.
//!
//! Words of four bytes are tracked as one as long as all accesses are whole words, and byte by byte from the
//! first smaller access on.

use crate::byteset::ByteSet;
use crate::exec::address::{Pattern, Request, lanes};

/// When and by whom an access was made, in one number. From the top: the barrier phase of the launch (32 bits,
/// counted over all blocks, so that a new block starts in a new phase), the warp barriers that the thread's warp
/// has passed (19 bits), whether the access was an atomic, who it was (12 bits): a thread of the block, or
/// a warp, or many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stamp(u64);

const WHO: u64 = 0xfff;
/// Several threads of one warp.
const WARP: u64 = 0x400;
/// Threads of several warps.
const MANY: u64 = 0x800;
const ATOMIC: u64 = 1 << 12;
const BARRIERS: u64 = (MAX_WARP_PHASE as u64) << 13;
/// The most warp barriers that a stamp holds.
pub const MAX_WARP_PHASE: u32 = (1 << 19) - 1;

impl Stamp {
    /// An access of `thread`, below 1024, in block phase `phase` after `warp_phase` warp barriers.
    #[inline(always)]
    pub fn new(phase: u32, warp_phase: u32, thread: u32) -> Self {
        debug_assert!(thread < 1024 && warp_phase <= MAX_WARP_PHASE);
        Stamp(u64::from(phase) << 32 | u64::from(warp_phase) << 13 | u64::from(thread))
    }

    /// The same for the thread `lane` lanes on.
    #[inline(always)]
    pub fn lane(self, lane: usize) -> Self {
        Stamp(self.0 + lane as u64)
    }

    #[inline(always)]
    fn who(self) -> u64 {
        self.0 & WHO
    }

    /// The warp of the access; none that exists for [`MANY`].
    #[inline(always)]
    fn warp(self) -> u64 {
        let who = self.who();
        if who < WARP { who >> 5 } else { who - WARP }
    }

    /// Whether both are of one block phase.
    #[inline(always)]
    fn meets(self, other: Stamp) -> bool {
        (self.0 ^ other.0) >> 32 == 0
    }

    /// The thread, if it was one.
    fn thread(self) -> Option<u32> {
        (self.who() < WARP).then_some(self.who() as u32)
    }

    /// Whether it is of another phase, or by the same thread: nothing that a later access has to keep.
    #[inline(always)]
    fn settled(self, now: Stamp) -> bool {
        !self.meets(now) | ((self.0 ^ now.0) & WHO == 0)
    }
}

/// Whether an access is ordered before one at `now`: it is of an earlier phase, by the same thread, or by the same
/// warp and before its latest barrier.
#[inline(always)]
fn ordered(before: Stamp, now: Stamp) -> bool {
    let earlier = (before.0 ^ now.0) & BARRIERS != 0;
    before.settled(now) | ((before.warp() == now.warp()) & earlier)
}

/// What an access met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Race {
    /// A read after a write.
    ReadAfterWrite(u32),
    /// A write after a write.
    WriteAfterWrite(u32),
    /// A write after a read; the reader, if it was one thread.
    WriteAfterRead(Option<u32>),
}

/// How memory is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Read, modify, write in one.
    Atomic,
}

/// The history of a block's shared memory. It outlives the block: stamps of earlier blocks never match.
#[derive(Debug, Default)]
pub struct SharedHistory {
    words: Cells,
    /// Empty until a word is split.
    bytes: Cells,
    split: ByteSet,
    any_split: bool,
    /// For each word, a lane that accesses it: means something within one request only.
    lanes: Vec<u8>,
}

/// The last write and the last reads of each word or byte.
#[derive(Debug, Default)]
struct Cells {
    writes: Vec<Stamp>,
    reads: Vec<Stamp>,
}

impl SharedHistory {
    /// For `size` bytes.
    pub fn new(size: usize) -> Self {
        let words = size.div_ceil(4);
        SharedHistory {
            words: Cells::new(words),
            bytes: Cells::default(),
            split: ByteSet::new(words),
            any_split: false,
            lanes: vec![0; words],
        }
    }

    /// Notes an access of `len` bytes at `offset`, inside the memory, and says whether it races.
    #[inline(always)]
    pub fn access(&mut self, offset: usize, len: usize, now: Stamp, how: Use) -> Option<Race> {
        let mut found = None;
        if (offset | len) & 3 == 0 {
            for word in offset / 4..(offset + len) / 4 {
                if self.any_split && self.split.covers(word, 1) {
                    found = found.or(self.by_byte(word * 4, 4, now, how));
                } else {
                    found = found.or(self.words.access(word, now, how));
                }
            }
            return found;
        }
        self.by_byte(offset, len, now, how)
    }

    /// Notes the accesses of a warp if it is plain that none of them races; false if it is not, and then nothing is
    /// noted: each lane must go through [`SharedHistory::access`]. `now` is the stamp of lane 0.
    ///
    /// What it notes is what `access` would. An access is plain if the word's last write (for a write also its last
    /// reads) is ordered before it, which is when `access` finds no race; and no lane of the warp changes what
    /// another finds: reads leave the writes alone, and lanes that write have words of their own.
    #[inline(always)]
    pub fn plain(&mut self, request: &Request, now: Stamp, how: Use) -> bool {
        let (first, len) = (request.first() as usize, request.len as usize);
        if (first | len) & 3 != 0 {
            return false;
        }
        let count = len / 4;
        match request.pattern {
            Pattern::Run if !self.splits(first, 32 * len) => match count {
                1 => self.words.plain_run::<1>(first / 4, now, how),
                2 => self.words.plain_run::<2>(first / 4, now, how),
                4 => self.words.plain_run::<4>(first / 4, now, how),
                _ => false,
            },
            Pattern::Same if !self.splits(first, len) => {
                let one = request.mask.trailing_zeros();
                let rest = request.mask & (request.mask - 1);
                if rest == 0 {
                    return self.words.plain(first / 4, count, now.lane(one as usize), how);
                }
                let words = first / 4..first / 4 + count;
                let plain =
                    |&w: &Stamp| !w.meets(now) || lanes(request.mask).all(|lane| ordered(w, now.lane(lane)));
                if how != Use::Read || !self.words.writes[words.clone()].iter().all(plain) {
                    return false;
                }
                // Two lanes that read make several readers of this warp, and more change nothing.
                let (now, other) = (now.lane(one as usize), now.lane(rest.trailing_zeros() as usize));
                for read in &mut self.words.reads[words] {
                    *read = merge(merge(*read, now), other);
                }
                true
            }
            Pattern::Other => {
                // Loops and not closures, which would be compiled for the baseline.
                if self.any_split {
                    for lane in lanes(request.mask) {
                        if self.splits(request.at[lane] as usize, len) {
                            return false;
                        }
                    }
                }
                if self.apart(request) {
                    return match count {
                        1 => self.words.plain_apart::<1, 32>(request, now, how),
                        2 => self.words.plain_apart::<2, 64>(request, now, how),
                        4 => self.words.plain_apart::<4, 128>(request, now, how),
                        _ => false,
                    };
                }
                if how != Use::Read {
                    return false;
                }
                for lane in lanes(request.mask) {
                    if !self.words.is_plain(request.at[lane] as usize / 4, count, now.lane(lane), how) {
                        return false;
                    }
                }
                for lane in lanes(request.mask) {
                    self.words.note(request.at[lane] as usize / 4, count, now.lane(lane), how);
                }
                true
            }
            _ => false,
        }
    }

    /// Whether no two lanes meet in a word. Accesses are aligned and of one length: those that meet begin together.
    #[inline(always)]
    fn apart(&mut self, request: &Request) -> bool {
        for lane in lanes(request.mask) {
            self.lanes[request.at[lane] as usize / 4] = lane as u8;
        }
        let mut apart = true;
        for lane in lanes(request.mask) {
            apart &= self.lanes[request.at[lane] as usize / 4] == lane as u8;
        }
        apart
    }

    /// Whether any word of the range is tracked byte by byte.
    #[inline(always)]
    fn splits(&self, offset: usize, len: usize) -> bool {
        self.any_split && self.split.meets(offset / 4, len / 4)
    }

    /// Makes all stamps of `warp` in `phase` those of a time before its first warp barrier, because its count of
    /// them starts again from 1. They were all before the latest barrier, so their order to what comes is the same.
    pub fn restart(&mut self, phase: u32, warp: u32) {
        let phase = Stamp::new(phase, 0, 0);
        for cells in [&mut self.words, &mut self.bytes] {
            for stamp in cells.writes.iter_mut().chain(&mut cells.reads) {
                if stamp.meets(phase) && stamp.warp() == u64::from(warp) {
                    stamp.0 &= !BARRIERS;
                }
            }
        }
    }

    #[inline(never)]
    fn by_byte(&mut self, offset: usize, len: usize, now: Stamp, how: Use) -> Option<Race> {
        if !self.any_split {
            self.any_split = true;
            self.bytes = Cells::new(self.words.writes.len() * 4);
        }
        let mut found = None;
        for byte in offset..offset + len {
            let word = byte / 4;
            if !self.split.covers(word, 1) {
                self.split.insert(word, 1);
                self.bytes.writes[word * 4..][..4].fill(self.words.writes[word]);
                self.bytes.reads[word * 4..][..4].fill(self.words.reads[word]);
            }
            found = found.or(self.bytes.access(byte, now, how));
        }
        found
    }
}

impl Cells {
    fn new(count: usize) -> Self {
        Cells { writes: vec![Stamp::default(); count], reads: vec![Stamp::default(); count] }
    }

    /// [`SharedHistory::plain`] for `count` words from `n` of one thread; it notes nothing.
    #[inline(always)]
    fn is_plain(&self, n: usize, count: usize, now: Stamp, how: Use) -> bool {
        let mut plain = true;
        for &write in &self.writes[n..n + count] {
            plain &= ordered(write, now);
        }
        if how != Use::Read {
            for &read in &self.reads[n..n + count] {
                plain &= ordered(read, now);
            }
        }
        plain
    }

    #[inline(always)]
    fn note(&mut self, n: usize, count: usize, now: Stamp, how: Use) {
        if how == Use::Read {
            for read in &mut self.reads[n..n + count] {
                *read = merge(*read, now);
            }
        } else {
            self.writes[n..n + count].fill(now);
        }
    }

    #[inline(always)]
    fn plain(&mut self, n: usize, count: usize, now: Stamp, how: Use) -> bool {
        let plain = self.is_plain(n, count, now, how);
        if plain {
            self.note(n, count, now, how);
        }
        plain
    }

    /// The same for a run of 32 lanes, `COUNT` words each.
    #[inline(always)]
    fn plain_run<const COUNT: usize>(&mut self, n: usize, now: Stamp, how: Use) -> bool {
        let writes = &mut self.writes[n..n + 32 * COUNT];
        let reads = &mut self.reads[n..n + 32 * COUNT];
        let plain = all_ordered::<COUNT>(writes, now);
        if how == Use::Read {
            if plain {
                for (k, read) in reads.iter_mut().enumerate() {
                    *read = merge(*read, now.lane(k / COUNT));
                }
            }
            return plain;
        }
        let plain = plain && all_ordered::<COUNT>(reads, now);
        if plain {
            for (k, write) in writes.iter_mut().enumerate() {
                *write = now.lane(k / COUNT);
            }
        }
        plain
    }

    /// The same for lanes that are apart, `COUNT` words each and `WORDS` for 32: brought together they are a run.
    #[inline(always)]
    fn plain_apart<const COUNT: usize, const WORDS: usize>(
        &mut self,
        request: &Request,
        now: Stamp,
        how: Use,
    ) -> bool {
        // Stamps of lanes that don't take part are those of before the first phase.
        let mut stamps = [Stamp::default(); WORDS];
        self.gather::<COUNT>(request, &mut stamps, Use::Write);
        if !all_ordered::<COUNT>(&stamps, now) {
            return false;
        }
        self.gather::<COUNT>(request, &mut stamps, Use::Read);
        let settled = all_settled::<COUNT>(&stamps, now);
        if how == Use::Read && !settled {
            for (k, read) in stamps.iter_mut().enumerate() {
                *read = merge(*read, now.lane(k / COUNT));
            }
        } else {
            if !settled && !all_ordered::<COUNT>(&stamps, now) {
                return false;
            }
            for (k, stamp) in stamps.iter_mut().enumerate() {
                *stamp = now.lane(k / COUNT);
            }
        }
        let cells = if how == Use::Read { &mut self.reads } else { &mut self.writes };
        for lane in lanes(request.mask) {
            let n = request.at[lane] as usize / 4;
            cells[n..n + COUNT].copy_from_slice(&stamps[lane * COUNT..][..COUNT]);
        }
        true
    }

    /// Brings the last reads or writes of a request's words together, `COUNT` a lane.
    #[inline(always)]
    fn gather<const COUNT: usize>(&self, request: &Request, stamps: &mut [Stamp], of: Use) {
        let cells = if of == Use::Read { &self.reads } else { &self.writes };
        for lane in lanes(request.mask) {
            let n = request.at[lane] as usize / 4;
            stamps[lane * COUNT..][..COUNT].copy_from_slice(&cells[n..n + COUNT]);
        }
    }

    #[inline(always)]
    fn access(&mut self, n: usize, now: Stamp, how: Use) -> Option<Race> {
        let (write, read) = (self.writes[n], self.reads[n]);
        let both_atomic = how == Use::Atomic && write.0 & ATOMIC != 0;
        let after_write = !both_atomic && !ordered(write, now);
        let mut race = None;
        if how == Use::Read {
            if after_write {
                race = Some(Race::ReadAfterWrite(write.who() as u32));
            }
            self.reads[n] = merge(read, now);
            return race;
        }
        if after_write {
            race = Some(Race::WriteAfterWrite(write.who() as u32));
        } else if !ordered(read, now) {
            race = Some(Race::WriteAfterRead(read.thread()));
        }
        self.writes[n] = if how == Use::Atomic { Stamp(now.0 | ATOMIC) } else { now };
        race
    }
}

/// Whether the stamps of a run, `COUNT` of each lane, are ordered before the lanes' accesses. `now` is lane 0's.
#[inline(always)]
fn all_ordered<const COUNT: usize>(stamps: &[Stamp], now: Stamp) -> bool {
    // Most are settled, which costs less to ask.
    if all_settled::<COUNT>(stamps, now) {
        return true;
    }
    let mut all = true;
    for (k, &stamp) in stamps.iter().enumerate() {
        all &= ordered(stamp, now.lane(k / COUNT));
    }
    all
}

/// The same for [`Stamp::settled`].
#[inline(always)]
fn all_settled<const COUNT: usize>(stamps: &[Stamp], now: Stamp) -> bool {
    let mut settled = true;
    for (k, stamp) in stamps.iter().enumerate() {
        settled &= stamp.settled(now.lane(k / COUNT));
    }
    settled
}

/// Both readers in one stamp: the later phase wins, several threads become "many".
#[inline(always)]
fn merge(old: Stamp, now: Stamp) -> Stamp {
    // What is ordered before `now` is ordered before whatever is ordered after `now`.
    if ordered(old, now) {
        return now;
    }
    let who = if old.warp() == now.warp() { WARP | now.warp() } else { MANY };
    Stamp(now.0 & !WHO | who)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(who: u32, phase: u32, warp_phase: u32) -> Stamp {
        Stamp::new(phase, warp_phase, who)
    }

    #[test]
    fn barriers_order_and_their_absence_does_not() {
        let mut h = SharedHistory::new(64);
        assert_eq!(h.access(0, 4, at(0, 1, 0), Use::Write), None);
        assert_eq!(h.access(0, 4, at(40, 1, 0), Use::Read), Some(Race::ReadAfterWrite(0)));
        assert_eq!(h.access(0, 4, at(40, 2, 0), Use::Read), None);
        assert_eq!(h.access(0, 4, at(41, 2, 0), Use::Write), Some(Race::WriteAfterRead(Some(40))));
        assert_eq!(h.access(0, 4, at(7, 3, 0), Use::Write), None);
        assert_eq!(h.access(0, 4, at(7, 3, 0), Use::Write), None);
        assert_eq!(h.access(0, 4, at(8, 3, 0), Use::Write), Some(Race::WriteAfterWrite(7)));
        assert_eq!(h.access(0, 4, at(7, 3, 1), Use::Read), None, "a warp barrier orders threads of one warp");
    }

    #[test]
    fn halves_of_a_word_are_apart() {
        let mut h = SharedHistory::new(64);
        assert_eq!(h.access(8, 2, at(0, 1, 0), Use::Write), None);
        assert_eq!(h.access(10, 2, at(1, 1, 0), Use::Write), None);
        assert_eq!(h.access(8, 4, at(2, 1, 0), Use::Read), Some(Race::ReadAfterWrite(0)));
        assert_eq!(h.access(8, 4, at(2, 2, 0), Use::Read), None);
    }

    #[test]
    fn atomics_agree_among_themselves_only() {
        let mut h = SharedHistory::new(64);
        assert_eq!(h.access(0, 4, at(0, 1, 0), Use::Atomic), None);
        assert_eq!(h.access(0, 4, at(99, 1, 0), Use::Atomic), None);
        assert_eq!(h.access(0, 4, at(0, 1, 0), Use::Read), Some(Race::ReadAfterWrite(99)));
    }

    #[test]
    fn a_reader_before_a_warp_barrier_is_no_reader_after_it() {
        let mut h = SharedHistory::new(64);
        assert_eq!(h.access(0, 4, at(1, 1, 1), Use::Read), None);
        assert_eq!(h.access(0, 4, at(2, 1, 2), Use::Read), None);
        assert_eq!(h.access(0, 4, at(2, 1, 2), Use::Write), None);
        assert_eq!(h.access(0, 4, at(3, 1, 2), Use::Write), Some(Race::WriteAfterWrite(2)));
        // Of another warp, no warp barrier orders them.
        assert_eq!(h.access(4, 4, at(1, 1, 1), Use::Read), None);
        assert_eq!(h.access(4, 4, at(2, 1, 2), Use::Read), None);
        assert_eq!(h.access(4, 4, at(40, 1, 2), Use::Write), Some(Race::WriteAfterRead(Some(2))));
    }

    #[test]
    fn many_readers_then_a_writer() {
        let mut h = SharedHistory::new(64);
        for reader in 0..64 {
            assert_eq!(h.access(0, 4, at(reader, 1, 0), Use::Read), None);
        }
        assert_eq!(h.access(0, 4, at(3, 1, 5), Use::Write), Some(Race::WriteAfterRead(None)));
    }

    /// Requests of all patterns by warps of two, with barriers between, noted in one go where that may be and lane by
    /// lane: races and histories are the same.
    #[test]
    fn short_ways_note_what_single_accesses_note() {
        let mut state = 7;
        let mut draw = |below: u64| crate::exec::draw(&mut state) % below;
        let (mut short, mut long) = (SharedHistory::new(4096), SharedHistory::new(4096));
        let (mut phase, mut warp_phases) = (1, [0u32; 2]);
        let mut plain = 0;
        for _ in 0..20_000 {
            match draw(4) {
                0 => phase += 1,
                1 => warp_phases[draw(2) as usize] += 1,
                _ => {}
            }
            let warp = draw(2) as u32;
            // Parts of words in the upper half only, which are split soon and for good.
            let upper = draw(10) == 0;
            let len = if upper { 2 << draw(4) } else { 4 << draw(3) };
            let base = u64::from(upper) * 2048 + draw(16) * 16;
            let at: [u64; 32] = match draw(5) {
                0 | 1 => std::array::from_fn(|lane| base + lane as u64 * len),
                2 => [base; 32],
                3 => std::array::from_fn(|lane| base + (lane as u64 ^ 5) * 2 * len),
                _ => std::array::from_fn(|lane| base + lane as u64 % 7 * len),
            };
            let mask = [u32::MAX, 1 << draw(32), 0x00ff_fff0, u32::MAX][draw(4) as usize];
            let how = if draw(3) == 0 { Use::Write } else { Use::Read };
            let request = Request::new(at, mask, len as u32);
            let now = Stamp::new(phase, warp_phases[warp as usize], warp * 32);
            let single = |history: &mut SharedHistory| -> Vec<Option<Race>> {
                let one = |lane: usize| history.access(at[lane] as usize, len as usize, now.lane(lane), how);
                lanes(mask).map(one).collect()
            };
            let races = single(&mut long);
            if short.plain(&request, now, how) {
                plain += 1;
                assert!(races.iter().all(Option::is_none), "{request:?} {how:?}: {races:?}");
            } else {
                assert_eq!(single(&mut short), races);
            }
            assert!(short.words.writes == long.words.writes && short.words.reads == long.words.reads);
            assert!(short.bytes.writes == long.bytes.writes && short.bytes.reads == long.bytes.reads);
        }
        assert!(plain > 2000, "only {plain} of the requests went the short way");
    }

    #[test]
    fn a_restart_keeps_the_order_of_what_was() {
        let mut h = SharedHistory::new(64);
        h.access(0, 4, at(0, 1, 9), Use::Write);
        h.access(4, 4, at(40, 1, 9), Use::Write);
        h.restart(1, 0);
        assert_eq!(h.access(0, 4, at(1, 1, 1), Use::Read), None, "before the barrier that made it restart");
        assert_eq!(h.access(4, 4, at(41, 1, 9), Use::Read), Some(Race::ReadAfterWrite(40)), "another warp");
    }
}
