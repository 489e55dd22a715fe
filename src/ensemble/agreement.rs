//! What the models of an ensemble must agree on.

use std::fmt::Debug;
#[cfg(feature = "tokenizer")]
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::{LlamaModel, Role};
#[cfg(feature = "tokenizer")]
use crate::tokenizer::Tokenizer;

/// Experts run in lockstep with the small model, so their layers must have its shape. Rotation, the norms' ε and the number
/// of token ids may differ.
pub(super) fn check_architectures(models: &[LlamaModel]) -> Result<()> {
    let Some(small) = models.iter().find(|model| model.role == Role::Small) else { return Ok(()) };
    let experts = models.iter().filter(|model| matches!(model.role, Role::Expert(_)));
    for expert in experts {
        let (s, e) = (&small.config, &expert.config);
        let role = expert.role;
        same(role, "hidden_size", &s.hidden_size, &e.hidden_size)?;
        same(role, "intermediate_size", &s.intermediate_size, &e.intermediate_size)?;
        same(role, "num_hidden_layers", &s.num_hidden_layers, &e.num_hidden_layers)?;
        same(role, "num_attention_heads", &s.num_attention_heads, &e.num_attention_heads)?;
        same(role, "num_key_value_heads", &s.num_key_value_heads, &e.num_key_value_heads)?;
        same(role, "head_dim", &s.head_dim, &e.head_dim)?;
        same(role, "attention_bias", &s.attention_bias, &e.attention_bias)?;
        same(role, "mlp_bias", &s.mlp_bias, &e.mlp_bias)?;
    }
    Ok(())
}

fn same<T: PartialEq + Debug>(expert: Role, what: &str, small: &T, found: &T) -> Result<()> {
    if small == found {
        return Ok(());
    }
    Err(Error::Mismatch {
        left: Role::Small,
        right: expert,
        what: what.to_owned(),
        expected: format!("{small:?}"),
        found: format!("{found:?}"),
    })
}

/// Checks that every id below `vocab_size` is the same token in all tokenizers that have one for it, special in all of
/// them or in none, and that all put the same tokens around a prompt. An id without a token is a row that pads the
/// embedding, and says nothing; a model without a tokenizer is given ids.
#[cfg(feature = "tokenizer")]
pub(super) fn check_tokens(
    models: &[Arc<LlamaModel>],
    tokenizers: &[Option<Tokenizer>],
    vocab_size: usize,
) -> Result<()> {
    let given = || {
        let pairs = models.iter().zip(tokenizers);
        pairs.filter_map(|(model, tokenizer)| tokenizer.as_ref().map(|tokenizer| (model.role, tokenizer)))
    };
    let mut distinct: Vec<(Role, &Tokenizer)> = Vec::new();
    for (role, tokenizer) in given() {
        if !distinct.iter().any(|(_, known)| known.shares_vocabulary(tokenizer)) {
            distinct.push((role, tokenizer));
        }
    }
    if distinct.len() > 1 {
        for id in 0..u32::try_from(vocab_size).unwrap_or(u32::MAX) {
            check_token(id, &distinct)?;
        }
    }
    // Here files beside tokenizer.json have a say, too. A tokenizer that can't write the text that shows it says nothing.
    let mut around =
        given().filter_map(|(role, tokenizer)| Some((role, tokenizer, tokenizer.around().ok()?)));
    let Some((left, first, expected)) = around.next() else { return Ok(()) };
    for (right, tokenizer, found) in around {
        for (place, expected, found) in [("before", &expected.0, &found.0), ("after", &expected.1, &found.1)]
        {
            if expected != found {
                let what = format!("what their tokenizers put {place} a prompt");
                let (expected, mut found) = (written(first, expected), written(tokenizer, found));
                found.push_str(
                    " (by tokenizer.json, or add_bos_token and add_eos_token in tokenizer_config.json)",
                );
                return Err(Error::Mismatch { left, right, what, expected, found });
            }
        }
    }
    Ok(())
}

/// Checks that token `id` is the same to all tokenizers that know it.
#[cfg(feature = "tokenizer")]
fn check_token(id: u32, tokenizers: &[(Role, &Tokenizer)]) -> Result<()> {
    let mut views = tokenizers.iter().filter_map(|&(role, tokenizer)| {
        tokenizer.token(id).map(|token| (role, token, tokenizer.is_special(id)))
    });
    let Some((left, expected, special)) = views.next() else { return Ok(()) };
    let differs = |(_, token, other): &(Role, String, bool)| (token, *other) != (&expected, special);
    let Some((right, found, other)) = views.find(differs) else { return Ok(()) };
    let mismatch = |what, expected, found| Err(Error::Mismatch { left, right, what, expected, found });
    if found != expected {
        return mismatch(format!("token {id}"), format!("{expected:?}"), format!("{found:?}"));
    }
    let view = |special| if special { "a special token" } else { "ordinary text" }.to_owned();
    mismatch(format!("token {id}, {expected:?}"), view(special), view(other))
}

/// Tokens as a message shows them.
#[cfg(feature = "tokenizer")]
fn written(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    if ids.is_empty() {
        return "nothing".to_owned();
    }
    let token = |&id: &u32| format!("token {id}, {:?}", tokenizer.token(id).unwrap_or_default());
    ids.iter().map(token).collect::<Vec<_>>().join(", ")
}
