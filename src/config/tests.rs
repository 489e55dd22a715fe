use serde_json::{Value, json};

use super::*;

/// A config.json in the form of transformers 5.
fn tiny() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2
    })
}

fn with(changes: Value) -> Value {
    let mut config = tiny();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

/// `rope_parameters` with the θ that the form always has.
fn rope(mut parameters: Value) -> Value {
    parameters["rope_theta"] = json!(500000.0);
    json!({"rope_parameters": parameters})
}

fn parse(config: &Value) -> Result<LlamaConfig> {
    LlamaConfig::from_json(Path::new("model/config.json"), &config.to_string(), None)
}

/// The message with which `changes` are refused; it must name the file.
fn refusal(changes: Value) -> String {
    let message = parse(&with(changes)).unwrap_err().to_string();
    assert!(message.starts_with("model/config.json: "), "{message}");
    message
}

#[test]
fn both_forms_of_rope_parameters_mean_the_same() {
    let new = parse(&tiny()).unwrap();
    let mut old = tiny();
    old.as_object_mut().unwrap().shift_remove("rope_parameters");
    old["rope_theta"] = json!(500000.0);
    old["rope_scaling"] = Value::Null;
    assert_eq!(parse(&old).unwrap(), new);
    assert_eq!(new.rope, RopeConfig { theta: 500_000.0, scaling: RopeScaling::Default });

    let scaled = |type_key: &str| {
        let parameters = json!({type_key: "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 64});
        let mut old = old.clone();
        old["rope_scaling"] = parameters.clone();
        let mut new = with(json!({"rope_parameters": parameters}));
        new["rope_parameters"]["rope_theta"] = json!(500000.0);
        assert_eq!(parse(&old).unwrap(), parse(&new).unwrap());
        parse(&new).unwrap().rope.scaling
    };
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    assert_eq!(scaled("type"), expected);
    assert_eq!(scaled("rope_type"), expected);
}

#[test]
fn defaults_are_those_of_transformers() {
    let mut config = tiny();
    for field in ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"] {
        config.as_object_mut().unwrap().shift_remove(field);
    }
    for field in ["bos_token_id", "eos_token_id"] {
        config.as_object_mut().unwrap().shift_remove(field);
    }
    let config = parse(&config).unwrap();
    assert_eq!(config.num_key_value_heads, 4);
    assert_eq!(config.head_dim, 16);
    assert_eq!(config.max_position_embeddings, 2048);
    assert_eq!(config.rms_norm_eps, 1e-6);
    assert_eq!(config.rope.theta, 10_000.0);
    assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2]));
}

#[test]
fn only_llama_1_and_2_and_their_continuations_leave_out_theta() {
    let without = |changes: Value| {
        let mut config = tiny();
        config.as_object_mut().unwrap().shift_remove("rope_parameters");
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        parse(&config).map(|config| config.rope.theta).map_err(|error| error.to_string())
    };
    for llama_2 in [
        json!({"max_position_embeddings": 2048}),
        json!({"max_position_embeddings": 4096, "rope_scaling": null, "rope_parameters": null}),
        // As Vicuna-16k and LLaMA-2-7B-32K, which say of the context what it was and what it is.
        json!({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        json!({"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}}),
        json!({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        json!({"max_position_embeddings": 65536, "rope_scaling":
            {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}}),
    ] {
        assert_eq!(without(llama_2.clone()), Ok(10_000.0), "{llama_2}");
    }
    let expected = "expected a number above 1 (write 10000.0 if the model, like Llama 1 and 2, was trained with that), found nothing";
    for (later, field) in [
        (json!({"max_position_embeddings": 8192}), "rope_theta"),
        (
            json!({"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 4.0}}),
            "rope_theta",
        ),
        (
            json!({"max_position_embeddings": 8192, "rope_scaling": {"type": "yarn", "factor": 2.0}}),
            "rope_theta",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}),
            "rope_theta",
        ),
        // transformers 5 always writes it.
        (json!({"rope_parameters": {"rope_type": "default"}}), "rope_parameters.rope_theta"),
        (json!({"rope_parameters": {}}), "rope_parameters.rope_theta"),
    ] {
        let message = format!("model/config.json: `{field}`: {expected}");
        assert_eq!(without(later.clone()), Err(message), "{later}");
    }
    // Where it is given, in either form, it is taken.
    assert_eq!(without(json!({"max_position_embeddings": 8192, "rope_theta": 5e5})), Ok(5e5));
    assert_eq!(without(json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e4})), Ok(3e4));
}

#[test]
fn head_dim_is_given_or_derived() {
    assert_eq!(parse(&with(json!({"head_dim": 32}))).unwrap().head_dim, 32);
    assert_eq!(parse(&with(json!({"head_dim": null}))).unwrap().head_dim, 16);
    assert!(refusal(json!({"hidden_size": 66})).contains("`hidden_size`: expected a multiple of the 4"));
    assert!(refusal(json!({"head_dim": 15})).contains("`head_dim`: expected an even number"));
}

#[test]
fn ends_of_sequence_are_the_union_of_both_files() {
    let config = with(json!({"eos_token_id": [128001, 128009]})).to_string();
    let generation = r#"{"eos_token_id": [128008, 128001], "bos_token_id": 128000}"#;
    let path = Path::new("model/config.json");
    let parsed = LlamaConfig::from_json(path, &config, Some(generation)).unwrap();
    assert_eq!(parsed.eos_token_ids, [128001, 128008, 128009]);
    assert_eq!(parsed.bos_token_id, Some(1), "config.json has the say");

    let none = with(json!({"eos_token_id": null, "bos_token_id": null}));
    let parsed = parse(&none).unwrap();
    assert_eq!((parsed.bos_token_id, parsed.eos_token_ids), (None, vec![]));
    let parsed = LlamaConfig::from_json(path, &none.to_string(), Some(generation)).unwrap();
    assert_eq!((parsed.bos_token_id, parsed.eos_token_ids), (Some(128000), vec![128001, 128008]));

    let error = LlamaConfig::from_json(path, &config, Some(r#"{"eos_token_id": "</s>"}"#)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model/generation_config.json: `eos_token_id`: expected a token id or a list of token ids, found \"</s>\""
    );
}

#[test]
fn yarn_has_the_defaults_of_transformers() {
    let yarn = |changes: Value| {
        let mut parameters =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        for (field, value) in changes.as_object().unwrap() {
            parameters[field] = value.clone();
        }
        match parse(&with(rope(parameters))).unwrap().rope.scaling {
            RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, attention_factor, .. } => {
                (factor, beta_fast, beta_slow, truncate, attention_factor)
            }
            other => panic!("{other:?}"),
        }
    };
    let default = 0.1 * 4.0_f64.ln() + 1.0;
    assert_eq!(yarn(json!({})), (4.0, 32.0, 1.0, true, default));
    assert_eq!(yarn(json!({"factor": null})).0, 4.0, "256 / 64");
    assert_eq!(yarn(json!({"attention_factor": 0.5})).4, 0.5);
    assert_eq!(yarn(json!({"mscale": 0.5})).4, default, "both weights or neither");
    let weighted = (0.05 * 4.0_f64.ln() + 1.0) / default;
    assert_eq!(yarn(json!({"mscale": 0.5, "mscale_all_dim": 1.0})).4, weighted);
    assert_eq!(yarn(json!({"beta_fast": 16, "beta_slow": 0, "truncate": false})).1, 16.0);
}

#[test]
fn dynamic_rope_lengthens_the_context() {
    let config = parse(&with(rope(json!({"rope_type": "dynamic", "factor": 2.5})))).unwrap();
    assert_eq!((config.max_position_embeddings, config.context()), (256, 640));
    assert_eq!(parse(&tiny()).unwrap().context(), 256);
}

#[test]
fn mistral_without_sliding_window_is_a_llama() {
    let mistral = |window: Value| {
        with(
            json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}),
        )
    };
    assert!(parse(&mistral(Value::Null)).is_ok());
    assert!(parse(&mistral(json!(256))).is_ok(), "a window as long as the context hides nothing");
    let message = parse(&mistral(json!(128))).unwrap_err().to_string();
    assert_eq!(message, "model/config.json: sliding window attention (sliding_window: 128) is not supported");
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (changes, name) in [
        (json!({"model_type": "qwen2"}), "the model type qwen2, neither llama nor mistral, is not supported"),
        (
            json!({"architectures": ["LlamaForSequenceClassification"]}),
            "LlamaForSequenceClassification, neither LlamaForCausalLM nor MistralForCausalLM, is not",
        ),
        (json!({"hidden_act": "gelu"}), "the activation gelu (hidden_act)"),
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "quantization gptq"),
        (json!({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}), "the rope type longrope"),
        (json!({"rope_scaling": {"type": "su", "factor": 2.0}}), "the rope type su"),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            "RoPE that differs between layers",
        ),
        (json!({"partial_rotary_factor": 0.5}), "a partial_rotary_factor of 0.5"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.25}}), "a partial_rotary_factor of 0.25"),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "attention other than full_attention",
        ),
        (json!({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}), "code of its own"),
    ] {
        let message = refusal(changes.clone());
        assert!(message.contains(name) && message.ends_with("is not supported"), "{changes}: {message}");
    }
}

#[test]
fn malformed_fields_are_named_with_what_they_are() {
    for (changes, rest) in [
        (
            json!({"hidden_size": "64"}),
            "`hidden_size`: expected a whole number from 1 to 1048576, found \"64\"",
        ),
        (
            json!({"hidden_size": 64.0}),
            "`hidden_size`: expected a whole number from 1 to 1048576, found 64.0",
        ),
        (json!({"vocab_size": 0}), "`vocab_size`: expected a whole number from 1 to 16777216, found 0"),
        (json!({"vocab_size": -1}), "found -1"),
        (
            json!({"num_hidden_layers": null}),
            "`num_hidden_layers`: expected a whole number from 1 to 4096, found nothing",
        ),
        (json!({"num_hidden_layers": u64::MAX}), "found 18446744073709551615"),
        (
            json!({"num_key_value_heads": 3}),
            "`num_key_value_heads`: expected a divisor of the 4 attention heads, found 3",
        ),
        (json!({"rms_norm_eps": 0}), "`rms_norm_eps`: expected a number between 0 and 1, found 0"),
        (json!({"architectures": "LlamaForCausalLM"}), "`architectures`: expected a list of names"),
        (json!({"rope_parameters": 7}), "`rope_parameters`: expected an object, found 7"),
        (
            json!({"rope_parameters": {"rope_theta": "1e4"}}),
            "`rope_parameters.rope_theta`: expected a number above 1",
        ),
        (
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "`rope_parameters.factor`: expected a number from 1, found nothing",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
            "`rope_scaling.factor`: expected a number from 1, found 0.5",
        ),
        (
            json!({"tie_word_embeddings": "yes"}),
            "`tie_word_embeddings`: expected true or false, found \"yes\"",
        ),
        (
            json!({"eos_token_id": [2, -1]}),
            "`eos_token_id`: expected a token id or a list of token ids, found [2,-1]",
        ),
    ] {
        let message = refusal(changes.clone());
        assert!(message.contains(rest), "{changes}: {message}");
    }
    let error = LlamaConfig::from_json(Path::new("c.json"), "{\"hidden_size\": NaN}", None).unwrap_err();
    assert!(error.to_string().starts_with("c.json: `json`: expected JSON, found"), "{error}");
}
