//! Device memory: allocations at addresses that the host cannot dereference, never reused, each with a shadow
//! that knows which bytes were written.

use crate::byteset::ByteSet;
use crate::sanitizer::blocks::{History, Sector};
use crate::zeroed::Zeroed;
use std::collections::BTreeMap;

/// Where device addresses begin. It is no canonical x86-64 address: the host faults if it follows one.
pub const GLOBAL_BASE: u64 = 0x0d00_0000_0000_0000;
/// Generic addresses of shared memory.
pub const SHARED_WINDOW: u64 = 0x0200_0000_0000_0000;
/// Generic addresses of local memory.
pub const LOCAL_WINDOW: u64 = 0x0300_0000_0000_0000;
/// Bytes of a sector, the unit of traffic between cache and memory.
pub const SECTOR: u64 = 32;
/// What fresh memory is filled with: NaN in every floating-point format.
const POISON: u8 = 0xff;
/// Larger allocations stay untouched zero pages, so that a test may reserve more than the host has.
const POISON_LIMIT: u64 = 16 << 20;
/// Untouched bytes between allocations.
const RED_ZONE: u64 = 4096;

/// Where an allocation is in its life. Allocations made in stream order exist before their stream reaches them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The stream has not reached the allocation.
    Pending,
    /// In use.
    Live,
}

/// One allocation.
pub struct Allocation {
    /// Device address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Life.
    pub state: State,
    bytes: Vec<u8>,
    host: *mut u8,
    /// None for pinned host memory, which counts as written.
    written: Option<ByteSet>,
    sectors: Zeroed<Sector>,
    histories: Zeroed<History>,
    /// Bytes that kernels have loaded of each sector, where that is watched.
    loads: Option<Vec<u32>>,
}

// SAFETY: `host` points to pinned memory that the driver owns until the allocation is removed, and a device is
// used by one thread at a time, under its lock.
unsafe impl Send for Allocation {}

impl Allocation {
    fn new(base: u64, size: u64, state: State) -> Self {
        let mut bytes = vec![0; size as usize];
        if size <= POISON_LIMIT {
            bytes.fill(POISON);
        }
        Self::over(base, size, state, bytes, std::ptr::null_mut(), Some(ByteSet::new(size as usize)))
    }

    fn pinned(host: *mut u8, size: u64) -> Self {
        Self::over(host as u64, size, State::Live, Vec::new(), host, None)
    }

    fn over(
        base: u64,
        size: u64,
        state: State,
        bytes: Vec<u8>,
        host: *mut u8,
        written: Option<ByteSet>,
    ) -> Self {
        let (sectors, histories) = (Zeroed::default(), Zeroed::default());
        Allocation { base, size, state, bytes, host, written, sectors, histories, loads: None }
    }

    /// Whether `[address, address + len)` lies inside.
    #[inline(always)]
    pub fn holds(&self, address: u64, len: u64) -> bool {
        let offset = address.wrapping_sub(self.base);
        offset < self.size && len <= self.size - offset
    }

    /// The storage, for reads and writes within `size`.
    #[inline(always)]
    pub fn data(&mut self) -> *mut u8 {
        if self.host.is_null() { self.bytes.as_mut_ptr() } else { self.host }
    }

    /// Whether any byte of the range, which must lie inside, was never written.
    #[inline(always)]
    pub fn unwritten(&self, offset: usize, len: usize) -> bool {
        self.written.as_ref().is_some_and(|written| !written.covers(offset, len))
    }

    /// Notes that a range was written.
    #[inline(always)]
    pub fn set_written(&mut self, offset: usize, len: usize) {
        if let Some(written) = &mut self.written {
            written.insert(offset, len);
        }
    }

    /// Which bytes were written: a word a sector, counted from the sector of `base`. None if all are.
    ///
    /// Only pinned memory may begin inside a sector, and there it is None.
    #[inline(always)]
    pub fn written(&mut self) -> Option<&mut ByteSet> {
        self.written.as_mut()
    }

    /// Bytes of the range and, a byte each, whether they were written.
    pub fn snapshot(&mut self, offset: usize, len: usize) -> (Vec<u8>, Vec<u8>) {
        // SAFETY: callers pass ranges inside the allocation.
        let bytes = unsafe { std::slice::from_raw_parts(self.data().add(offset), len) }.to_vec();
        let flags = match &self.written {
            Some(written) if !written.covers(offset, len) => {
                (offset..offset + len).map(|at| u8::from(written.covers(at, 1))).collect()
            }
            _ => vec![1; len],
        };
        (bytes, flags)
    }

    /// Writes bytes with their shadow, as [`Allocation::snapshot`] gives it.
    pub fn restore(&mut self, offset: usize, bytes: &[u8], flags: &[u8]) {
        self.write(offset, bytes);
        let Some(written) = &mut self.written else { return };
        if flags.contains(&0) {
            written.remove(offset, flags.len());
            let set = flags.iter().enumerate().filter(|(_, flag)| **flag != 0);
            set.for_each(|(n, _)| written.insert(offset + n, 1));
        }
    }

    /// Writes bytes.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        // SAFETY: callers pass ranges inside the allocation.
        unsafe { std::slice::from_raw_parts_mut(self.data().add(offset), bytes.len()) }
            .copy_from_slice(bytes);
        self.set_written(offset, bytes.len());
    }

    /// What the running launch did to each sector, counted from the sector of `base`.
    #[inline(always)]
    pub fn sectors(&mut self) -> &mut [Sector] {
        if self.sectors.is_empty() {
            self.sectors = Zeroed::new((self.size.div_ceil(SECTOR) + 1) as usize);
        }
        &mut self.sectors
    }

    /// From now on counts what kernels load.
    pub fn watch(&mut self) {
        self.loads = Some(vec![0; (self.size.div_ceil(SECTOR) + 1) as usize]);
    }

    /// The bytes that kernels have loaded of each sector since [`watch`](Self::watch), counted from that of `base`:
    /// different bytes of a warp's request once, those of other requests again.
    pub fn loads(&mut self) -> Option<&mut Vec<u32>> {
        self.loads.as_mut()
    }

    /// The same with the whole history of one sector.
    #[inline(always)]
    pub fn history(&mut self, sector: usize) -> (&mut Sector, &mut History) {
        if self.histories.is_empty() {
            self.histories = Zeroed::new((self.size.div_ceil(SECTOR) + 1) as usize);
        }
        (&mut self.sectors[sector], &mut self.histories[sector])
    }
}

/// All memory of a device.
pub struct Memory {
    allocations: BTreeMap<u64, Box<Allocation>>,
    freed: BTreeMap<u64, u64>,
    next: u64,
    /// Bytes taken, rounded up as the card does.
    pub used: u64,
    /// Bytes of the card.
    pub capacity: u64,
}

impl Memory {
    /// An empty memory of `capacity` bytes. Devices get disjoint address ranges by `ordinal`.
    pub fn new(capacity: u64, ordinal: u64) -> Self {
        let next = GLOBAL_BASE + (ordinal << 44);
        Memory { allocations: BTreeMap::new(), freed: BTreeMap::new(), next, used: 0, capacity }
    }

    /// Goes on with the addresses of `old`, so that what is stale stays so.
    pub fn continue_from(&mut self, old: &Memory) {
        self.next = old.next;
        self.freed = old.freed.clone();
        self.freed.extend(old.allocations.values().filter(|a| a.host.is_null()).map(|a| (a.base, a.size)));
    }

    fn rounded(size: u64) -> u64 {
        size.next_multiple_of(512)
    }

    /// A new allocation, or None when the card is full.
    pub fn allocate(&mut self, size: u64, state: State) -> Option<u64> {
        let rounded = Self::rounded(size);
        if rounded > self.capacity - self.used.min(self.capacity) {
            return None;
        }
        let base = self.next;
        self.next += rounded + RED_ZONE;
        self.used += rounded;
        self.allocations.insert(base, Box::new(Allocation::new(base, size, state)));
        Some(base)
    }

    /// Makes pinned host memory visible to kernels at its own address.
    pub fn map_host(&mut self, host: *mut u8, size: u64) {
        self.allocations.insert(host as u64, Box::new(Allocation::pinned(host, size)));
    }

    /// Removes pinned memory; true if it was there.
    pub fn unmap_host(&mut self, host: u64) -> bool {
        self.allocations.remove(&host).is_some()
    }

    /// Frees an allocation by its first address; false if there is none.
    pub fn free(&mut self, base: u64) -> bool {
        let Some(allocation) = self.allocations.remove(&base) else { return false };
        self.used -= Self::rounded(allocation.size);
        self.freed.insert(base, allocation.size);
        true
    }

    /// The allocation that begins at `base`.
    pub fn at(&mut self, base: u64) -> Option<&mut Allocation> {
        self.allocations.get_mut(&base).map(Box::as_mut)
    }

    /// The live allocation that holds the whole range.
    pub fn find(&mut self, address: u64, len: u64) -> Option<&mut Allocation> {
        let (_, allocation) = self.allocations.range_mut(..=address).next_back()?;
        (allocation.state == State::Live && allocation.holds(address, len)).then_some(allocation)
    }

    /// The live allocation that holds `address`, and the offset in it.
    pub fn locate(&self, address: u64) -> Option<(u64, u64)> {
        let (base, allocation) = self.allocations.range(..=address).next_back()?;
        allocation.holds(address, 0).then_some((*base, allocation.size))
    }

    /// What an address that no allocation holds is near to, for a report.
    pub fn describe(&self, address: u64) -> String {
        if let Some((base, size)) = self.freed.range(..=address).next_back()
            && address - base < *size
        {
            return format!("{} bytes into a freed allocation of {size} bytes", address - base);
        }
        match self.allocations.range(..=address).next_back() {
            Some((base, a)) if a.holds(address, 0) && a.state == State::Pending => {
                format!("{} bytes into an allocation that its stream has not reached", address - base)
            }
            Some((base, a)) if a.holds(address, 0) => {
                format!(
                    "{} bytes into an allocation of {} bytes, running over its end",
                    address - base,
                    a.size
                )
            }
            Some((base, a)) if address - base - a.size < RED_ZONE => {
                format!("{} bytes past the end of an allocation of {} bytes", address - base - a.size, a.size)
            }
            _ => match self.allocations.range(address..).next() {
                Some((base, a)) if base - address < RED_ZONE => {
                    format!("{} bytes before an allocation of {} bytes", base - address, a.size)
                }
                _ => "near no allocation".into(),
            },
        }
    }

    /// Live allocations of device memory: address and bytes.
    pub fn list(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.allocations.values().filter(|a| a.host.is_null()).map(|a| (a.base, a.size))
    }

    /// Live allocations of device memory: count and bytes.
    pub fn live(&self) -> (u64, u64) {
        self.list().fold((0, 0), |(count, bytes), (_, size)| (count + 1, bytes + size))
    }
}
