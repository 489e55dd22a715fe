//! What the models of an ensemble must agree on.

use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::model::{LlamaModel, Role};

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

/// Checks that every id below `vocab_size` is the same token in all tokenizers that have one for it. An id without a
/// token is a row that pads the embedding, and says nothing.
#[cfg(feature = "tokenizer")]
pub(super) fn check_tokens(
    models: &[std::sync::Arc<LlamaModel>],
    tokenizers: &[Option<crate::tokenizer::Tokenizer>],
    vocab_size: usize,
) -> Result<()> {
    let mut distinct: Vec<(Role, &crate::tokenizer::Tokenizer)> = Vec::new();
    for (model, tokenizer) in models.iter().zip(tokenizers) {
        if let Some(tokenizer) = tokenizer
            && !distinct.iter().any(|(_, known)| known.shares_vocabulary(tokenizer))
        {
            distinct.push((model.role, tokenizer));
        }
    }
    if distinct.len() < 2 {
        return Ok(());
    }
    for id in 0..u32::try_from(vocab_size).unwrap_or(u32::MAX) {
        let mut tokens =
            distinct.iter().filter_map(|(role, tokenizer)| tokenizer.token(id).map(|token| (*role, token)));
        let Some((left, expected)) = tokens.next() else { continue };
        if let Some((right, found)) = tokens.find(|(_, token)| *token != expected) {
            return Err(Error::Mismatch {
                left,
                right,
                what: format!("token {id}"),
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
        }
    }
    Ok(())
}
