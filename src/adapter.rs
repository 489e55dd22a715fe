//! A LoRA adapter in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A projection with weight `W` becomes `y = W x + scale · B (A x)`, with `scale = lora_alpha / r`, or
//! `lora_alpha / √r` for rsLoRA.

use std::path::Path;

use serde_json::Value;

use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::json::{Object, show};
use crate::weights::{Checkpoint, Tensor};

/// The file that makes a directory an adapter.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";

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

impl Projection {
    /// Every projection, in the order of [`LoraLayer::deltas`].
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The module's name within its layer.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// `(out, in)` in a model of this configuration.
    pub fn shape(self, config: &LlamaConfig) -> (usize, usize) {
        let &LlamaConfig { hidden_size, intermediate_size, head_dim, .. } = config;
        match self {
            Self::Q => (config.num_attention_heads * head_dim, hidden_size),
            Self::K | Self::V => (config.num_key_value_heads * head_dim, hidden_size),
            Self::O => (hidden_size, config.num_attention_heads * head_dim),
            Self::Gate | Self::Up => (intermediate_size, hidden_size),
            Self::Down => (hidden_size, intermediate_size),
        }
    }
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

impl LoraAdapter {
    /// Maps the adapter in `dir`, which must fit a model of this configuration.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] and [`Error::Weights`] where a file is malformed, [`Error::Tensor`] where a
    /// tensor doesn't fit, [`Error::Unsupported`] where the adapter is more than a low-rank update of
    /// projections (DoRA, saved modules, biases, initialisations that change the base weights).
    pub fn load(dir: &Path, config: &LlamaConfig) -> Result<Self> {
        let path = dir.join(ADAPTER_CONFIG);
        let Some(lora) = Object::read(&path)? else {
            return Err(Error::io(path, std::io::ErrorKind::NotFound.into()));
        };
        refuse_unsupported(&lora)?;
        let scaling = Scaling::from_json(&lora)?;
        let file = dir.join("adapter_model.safetensors");
        if !file.exists() && dir.join("adapter_model.bin").exists() {
            let reason =
                "has adapter_model.bin, which can't be read: convert it to adapter_model.safetensors";
            return Err(Error::Weights { path: dir.to_owned(), reason: reason.to_owned() });
        }
        let mut checkpoint = Checkpoint::open_file(&file)?;

        let mut layers = vec![LoraLayer::default(); config.num_hidden_layers];
        for (index, layer) in layers.iter_mut().enumerate() {
            for (projection, delta) in Projection::ALL.into_iter().zip(&mut layer.deltas) {
                *delta = take_delta(&mut checkpoint, &scaling, index, projection, config)?;
            }
        }
        checkpoint.refuse_rest(|_| false)?;
        if layers.iter().flat_map(|layer| &layer.deltas).all(Option::is_none) {
            let reason = "holds no update of any projection".to_owned();
            return Err(Error::Weights { path: file, reason });
        }
        Ok(Self { layers })
    }

    /// Bytes that the adapter takes, as stored.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.as_bytes().len()).sum()
    }

    /// Numbers that the adapter has.
    pub fn num_parameters(&self) -> usize {
        self.tensors().map(|tensor| tensor.shape().iter().product::<usize>()).sum()
    }

    /// Every tensor.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers
            .iter()
            .flat_map(|layer| layer.deltas.iter().flatten())
            .flat_map(|delta| [&delta.a, &delta.b])
    }
}

fn take_delta(
    checkpoint: &mut Checkpoint,
    scaling: &Scaling,
    layer: usize,
    projection: Projection,
    config: &LlamaConfig,
) -> Result<Option<LoraDelta>> {
    let module = format!("model.layers.{layer}.{}", projection.module());
    let name = |matrix: &str| format!("base_model.model.{module}.lora_{matrix}.weight");
    let (a, b) = (name("A"), name("B"));
    if !checkpoint.contains(&a) && !checkpoint.contains(&b) {
        return Ok(None);
    }
    let (r, scale) = scaling.of(&module);
    let (out, input) = projection.shape(config);
    let (a, b) = (checkpoint.take(&a, &[r, input])?, checkpoint.take(&b, &[out, r])?);
    Ok(Some(LoraDelta { a, b, scale }))
}

/// Refuses by name what is more than `scale · B A` on a projection.
fn refuse_unsupported(lora: &Object) -> Result<()> {
    let unsupported = |what: String| Err(Error::Unsupported { path: lora.path().to_owned(), what });
    match lora.str("peft_type")? {
        Some("LORA") => {}
        Some(other) => return unsupported(format!("the adapter type {other} (peft_type)")),
        None => return Err(lora.invalid("peft_type", "LORA", "nothing")),
    }
    const MORE_THAN_LORA: [&str; 17] = [
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "lora_bias",
        "fan_in_fan_out",
        "modules_to_save",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "megatron_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
        "arrow_config",
        "kasa_config",
    ];
    for field in MORE_THAN_LORA {
        let asked_for = |value: &&Value| match value {
            Value::Bool(given) => *given,
            Value::Array(items) => !items.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            _ => true,
        };
        if let Some(value) = lora.get(field).filter(asked_for) {
            return unsupported(format!("an adapter with {field} ({})", show(value)));
        }
    }
    if let Some(other) = lora.str("bias")?.filter(|&bias| bias != "none") {
        return unsupported(format!("an adapter with trained biases (bias: {other})"));
    }
    // PiSSA, OLoRA, CorDA and LoftQ change the base weights as well, and only PEFT could redo that.
    match lora.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => Ok(()),
        Some(other) => unsupported(format!("an adapter with init_lora_weights {}", show(other))),
    }
}

/// Rank and scale of every module.
struct Scaling {
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
}

/// Which modules a key of `rank_pattern` or `alpha_pattern` means.
enum Pattern {
    /// `^name`: this one.
    Whole(String),
    /// `name`: it, and all that end with `.name`.
    End(String),
}

const MAX_RANK: usize = 1 << 16;
const ALPHA: &str = "a number up to 1e6";

fn is_alpha(alpha: f64) -> bool {
    alpha.abs() <= 1e6
}

impl Scaling {
    fn from_json(lora: &Object) -> Result<Self> {
        let r = lora.required_size("r", MAX_RANK)?;
        let lora_alpha = lora.required_number("lora_alpha", ALPHA, is_alpha)?;
        let use_rslora = lora.bool("use_rslora")?.unwrap_or(false);
        let ranks = patterns(lora, "rank_pattern", |patterns, key| patterns.required_size(key, MAX_RANK))?;
        let alphas =
            patterns(lora, "alpha_pattern", |patterns, key| patterns.required_number(key, ALPHA, is_alpha))?;
        Ok(Self { r, lora_alpha, use_rslora, ranks, alphas })
    }

    /// Rank and scale of `module`, a path like `model.layers.0.self_attn.q_proj`.
    fn of(&self, module: &str) -> (usize, f32) {
        let r = first_match(&self.ranks, module).unwrap_or(self.r);
        let alpha = first_match(&self.alphas, module).unwrap_or(self.lora_alpha);
        let divisor = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
        (r, (alpha / divisor) as f32)
    }
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Option<T> {
    let matches = |pattern: &Pattern| match pattern {
        Pattern::Whole(name) => module == name,
        Pattern::End(name) => {
            module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        }
    };
    patterns.iter().find(|(pattern, _)| matches(pattern)).map(|&(_, value)| value)
}

/// Reads a pattern table. PEFT takes its keys as regular expressions; those that are plain names are read here, and
/// others refused.
fn patterns<T>(
    lora: &Object,
    field: &str,
    value: impl Fn(&Object, &str) -> Result<T>,
) -> Result<Vec<(Pattern, T)>> {
    let Some(table) = lora.object(field)? else { return Ok(Vec::new()) };
    let read = |key: &String| {
        let (name, whole) = key.strip_prefix('^').map_or((key.as_str(), false), |name| (name, true));
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.') {
            let what = format!("the regular expression {key:?} in {field}");
            return Err(Error::Unsupported { path: lora.path().to_owned(), what });
        }
        let pattern = if whole { Pattern::Whole(name.to_owned()) } else { Pattern::End(name.to_owned()) };
        Ok((pattern, value(&table, key)?))
    };
    table.fields().keys().map(read).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lora(changes: Value) -> Object {
        let mut config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": false,
            "modules_to_save": null, "rank_pattern": {}, "init_lora_weights": true});
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        Object::parse(Path::new("lora/adapter_config.json"), &config.to_string()).unwrap()
    }

    #[test]
    fn scale_is_alpha_over_r_or_its_root() {
        let of = |changes| Scaling::from_json(&lora(changes)).unwrap().of("model.layers.0.mlp.up_proj");
        assert_eq!(of(json!({})), (8, 2.0));
        assert_eq!(of(json!({"r": 16, "use_rslora": true})), (16, 4.0));
        assert_eq!(of(json!({"lora_alpha": 2.0})), (8, 0.25));
    }

    #[test]
    fn patterns_name_modules_by_their_end() {
        let scaling = Scaling::from_json(&lora(json!({
            "rank_pattern": {"layers.1.mlp.up_proj": 4, "up_proj": 2, "^mlp.up_proj": 3},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 32.0, "k_proj": 4}
        })))
        .unwrap();
        assert_eq!(scaling.of("model.layers.1.mlp.up_proj"), (4, 4.0), "the first that matches");
        assert_eq!(scaling.of("model.layers.11.mlp.up_proj"), (2, 8.0), "11 doesn't end like 1");
        assert_eq!(scaling.of("model.layers.0.mlp.up_proj"), (2, 16.0));
        assert_eq!(scaling.of("model.layers.0.self_attn.k_proj"), (8, 0.5));
        assert_eq!(scaling.of("model.layers.0.self_attn.q_proj"), (8, 2.0));
        let Err(error) = Scaling::from_json(&lora(json!({"rank_pattern": {".*up_proj|q": 2}}))) else {
            panic!("a regular expression was taken for a name")
        };
        assert!(
            error.to_string().contains("the regular expression \".*up_proj|q\" in rank_pattern is not"),
            "{error}"
        );
    }

    #[test]
    fn more_than_lora_is_refused_by_name() {
        assert!(refuse_unsupported(&lora(json!({"modules_to_save": [], "megatron_config": {}}))).is_ok());
        for (changes, name) in [
            (json!({"peft_type": "IA3"}), "the adapter type IA3"),
            (json!({"use_dora": true}), "use_dora"),
            (json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
            (json!({"bias": "lora_only"}), "bias: lora_only"),
            (json!({"init_lora_weights": "pissa_niter_4"}), "pissa_niter_4"),
            (json!({"layer_replication": [[0, 2]]}), "layer_replication"),
        ] {
            let message = refuse_unsupported(&lora(changes)).unwrap_err().to_string();
            assert!(message.contains(name) && message.ends_with("is not supported"), "{message}");
        }
    }
}
