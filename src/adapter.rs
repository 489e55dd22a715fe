//! A LoRA adapter in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A projection with weight `W` becomes `y = W x + scale · B (A x)`, with `scale = lora_alpha / r`, or
//! `lora_alpha / √r` for rsLoRA.

use crate::weights::Tensor;

/// The projections that an adapter may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

/// The low-rank update of one projection.
#[derive(Clone, Debug)]
pub struct LoraDelta {
    /// A: `(r, in)`.
    pub a: Tensor,
    /// B: `(out, r)`.
    pub b: Tensor,
    /// What `B (A x)` is multiplied with.
    pub scale: f32,
}

/// The updates of one layer, `None` where a projection is unchanged.
#[derive(Clone, Debug, Default)]
pub struct LoraLayer {
    /// Indexed by [`Projection`] in its order.
    pub deltas: [Option<LoraDelta>; 7],
}

impl LoraLayer {
    /// The update of `projection`.
    pub fn delta(&self, projection: Projection) -> Option<&LoraDelta> {
        self.deltas.get(projection as usize).and_then(Option::as_ref)
    }
}

/// A LoRA adapter over a Llama model.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    /// One a layer of the model.
    pub layers: Vec<LoraLayer>,
}
