//! Llama inference for ensembles: a large model, a small one, and experts fine-tuned from the small one, decoded
//! together by *Dynamic Logits Fusion* (NeurIPS 2024).
//!
//! ```text
//! files ─► Ensemble ─► Generator ─► Step { token, text, α, KL … }
//!                        │   ▲
//!              Batch of rows │ Decisions
//!                        ▼   │
//!                       Backend: forward (large; small and experts in lockstep), fuse
//! ```
//!
//! An [`Ensemble`] is immutable and shared. A [`Generator`] takes [`Request`]s, keeps them in flight together, and
//! is an iterator of [`Step`]s; what a step decided, and by which numbers, is its [`fusion::Decision`]. A
//! [`backend::Backend`] runs the models.

pub mod adapter;
pub mod backend;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
mod demo;
mod ensemble;
mod error;
#[cfg(feature = "eval")]
pub mod eval;
pub mod fusion;
pub mod generate;
mod json;
pub mod kv_cache;
pub mod model;
#[cfg(feature = "cli")]
pub mod plot;
pub mod rope;
pub mod sampling;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(feature = "tokenizer")]
pub mod tokenizer;
pub mod weights;

pub use backend::{BackendOptions, Device, Limits};
pub use ensemble::{Ensemble, EnsembleSpec, ExpertSpec, Memory};
pub use error::{Error, Result};
pub use fusion::FusionRule;
pub use generate::{Generator, Request, Step};
pub use sampling::SamplingParams;

/// The README's example is a test.
#[cfg(all(doctest, feature = "demo", feature = "tokenizer"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// So is the guide to embedding.
#[cfg(all(doctest, feature = "demo", feature = "tokenizer"))]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
