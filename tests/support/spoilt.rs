//! The demo's large model as a directory of its own, with something in it spoilt.

use std::path::Path;
use std::sync::Arc;

use dlf_engine::{Ensemble, EnsembleSpec};
use safetensors::SafeTensors;
use serde_json::Value;

/// Loads the large model alone, from a copy that `spoil` has changed.
pub(crate) fn large(spoil: impl FnOnce(&Path)) -> Arc<Ensemble> {
    let copy = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo/large");
    for file in std::fs::read_dir(demo).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    spoil(copy.path());
    let spec = EnsembleSpec { large: Some(copy.path().to_owned()), ..EnsembleSpec::default() };
    // A mapped file lives on without its name.
    Arc::new(Ensemble::load(&spec).unwrap())
}

/// Replaces the chat template.
pub(crate) fn chat_template(dir: &Path, template: &str) {
    let path = dir.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = template.into();
    std::fs::write(&path, config.to_string()).unwrap();
}

/// Unties the embedding, and makes that of one token NaN: what reads this token fails, and nothing else.
pub(crate) fn nan_embedding(dir: &Path, token: u32) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = false.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let whole = model.tensor(embedding).unwrap();
    let mut spoilt = whole.data().to_vec();
    let row = spoilt.len() / whole.shape()[0];
    for number in spoilt[token as usize * row..][..row].chunks_exact_mut(2) {
        number.copy_from_slice(&half::bf16::NAN.to_le_bytes());
    }
    let spoilt =
        safetensors::tensor::TensorView::new(whole.dtype(), whole.shape().to_vec(), &spoilt).unwrap();
    let tensors = model.tensors().into_iter().filter(|(name, _)| name != embedding);
    let tensors = tensors.chain([(embedding.to_owned(), spoilt), (head.to_owned(), whole)]);
    let spoilt = safetensors::tensor::serialize(tensors, None).unwrap();
    std::fs::write(&path, spoilt).unwrap();
}
