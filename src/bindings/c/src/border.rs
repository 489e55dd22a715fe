//! What crosses the border: statuses, messages, and borrowed memory.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::Error;

/// How a call ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum dlf_status {
    /// It did what it says.
    DLF_OK = 0,
    /// An argument is null, out of its range, or not what the models take.
    DLF_INVALID_ARGUMENT = 1,
    /// A model's files can't be read, or the models don't fit together.
    DLF_MODEL = 2,
    /// Logits are NaN or +infinity, or no token is left to choose from.
    DLF_NUMERIC = 3,
    /// The device can't be used, or its memory is too small.
    DLF_DEVICE = 4,
    /// The buffer is too small; the size that is needed was written.
    DLF_BUFFER_TOO_SMALL = 5,
    /// A bug of the library.
    DLF_INTERNAL = 6,
}

/// Token ids: `len` of them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dlf_tokens {
    /// May be null where `len` is 0.
    pub ids: *const u32,
    /// How many.
    pub len: usize,
}

impl dlf_tokens {
    pub(crate) const NONE: Self = Self { ids: std::ptr::null(), len: 0 };

    /// # Safety
    /// As [`slice`].
    pub(crate) unsafe fn get<'a>(self, what: &str) -> Result<&'a [u32], Failure> {
        // SAFETY: the caller's promise.
        unsafe { slice(self.ids, self.len, what) }
    }
}

/// A status and its message.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: dlf_status,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { status: dlf_status::DLF_INVALID_ARGUMENT, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { status: status_of(&error), message: error.to_string() }
    }
}

pub(crate) fn status_of(error: &Error) -> dlf_status {
    match error {
        Error::Parameter { .. }
        | Error::MissingModel { .. }
        | Error::EmptyPrompt { .. }
        | Error::TokenOutOfRange { .. }
        | Error::PromptTooLong { .. } => dlf_status::DLF_INVALID_ARGUMENT,
        Error::NotFinite { .. } | Error::NoCandidate { .. } => dlf_status::DLF_NUMERIC,
        Error::CacheFull { .. } | Error::Device { .. } | Error::Cuda { .. } => dlf_status::DLF_DEVICE,
        Error::Request { source, .. } => status_of(source),
        _ => dlf_status::DLF_MODEL,
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// What went wrong in the last call of this thread that failed, as UTF-8; empty where none has. It is valid until
/// another call of this thread fails.
#[unsafe(no_mangle)]
pub extern "C" fn dlf_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|message| message.as_ptr())
}

/// The library's version, such as "0.1.0". It is valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn dlf_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}

/// Keeps the message for [`dlf_last_error`].
pub(crate) fn remember(failure: &Failure) {
    // A message that quotes a NUL is cut there.
    let until_nul = failure.message.split('\0').next().unwrap_or_default();
    let message = CString::new(until_nul).unwrap_or_default();
    LAST_ERROR.with_borrow_mut(|last| *last = message);
}

/// Runs the body of a function: its failure, or its panic, becomes a status and a message.
pub(crate) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> dlf_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return dlf_status::DLF_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure { status: dlf_status::DLF_INTERNAL, message: panic_message(panic) },
    };
    remember(&failure);
    failure.status
}

fn panic_message(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let text = text.unwrap_or_else(|| "a panic".to_owned());
    // What was thrown may throw again where it is dropped.
    std::mem::forget(panic);
    format!("a bug of dlf-engine: {text}")
}

/// Frees what `Box::into_raw` gave; null is nothing.
///
/// # Safety
/// `handle` is null or comes from `Box::into_raw`, and nobody uses it any more.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: the caller's promise.
        let handle = unsafe { Box::from_raw(handle) };
        guard(|| {
            drop(handle);
            Ok(())
        });
    }
}

/// `len` values that the caller lends for the time of the call; null is no value where `len` is 0.
///
/// # Safety
/// `pointer` is null or points to `len` values that nobody changes during the call.
pub(crate) unsafe fn slice<'a, T>(pointer: *const T, len: usize, what: &str) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    check_pointer(pointer, len, what)?;
    // SAFETY: checked for null, alignment and size; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

fn check_pointer<T>(pointer: *const T, len: usize, what: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::invalid(format!("{what} is null")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::invalid(format!("{what} is not aligned to {} bytes", align_of::<T>())));
    }
    if len > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::invalid(format!("{what}: {len} values don't fit memory")));
    }
    Ok(())
}

/// A value that the caller lends; null is `None`.
///
/// # Safety
/// `pointer` is null or points to a valid value that nobody changes during the call.
pub(crate) unsafe fn optional<'a, T>(pointer: *const T, what: &str) -> Result<Option<&'a T>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    check_pointer(pointer, 1, what)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    Ok(unsafe { pointer.as_ref() })
}

/// A value that the caller lends.
///
/// # Safety
/// As [`optional`].
pub(crate) unsafe fn required<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, Failure> {
    // SAFETY: the caller's promise.
    unsafe { optional(pointer, what) }?.ok_or_else(|| Failure::invalid(format!("{what} is null")))
}

/// Where a result is to be written.
pub(crate) fn out<T>(pointer: *mut T, what: &str) -> Result<*mut T, Failure> {
    check_pointer(pointer, 1, what)?;
    Ok(pointer)
}

/// Where `len` results are to be written.
pub(crate) fn outs<T>(pointer: *mut T, len: usize, what: &str) -> Result<*mut T, Failure> {
    if len > 0 {
        check_pointer(pointer, len, what)?;
    }
    Ok(pointer)
}

/// A text that ends with NUL; null is `None`.
///
/// # Safety
/// `pointer` is null or points to a text that ends with NUL, and nobody changes it during the call.
pub(crate) unsafe fn optional_text<'a>(
    pointer: *const c_char,
    what: &str,
) -> Result<Option<&'a str>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not null; the rest is the caller's promise.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|_| Failure::invalid(format!("{what} is not UTF-8")))
}

/// Texts that end with NUL.
///
/// # Safety
/// As [`slice`] and [`optional_text`].
pub(crate) unsafe fn texts<'a>(
    pointer: *const *const c_char,
    len: usize,
    what: &str,
) -> Result<Vec<&'a str>, Failure> {
    // SAFETY: the caller's promise.
    let pointers = unsafe { slice(pointer, len, what) }?;
    let text = |&pointer: &*const c_char| {
        // SAFETY: the caller's promise.
        unsafe { optional_text(pointer, what) }?
            .ok_or_else(|| Failure::invalid(format!("one of {what} is null")))
    };
    pointers.iter().map(text).collect()
}
