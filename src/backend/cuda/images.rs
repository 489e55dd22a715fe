//! The kernels' images, embedded by build.rs: PTX for compute_80, one for each source in kernels/.

/// Name and PTX.
const IMAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The PTX of `module`, which is the name of its source without `.cu`.
pub(crate) fn ptx(module: &str) -> Option<&'static str> {
    IMAGES.iter().find(|(name, _)| *name == module).map(|&(_, ptx)| ptx)
}
