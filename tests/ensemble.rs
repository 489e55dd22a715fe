//! What the models of an ensemble must agree on, and what an ensemble says of itself.
#![allow(clippy::unwrap_used)] // a test may panic

#[path = "support/directory.rs"]
mod directory;
#[path = "support/vocabulary.rs"]
mod vocabulary;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dlf_engine::fusion::{AlphaGrid, DynamicRule, FusionRule};
use dlf_engine::model::Role;
use dlf_engine::{Ensemble, EnsembleSpec, ExpertSpec};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory with models by name.
struct Models(TempDir);

impl Models {
    fn new(models: &[(&str, Value)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, changes) in models {
            directory::write_model(&dir.path().join(name), &directory::config_with(changes.clone()));
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn tokenizer(&self, name: &str, tokenizer: &Value) {
        std::fs::write(self.path(name).join("tokenizer.json"), tokenizer.to_string()).unwrap();
    }

    fn load(&self, large: &str, small: &str, experts: &[&str]) -> dlf_engine::Result<Ensemble> {
        let dir = |name: &str| (!name.is_empty()).then(|| self.path(name));
        let experts = experts.iter().map(|name| ExpertSpec { name: None, path: self.path(name) }).collect();
        Ensemble::load(&EnsembleSpec { large: dir(large), small: dir(small), experts })
    }
}

fn refusal(loaded: dlf_engine::Result<Ensemble>) -> String {
    loaded.unwrap_err().to_string()
}

#[test]
fn widths_may_differ_and_the_least_is_shared() {
    let models = Models::new(&[
        ("large", json!({"vocab_size": 32, "hidden_size": 16, "eos_token_id": [2, 30]})),
        ("small", json!({"vocab_size": 24})),
        ("chat", json!({"vocab_size": 27, "eos_token_id": [7, 25]})),
    ]);
    let ensemble = models.load("large", "small", &["chat"]).unwrap();
    assert_eq!(ensemble.vocab_size(), 24);
    assert_eq!(ensemble.eos_token_ids(), [2, 7], "the union, without ids that are not shared");
    assert_eq!(ensemble.num_experts(), 1);
    assert_eq!(ensemble.expert_name(0), Some("chat"));
    assert_eq!((ensemble.index(Role::Small), ensemble.index(Role::Expert(1))), (Some(1), None));
    assert_eq!((ensemble.context(0), ensemble.context(9)), (64, 0));
    // Expert alone: nobody else narrows the vocabulary.
    assert_eq!(models.load("", "", &["chat"]).unwrap().vocab_size(), 27);
}

#[test]
fn an_expert_has_the_small_models_architecture() {
    for (changes, what) in [
        (json!({"hidden_size": 16}), "hidden_size: 8 and 16"),
        (json!({"num_hidden_layers": 1}), "num_hidden_layers: 2 and 1"),
        (json!({"num_key_value_heads": 1}), "num_key_value_heads: 2 and 1"),
        (json!({"attention_bias": true}), "attention_bias: false and true"),
    ] {
        let models = Models::new(&[("small", json!({})), ("expert", changes)]);
        let message = refusal(models.load("", "small", &["small", "expert"]));
        assert_eq!(message, format!("the small and expert 1 models differ in {what}"));
    }
    let models = Models::new(&[
        ("small", json!({})),
        ("tied", json!({"tie_word_embeddings": true, "vocab_size": 25})),
    ]);
    assert!(models.load("", "small", &["tied"]).is_ok());
    // As CodeLlama over Llama 2.
    let other = json!({"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e6}});
    let models = Models::new(&[("small", json!({})), ("code", other)]);
    assert!(models.load("", "small", &["code"]).is_ok());
}

#[test]
fn one_id_is_one_token() {
    let models = Models::new(&[("large", json!({"vocab_size": 300})), ("small", json!({"vocab_size": 300}))]);
    let tokenizer = vocabulary::byte_level();
    models.tokenizer("large", &tokenizer);
    // Models without a tokenizer, and tokenizers that are the same, agree.
    assert!(models.load("large", "small", &[]).unwrap().tokenizer(1).is_none());
    models.tokenizer("small", &tokenizer);
    let ensemble = models.load("large", "small", &["small"]).unwrap();
    assert!(ensemble.tokenizer(1).unwrap().shares_vocabulary(ensemble.tokenizer(2).unwrap()));
    assert!(ensemble.tokenizer_of_any().is_some());

    // One more token past the ids that the other knows is a padded row of the other.
    let mut longer = tokenizer.clone();
    longer["model"]["vocab"]["longer"] = json!(261);
    models.tokenizer("small", &longer);
    assert!(models.load("large", "small", &[]).is_ok());

    let mut other = tokenizer.clone();
    let vocab = other["model"]["vocab"].as_object_mut().unwrap();
    vocab.shift_remove("A");
    vocab.insert("Ω".to_owned(), json!(3 + 65));
    models.tokenizer("small", &other);
    let message = refusal(models.load("large", "small", &[]));
    assert_eq!(message, "the large and small models differ in token 68: \"A\" and \"Ω\"");
    // Where the shared vocabulary ends before, the two agree.
    directory::write_model(&models.path("small"), &directory::config_with(json!({"vocab_size": 68})));
    assert!(models.load("large", "small", &[]).is_ok());
}

#[test]
fn a_special_token_is_special_to_all() {
    let models = Models::new(&[
        ("large", json!({"vocab_size": 300})),
        ("small", json!({"vocab_size": 300})),
        ("chat", json!({"vocab_size": 300, "eos_token_id": 1})),
    ]);
    let tokenizer = vocabulary::byte_level();
    models.tokenizer("large", &tokenizer);
    // An EOS of its own is an expert's good right, and `config.json`'s business.
    models.tokenizer("chat", &tokenizer);
    let ensemble = models.load("large", "small", &["chat"]).unwrap();
    assert_eq!(ensemble.eos_token_ids(), [1, 2]);
    let (first, last) = (ensemble.tokenizer(0).unwrap(), ensemble.tokenizer(2).unwrap());
    assert!(first.is_special(2) && !first.is_special(3) && !last.is_special(1 << 20));

    // A token of its own beside them is special in a row that pads the others.
    let token = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    let with = |changed: &[Value]| {
        let mut tokenizer = tokenizer.clone();
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        for token in changed {
            added.retain(|known| known["id"] != token["id"]);
            added.push(token.clone());
        }
        tokenizer
    };
    models.tokenizer("chat", &with(&[token(261, "<pad>", true)]));
    assert!(models.load("large", "small", &["chat"]).is_ok());

    // Recognised, but shown as text; not recognised at all; and ordinary text that became special.
    models.tokenizer("chat", &with(&[token(2, "<|im_end|>", false)]));
    let message = refusal(models.load("large", "small", &["chat"]));
    let differs =
        |id: u32, token: &str| format!("the large and expert 0 models differ in token {id}, \"{token}\": ");
    assert_eq!(message, differs(2, "<|im_end|>") + "a special token and ordinary text");
    let mut plain = tokenizer.clone();
    plain["added_tokens"].as_array_mut().unwrap().retain(|token| token["id"] != 1);
    models.tokenizer("chat", &plain);
    let message = refusal(models.load("large", "small", &["chat"]));
    assert_eq!(message, differs(1, "<|im_start|>") + "a special token and ordinary text");
    models.tokenizer("chat", &with(&[token(68, "A", true)]));
    let message = refusal(models.load("large", "small", &["chat"]));
    assert_eq!(message, differs(68, "A") + "ordinary text and a special token");
    // Past the shared vocabulary, nobody asks.
    directory::write_model(&models.path("small"), &directory::config_with(json!({"vocab_size": 68})));
    assert!(models.load("large", "small", &["chat"]).is_ok());
}

#[test]
fn all_put_the_same_tokens_around_a_prompt() {
    let models = Models::new(&[("large", json!({"vocab_size": 300})), ("small", json!({"vocab_size": 300}))]);
    let tokenizer = vocabulary::sentencepiece();
    models.tokenizer("large", &tokenizer);
    models.tokenizer("small", &tokenizer);
    let configure = |name: &str, add_bos: bool, add_eos: bool| {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos, "add_eos_token": add_eos});
        std::fs::write(models.path(name).join("tokenizer_config.json"), config.to_string()).unwrap();
        models.load("large", "small", &[])
    };
    // The same by the post-processor and by a flag.
    assert!(configure("small", true, false).is_ok());
    let differ = "the large and small models differ in what their tokenizers put ";
    let by = "(by tokenizer.json, or add_bos_token and add_eos_token in tokenizer_config.json)";
    assert_eq!(
        refusal(configure("small", false, false)),
        format!("{differ}before a prompt: token 1, \"<s>\" and nothing {by}")
    );
    assert_eq!(
        refusal(configure("small", true, true)),
        format!("{differ}after a prompt: nothing and token 2, \"</s>\" {by}")
    );
    assert!(configure("large", true, true).is_ok(), "it is the same to both");
    assert!(refusal(configure("large", false, true)).contains("nothing and token 1"));

    // By the post-processor alone.
    let mut without = tokenizer.clone();
    without["post_processor"] = Value::Null;
    let models = Models::new(&[("large", json!({"vocab_size": 300})), ("small", json!({"vocab_size": 300}))]);
    models.tokenizer("large", &without);
    models.tokenizer("small", &tokenizer);
    assert_eq!(
        refusal(models.load("large", "small", &[])),
        format!("{differ}before a prompt: nothing and token 1, \"<s>\" {by}")
    );
}

#[test]
fn a_lora_expert_shares_the_small_models_weights() {
    let models = Models::new(&[("large", json!({})), ("small", json!({}))]);
    directory::write_adapter(&models.path("math"));
    models.tokenizer("small", &vocabulary::byte_level());
    let ensemble = models.load("large", "small", &["math", "math"]).unwrap();
    let [_, small, math, again] = ensemble.models() else { panic!("four models") };
    assert!(Arc::ptr_eq(&small.weights, &math.weights) && Arc::ptr_eq(&small.weights, &again.weights));
    assert_eq!((math.name.as_str(), again.name.as_str()), ("math", "math-2"));
    let adapter = math.adapter.as_ref().unwrap();
    let deltas: Vec<_> = adapter.layers.iter().flat_map(|layer| layer.deltas.iter().flatten()).collect();
    assert_eq!(deltas.len(), 2);
    assert!(deltas.iter().all(|delta| delta.scale == 2.0));
    assert_eq!((deltas[0].a.shape(), deltas[1].b.shape()), (&[2, 8][..], &[8, 2][..]));
    assert!(ensemble.tokenizer(2).unwrap().shares_vocabulary(ensemble.tokenizer(1).unwrap()));

    // f32: 2·8 + 24·2 for q, 2·12 + 8·2 for down.
    assert_eq!(math.weight_bytes(), 4 * (16 + 48 + 24 + 16));
    let memory = ensemble.memory();
    let expected = ensemble.models()[0].weight_bytes() + small.weight_bytes() + 2 * math.weight_bytes();
    assert_eq!(memory.weight_bytes, expected);
    // Keys and values, 2 layers, 2 heads of 6, f32, in four models.
    assert_eq!(memory.kv_bytes_per_token, 4 * 2 * 2 * 2 * 6 * 4);

    assert!(
        refusal(models.load("large", "", &["math"]))
            .ends_with("without the small model that it changes is not supported")
    );
    assert!(
        refusal(models.load("math", "", &[])).ends_with("a LoRA adapter as the large model is not supported")
    );
}

#[test]
fn a_directory_named_twice_is_mapped_once() {
    let models = Models::new(&[("model", json!({}))]);
    let ensemble = models.load("model", "model", &["model/../model"]).unwrap();
    let [large, small, expert] = ensemble.models() else { panic!("three models") };
    assert!(Arc::ptr_eq(&large.weights, &small.weights) && Arc::ptr_eq(&small.weights, &expert.weights));
    assert_eq!(ensemble.memory().weight_bytes, large.weight_bytes());
    assert_eq!((large.role, expert.role), (Role::Large, Role::Expert(0)));
}

#[test]
fn rules_need_their_models() {
    let models = Models::new(&[("m", json!({}))]);
    let all = models.load("m", "m", &["m", "m"]).unwrap();
    let pair = models.load("m", "m", &[]).unwrap();
    let expert = models.load("", "", &["m"]).unwrap();
    let dynamic = FusionRule::default();
    assert_eq!(all.models_for(&dynamic), [0, 1, 2, 3]);
    assert_eq!(all.models_for(&FusionRule::Large), [0]);
    assert_eq!(all.models_for(&FusionRule::Expert(1)), [3]);
    assert_eq!(expert.models_for(&FusionRule::Expert(0)), [0]);
    assert!(pair.models_for(&dynamic).is_empty() && expert.models_for(&FusionRule::Small).is_empty());

    let error = |ensemble: &Ensemble, rule: &FusionRule| ensemble.check_rule(rule).unwrap_err().to_string();
    assert_eq!(error(&pair, &dynamic), "the dynamic method needs an expert");
    assert_eq!(error(&expert, &FusionRule::Large), "the large method needs a large model");
    assert_eq!(error(&pair, &FusionRule::Expert(0)), "the expert method needs an expert");
    assert_eq!(
        error(&all, &FusionRule::Expert(2)),
        "the expert method needs expert 2, and there are 2, counted from 0"
    );
    let fixed = |alphas: &[f64]| FusionRule::Static(alphas.iter().copied().collect());
    assert!(all.check_rule(&fixed(&[1.0])).is_ok() && all.check_rule(&fixed(&[1.0, -0.5])).is_ok());
    assert_eq!(error(&all, &fixed(&[1.0; 3])), "number of alphas: expected 1 or 2, one an expert, found 3");
    assert_eq!(error(&all, &fixed(&[])), "number of alphas: expected 1 or 2, one an expert, found 0");
    assert_eq!(error(&all, &fixed(&[f64::NAN])), "alpha: expected a finite number, found NaN");
    let grids = |count: usize, every: usize| {
        let grids = std::iter::repeat_n(AlphaGrid::default(), count).collect();
        FusionRule::Dynamic(DynamicRule { grids, every, ..DynamicRule::default() })
    };
    assert!(all.check_rule(&grids(2, 3)).is_ok());
    assert!(error(&all, &grids(3, 1)).starts_with("number of alpha grids: expected 1 or 2"));
    assert_eq!(error(&all, &grids(1, 0)), "alpha every: expected at least 1, found 0");
}

#[test]
fn too_many_experts_or_none_at_all() {
    let models = Models::new(&[("m", json!({}))]);
    assert_eq!(models.load("", "m", &["m"; 8]).unwrap().num_experts(), 8);
    assert_eq!(refusal(models.load("", "m", &["m"; 9])), "experts: expected at most 8, found 9");
    assert_eq!(refusal(models.load("", "", &[])), "models: expected at least one model, found []");
    let missing = refusal(models.load("nowhere", "", &[]));
    assert!(missing.contains("nowhere: ") && Path::new(&missing).is_absolute(), "{missing}");
}
