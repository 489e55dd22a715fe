//! A set of the bytes of a memory, a bit each: which were written, which wait for a copy.

/// A set of bytes of a memory of fixed size.
#[derive(Debug, Clone, Default)]
pub struct ByteSet {
    words: Vec<u32>,
}

/// The words that `[offset, offset + len)` touches, with the bits of it in each.
#[inline(always)]
fn pieces(offset: usize, len: usize) -> impl Iterator<Item = (usize, u32)> {
    let end = offset + len;
    (offset / 32..end.div_ceil(32)).map(move |word| {
        let (from, to) = (offset.max(word * 32) - word * 32, end.min(word * 32 + 32) - word * 32);
        (word, (u64::MAX << from) as u32 & ((1u64 << to) - 1) as u32)
    })
}

/// The word of an aligned access of at most 32 bytes, which touches no other, and the bits of it there.
#[inline(always)]
pub fn aligned(offset: usize, len: usize) -> (usize, u32) {
    debug_assert!(len.is_power_of_two() && len <= 32 && offset.is_multiple_of(len));
    (offset / 32, u32::MAX >> (32 - len) << (offset % 32))
}

impl ByteSet {
    /// The empty set, for a memory of `len` bytes. Its storage is not touched before it is written to.
    pub fn new(len: usize) -> Self {
        ByteSet { words: vec![0; len.div_ceil(32)] }
    }

    /// The bytes `32 * n ..` as bits, lowest first.
    #[inline(always)]
    pub fn word(&self, n: usize) -> u32 {
        self.words[n]
    }

    /// Adds the bytes of `bits` to word `n`.
    #[inline(always)]
    pub fn insert_word(&mut self, n: usize, bits: u32) {
        self.words[n] |= bits;
    }

    /// Takes the bytes of `bits` out of word `n`.
    #[inline(always)]
    pub fn remove_word(&mut self, n: usize, bits: u32) {
        self.words[n] &= !bits;
    }

    /// Whether all bytes of the range are in the set.
    #[inline(always)]
    pub fn covers(&self, offset: usize, len: usize) -> bool {
        pieces(offset, len).all(|(word, bits)| bits & !self.words[word] == 0)
    }

    /// Whether any byte of the range is in the set.
    #[inline(always)]
    pub fn meets(&self, offset: usize, len: usize) -> bool {
        pieces(offset, len).any(|(word, bits)| bits & self.words[word] != 0)
    }

    /// Adds a range.
    #[inline(always)]
    pub fn insert(&mut self, offset: usize, len: usize) {
        for (word, bits) in pieces(offset, len) {
            self.words[word] |= bits;
        }
    }

    /// Takes a range out.
    #[inline(always)]
    pub fn remove(&mut self, offset: usize, len: usize) {
        for (word, bits) in pieces(offset, len) {
            self.words[word] &= !bits;
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteSet, aligned};

    #[test]
    fn ranges() {
        let mut set = ByteSet::new(100);
        assert!(set.covers(7, 0) && !set.meets(7, 0) && set.covers(64, 0));
        set.insert(30, 40);
        assert_eq!((set.word(0), set.word(1), set.word(2)), (0b11 << 30, u32::MAX, 0b11_1111));
        assert!(set.covers(30, 40) && !set.covers(29, 2) && !set.covers(69, 2) && set.covers(32, 32));
        assert!(set.meets(0, 31) && !set.meets(0, 30) && !set.meets(70, 30));
        set.remove(31, 34);
        assert!(set.covers(30, 1) && set.covers(65, 5) && !set.meets(31, 34));
        set.insert_word(3, 0b1000);
        assert!(set.covers(99, 1));
        let (word, bits) = aligned(48, 16);
        assert!((word, bits) == (1, 0xffff_0000) && aligned(64, 32) == (2, u32::MAX));
        set.insert(40, 24);
        set.remove_word(word, bits);
        assert!(!set.meets(48, 16) && set.covers(40, 8));
        set.clear();
        assert!(!set.meets(0, 100));
    }
}
