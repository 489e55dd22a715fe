//! Arrays that begin as zero bytes without being written: their pages cost nothing until they are used.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Plain data of which zero bytes are a value.
///
/// # Safety
/// Zero bytes must be a valid value of the type, and it must not need dropping.
pub unsafe trait Zero: Copy {}

/// A boxed slice that was zero bytes at first. A `vec![zero; n]` of a struct writes all of its elements.
pub struct Zeroed<T: Zero> {
    first: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its elements, as a box does.
unsafe impl<T: Zero + Send> Send for Zeroed<T> {}

impl<T: Zero> Zeroed<T> {
    /// `len` elements of zero bytes.
    pub fn new(len: usize) -> Self {
        const { assert!(size_of::<T>() > 0) };
        let Ok(layout) = Layout::array::<T>(len) else { handle_alloc_error(Layout::new::<T>()) };
        if len == 0 {
            return Zeroed { first: NonNull::dangling(), len };
        }
        // SAFETY: the layout is not empty.
        let Some(first) = NonNull::new(unsafe { alloc_zeroed(layout) }.cast()) else {
            handle_alloc_error(layout)
        };
        Zeroed { first, len }
    }
}

impl<T: Zero> Default for Zeroed<T> {
    fn default() -> Self {
        Zeroed::new(0)
    }
}

impl<T: Zero> Drop for Zeroed<T> {
    fn drop(&mut self) {
        if let (true, Ok(layout)) = (self.len > 0, Layout::array::<T>(self.len)) {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.first.as_ptr().cast(), layout) };
        }
    }
}

impl<T: Zero> Deref for Zeroed<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were allocated, and zero bytes are a value of each.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T: Zero> DerefMut for Zeroed<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}
