//! Model directories: what loads, and that whatever doesn't is an error that names the file.
#![allow(clippy::unwrap_used)] // a test may panic

#[path = "support/directory.rs"]
mod directory;

use std::fs;
use std::path::Path;

use dlf_engine::Error;
use dlf_engine::adapter::LoraAdapter;
use dlf_engine::config::LlamaConfig;
use dlf_engine::tokenizer::Tokenizer;
use dlf_engine::weights::{Dtype, LlamaWeights, Tensor, TensorData};
use half::{bf16, f16};
use serde_json::{Value, json};

fn parse(config: &Value) -> LlamaConfig {
    LlamaConfig::from_json(Path::new("config.json"), &config.to_string(), None).unwrap()
}

fn load(dir: &Path) -> dlf_engine::Result<LlamaWeights> {
    LlamaWeights::load(dir, &LlamaConfig::load(dir)?)
}

/// Weights from a file in memory.
fn from_bytes(bytes: Vec<u8>, config: &LlamaConfig) -> dlf_engine::Result<LlamaWeights> {
    // Tests are short: what they leak the system takes back.
    LlamaWeights::from_safetensors(Path::new("model.safetensors"), bytes.leak(), config)
}

fn f32_values(tensor: &Tensor) -> Vec<f32> {
    tensor.data().to_f32()
}

/// The numbers of tensor `name` as they were written.
fn written(tensors: &directory::Tensors, name: &str) -> Vec<f32> {
    tensors[name].1.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn every_tensor_is_where_it_belongs() {
    let config = directory::config_with(json!({"attention_bias": true, "mlp_bias": true}));
    let dir = tempfile::tempdir().unwrap();
    directory::write_model(dir.path(), &config);
    let (weights, tensors) = (load(dir.path()).unwrap(), directory::tensors(&config));
    let check = |tensor: &Tensor, name: &str| {
        assert_eq!(tensor.shape(), tensors[name].0, "{name}");
        assert_eq!(f32_values(tensor), written(&tensors, name), "{name}");
    };
    check(&weights.embed_tokens, "model.embed_tokens.weight");
    check(&weights.norm, "model.norm.weight");
    check(&weights.lm_head, "lm_head.weight");
    for (index, layer) in weights.layers.iter().enumerate() {
        let named = |name: &str| format!("model.layers.{index}.{name}");
        check(&layer.input_layernorm, &named("input_layernorm.weight"));
        check(&layer.post_attention_layernorm, &named("post_attention_layernorm.weight"));
        for (linear, name) in [
            (&layer.q_proj, "self_attn.q_proj"),
            (&layer.k_proj, "self_attn.k_proj"),
            (&layer.v_proj, "self_attn.v_proj"),
            (&layer.o_proj, "self_attn.o_proj"),
            (&layer.gate_proj, "mlp.gate_proj"),
            (&layer.up_proj, "mlp.up_proj"),
            (&layer.down_proj, "mlp.down_proj"),
        ] {
            check(&linear.weight, &named(&format!("{name}.weight")));
            check(linear.bias.as_ref().unwrap(), &named(&format!("{name}.bias")));
        }
    }
    assert_eq!(weights.layers.len(), 2);
    assert_eq!(weights.bytes(), tensors.values().map(|(_, bytes)| bytes.len()).sum::<usize>());
    assert_eq!(weights.num_parameters() * 4, weights.bytes());
}

#[test]
fn tied_embeddings_are_one_tensor() {
    let config = directory::config_with(json!({"tie_word_embeddings": true}));
    let mut tensors = directory::tensors(&config);
    let parsed = parse(&config);
    let weights = from_bytes(directory::safetensors(&tensors), &parsed).unwrap();
    assert!(weights.lm_head.is_same(&weights.embed_tokens));
    let bytes = weights.bytes();

    // A second copy in the file is no second tensor in memory; a different one contradicts the configuration.
    let embedding = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".to_owned(), embedding.clone());
    let weights = from_bytes(directory::safetensors(&tensors), &parsed).unwrap();
    assert!(weights.lm_head.is_same(&weights.embed_tokens));
    assert_eq!(weights.bytes(), bytes);
    let mut other = embedding;
    other.1[0] ^= 1;
    tensors.insert("lm_head.weight".to_owned(), other);
    let message = from_bytes(directory::safetensors(&tensors), &parsed).unwrap_err().to_string();
    assert!(
        message.contains("`lm_head.weight`: expected the embedding, which tie_word_embeddings says"),
        "{message}"
    );
}

#[test]
fn f16_and_bf16_stay_as_stored() {
    let config = directory::config();
    for (dtype, name) in [(Dtype::F16, "F16"), (Dtype::Bf16, "BF16")] {
        let mut data = Vec::new();
        let mut header = serde_json::Map::new();
        for (name_, (shape, bytes)) in directory::tensors(&config) {
            let start = data.len();
            for chunk in bytes.chunks(4) {
                let value = f32::from_le_bytes(chunk.try_into().unwrap());
                let bits = match dtype {
                    Dtype::F16 => f16::from_f32(value).to_bits(),
                    _ => bf16::from_f32(value).to_bits(),
                };
                data.extend(bits.to_le_bytes());
            }
            header.insert(name_, json!({"dtype": name, "shape": shape, "data_offsets": [start, data.len()]}));
        }
        let weights = from_bytes(file(&Value::Object(header), &data), &parse(&config)).unwrap();
        let tensor = &weights.layers[0].q_proj.weight;
        assert_eq!(tensor.dtype(), dtype);
        match tensor.data() {
            TensorData::F16(values) => assert_eq!(values.len(), 24 * 8),
            TensorData::Bf16(values) => assert_eq!(values.len(), 24 * 8),
            TensorData::F32(_) => panic!("a copy in f32"),
        }
        assert_eq!(weights.bytes(), data.len());
    }
}

/// A safetensors file by hand: length, header, data.
fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn any_alignment_reads_the_same_numbers() {
    let config = directory::config();
    let tensors = directory::tensors(&config);
    let whole = directory::safetensors(&tensors);
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let expected = written(&tensors, "model.layers.1.mlp.up_proj.weight");
    for pad in 0..8 {
        // Spaces behind the header move the data; the leaked copy itself may begin anywhere.
        let header = [&whole[8..8 + length], &b"       "[..pad.min(7)]].concat();
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_slice(), &whole[8 + length..]].concat();
        let weights = from_bytes(bytes, &parse(&config)).unwrap();
        assert_eq!(f32_values(&weights.layers[1].up_proj.weight), expected, "{pad}");
    }
}

/// Splits the tiny model into two shards and an index.
fn write_shards(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let config = directory::config();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (mut first, mut second) = (directory::tensors(&config), directory::Tensors::new());
    while second.len() < first.len() {
        let (name, tensor) = first.pop_last().unwrap();
        second.insert(name, tensor);
    }
    let mut index = json!({"metadata": {"total_size": 0}, "weight_map": {}});
    for (file, tensors) in
        [("model-00001-of-00002.safetensors", &first), ("model-00002-of-00002.safetensors", &second)]
    {
        fs::write(dir.join(file), directory::safetensors(tensors)).unwrap();
        for name in tensors.keys() {
            index["weight_map"][name] = json!(file);
        }
    }
    edit(&mut index);
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_one_model() {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), |_| {});
    let weights = load(dir.path()).unwrap();
    let tensors = directory::tensors(&directory::config());
    assert_eq!(f32_values(&weights.embed_tokens), written(&tensors, "model.embed_tokens.weight"));
    assert_eq!(f32_values(&weights.norm), written(&tensors, "model.norm.weight"));
    assert_eq!(weights.bytes(), tensors.values().map(|(_, bytes)| bytes.len()).sum::<usize>());
}

#[test]
fn an_index_can_not_lead_astray() {
    let message = |edit: fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        write_shards(dir.path(), edit);
        load(dir.path()).unwrap_err().to_string()
    };
    let outside = message(|index| {
        index["weight_map"]["model.norm.weight"] = json!("../model-00002-of-00002.safetensors")
    });
    assert!(
        outside.contains("index.json: `weight_map.model.norm.weight`: expected the name of a file in this"),
        "{outside}"
    );
    for name in ["", ".", "..", "/etc/passwd", "a/b"] {
        let dir = tempfile::tempdir().unwrap();
        write_shards(dir.path(), |index| index["weight_map"]["model.norm.weight"] = json!(name));
        assert!(matches!(load(dir.path()), Err(Error::Config { .. })), "{name:?}");
    }
    let wrong =
        message(|index| index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors"));
    assert!(wrong.ends_with("tensor `model.norm.weight`: expected it in \"model-00001-of-00002.safetensors\", found it in model-00002-of-00002.safetensors"), "{wrong}");
    let absent = message(|index| index["weight_map"]["more"] = json!("model-00001-of-00002.safetensors"));
    assert!(absent.contains("tensor `more`") && absent.ends_with("found nothing"), "{absent}");
    let no_file = message(|index| index["weight_map"]["more"] = json!("model-00003.safetensors"));
    assert!(no_file.contains("model-00003.safetensors: "), "{no_file}");
    assert!(message(|index| *index = json!({})).contains("`weight_map`: expected an object, found nothing"));
}

#[test]
fn tensors_must_be_those_of_the_configuration() {
    let config = directory::config();
    let refusal = |changes: Value, edit: &dyn Fn(&mut directory::Tensors)| {
        let mut tensors = directory::tensors(&config);
        edit(&mut tensors);
        let config = parse(&directory::config_with(changes));
        from_bytes(directory::safetensors(&tensors), &config).unwrap_err().to_string()
    };
    let same = |_: &mut directory::Tensors| {};
    assert_eq!(
        refusal(json!({"vocab_size": 25}), &same),
        "model.safetensors: tensor `model.embed_tokens.weight`: expected shape [25, 8], found shape [24, 8]"
    );
    assert_eq!(
        refusal(json!({"num_hidden_layers": 3}), &same),
        "model.safetensors: tensor `model.layers.2.self_attn.q_proj.weight`: expected shape [24, 8], found nothing"
    );
    // A weight that nobody asked for: the model would be computed without it.
    for (name, changes) in [
        ("model.layers.1.input_layernorm.weight", json!({"num_hidden_layers": 1})),
        ("model.layers.0.self_attn.q_norm.weight", json!({})),
        ("model.layers.0.self_attn.q_proj.bias", json!({})),
    ] {
        let message = refusal(changes, &|tensors| {
            tensors.entry(name.to_owned()).or_insert((vec![8], vec![0; 32]));
        });
        assert_eq!(
            message,
            format!(
                "model.safetensors: tensor `{name}`: expected no such tensor in a Llama of this configuration, found one"
            )
        );
    }
    let mut old = directory::tensors(&config);
    old.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), (vec![3], vec![0; 12]));
    assert!(
        from_bytes(directory::safetensors(&old), &parse(&config)).is_ok(),
        "follows from the configuration"
    );
}

#[test]
fn lying_headers_are_errors() {
    let config = parse(&directory::config());
    let entry = |dtype: &str, shape: Value, offsets: Value| json!({"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}});
    let huge = u64::MAX;
    for (bytes, says) in [
        (vec![], "header too small"),
        (vec![0; 7], "header too small"),
        (huge.to_le_bytes().to_vec(), "header too large"),
        ((1_u64 << 24).to_le_bytes().to_vec(), "invalid header length"),
        ([&3_u64.to_le_bytes()[..], b"{]}"].concat(), "invalid JSON in header"),
        (file(&json!([1]), &[]), "invalid type: sequence"),
        (file(&entry("F32", json!([8]), json!([0, 64])), &[0; 32]), "invalid shape, data type, or offset"),
        (
            file(&entry("F32", json!([8]), json!([huge - 31, huge])), &[0; 32]),
            "invalid offset for tensor `model.norm.weight`",
        ),
        (
            file(&entry("F32", json!([8]), json!([32, 0])), &[0; 32]),
            "invalid offset for tensor `model.norm.weight`",
        ),
        (file(&entry("F32", json!([8]), json!([0])), &[0; 32]), "expected a tuple of size 2"),
        (file(&entry("F32", json!([-8]), json!([0, 32])), &[0; 32]), "integer `-8`"),
        (file(&entry("F32", json!([8.0]), json!([0, 32])), &[0; 32]), "floating point `8.0`"),
        (file(&entry("F32", json!([8]), json!([0, 32])), &[0; 40]), "file not fully covered"),
        (
            file(&entry("F32", json!([8]), json!([8, 40])), &[0; 40]),
            "invalid offset for tensor `model.norm.weight`",
        ),
        (
            file(
                &json!({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
                &[0; 12],
            ),
            "invalid offset for tensor `b`",
        ),
    ] {
        let message = from_bytes(bytes, &config).unwrap_err().to_string();
        let named = message.starts_with("model.safetensors: damaged or cut off: ");
        assert!(named && message.contains(says), "{says}: {message}");
    }
    // These lie about a tensor that is wanted: shape and bytes disagree, the shape overflows, the dtype is another.
    let whole = directory::safetensors(&directory::tensors(&directory::config()));
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    let lie = |field: &str, value: Value| {
        let mut header = header.clone();
        header["model.norm.weight"][field] = value;
        from_bytes(file(&header, &whole[8 + length..]), &config).unwrap_err().to_string()
    };
    let about = "model.safetensors: tensor `model.norm.weight`: expected ";
    assert!(lie("shape", json!([huge, huge])).contains("overflow computing buffer size"));
    assert!(lie("dtype", json!("BF16")).contains("invalid shape, data type, or offset"));
    assert_eq!(lie("dtype", json!("I32")), format!("{about}dtype F32, F16 or BF16, found I32"));
    // Eight tensors whose sizes add up to more than 64 bits, which the format's crate doesn't look for.
    let eighth = 1_u64 << 61;
    let wrapping: serde_json::Map<String, Value> = (0..8)
        .map(|k| {
            let end = if k == 7 { huge - 100 } else { (k + 1) * eighth };
            let (start, size) = (k * eighth, end - k * eighth);
            (format!("t{k}"), json!({"dtype": "U8", "shape": [size], "data_offsets": [start, end]}))
        })
        .collect();
    assert!(from_bytes(file(&Value::Object(wrapping), &[0; 32]), &config).is_err());
}

#[test]
fn directories_without_weights_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let message = |dir: &Path| load(dir).unwrap_err().to_string();
    assert!(message(dir.path()).contains("config.json: "));
    fs::write(dir.path().join("config.json"), directory::config().to_string()).unwrap();
    assert!(message(dir.path()).ends_with("has neither model.safetensors nor model.safetensors.index.json"));
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(message(dir.path()).ends_with("convert it to model.safetensors"));
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(message(dir.path()).ends_with("model.safetensors: not a regular file"));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    fs::create_dir(dir.path().join("config.json")).unwrap();
    assert!(message(dir.path()).ends_with("config.json: not a regular file"));
}

#[test]
fn files_longer_than_any_real_one_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let long =
        |name: &str, length: u64| fs::File::create(dir.path().join(name)).unwrap().set_len(length).unwrap();
    long("config.json", (64 << 20) + 1);
    let message = LlamaConfig::load(dir.path()).unwrap_err().to_string();
    assert!(message.ends_with("config.json: longer than the 64 MiB that such a file may have"), "{message}");
    long("tokenizer.json", (256 << 20) + 1);
    let message = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(
        message.ends_with("tokenizer.json: longer than the 256 MiB that such a file may have"),
        "{message}"
    );
}

#[test]
fn random_weights_have_the_shape_of_the_configuration() {
    let config = parse(&directory::config_with(json!({"attention_bias": true})));
    let weights = LlamaWeights::random(&config, Dtype::Bf16, 7);
    let (again, other) =
        (LlamaWeights::random(&config, Dtype::Bf16, 7), LlamaWeights::random(&config, Dtype::Bf16, 8));
    assert_eq!(weights.lm_head.as_bytes(), again.lm_head.as_bytes());
    assert_ne!(weights.lm_head.as_bytes(), other.lm_head.as_bytes());
    let written = directory::tensors(&directory::config_with(json!({"attention_bias": true})));
    assert_eq!(weights.num_parameters() * 4, written.values().map(|(_, bytes)| bytes.len()).sum::<usize>());
    assert_eq!(weights.layers[1].k_proj.weight.shape(), [12, 8]);
    assert!(weights.layers[1].k_proj.bias.is_some() && weights.layers[1].up_proj.bias.is_none());
    // Uniform within √(3 / 8): 192 numbers whose variance is 1 / 8, give or take a third.
    let values = f32_values(&weights.lm_head);
    let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
    assert!((variance - 0.125).abs() < 0.04 && values.iter().all(|v| v.abs() <= 0.62), "{variance}");
}

#[test]
fn tensors_from_numbers_must_have_as_many_as_their_shape() {
    let tensor = Tensor::from_f32(Dtype::F16, &[2, 3], &[0.0, 1.0, -2.0, 0.5, 65504.0, 0.1]).unwrap();
    assert_eq!(f32_values(&tensor), [0.0, 1.0, -2.0, 0.5, 65504.0, f16::from_f32(0.1).to_f32()]);
    assert!(Tensor::from_f32(Dtype::F32, &[2, 3], &[0.0; 5]).is_err());
    assert!(Tensor::from_f32(Dtype::F32, &[usize::MAX, 2], &[0.0; 5]).is_err());
}

#[test]
fn adapters_must_fit() {
    let config = parse(&directory::config());
    let dir = tempfile::tempdir().unwrap();
    directory::write_adapter(dir.path());
    assert!(LoraAdapter::load(dir.path(), &config).is_ok());
    let narrower = parse(&directory::config_with(json!({"hidden_size": 4})));
    let message = LoraAdapter::load(dir.path(), &narrower).unwrap_err().to_string();
    assert!(
        message
            .contains("layers.0.self_attn.q_proj.lora_A.weight`: expected shape [2, 4], found shape [2, 8]"),
        "{message}"
    );
    let shallower = parse(&directory::config_with(json!({"num_hidden_layers": 1})));
    let message = LoraAdapter::load(dir.path(), &shallower).unwrap_err().to_string();
    assert!(message.contains("layers.1.mlp.down_proj.lora_A.weight`: expected no such tensor"), "{message}");
    let rank = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 4});
    fs::write(dir.path().join("adapter_config.json"), rank.to_string()).unwrap();
    let message = LoraAdapter::load(dir.path(), &config).unwrap_err().to_string();
    assert!(message.contains("expected shape [4, 8], found shape [2, 8]"), "{message}");
}

#[test]
fn what_git_lfs_left_in_the_place_of_a_file_is_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    let dir = tempfile::tempdir().unwrap();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/ensemble/small/config.json");
    fs::copy(config, dir.path().join("config.json")).unwrap();
    for file in ["model.safetensors", "config.json"] {
        fs::write(dir.path().join(file), pointer).unwrap();
        let message = load(dir.path()).unwrap_err().to_string();
        assert!(message.contains(&format!("{file}: a Git LFS pointer instead of the file")), "{message}");
    }
}
