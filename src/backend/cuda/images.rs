//! The kernels' images, embedded by build.rs: PTX for compute_80, one for each source in kernels/.
//!
//! A driver compiles PTX for its chip as it loads it, all kernels of an image at once, and most of them for nothing: models
//! use one dtype, one size of head, few sizes of batches. So each kernel is cut out of its image and loaded by itself.

/// Name and PTX.
const IMAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// What a kernel begins with: its name follows.
const ENTRY: &str = "\n.visible .entry ";

/// The image of `module`, which is the name of its source without `.cu`.
pub(crate) fn image(module: &str) -> Option<&'static str> {
    IMAGES.iter().find(|(name, _)| *name == module).map(|&(_, image)| image)
}

/// The kernels of an image: the name and the text of each.
pub(crate) fn kernels(image: &str) -> impl Iterator<Item = (&str, &str)> {
    // Before the first come versions and variables.
    image.split(ENTRY).skip(1).filter_map(|kernel| Some((kernel.split_once('(')?.0, kernel)))
}

/// An image with none of its kernels but `symbol`.
pub(crate) fn cut(image: &str, symbol: &str) -> Option<String> {
    let (head, _) = image.split_once(ENTRY)?;
    let (_, kernel) = kernels(image).find(|(name, _)| *name == symbol)?;
    Some([head, ENTRY, kernel].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_cut_out_whole() {
        for (module, image) in IMAGES {
            let all: Vec<_> = kernels(image).collect();
            assert_eq!(all.len(), image.matches(".entry").count(), "{module}");
            // Nothing stands between kernels, or they would depend on each other.
            assert!(!image.contains(".func"), "{module}");
            for (symbol, kernel) in all {
                let end = kernel.rfind("\n}").unwrap();
                let rest = kernel[end + 2..].lines().map(str::trim);
                assert!(rest.into_iter().all(|line| line.is_empty() || line.starts_with("//")), "{symbol}");
                let ptx = cut(image, symbol).unwrap();
                assert!(ptx.contains(".target sm_80") && ptx.contains(&format!(".entry {symbol}(")));
                assert_eq!(ptx.matches(".entry").count(), 1, "{symbol}");
            }
        }
        assert_eq!((image("gemv"), cut(image("gemv_bf16").unwrap(), "qkv_bf16")), (None, None));
    }
}
