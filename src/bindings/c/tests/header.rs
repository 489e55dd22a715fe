//! The checked-in header is what the sources say. `DLF_UPDATE_HEADER=1 cargo test -p dlf-engine-c --test header` writes it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::path::Path;

#[test]
fn the_header_is_current() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(dir.join("cbindgen.toml")).unwrap();
    let sources = ["border.rs", "rule.rs", "decision.rs", "fuse.rs", "ensemble.rs"];
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |builder, source| {
        builder.with_src(dir.join("src").join(source))
    });
    let mut generated = Vec::new();
    builder.generate().unwrap().write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    assert!(generated.contains("enum dlf_status dlf_fuse("), "{generated}");

    let path = dir.join("include/dlf_engine.h");
    if std::env::var_os("DLF_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert_eq!(kept, generated, "run this test with DLF_UPDATE_HEADER=1");
}
