//! Hugging Face directories of tiny random models, written by the format's own crate.
#![allow(dead_code)] // each test file takes what it needs

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

/// Name, shape and f32 bytes.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// config.json of a model with 24 ids and 2 layers.
pub(crate) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 24, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
    })
}

/// A config with fields changed.
pub(crate) fn config_with(changes: Value) -> Value {
    let mut config = config();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

/// The tensors that a config asks for: names and shapes are written out here, not taken from the loader.
pub(crate) fn tensors(config: &Value) -> Tensors {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let (hidden, inner, vocab) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let (queries, keys) =
        (size("num_attention_heads") * size("head_dim"), size("num_key_value_heads") * size("head_dim"));
    let flag = |field: &str| config.get(field).and_then(Value::as_bool) == Some(true);
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let start = tensors.len() as f32;
        let count = shape.iter().product::<usize>();
        let bytes = (0..count).flat_map(|i| (start + i as f32 / 64.0).to_le_bytes()).collect();
        tensors.insert(name, (shape.to_vec(), bytes));
    };
    add("model.embed_tokens.weight".to_owned(), &[vocab, hidden]);
    add("model.norm.weight".to_owned(), &[hidden]);
    if !flag("tie_word_embeddings") {
        add("lm_head.weight".to_owned(), &[vocab, hidden]);
    }
    for layer in 0..size("num_hidden_layers") {
        let projections = [
            ("self_attn.q_proj", queries, hidden, "attention_bias"),
            ("self_attn.k_proj", keys, hidden, "attention_bias"),
            ("self_attn.v_proj", keys, hidden, "attention_bias"),
            ("self_attn.o_proj", hidden, queries, "attention_bias"),
            ("mlp.gate_proj", inner, hidden, "mlp_bias"),
            ("mlp.up_proj", inner, hidden, "mlp_bias"),
            ("mlp.down_proj", hidden, inner, "mlp_bias"),
        ];
        for (name, rows, columns, bias) in projections {
            add(format!("model.layers.{layer}.{name}.weight"), &[rows, columns]);
            if flag(bias) {
                add(format!("model.layers.{layer}.{name}.bias"), &[rows]);
            }
        }
        add(format!("model.layers.{layer}.input_layernorm.weight"), &[hidden]);
        add(format!("model.layers.{layer}.post_attention_layernorm.weight"), &[hidden]);
    }
    tensors
}

/// A safetensors file.
pub(crate) fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    serialize(views, None).unwrap()
}

/// Writes config.json and model.safetensors.
pub(crate) fn write_model(dir: &Path, config: &Value) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors(&tensors(config))).unwrap();
}

/// Writes a LoRA adapter of rank 2, `lora_alpha` 4, over q_proj of layer 0 and down_proj of layer 1 of [`config`].
pub(crate) fn write_adapter(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let adapter = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"});
    std::fs::write(dir.join("adapter_config.json"), adapter.to_string()).unwrap();
    let mut tensors = Tensors::new();
    for (module, out, input) in [("layers.0.self_attn.q_proj", 24, 8), ("layers.1.mlp.down_proj", 8, 12)] {
        for (matrix, shape) in [("A", [2, input]), ("B", [out, 2])] {
            let name = format!("base_model.model.model.{module}.lora_{matrix}.weight");
            tensors.insert(name, (shape.to_vec(), vec![0; shape[0] * shape[1] * 4]));
        }
    }
    std::fs::write(dir.join("adapter_model.safetensors"), safetensors(&tensors)).unwrap();
}
