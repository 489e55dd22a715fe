//! Evaluation: tasks described in small files, their samples, what methods answer, and how sure the scores are.
//!
//! ```text
//! task.toml ─► Task ─┐
//! data.jsonl ─► Sample ─► Item { prompts, references or choices } ─► Runner over a Generator ─► SampleResult
//!                                                                        statistics ◄──────────────┘
//! ```
//!
//! A [`Task`] says how a sample becomes a prompt and how what comes back is scored: either a text is generated and an
//! answer extracted from it, or the log-likelihoods of given choices are compared. A [`Runner`] does it for one
//! method; its results come in the order of the samples, so that a file of them can be resumed, and shards of it
//! merged, to the byte.

mod chart;
mod data;
mod encode;
mod extract;
mod metrics;
pub mod porter;
pub mod rouge;
mod runner;
pub mod statistics;
mod summary;
mod task;
mod template;

pub use chart::{Chart, Point};
pub use data::{Sample, parse_samples, read_samples};
pub use encode::Encoder;
pub use extract::Extract;
pub use metrics::Metric;
pub use runner::{Decoding, Plan, Runner, SampleResult};
pub use statistics::Interval;
pub use summary::{MethodScores, Row, Scores, Summary};
pub use task::{BUILT_IN, Choices, Item, Kind, Prompt, Task};

/// A number that tells one text from another, the same on every machine and in every version: FNV-1a, 64 bits.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}
