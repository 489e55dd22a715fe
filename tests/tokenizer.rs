//! Tokenizers: text to ids and back, whole and as a stream; chat templates.
#![allow(clippy::unwrap_used)] // a test may panic

#[path = "support/vocabulary.rs"]
mod vocabulary;

use std::path::Path;

use dlf_engine::tokenizer::{Message, Tokenizer, TokenizerFiles};
use proptest::prelude::*;
use serde_json::{Value, json};

fn load(tokenizer: &Value) -> Tokenizer {
    from_files(tokenizer, None, None).unwrap()
}

fn from_files(
    tokenizer: &Value,
    config: Option<&Value>,
    chat_template: Option<&str>,
) -> dlf_engine::Result<Tokenizer> {
    let (tokenizer, config) = (tokenizer.to_string(), config.map(Value::to_string));
    let files = TokenizerFiles {
        tokenizer: tokenizer.as_bytes(),
        config: config.as_deref(),
        special_tokens_map: None,
        chat_template,
    };
    Tokenizer::from_files(Path::new("model"), files)
}

/// What the tokenizers crate itself makes of the ids.
fn reference(tokenizer: &Value) -> tokenizers::Tokenizer {
    tokenizer.to_string().parse().unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut decoder = tokenizer.decoder();
    let mut texts: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
    texts.push(decoder.finish());
    texts
}

const TEXTS: [&str; 7] = [
    "the cat and the hat",
    "  two spaces, then one the",
    "天地玄黄，宇宙洪荒。",
    "a 👩‍👩‍👧‍👦 family and a 🇨🇭 flag",
    "naïve café — “quoted”",
    "line\n\n\ttab\r\n",
    "",
];

#[test]
fn both_kinds_decode_what_they_encoded() {
    for tokenizer in [vocabulary::byte_level(), vocabulary::sentencepiece()] {
        let (ours, theirs) = (load(&tokenizer), reference(&tokenizer));
        for text in TEXTS {
            let ids = ours.encode(text, true).unwrap();
            assert_eq!(ids, theirs.encode(text, true).unwrap().get_ids());
            assert_eq!(ours.decode(&ids), text);
            assert_eq!(theirs.decode(&ids, true).unwrap(), text);
            assert_eq!(stream(&ours, &ids).concat(), text);
        }
    }
}

#[test]
fn a_character_leaves_with_its_last_byte() {
    // One byte a token for both: 猫 is E7 8C AB.
    let expected = ["", "", "猫", "!", ""];
    let ours = load(&vocabulary::byte_level());
    assert_eq!(stream(&ours, &ours.encode("猫!", false).unwrap()), expected);
    let ours = load(&vocabulary::sentencepiece());
    let ids = ours.encode("猫!", false).unwrap();
    let prefix: Vec<_> = ids.iter().map(|&id| ours.token(id).unwrap()).collect();
    assert_eq!(prefix, ["▁", "<0xE7>", "<0x8C>", "<0xAB>", "<0x21>"]);
    assert_eq!(stream(&ours, &ids)[1..], expected);
}

#[test]
fn an_unfinished_character_is_replaced_at_the_end_and_where_it_is_broken() {
    for (tokenizer, token) in [
        (load(&vocabulary::byte_level()), ["ç", "Į", "A"]),
        (load(&vocabulary::sentencepiece()), ["<0xE7>", "<0x8C>", "<0x41>"]),
    ] {
        let ids = token.map(|token| tokenizer.token_id(token).unwrap());
        assert_eq!(stream(&tokenizer, &ids[..2]), ["", "", "\u{FFFD}"]);
        assert_eq!(stream(&tokenizer, &ids), ["", "", "\u{FFFD}A", ""]);
    }
}

#[test]
fn endless_broken_bytes_cost_no_memory() {
    let tokenizer = load(&vocabulary::sentencepiece());
    let continuation = tokenizer.token_id("<0x8C>").unwrap();
    let mut decoder = tokenizer.decoder();
    for _ in 0..100_000 {
        assert_eq!(decoder.push(continuation), "\u{FFFD}");
    }
}

#[test]
fn the_space_before_the_first_word_stays_in_a_continuation() {
    let tokenizer = load(&vocabulary::sentencepiece());
    let ids = tokenizer.encode("th", false).unwrap();
    assert_eq!(ids, [tokenizer.token_id("▁th").unwrap()]);
    assert_eq!(tokenizer.decode(&ids), "th");
    let prompt = tokenizer.encode("a", true).unwrap();
    assert_eq!(prompt[0], 1, "a BOS");
    assert_eq!(tokenizer.decoder_after(&prompt).push(ids[0]), " th");
    assert_eq!(tokenizer.decoder_after(&[1]).push(ids[0]), "th", "a BOS is no text");
    // Only one space is the tokenizer's own.
    let spaces = tokenizer.token_id("▁▁").unwrap();
    assert_eq!(stream(&tokenizer, &[spaces, ids[0]]), [" ", " th", ""]);
}

#[test]
fn special_and_unknown_tokens_are_no_text() {
    let tokenizer = load(&vocabulary::byte_level());
    let ids = tokenizer.encode("<|im_start|>a<|im_end|>", false).unwrap();
    assert_eq!((ids[0], ids[2], ids.len()), (1, 2, 3));
    assert_eq!(tokenizer.decode(&[1, ids[1], 2, 9999, u32::MAX]), "a");
    assert!(tokenizer.piece(1).is_empty() && tokenizer.piece(9999).is_empty());
    assert_eq!(tokenizer.piece(ids[1]), b"a");
    assert_eq!(tokenizer.vocab_size(), 3 + 256 + 2);
}

#[test]
fn other_decoders() {
    let text = |decoder: Value| {
        let mut tokenizer = vocabulary::sentencepiece();
        tokenizer["decoder"] = decoder;
        let (ours, theirs) = (load(&tokenizer), reference(&tokenizer));
        let ids: Vec<u32> = ["▁▁", "a", "▁th", "▁"].map(|token| ours.token_id(token).unwrap()).into();
        let text = ours.decode(&ids);
        assert_eq!(text, theirs.decode(&ids, true).unwrap());
        assert_eq!(stream(&ours, &ids).concat(), text);
        text
    };
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    assert_eq!(text(metaspace("always")), "a th ");
    assert_eq!(text(metaspace("never")), "  a th ");
    assert_eq!(text(Value::Null), "▁▁ a ▁th ▁");
    let without_strip = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]});
    assert_eq!(text(without_strip), "  a th ");

    let mut tokenizer = vocabulary::sentencepiece();
    tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let message = from_files(&tokenizer, None, None).unwrap_err().to_string();
    assert!(
        message.starts_with("model/tokenizer.json: the token decoder {\"type\":\"WordPiece\""),
        "{message}"
    );
}

#[test]
fn truncation_and_padding_of_training_are_off() {
    let mut tokenizer = vocabulary::byte_level();
    tokenizer["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    assert_eq!(load(&tokenizer).encode("abcd", true).unwrap().len(), 4);
}

#[test]
fn add_bos_token_has_the_say_over_the_post_processor() {
    let ids = |config: Value| {
        from_files(&vocabulary::sentencepiece(), Some(&config), None).unwrap().encode("a", true).unwrap()
    };
    let a = load(&vocabulary::sentencepiece()).encode("a", false).unwrap();
    let around = |bos: &[u32], eos: &[u32]| [bos, &a, eos].concat();
    let names = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}});
    let with = |add_bos: Value, add_eos: Value| {
        let mut config = names.clone();
        (config["add_bos_token"], config["add_eos_token"]) = (add_bos, add_eos);
        ids(config)
    };
    assert_eq!(ids(names.clone()), around(&[1], &[]), "the post-processor's");
    assert_eq!(with(json!(false), Value::Null), around(&[], &[]));
    assert_eq!(with(json!(true), json!(true)), around(&[1], &[2]));
    assert_eq!(with(json!(true), json!(false)), around(&[1], &[]));
    let config = json!({"bos_token": "<bos>", "add_bos_token": true});
    let message = from_files(&vocabulary::sentencepiece(), Some(&config), None).unwrap_err().to_string();
    assert_eq!(
        message,
        "model/tokenizer_config.json: `bos_token`: expected a token of the vocabulary, found \"<bos>\""
    );
}

#[test]
fn huge_ids_dropout_and_marks_are_refused() {
    let mut tokenizer = vocabulary::byte_level();
    tokenizer["model"]["vocab"]["zzz"] = json!(u32::MAX);
    let message = from_files(&tokenizer, None, None).unwrap_err().to_string();
    assert!(message.contains("token \"zzz\" has the id 4294967295"), "{message}");
    let mut tokenizer = vocabulary::byte_level();
    tokenizer["model"]["dropout"] = json!(0.1);
    let message = from_files(&tokenizer, None, None).unwrap_err().to_string();
    assert_eq!(message, "model/tokenizer.json: a BPE dropout of 0.1 is not supported");
    let mut tokenizer = vocabulary::byte_level();
    tokenizer["model"]["continuing_subword_prefix"] = json!("##");
    let message = from_files(&tokenizer, None, None).unwrap_err().to_string();
    assert_eq!(message, "model/tokenizer.json: the continuing_subword_prefix \"##\" is not supported");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_survives_and_streams(text in "\\PC{0,40}") {
        for tokenizer in [vocabulary::byte_level(), vocabulary::sentencepiece()] {
            let tokenizer = load(&tokenizer);
            let ids = tokenizer.encode(&text, false).unwrap();
            // The space that sentencepiece puts in front is lost with one that the text begins with.
            prop_assert_eq!(stream(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
            prop_assert_eq!(tokenizer.decode(&ids), text.as_str());
        }
    }

    #[test]
    fn any_bytes_decode_like_lossy_utf8(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0x80..=0xF4_u8], 0..24)) {
        let tokenizer = load(&vocabulary::byte_level());
        let ids: Vec<u32> = bytes.iter().map(|&byte| 3 + u32::from(byte)).collect();
        for (id, byte) in ids.iter().zip(&bytes) {
            prop_assert_eq!(tokenizer.piece(*id), [*byte]);
        }
        prop_assert_eq!(stream(&tokenizer, &ids).concat(), String::from_utf8_lossy(&bytes).into_owned());
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

fn render(template: &str, messages: &[Message]) -> dlf_engine::Result<String> {
    let config = json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}});
    from_files(&vocabulary::byte_level(), Some(&config), Some(template))
        .unwrap()
        .apply_chat_template(messages)
}

/// SmolLM2's.
const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// In the manner of Llama 2's: namespaces, methods of Python's strings, trimmed blocks.
const LLAMA: &str = "{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {% if message.role == 'system' %}
        {%- set ns.system = message['content'].strip() %}
    {% elif message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message.role.upper()) }}
    {% else %}
        {%- if tools is not none %}{{ tools }}{% endif %}
        {{- bos_token + '[' ~ (ns.system.split('\\n')[0]) ~ '|' + message.content.strip() + ']' + eos_token }}
    {% endif %}
{%- endfor %}
";

#[test]
fn templates_render_as_in_transformers() {
    // Both expectations are jinja2's, set up as transformers does.
    let user = [message("user", "  Hi <b>&'\"  ")];
    assert_eq!(
        render(CHATML, &user).unwrap(),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\n  Hi <b>&'\"  <|im_end|>\n<|im_start|>assistant\n"
    );
    let conversation =
        [message("system", " Be brief.\nOr not. "), user[0].clone(), message("assistant", "Yes")];
    assert_eq!(
        render(LLAMA, &conversation).unwrap(),
        "<|im_start|>[Be brief.|Hi <b>&'\"]<|im_end|>\n<|im_start|>[Be brief.|Yes]<|im_end|>\n"
    );
}

#[test]
fn functions_and_filters_of_transformers_are_there() {
    let error = render(LLAMA, &[message("tool", "x")]).unwrap_err().to_string();
    assert!(error.starts_with("model/chat_template.jinja: chat template: line 6: "), "{error}");
    assert!(error.contains("unknown role TOOL"), "{error}");
    let year = render("{{ strftime_now('%Y') }}", &[]).unwrap();
    assert!(year.len() == 4 && year.starts_with("2"), "{year}");
    assert!(render("{{ strftime_now('%Q!') }}", &[]).unwrap_err().to_string().contains("no strftime format"));
    let json = render("{{ messages[0] | tojson }}", &[message("user", "<é'\n>")]).unwrap();
    assert_eq!(json, "{\"role\": \"user\", \"content\": \"<é'\\n>\"}");
    let marked = "{% for m in messages %}{%- generation -%} {{ m.content }} {% endgeneration %}{% endfor %}";
    assert_eq!(render(marked, &[message("user", "a")]).unwrap(), "a ");
    assert_eq!(render("{{ a_name_that_is_not_there }}|{{ [1, 2][-1] }}", &[]).unwrap(), "|2");
    assert_eq!(
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", &[])
            .unwrap(),
        "1"
    );
}

#[test]
fn a_template_ends_and_reaches_nothing() {
    let endless = "{% macro f() %}{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}{% endmacro %}{{ f() }}";
    let error = render(endless, &[]).unwrap_err().to_string();
    assert_eq!(
        error,
        "model/chat_template.jinja: chat template: it doesn't come to an end, or takes too much memory"
    );
    // Each of these would take a terabyte.
    let doubled = |start: &str, twice: &str, end: &str| {
        format!(
            "{{% set ns = namespace(a={start}) %}}{{% for i in range(40) %}}{{% set ns.a = {twice} %}}{{% endfor %}}{end}"
        )
    };
    let text = |end: &str| doubled("'a'", "ns.a ~ ns.a", end);
    let list = |end: &str| doubled("[1]", "[ns.a, ns.a]", end);
    for (huge, how) in [
        (text(""), "concatenated"),
        (text("{{ ns.a }}"), "printed"),
        (doubled("'a'", "ns.a + ns.a", ""), "added"),
        (doubled("'a'", "ns.a.replace('a', 'aa')", ""), "replaced"),
        (doubled("'a'", "ns.a.join([ns.a, ns.a])", ""), "joined by itself"),
        (doubled("'aa'", "ns.a | replace('a', ns.a)", ""), "replaced by the filter"),
        (list("{{ ns.a | tojson }}"), "a list as JSON"),
        (list("{{ ns.a | tojson(indent=4) }}"), "a list as indented JSON"),
        ("{{ 'a' * 999999999999 }}".to_owned(), "multiplied"),
        ("{{ 'a' | indent(999999999999, true) }}".to_owned(), "indented"),
        ("{{ '%999999999d' | format(1) }}".to_owned(), "padded"),
        ("{% for i in range(999999999999) %}a{% endfor %}".to_owned(), "ranged"),
    ] {
        assert!(render(&huge, &[]).is_err(), "{how}");
    }
    for reaching in [
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__() }}",
    ] {
        assert!(render(reaching, &[message("user", "x")]).is_err(), "{reaching}");
    }
    let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(render(recursive, &[]).is_err());
    let broken = render("{% if %}", &[]).unwrap_err().to_string();
    assert!(broken.starts_with("model/chat_template.jinja: chat template: line 1: syntax error"), "{broken}");
}

#[test]
fn the_template_is_looked_for_in_order() {
    let render = |config: Value, jinja: Option<&str>| {
        from_files(&vocabulary::byte_level(), Some(&config), jinja)?.apply_chat_template(&[])
    };
    let string = json!({"chat_template": "from the config"});
    let list = json!({"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from the list"}]});
    assert_eq!(render(string.clone(), Some("from the file")).unwrap(), "from the file");
    assert_eq!(render(string, None).unwrap(), "from the config");
    assert_eq!(render(list, None).unwrap(), "from the list");
    let error = render(json!({}), None).unwrap_err().to_string();
    assert_eq!(error, "model: chat template: neither chat_template.jinja nor tokenizer_config.json has one");
    let no_default = json!({"chat_template": [{"name": "tool_use", "template": "tools"}]});
    let error = render(no_default, None).unwrap_err().to_string();
    assert!(
        error.starts_with("model/tokenizer_config.json: `chat_template`: expected a template"),
        "{error}"
    );
}
