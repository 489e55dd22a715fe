//! The kernels' images, embedded.

/// The PTX of `module`, which is the name of its source without `.cu`.
pub(crate) fn ptx(_module: &str) -> Option<&'static str> {
    None
}
