//! Races in shared memory, by thread: two accesses of different threads to one byte, one of them a write, must
//! have a block barrier between them, or a warp barrier when both threads are of one warp.
//!
//! Words of four bytes are tracked as one as long as all accesses are whole words, and byte by byte from the
//! first smaller access on.

/// When and by whom an access was made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stamp {
    /// Barrier phases of the launch, counted over all blocks, so that a new block starts in a new phase.
    pub phase: u32,
    /// Warp barriers that the thread's warp has passed.
    pub warp_phase: u32,
    /// Thread in the block, or `MANY_IN_WARP` and a warp, or `MANY`.
    pub who: u16,
    /// Whether the access was an atomic.
    pub atomic: bool,
}

const MANY: u16 = 0xffff;
const MANY_IN_WARP: u16 = 0x8000;

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    write: Stamp,
    read: Stamp,
    split: bool,
}

/// What an access met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Race {
    /// A read after a write.
    ReadAfterWrite(u16),
    /// A write after a write.
    WriteAfterWrite(u16),
    /// A write after a read; the reader, if it was one thread.
    WriteAfterRead(Option<u16>),
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
    words: Vec<Cell>,
    bytes: Vec<Cell>,
}

impl SharedHistory {
    /// For `size` bytes.
    pub fn new(size: usize) -> Self {
        SharedHistory { words: vec![Cell::default(); size.div_ceil(4)], bytes: Vec::new() }
    }

    /// Notes an access of `len` bytes at `offset`, inside the memory, and says whether it races.
    #[inline(always)]
    pub fn access(&mut self, offset: usize, len: usize, stamp: Stamp, how: Use) -> Option<Race> {
        let mut found = None;
        if (offset | len) & 3 == 0 {
            for word in offset / 4..(offset + len) / 4 {
                if self.words[word].split {
                    found = found.or(self.by_byte(word * 4, 4, stamp, how));
                } else {
                    found = found.or(self.words[word].access(stamp, how));
                }
            }
            return found;
        }
        self.by_byte(offset, len, stamp, how)
    }

    #[inline(never)]
    fn by_byte(&mut self, offset: usize, len: usize, stamp: Stamp, how: Use) -> Option<Race> {
        if self.bytes.is_empty() {
            self.bytes = vec![Cell::default(); self.words.len() * 4];
        }
        let mut found = None;
        for byte in offset..offset + len {
            let word = &mut self.words[byte / 4];
            if !word.split {
                word.split = true;
                let copy = *word;
                self.bytes[byte / 4 * 4..][..4].fill(copy);
            }
            found = found.or(self.bytes[byte].access(stamp, how));
        }
        found
    }
}

impl Cell {
    #[inline(always)]
    fn access(&mut self, now: Stamp, how: Use) -> Option<Race> {
        let both_atomic = how == Use::Atomic && self.write.atomic;
        let after_write = !both_atomic && self.write.phase == now.phase && unordered(self.write, now);
        let mut race = None;
        if how == Use::Read {
            if after_write {
                race = Some(Race::ReadAfterWrite(self.write.who));
            }
            self.read = merge(self.read, now);
            return race;
        }
        if after_write {
            race = Some(Race::WriteAfterWrite(self.write.who));
        } else if self.read.phase == now.phase && unordered(self.read, now) {
            race = Some(Race::WriteAfterRead((self.read.who < MANY_IN_WARP).then_some(self.read.who)));
        }
        self.write = now;
        self.write.atomic = how == Use::Atomic;
        race
    }
}

/// Whether an access of the same block phase is not ordered before `now`.
#[inline(always)]
fn unordered(before: Stamp, now: Stamp) -> bool {
    if before.who == now.who {
        return false;
    }
    let warp = if before.who >= MANY_IN_WARP { before.who & 0x7fff } else { before.who / 32 };
    warp != now.who / 32 || before.warp_phase == now.warp_phase
}

/// Both readers in one stamp: the later phase wins, several threads become "many".
#[inline(always)]
fn merge(old: Stamp, now: Stamp) -> Stamp {
    // What is ordered before `now` is ordered before whatever is ordered after `now`.
    if old.phase != now.phase || !unordered(old, now) {
        return now;
    }
    let old_warp = if old.who >= MANY_IN_WARP { old.who & 0x7fff } else { old.who / 32 };
    let who = if old_warp == now.who / 32 { MANY_IN_WARP | old_warp } else { MANY };
    Stamp { who, ..now }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(who: u16, phase: u32, warp_phase: u32) -> Stamp {
        Stamp { phase, warp_phase, who, atomic: false }
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
        assert_eq!(h.access(0, 4, at(1, 1, 0), Use::Read), None);
        assert_eq!(h.access(0, 4, at(2, 1, 1), Use::Read), None);
        assert_eq!(h.access(0, 4, at(2, 1, 1), Use::Write), None);
        assert_eq!(h.access(0, 4, at(3, 1, 1), Use::Write), Some(Race::WriteAfterWrite(2)));
        // Of another warp, no warp barrier orders them.
        assert_eq!(h.access(4, 4, at(1, 1, 0), Use::Read), None);
        assert_eq!(h.access(4, 4, at(2, 1, 1), Use::Read), None);
        assert_eq!(h.access(4, 4, at(40, 1, 1), Use::Write), Some(Race::WriteAfterRead(Some(2))));
    }

    #[test]
    fn many_readers_then_a_writer() {
        let mut h = SharedHistory::new(64);
        for reader in 0..64 {
            assert_eq!(h.access(0, 4, at(reader, 1, 0), Use::Read), None);
        }
        assert_eq!(h.access(0, 4, at(3, 1, 5), Use::Write), Some(Race::WriteAfterRead(None)));
    }
}
