//! Embeds the kernels' images, after a look whether they are those of the sources: the engine's, and those that the
//! benchmarks hold them against.
//!
//! Needs no CUDA. Where `DLF_NVCC` names an nvcc, the images are compiled with that one instead of taken from
//! kernels/ptx; a toolkit that merely happens to be installed is never used.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=benches/kernels");
    println!("cargo::rerun-if-env-changed=DLF_NVCC");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    for (folder, table) in [("kernels", "images.rs"), ("benches/kernels", "bench_images.rs")] {
        let images = match env::var_os("DLF_NVCC") {
            Some(nvcc) => compile(Path::new(&nvcc), &root, folder, &out)?,
            None => prebuilt(&root, folder)?,
        };
        let mut text = String::from("&[\n");
        for image in &images {
            let name = image.file_stem().unwrap_or_default().to_string_lossy();
            let path = image.display().to_string();
            writeln!(text, "    ({name:?}, include_str!({path:?})),")?;
        }
        fs::write(out.join(table), text + "]\n")?;
    }
    Ok(())
}

/// The images in `folder`/ptx, whose MANIFEST must be that of the files as they are.
fn prebuilt(root: &Path, folder: &str) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let manifest = root.join(folder).join("ptx/MANIFEST");
    let text = fs::read_to_string(&manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
    let mut images = Vec::new();
    let mut sources = 0;
    for line in text.lines() {
        let (hash, name) = line.split_once(' ').ok_or_else(|| format!("{}: {line:?}", manifest.display()))?;
        let path = root.join(name);
        let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if fnv1a(&bytes) != hash {
            return Err(stale(name).into());
        }
        match path.extension().is_some_and(|extension| extension == "ptx") {
            true => images.push(path),
            false if path.parent() == Some(root.join(folder).as_path()) => sources += 1,
            // A header of kernels/ that another folder includes.
            false => {}
        }
    }
    if sources != find(&root.join(folder), &["cu", "cuh"])?.len() {
        return Err(stale(&format!("the list of files in {folder}")).into());
    }
    Ok(images)
}

fn stale(what: &str) -> String {
    format!(
        "{what} is not what the images were made from: run tools/build_kernels.py (Python 3, no CUDA needed), or \
         set DLF_NVCC to an nvcc of CUDA 12 or newer"
    )
}

/// The images as this nvcc makes them.
fn compile(nvcc: &Path, root: &Path, folder: &str, out: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut images = Vec::new();
    for source in find(&root.join(folder), &["cu"])? {
        let image = out.join(source.with_extension("ptx").file_name().unwrap_or_default());
        let options = ["-ptx", "-arch=compute_80", "-std=c++17", "-O3", "-o"];
        let mut command = Command::new(nvcc);
        let status =
            command.args(options).arg(&image).arg("-I").arg(root.join("kernels")).arg(&source).status();
        match status {
            Ok(status) if status.success() => images.push(image),
            Ok(status) => return Err(format!("{command:?}: {status}").into()),
            Err(error) => return Err(format!("DLF_NVCC={}: {error}", nvcc.display()).into()),
        }
    }
    Ok(images)
}

/// The files of a directory with one of these extensions, in order.
fn find(directory: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        if extensions.contains(&&*extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// FNV-1a, which tools/build_kernels.py computes, too.
fn fnv1a(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    format!("{hash:016x}")
}
