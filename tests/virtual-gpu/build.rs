//! Gives the cdylib the SONAME of the driver, so that a program which later asks for `libcuda.so` gets the one
//! already loaded.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
