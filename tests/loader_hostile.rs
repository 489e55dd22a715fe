//! Hostile files: whatever stands in them, loading ends soon, in an error that names the file or in something usable.
#![allow(clippy::unwrap_used)] // a test may panic

#[path = "support/allocator.rs"]
mod allocator;
#[path = "support/directory.rs"]
mod directory;
#[path = "support/vocabulary.rs"]
mod vocabulary;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use dlf_engine::adapter::LoraAdapter;
use dlf_engine::config::LlamaConfig;
use dlf_engine::tokenizer::{Tokenizer, TokenizerFiles};
use dlf_engine::weights::LlamaWeights;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use serde_json::{Value, json};
use tempfile::TempDir;

/// No file here is longer than some kilobytes. What they may claim: 2²⁴ token ids, eight bytes each.
const MOST_BYTES: usize = 160 << 20;

fn parse(config: &Value) -> LlamaConfig {
    LlamaConfig::from_json(Path::new("config.json"), &config.to_string(), None).unwrap()
}

/// Weights from a file in memory.
fn from_bytes(bytes: Vec<u8>, config: &LlamaConfig) -> dlf_engine::Result<LlamaWeights> {
    // Tests are short: what they leak the system takes back.
    LlamaWeights::from_safetensors(Path::new("model.safetensors"), bytes.leak(), config)
}

/// Loads, and gives what was loaded; an error must name a file of `dir`, or `dir` where that lacks one.
fn ends_well<T>(
    dir: &Path,
    load: impl FnOnce() -> dlf_engine::Result<T>,
) -> Result<Option<T>, TestCaseError> {
    let started = Instant::now();
    let loaded = load();
    prop_assert!(started.elapsed() < Duration::from_secs(5));
    prop_assert!(allocator::largest() < MOST_BYTES, "{} bytes at once", allocator::largest());
    match loaded {
        Ok(loaded) => Ok(Some(loaded)),
        Err(error) => {
            let named = error.to_string().starts_with(dir.to_str().unwrap());
            prop_assert!(named, "{error}");
            Ok(None)
        }
    }
}

/// A JSON value that is anything but what a field should be.
fn junk() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0_u64..5).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9\\-]{0,6}".prop_map(Value::from),
        proptest::collection::vec(any::<i64>(), 0..4).prop_map(Value::from),
        Just(json!({"rope_type": "yarn", "factor": 0})),
        Just(json!({"rope_type": "llama3"})),
        Just(json!({"a": {"b": [null]}})),
    ]
}

/// Sets a field of the tree, found by counting `at` down through all of them.
fn corrupt(value: &mut Value, at: &mut usize, junk: &Value) -> bool {
    if *at == 0 {
        *value = junk.clone();
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| corrupt(item, at, junk)),
        Value::Object(fields) => fields.iter_mut().any(|(_, field)| corrupt(field, at, junk)),
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn hostile_configurations(field in 0_usize..16, value in junk(), extra in "[a-z_]{1,20}") {
        let mut config = directory::config();
        let names: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        let name = names.get(field).unwrap_or(&extra);
        config[name] = value;
        match LlamaConfig::from_json(Path::new("dir/config.json"), &config.to_string(), Some(&config.to_string())) {
            // What loads must be usable: no frequency may be NaN, no size absurd.
            Ok(config) => {
                let rope = dlf_engine::rope::Rope::new(&config);
                prop_assert!(rope.inv_freq().iter().all(|f| f.is_finite()), "{config:?}");
                prop_assert!(config.context() > 0 && config.kv_bytes_per_token() > 0);
            }
            Err(error) => prop_assert!(error.to_string().starts_with("dir/"), "{error}"),
        }
    }

    #[test]
    fn hostile_rope(kind in prop::sample::select(vec!["linear", "dynamic", "llama3", "yarn"]),
            numbers in proptest::collection::vec(prop_oneof![Just(0.0), Just(1.0), Just(1e6), 1e-9..1e9, any::<f64>()], 8)) {
        let names = ["rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale"];
        let mut rope = json!({"rope_type": kind, "mscale_all_dim": 1, "original_max_position_embeddings": 1});
        for (name, number) in names.iter().zip(numbers) {
            rope[*name] = json!(number);
        }
        let config = directory::config_with(json!({"rope_parameters": rope}));
        if let Ok(config) = LlamaConfig::from_json(Path::new("config.json"), &config.to_string(), None) {
            let rope = dlf_engine::rope::Rope::new(&config);
            let (mut cos, mut sin) = ([0.0; 3], [0.0; 3]);
            rope.cos_sin(100, &mut cos, &mut sin);
            prop_assert!(cos.iter().chain(&sin).all(|x| x.is_finite()), "{config:?} {cos:?}");
        }
    }

    #[test]
    fn truncated_and_damaged_safetensors(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let config = parse(&directory::config());
        let whole = directory::safetensors(&directory::tensors(&directory::config()));
        let started = Instant::now();
        let truncated = whole[..cut.index(whole.len())].to_vec();
        let message = from_bytes(truncated, &config).unwrap_err().to_string();
        prop_assert!(message.starts_with("model.safetensors: "), "{message}");
        // A damaged byte of the header; one of the data is a number like any other.
        let mut damaged = whole.clone();
        let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        damaged[at.index(8 + length)] = byte;
        if let Err(error) = from_bytes(damaged, &config) {
            prop_assert!(error.to_string().starts_with("model.safetensors: "), "{error}");
        }
        prop_assert!(started.elapsed() < Duration::from_secs(5));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn hostile_tokenizers(at in 0_usize..700, value in junk(), cut in any::<prop::sample::Index>(), kind in any::<bool>()) {
        let mut tokenizer = if kind { vocabulary::byte_level() } else { vocabulary::sentencepiece() };
        // Most of the 700 are entries of the vocabulary: every other time, one of the few other fields.
        let mut at = if at % 2 == 0 { at } else { at % 90 };
        corrupt(&mut tokenizer, &mut at, &value);
        let text = tokenizer.to_string();
        let load = |text: &[u8]| {
            Tokenizer::from_files(Path::new("dir"), TokenizerFiles { tokenizer: text, ..TokenizerFiles::default() })
        };
        match load(text.as_bytes()) {
            Ok(tokenizer) => {
                // Whatever loads must not panic either.
                if let Ok(ids) = tokenizer.encode("the cat 猫 <s>", true) {
                    tokenizer.decode(&ids);
                }
                let all: Vec<u32> = (0..300).collect();
                tokenizer.decode(&all);
            }
            Err(error) => prop_assert!(error.to_string().starts_with("dir/tokenizer.json: "), "{error}"),
        }
        let error = load(&text.as_bytes()[..cut.index(text.len())]).unwrap_err();
        prop_assert!(error.to_string().starts_with("dir/tokenizer.json: "), "{error}");
    }
}

/// A file's text with one field turned into junk, or one more field, or its end cut off.
fn spoil(
    mut value: Value,
    (at, junk, name, cut): &(usize, Value, String, Option<prop::sample::Index>),
) -> Vec<u8> {
    if !corrupt(&mut value, &mut at.clone(), junk)
        && let Some(object) = value.as_object_mut()
    {
        object.insert(name.clone(), junk.clone());
    }
    let mut text = value.to_string().into_bytes();
    if let Some(cut) = cut {
        text.truncate(cut.index(text.len()));
    }
    text
}

/// How a file of about `fields` fields is spoilt; among junk are names that lead elsewhere.
fn spoiling(fields: usize) -> impl Strategy<Value = (usize, Value, String, Option<prop::sample::Index>)> {
    let names = [
        "..",
        "../model.safetensors",
        "/dev/zero",
        "a\0b",
        "config.json",
        "model.safetensors.index.json",
        ".",
    ];
    let junk = prop_oneof![3 => junk(), 1 => prop::sample::select(names.to_vec()).prop_map(Value::from)];
    let extra = prop_oneof![
        "[a-z_.]{1,12}",
        Just("rank_pattern".to_owned()),
        Just("eos_token_id".to_owned()),
        Just("modules_to_save".to_owned())
    ];
    let cut = prop::option::weighted(0.2, any::<prop::sample::Index>());
    (0..fields + 2, junk, extra, cut)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn hostile_indices(spoiling in spoiling(24), extra in "[a-z.]{1,8}") {
        let dir = TempDir::new().unwrap();
        let config = directory::config();
        let tensors = directory::tensors(&config);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        fs::write(dir.path().join("shard.safetensors"), directory::safetensors(&tensors)).unwrap();
        let names = tensors.keys().chain([&extra]);
        let map: serde_json::Map<String, Value> = names.map(|name| (name.clone(), json!("shard.safetensors"))).collect();
        let mut index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        index["weight_map"].as_object_mut().unwrap().shift_remove(&extra);
        fs::write(dir.path().join("model.safetensors.index.json"), spoil(index, &spoiling)).unwrap();
        let config = parse(&config);
        if let Some(weights) = ends_well(dir.path(), || LlamaWeights::load(dir.path(), &config))? {
            prop_assert_eq!(weights.layers.len(), 2);
        }
    }

    #[test]
    fn hostile_adapter_configurations(spoiling in spoiling(14)) {
        let dir = TempDir::new().unwrap();
        directory::write_adapter(dir.path());
        let adapter = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": false,
            "use_dora": false, "init_lora_weights": true, "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"^model.layers.1.mlp.down_proj": 8}, "modules_to_save": null, "fan_in_fan_out": false});
        fs::write(dir.path().join("adapter_config.json"), spoil(adapter, &spoiling)).unwrap();
        let config = parse(&directory::config());
        if let Some(adapter) = ends_well(dir.path(), || LoraAdapter::load(dir.path(), &config))? {
            let mut deltas = adapter.layers.iter().flat_map(|layer| layer.deltas.iter().flatten());
            prop_assert!(deltas.all(|delta| delta.scale.is_finite()));
        }
    }

    #[test]
    fn truncated_and_damaged_adapters(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let dir = TempDir::new().unwrap();
        directory::write_adapter(dir.path());
        let path = dir.path().join("adapter_model.safetensors");
        let whole = fs::read(&path).unwrap();
        let config = parse(&directory::config());
        fs::write(&path, &whole[..cut.index(whole.len())]).unwrap();
        prop_assert!(ends_well(&path, || LoraAdapter::load(dir.path(), &config))?.is_none());
        let mut damaged = whole.clone();
        let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        damaged[at.index(8 + length)] = byte;
        fs::write(&path, damaged).unwrap();
        ends_well(&path, || LoraAdapter::load(dir.path(), &config))?;
    }

    #[test]
    fn hostile_generation_configurations(spoiling in spoiling(7)) {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("config.json"), directory::config().to_string()).unwrap();
        let generation = json!({"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "do_sample": true});
        let path = dir.path().join("generation_config.json");
        fs::write(&path, spoil(generation, &spoiling)).unwrap();
        if let Some(config) = ends_well(&path, || LlamaConfig::load(dir.path()))? {
            prop_assert!(config.eos_token_ids.contains(&2), "config.json has it");
        }
    }
}
