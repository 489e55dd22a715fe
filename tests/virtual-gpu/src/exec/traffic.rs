//! Counts what a warp's request to memory costs: sectors of device memory, passes through the banks of shared
//! memory.

use std::mem::MaybeUninit;

/// The sectors of one request with the bytes used in each.
pub struct Sectors {
    keys: [u64; 64],
    masks: [u32; 64],
    /// Slots in use, in order of first touch.
    order: [u8; 64],
    count: usize,
}

impl Default for Sectors {
    fn default() -> Self {
        Sectors { keys: [0; 64], masks: [0; 64], order: [0; 64], count: 0 }
    }
}

impl Sectors {
    /// Adds an aligned access of at most 16 bytes.
    #[inline(always)]
    pub fn add(&mut self, address: u64, len: u32) {
        let sector = address >> 5;
        let bytes = (((1u64 << len) - 1) as u32) << (address & 31);
        let mut slot = (sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as usize;
        loop {
            if self.masks[slot] == 0 {
                self.keys[slot] = sector;
                self.masks[slot] = bytes;
                self.order[self.count] = slot as u8;
                self.count += 1;
                return;
            }
            if self.keys[slot] == sector {
                self.masks[slot] |= bytes;
                return;
            }
            slot = (slot + 1) & 63;
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Sector numbers (address / 32) and masks of bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.order[..self.count].iter().map(|&slot| (self.keys[slot as usize], self.masks[slot as usize]))
    }

    /// Different bytes of all sectors.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|(_, mask)| u64::from(mask.count_ones())).sum()
    }
}

/// Passes that 32 banks of four bytes need for a request of `len` bytes a lane, and how many it would be without
/// conflicts. Requests of 8 bytes go in two halves of the warp, of 16 bytes in four quarters.
pub fn waves(offsets: &[u32; 32], mask: u32, len: u32) -> (u64, u64) {
    let lanes = if len <= 4 { 32 } else { 128 / len };
    let (mut total, mut ideal) = (0, 0);
    for first in (0..32).step_by(lanes as usize) {
        let part = mask >> first & if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
        if part != 0 {
            total += part_waves(&offsets[first as usize..(first + lanes) as usize], part, len);
            ideal += 1;
        }
    }
    (total, ideal)
}

/// Passes of one part of a request.
pub fn part_waves(offsets: &[u32], mask: u32, len: u32) -> u64 {
    // The words of each bank so far; only the first `counts[bank]` of a row are set, clearing all would cost more
    // than the rest of this function.
    let mut words = [const { MaybeUninit::<[u32; 32]>::uninit() }; 32];
    let mut counts = [0usize; 32];
    let mut most = 1;
    for (lane, &offset) in offsets.iter().enumerate() {
        if mask >> lane & 1 == 0 {
            continue;
        }
        for word in offset / 4..(offset + len).div_ceil(4) {
            let bank = (word & 31) as usize;
            let (row, count) = (words[bank].as_mut_ptr().cast::<u32>(), &mut counts[bank]);
            // SAFETY: the first `count` words of the row were written below.
            let known = unsafe { std::slice::from_raw_parts(row, *count) };
            if !known.contains(&word) && *count < 32 {
                // SAFETY: a row has 32 words.
                unsafe { row.add(*count).write(word) };
                *count += 1;
                most = most.max(*count);
            }
        }
    }
    most as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strided(stride: u32) -> [u32; 32] {
        std::array::from_fn(|lane| lane as u32 * stride)
    }

    #[test]
    fn banks() {
        assert_eq!(waves(&strided(4), u32::MAX, 4), (1, 1));
        assert_eq!(waves(&strided(8), u32::MAX, 4), (2, 1));
        assert_eq!(waves(&strided(128), u32::MAX, 4), (32, 1));
        assert_eq!(waves(&strided(132), u32::MAX, 4), (1, 1), "padding by a word removes the conflict");
        assert_eq!(waves(&strided(0), u32::MAX, 4), (1, 1), "a broadcast is one pass");
        assert_eq!(waves(&strided(8), u32::MAX, 8), (2, 2));
        assert_eq!(waves(&strided(16), u32::MAX, 16), (4, 4));
        assert_eq!(waves(&strided(128), u32::MAX, 16), (32, 4));
        assert_eq!(waves(&strided(2), u32::MAX, 2), (1, 1), "halves of a word share a pass");
        assert_eq!(waves(&strided(128), 0b11, 4), (2, 1));
    }

    #[test]
    fn sectors() {
        let mut s = Sectors::default();
        (0..32).for_each(|lane| s.add(4096 + lane * 4, 4));
        assert_eq!((s.len(), s.bytes()), (4, 128));
        let mut s = Sectors::default();
        (0..32).for_each(|lane| s.add(4096 + lane * 34 / 2 * 2, 2));
        assert_eq!((s.len(), s.bytes()), (32, 64));
        let mut s = Sectors::default();
        (0..32).for_each(|_| s.add(4100, 4));
        assert_eq!((s.len(), s.bytes()), (1, 4));
    }
}
