//! Counts what a warp's request to memory costs: sectors of device memory, passes through the banks of shared
//! memory.

use super::address::{Pattern, Request, lanes};

/// The sectors of one request with the bytes used in each, in the order in which the lanes come to them.
pub struct Sectors {
    keys: [u64; 32],
    masks: [u32; 32],
    count: usize,
}

impl Default for Sectors {
    /// None.
    #[inline(always)]
    fn default() -> Self {
        Sectors { keys: [0; 32], masks: [0; 32], count: 0 }
    }
}

/// The bytes of an aligned access in its sector.
#[inline(always)]
fn bytes_of(address: u64, len: u32) -> u32 {
    (((1u64 << len) - 1) as u32) << (address as u32 & 31)
}

impl Sectors {
    /// Those of a request of aligned accesses of at most 16 bytes: none of them crosses a sector.
    #[inline(always)]
    pub fn of(request: &Request) -> Self {
        let mut sectors = Sectors::default();
        let (first, len) = (request.first(), request.len);
        match request.pattern {
            Pattern::Run if first.is_multiple_of(32) => {
                sectors.count = len as usize & 31;
                for n in 0..sectors.count {
                    (sectors.keys[n], sectors.masks[n]) = ((first >> 5) + n as u64, u32::MAX);
                }
            }
            Pattern::Same => {
                sectors.count = 1;
                (sectors.keys[0], sectors.masks[0]) = (first >> 5, bytes_of(first, len));
            }
            _ => {
                let found = sectors.apart(request)
                    || match len {
                        16 => sectors.whole::<2>(request),
                        8 => sectors.whole::<4>(request),
                        4 => sectors.whole::<8>(request),
                        _ => false,
                    };
                if !found && !sectors.rising(request) {
                    sectors.any(request);
                }
            }
        }
        sectors
    }

    /// The sectors of a full warp of which each lane has one of its own, above that of the lane before; false if not.
    #[inline(always)]
    fn apart(&mut self, request: &Request) -> bool {
        let mut apart = request.mask == u32::MAX;
        for (lane, &address) in request.at.iter().enumerate() {
            (self.keys[lane], self.masks[lane]) = (address >> 5, bytes_of(address, request.len));
        }
        for lane in 1..32 {
            apart &= self.keys[lane] > self.keys[lane - 1];
        }
        self.count = 32;
        apart
    }

    /// The sectors of a full warp of which each `LANES` lanes read a whole one, above those before; false if not.
    #[inline(always)]
    fn whole<const LANES: usize>(&mut self, request: &Request) -> bool {
        let mut whole = request.mask == u32::MAX;
        let mut apart = 0;
        for (lane, &address) in request.at.iter().enumerate() {
            let first = request.at[lane / LANES * LANES];
            apart |= first & 31 | address ^ first.wrapping_add((lane % LANES * 32 / LANES) as u64);
        }
        whole &= apart == 0;
        self.count = 32 / LANES;
        for n in 0..self.count {
            (self.keys[n], self.masks[n]) = (request.at[n * LANES] >> 5, u32::MAX);
        }
        for n in 1..self.count {
            whole &= self.keys[n] > self.keys[n - 1];
        }
        whole
    }

    /// The sectors of lanes whose addresses don't fall: each is that of the lane before, or new. False if one falls.
    #[inline(always)]
    fn rising(&mut self, request: &Request) -> bool {
        let (mut count, mut last, mut rises) = (0, 0, true);
        for lane in lanes(request.mask) {
            let sector = request.at[lane] >> 5;
            let new = (count == 0) | (sector != last);
            rises &= sector >= last;
            count += usize::from(new);
            let (at, bytes) = (count - 1 & 31, bytes_of(request.at[lane], request.len));
            self.masks[at] = if new { bytes } else { self.masks[at] | bytes };
            self.keys[at] = sector;
            last = sector;
        }
        self.count = count;
        rises
    }

    #[inline(never)]
    fn any(&mut self, request: &Request) {
        self.count = 0;
        for lane in lanes(request.mask) {
            let (sector, bytes) = (request.at[lane] >> 5, bytes_of(request.at[lane], request.len));
            match self.keys[..self.count].iter().position(|&key| key == sector) {
                Some(slot) => self.masks[slot] |= bytes,
                None => {
                    (self.keys[self.count], self.masks[self.count]) = (sector, bytes);
                    self.count += 1;
                }
            }
        }
    }

    /// How many there are.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Sector numbers (address / 32) and masks of bytes.
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.keys.iter().copied().zip(self.masks.iter().copied()).take(self.count)
    }

    /// Different bytes of all sectors.
    #[inline(always)]
    pub fn bytes(&self) -> u64 {
        self.masks[..self.count].iter().map(|mask| u64::from(mask.count_ones())).sum()
    }
}

/// Passes that 32 banks of four bytes need for a request, and how many it would be without conflicts. Requests of 8
/// bytes go in two halves of the warp, of 16 bytes in four quarters.
#[inline(always)]
pub fn waves(request: &Request) -> (u64, u64) {
    // A run that begins at a word, or one address for all, uses no bank for two things.
    let smooth =
        request.pattern == Pattern::Same || request.pattern == Pattern::Run && request.first() & 3 == 0;
    waves_of(&request.at, request.mask, request.len, smooth)
}

/// The same from the addresses of aligned accesses; `smooth` if it is known that none has to wait for another.
#[inline(always)]
pub fn waves_of(at: &[u64; 32], mask: u32, len: u32, smooth: bool) -> (u64, u64) {
    let lanes = if len <= 4 { 32 } else { 128 / len };
    let (mut total, mut ideal, mut first) = (0, 0, 0);
    let banks = if smooth { [0; 32] } else { banks_of(at, len) };
    while first < 32 {
        let part = mask & (u32::MAX >> (32 - lanes)) << first;
        if part != 0 {
            total += if smooth { 1 } else { part_waves(at, &banks, part, len) };
            ideal += 1;
        }
        first += lanes;
    }
    (total, ideal)
}

/// The bank of each lane's access, as a bit. Accesses of 8 or 16 bytes use two or four banks together, because they
/// are aligned: these count as one.
#[inline(always)]
fn banks_of(at: &[u64; 32], len: u32) -> [u32; 32] {
    let shift = len.max(4).trailing_zeros();
    let last = (128u32 >> shift) - 1;
    let mut banks = [0; 32];
    for (bank, &address) in banks.iter_mut().zip(at) {
        *bank = 1 << ((address >> shift) as u32 & last);
    }
    banks
}

/// Passes of one part of a request: each pass serves one word of each bank, to all lanes that want it.
#[inline(always)]
fn part_waves(at: &[u64; 32], banks: &[u32; 32], mask: u32, len: u32) -> u64 {
    let mut used = 0u32;
    for lane in lanes(mask) {
        used |= banks[lane];
    }
    if used.count_ones() == mask.count_ones() { 1 } else { passes(at, mask, len) }
}

#[inline(never)]
fn passes(at: &[u64; 32], mask: u32, len: u32) -> u64 {
    let shift = len.max(4).trailing_zeros();
    let banks = (128u32 >> shift) - 1;
    let mut served = [0u32; 32];
    let (mut left, mut passes) = (mask, 0);
    while left != 0 {
        let (mut busy, mut later) = (0u32, 0u32);
        for lane in lanes(left) {
            let word = (at[lane] >> shift) as u32;
            let bank = word & banks & 31;
            if busy >> bank & 1 == 0 {
                busy |= 1 << bank;
                served[bank as usize] = word;
            } else if served[bank as usize] != word {
                later |= 1 << lane;
            }
        }
        left = later;
        passes += 1;
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strided(stride: u64) -> [u64; 32] {
        std::array::from_fn(|lane| lane as u64 * stride)
    }

    fn waves(at: &[u64; 32], mask: u32, len: u32) -> (u64, u64) {
        let request = Request::new(*at, mask, len);
        // The short way for runs gives what counting gives.
        let counted = super::waves(&Request { pattern: Pattern::Other, ..request.clone() });
        assert_eq!(super::waves(&request), counted);
        counted
    }

    fn sectors(at: [u64; 32], mask: u32, len: u32) -> (usize, u64) {
        let request = Request::new(at, mask, len);
        let sectors = Sectors::of(&request);
        let counted = Sectors::of(&Request { pattern: Pattern::Other, ..request.clone() });
        assert!(sectors.iter().eq(counted.iter()));
        (sectors.len(), sectors.bytes())
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
    fn touched_sectors() {
        assert_eq!(sectors(strided(4).map(|a| 4096 + a), u32::MAX, 4), (4, 128));
        assert_eq!(sectors(strided(4).map(|a| 4100 + a), u32::MAX, 4), (5, 128));
        assert_eq!(sectors(strided(16), u32::MAX, 16), (16, 512));
        // Rows of 64 bytes, 100 sectors apart, and the same with a gap that makes halves of sectors.
        let rows = |len: u64, start: u64| {
            std::array::from_fn(|lane: usize| start + lane as u64 * len / 64 * 3200 + lane as u64 * len % 64)
        };
        for len in [4, 8, 16] {
            assert_eq!(sectors(rows(len, 4096), u32::MAX, len as u32), (len as usize, 32 * len));
            assert_eq!(sectors(rows(len, 4112), u32::MAX, len as u32), (len as usize * 3 / 2, 32 * len));
            assert_eq!(sectors(rows(len, 4096), u32::MAX >> 1, len as u32), (len as usize, 31 * len));
        }
        assert_eq!(sectors(strided(34), u32::MAX, 2), (32, 64));
        assert_eq!(sectors(strided(0).map(|a| 4100 + a), u32::MAX, 4), (1, 4));
        assert_eq!(sectors(strided(4), 0xff00, 4), (1, 32));
        // Down and up again, with sectors that come back.
        let there_and_back = std::array::from_fn(|lane: usize| 4096 + 32 * lane.abs_diff(16) as u64);
        assert_eq!(sectors(there_and_back, u32::MAX, 4), (17, 68));
    }
}
