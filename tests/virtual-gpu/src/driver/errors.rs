//! Error names and texts. The text of an error that a finding caused ends in that finding, and so does what is wrong with
//! the environment.

use super::{entry, give};
use crate::device::code;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::sync::{Mutex, PoisonError};

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Texts given out; they must live for ever, so equal ones are made once.
static TEXTS: Mutex<Option<HashMap<String, &'static std::ffi::CStr>>> = Mutex::new(None);

/// Keeps the text of the last finding of this thread.
pub fn remember(text: &str) {
    LAST.set(text.to_string());
}

fn forever(text: String) -> *const c_char {
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let texts = texts.get_or_insert_with(HashMap::new);
    if let Some(known) = texts.get(&text) {
        return known.as_ptr();
    }
    let c: &'static std::ffi::CStr =
        Box::leak(CString::new(text.replace('\0', " ")).unwrap_or_default().into_boxed_c_str());
    texts.insert(text, c);
    c.as_ptr()
}

fn name_and_text(error: i32) -> Option<(&'static str, &'static str)> {
    Some(match error {
        0 => ("CUDA_SUCCESS", "no error"),
        code::INVALID_VALUE => ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
        code::OUT_OF_MEMORY => ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
        3 => ("CUDA_ERROR_NOT_INITIALIZED", "initialization error"),
        code::NO_DEVICE => ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
        code::INVALID_DEVICE => ("CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"),
        200 => ("CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"),
        code::INVALID_CONTEXT => ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
        code::NO_BINARY_FOR_GPU => {
            ("CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device")
        }
        code::INVALID_PTX => ("CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"),
        code::UNSUPPORTED_PTX_VERSION => (
            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
            "the provided PTX was compiled with an unsupported toolchain.",
        ),
        code::FILE_NOT_FOUND => ("CUDA_ERROR_FILE_NOT_FOUND", "file not found"),
        code::INVALID_HANDLE => ("CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"),
        code::NOT_FOUND => ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
        code::NOT_READY => ("CUDA_ERROR_NOT_READY", "device not ready"),
        code::ILLEGAL_ADDRESS => ("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
        701 => ("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"),
        code::LAUNCH_TIMEOUT => ("CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"),
        code::ILLEGAL_INSTRUCTION => {
            ("CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered")
        }
        code::MISALIGNED_ADDRESS => ("CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"),
        code::LAUNCH_FAILED => ("CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"),
        code::COOPERATIVE_LAUNCH_TOO_LARGE => {
            ("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch")
        }
        code::NOT_SUPPORTED => ("CUDA_ERROR_NOT_SUPPORTED", "operation not supported"),
        code::CAPTURE_UNSUPPORTED => {
            ("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing")
        }
        code::CAPTURE_INVALIDATED => (
            "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            "operation failed due to a previous error during capture",
        ),
        code::CAPTURE_UNMATCHED => (
            "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
            "operation failed because the stream is not the origin of the capture",
        ),
        code::CAPTURE_UNJOINED => {
            ("CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work")
        }
        code::CAPTURE_ISOLATION => {
            ("CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream")
        }
        code::UNKNOWN => ("CUDA_ERROR_UNKNOWN", "unknown error"),
        _ => return None,
    })
}

/// Whether the last finding belongs into the text of this error.
fn explained(error: i32) -> bool {
    matches!(
        error,
        code::NO_DEVICE
            | code::ILLEGAL_ADDRESS
            | code::MISALIGNED_ADDRESS
            | code::LAUNCH_FAILED
            | code::LAUNCH_TIMEOUT
            | code::ILLEGAL_INSTRUCTION
            | code::INVALID_PTX
            | code::NO_BINARY_FOR_GPU
            | code::UNSUPPORTED_PTX_VERSION
            | code::NOT_SUPPORTED
    )
}

entry! {
    fn cuGetErrorName(error: i32, text: *mut *const c_char) {
        let Some((name, _)) = name_and_text(error) else { return Err(code::INVALID_VALUE) };
        give(text, forever(name.to_string()))
    }

    fn cuGetErrorString(error: i32, text: *mut *const c_char) {
        let Some((_, message)) = name_and_text(error) else { return Err(code::INVALID_VALUE) };
        let last = LAST.with_borrow(String::clone);
        let full = if explained(error) && !last.is_empty() { format!("{message} [{last}]") } else { message.into() };
        give(text, forever(full))
    }
}
