//! The kernels' images, embedded by build.rs: PTX for compute_80, one for each source in kernels/.
//!
//! A driver compiles PTX for its chip as it loads it, all kernels of an image at once, and most of them for nothing: models
//! use one dtype, one size of head, few sizes of batches. So each kernel is cut out of its image and loaded by itself.

/// Name and PTX.
const IMAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// What a kernel begins with: its name follows.
const ENTRY: &str = "\n.visible .entry ";

/// The kernels of `module`, which is the name of its source without `.cu`: the name and the text of each.
pub(crate) fn kernels(module: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let (_, kernels) = parts(module).unwrap_or_default();
    kernels.split(ENTRY).filter_map(|kernel| Some((kernel.split_once('(')?.0, kernel)))
}

/// The PTX of `module` with none of its kernels but `symbol`.
pub(crate) fn ptx(module: &str, symbol: &str) -> Option<String> {
    let (head, _) = parts(module)?;
    let (_, kernel) = kernels(module).find(|(name, _)| *name == symbol)?;
    Some([head, ENTRY, kernel].concat())
}

/// What comes before the first kernel (versions and variables), and the kernels.
fn parts(module: &str) -> Option<(&'static str, &'static str)> {
    IMAGES.iter().find(|(name, _)| *name == module)?.1.split_once(ENTRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_cut_out_whole() {
        for (module, image) in IMAGES {
            let cut: Vec<_> = kernels(module).collect();
            assert_eq!(cut.len(), image.matches(".entry").count(), "{module}");
            // Nothing stands between kernels, or they would depend on each other.
            assert!(!image.contains(".func"), "{module}");
            for (symbol, kernel) in cut {
                let end = kernel.rfind("\n}").unwrap();
                let rest = kernel[end + 2..].lines().map(str::trim);
                assert!(rest.into_iter().all(|line| line.is_empty() || line.starts_with("//")), "{symbol}");
                let ptx = ptx(module, symbol).unwrap();
                assert!(ptx.contains(".target sm_80") && ptx.contains(&format!(".entry {symbol}(")));
                assert_eq!(ptx.matches(".entry").count(), 1, "{symbol}");
            }
        }
        assert_eq!((ptx("gemv", "qkv_bf16_1"), ptx("gemv_bf16", "qkv_bf16")), (None, None));
    }
}
