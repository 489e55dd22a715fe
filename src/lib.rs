//! Llama inference for ensembles: a large model, a small one, and experts fine-tuned from the small one, decoded
//! together by *Dynamic Logits Fusion* (NeurIPS 2024).

pub mod adapter;
pub mod backend;
pub mod config;
mod ensemble;
mod error;
pub mod fusion;
mod json;
pub mod kv_cache;
pub mod model;
pub mod rope;
pub mod sampling;
#[cfg(feature = "tokenizer")]
pub mod tokenizer;
pub mod weights;

pub use ensemble::{Ensemble, EnsembleSpec, ExpertSpec, Memory};
pub use error::{Error, Result};
