//! Small tokenizers of the two kinds that Llama models have.
#![allow(dead_code)] // each test file takes the kinds it needs

use serde_json::{Map, Value, json};

/// The character that byte-level BPE writes for a byte, by OpenAI's rule: printable bytes are themselves, the
/// others are counted up from U+0100.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| b.is_ascii_graphic() || (0xA1..=0xAC).contains(&b) || b >= 0xAE;
    if printable(byte) {
        return byte.into();
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}

fn special(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true})
}

fn tokenizer(special_tokens: &[&str], model: Value) -> Value {
    let added: Vec<Value> = special_tokens.iter().enumerate().map(|(id, token)| special(id, token)).collect();
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model})
}

fn bpe(tokens: impl IntoIterator<Item = String>, merges: &[[&str; 2]], byte_fallback: bool) -> Value {
    let vocab: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, t)| (t, json!(id))).collect();
    json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": byte_fallback, "ignore_merges": false,
        "vocab": vocab, "merges": merges})
}

/// Byte-level BPE, as Llama 3 and SmolLM2 have it: 3 special tokens, then one token a byte, then two merges.
pub(crate) fn byte_level() -> Value {
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let tokens = specials.iter().map(|&token| token.to_owned());
    let tokens =
        tokens.chain((0..=255).map(|byte| byte_char(byte).to_string())).chain(["Ġt".into(), "Ġth".into()]);
    let mut tokenizer = tokenizer(&specials, bpe(tokens, &[["Ġ", "t"], ["Ġt", "h"]], false));
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    tokenizer["pre_tokenizer"] = byte_level.clone();
    tokenizer["decoder"] = byte_level;
    tokenizer
}

/// Sentencepiece BPE with byte fallback, as Llama 2 has it: `<unk>`, `<s>`, `</s>`, one token a byte, `▁`, the
/// letters a to z, and three merges. A BOS is put in front.
pub(crate) fn sentencepiece() -> Value {
    let specials = ["<unk>", "<s>", "</s>"];
    let tokens = specials.iter().map(|&token| token.to_owned());
    let tokens = tokens.chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).chain(["▁".to_owned()]);
    let tokens = tokens.chain(('a'..='z').map(String::from)).chain(["▁t".into(), "▁th".into(), "▁▁".into()]);
    let merges = [["▁", "t"], ["▁t", "h"], ["▁", "▁"]];
    let mut tokenizer = tokenizer(&specials, bpe(tokens, &merges, true));
    tokenizer["model"]["unk_token"] = json!("<unk>");
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    tokenizer["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    tokenizer
}
