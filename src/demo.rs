//! The demo ensemble, embedded in the binary. `models/demo/README.md` says what it is and how it was made.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::LlamaConfig;
use crate::ensemble::Ensemble;
use crate::error::Result;
use crate::model::{LlamaModel, Role};
use crate::weights::LlamaWeights;

/// What the demo ensemble is asked where nobody asks anything.
#[cfg(feature = "cli")]
pub(crate) const PROMPT: &str =
    "Question: Lily has 29 apples and gives 25 apples to Sue. How many apples does Lily have?\nAnswer:";

/// Bytes that start at an address that every dtype can be read at.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// The files of one model.
struct Files {
    role: Role,
    name: &'static str,
    config: &'static str,
    generation_config: &'static str,
    weights: &'static [u8],
}

macro_rules! file {
    ($dir:literal, $name:literal) => {
        concat!("../models/demo/", $dir, "/", $name)
    };
}

macro_rules! model {
    ($role:expr, $name:literal, $dir:literal) => {{
        static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!(file!($dir, "model.safetensors")));
        Files {
            role: $role,
            name: $name,
            config: include_str!(file!($dir, "config.json")),
            generation_config: include_str!(file!($dir, "generation_config.json")),
            weights: &WEIGHTS.0,
        }
    }};
}

impl Files {
    fn load(self) -> Result<LlamaModel> {
        let path = PathBuf::from("demo ensemble").join(self.name);
        let config =
            LlamaConfig::from_json(&path.join("config.json"), self.config, Some(self.generation_config))?;
        let weights = LlamaWeights::from_safetensors(&path.join("model.safetensors"), self.weights, &config)?;
        Ok(LlamaModel {
            role: self.role,
            name: self.name.to_owned(),
            path,
            config: Arc::new(config),
            weights: Arc::new(weights),
            adapter: None,
        })
    }
}

impl Ensemble {
    /// The demo ensemble in the binary: a large model that knows the people of a made-up town and how to add, a
    /// small one that knows less, and two experts that know how two tasks are answered, `facts` and `sums`.
    ///
    /// # Errors
    /// None but by a bug: the files are part of the program.
    pub fn demo() -> Result<Self> {
        let files = [
            model!(Role::Large, "large", "large"),
            model!(Role::Small, "small", "small"),
            model!(Role::Expert(0), "facts", "expert-facts"),
            model!(Role::Expert(1), "sums", "expert-sums"),
        ];
        let models = files.into_iter().map(Files::load).collect::<Result<Vec<_>>>()?;
        let ensemble = Self::from_models(models)?;
        #[cfg(feature = "tokenizer")]
        let ensemble = {
            let tokenizer = crate::tokenizer::Tokenizer::from_files(
                Path::new("demo ensemble"),
                crate::tokenizer::TokenizerFiles {
                    tokenizer: include_bytes!(file!("large", "tokenizer.json")),
                    config: Some(include_str!(file!("large", "tokenizer_config.json"))),
                    ..Default::default()
                },
            )?;
            let tokenizers = ensemble.models().iter().map(|_| Some(tokenizer.clone())).collect();
            ensemble.with_tokenizers(tokenizers)?
        };
        Ok(ensemble)
    }
}
