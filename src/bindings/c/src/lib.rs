//! The engine as a C library. `include/dlf_engine.h` is generated from these files; `docs/embedding.md` shows its use.
//!
//! What holds for every function, and stands once here instead of under `# Safety` everywhere: a pointer is null,
//! where its documentation allows that, or points to as many valid values as it says for the time of the call; a
//! handle comes from the function that makes it and wasn't freed. Null where it isn't allowed, numbers out of their
//! range and texts that aren't UTF-8 are answered with a status. No panic crosses the border.
#![allow(non_camel_case_types, reason = "names as C has them")]
#![allow(clippy::missing_safety_doc, reason = "it is the same for all, above")]

mod border;
mod decision;
mod ensemble;
mod fuse;
mod rule;
