//! Tiny ensembles with random weights.

use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::config::LlamaConfig;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::{Dtype, LlamaWeights};

/// `max_position_embeddings` of the models.
pub(crate) const CONTEXT: usize = 1024;

/// A large model, a small one and `experts` experts over 97 token ids, without tokenizers.
pub(crate) fn ensemble(experts: usize) -> Ensemble {
    let mut models = vec![model(Role::Large, 32, 1), model(Role::Small, 16, 2)];
    models.extend((0..experts).map(|t| model(Role::Expert(t), 16, 3 + t as u64)));
    Ensemble::from_models(models).unwrap()
}

fn model(role: Role, hidden_size: usize, seed: u64) -> LlamaModel {
    let json = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": {hidden_size},
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 97, "max_position_embeddings": {CONTEXT}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 95, "eos_token_id": 96}}"#
    );
    let config = LlamaConfig::from_json("config.json".as_ref(), &json, None).unwrap();
    let weights = Arc::new(LlamaWeights::random(&config, Dtype::F32, seed));
    let (name, path) = (role.to_string(), "memory".into());
    LlamaModel { role, name, path, config: Arc::new(config), weights, adapter: None }
}
