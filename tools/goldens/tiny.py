"""tests/goldens/tiny: forward passes of tiny models by transformers, and of LoRA adapters by PEFT."""

import json
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from . import models

PROMPT_LENGTHS = (24, 7)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# What a mistake must at least change in some log-probability, or the golden could not catch it. A correct
# engine differs by less than 1e-4.
VISIBLE = 0.05
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Case:
    """One directory: a model as save_pretrained writes it, then `rewrite(directory)`, and its golden."""

    name: str
    what: str
    config: LlamaConfig | MistralConfig
    dtype: str = "bf16"
    shard: str = "1GB"
    rewrite: list = field(default_factory=list)
    token_by_token: bool = False
    ablations: dict = field(default_factory=dict)


def llama(hidden, heads, kv_heads, intermediate, vocab, **more):
    return LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        **{"num_hidden_layers": 2, "max_position_embeddings": 256, **more},
    )


# How a case's config.json is rewritten.


def edit_json(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def older_form(directory):
    """config.json as before transformers 5: rope_theta, rope_scaling and torch_dtype on the top level."""

    def edit(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
        del config["transformers_version"]

    edit_json(directory / "config.json", edit)


def rope_type_named_type(directory):
    """The oldest form of rope_scaling: {"type": ..., "factor": ...}."""

    def edit(config):
        scaling = config["rope_scaling"]
        scaling["type"] = scaling.pop("rope_type")

    edit_json(directory / "config.json", edit)


def llama_1_form(directory):
    """config.json with the keys of the first Llama alone, and the inv_freq buffers that it stored."""
    keep = (
        "architectures bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size "
        "max_position_embeddings model_type num_attention_heads num_hidden_layers rms_norm_eps "
        "tie_word_embeddings torch_dtype use_cache vocab_size"
    ).split()

    def edit(config):
        config["torch_dtype"] = config.pop("dtype")
        for key in set(config) - set(keep):
            del config[key]

    edit_json(directory / "config.json", edit)
    path = directory / "model.safetensors"
    state = load_file(path)
    model = models.load(directory)
    for layer in range(model.config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        state[name] = model.model.rotary_emb.inv_freq.clone()
    save_file(state, path, metadata={"format": "pt"})


# Ablations: a mistake that an engine could make, done on purpose to a loaded model.


def without_rope_scaling(model):
    rope = model.model.rotary_emb
    rope.rope_type = "default"
    rope.inv_freq, rope.attention_scaling = rope.compute_default_rope_parameters(model.config)


def without_attention_scaling(model):
    model.model.rotary_emb.attention_scaling = 1.0


def without_biases(suffixes):
    def ablate(model):
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and name.split(".")[-2] in suffixes:
                parameter.data.zero_()

    return ablate


def with_default_eps(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-6


def cases():
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    yarn_options = {
        **yarn,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 1.5,
        "mscale_all_dim": 0.4,
        "truncate": False,
    }
    no_scaling = {"no rope scaling": without_rope_scaling}
    rope = {"hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 56, "vocab": 113}

    def rope_case(name, what, parameters, **more):
        return Case(name, what, llama(**rope, rope_parameters=parameters), ablations=no_scaling, **more)

    return [
        Case("mha_untied_f32", "multi-head attention, untied lm_head", llama(48, 4, 4, 83, 97), dtype="f32"),
        Case(
            "gqa_tied_bf16",
            "grouped queries (8 heads, 2 KV heads), tied embeddings, three layers, theta 500000",
            llama(
                64, 8, 2, 112, 300, num_hidden_layers=3, tie_word_embeddings=True, rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            ),
        ),
        Case(
            "bias_f16",
            "attention_bias and mlp_bias; rms_norm_eps 0.02",
            llama(36, 6, 3, 61, 101, attention_bias=True, mlp_bias=True, rms_norm_eps=0.02),
            dtype="f16",
            ablations={
                "no attention bias": without_biases(["q_proj", "k_proj", "v_proj", "o_proj"]),
                "no o_proj bias": without_biases(["o_proj"]),
                "no mlp bias": without_biases(["gate_proj", "up_proj", "down_proj"]),
                "rms_norm_eps 1e-6": with_default_eps,
            },
        ),
        Case(
            "head_dim_64",
            "head_dim 64 given explicitly (hidden / heads is 32), one KV head",
            llama(64, 2, 1, 96, 200, head_dim=64),
        ),
        Case(
            "head_dim_128",
            "head_dim 128 given explicitly, two heads of each kind",
            llama(64, 2, 2, 72, 128, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        ),
        rope_case(
            "rope_llama3_sharded",
            "llama3 rope, older config.json; three shards and model.safetensors.index.json",
            llama3,
            shard="24KB",
            rewrite=[older_form],
        ),
        rope_case(
            "rope_llama3",
            "the weights of rope_llama3_sharded in one file, rope_parameters of transformers 5",
            llama3,
        ),
        rope_case(
            "rope_linear",
            'linear rope as {"type": "linear"} in rope_scaling',
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
            rewrite=[older_form, rope_type_named_type],
        ),
        Case(
            "rope_yarn",
            "yarn rope with its defaults (attention factor 0.1 ln 4 + 1)",
            llama(**rope, rope_parameters=yarn),
            ablations={**no_scaling, "no attention factor": without_attention_scaling},
        ),
        Case(
            "rope_yarn_options",
            "yarn rope with beta_fast, beta_slow, mscale, mscale_all_dim and truncate false",
            llama(**rope, rope_parameters=yarn_options),
            ablations={**no_scaling, "no attention factor": without_attention_scaling},
        ),
        Case(
            "rope_dynamic",
            "dynamic NTK rope beyond max_position_embeddings 20, token by token with a cache: position p >= 20 "
            "is rotated with the frequencies of sequence length p + 1",
            llama(
                **rope, max_position_embeddings=20,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
            ),
            rewrite=[older_form, rope_type_named_type],
            token_by_token=True,
            ablations=no_scaling,
        ),
        Case(
            "mistral",
            "Mistral without a sliding window; head_dim 16 and 3 heads at hidden 40; four ends of sequence in "
            "generation_config.json, one in config.json",
            MistralConfig(
                hidden_size=40, num_attention_heads=3, num_key_value_heads=1, head_dim=16, intermediate_size=72,
                vocab_size=131, num_hidden_layers=2, max_position_embeddings=256, sliding_window=None,
            ),
        ),
        Case(
            "llama_1_form",
            "a config.json without rope, KV head, head_dim and bias keys; inv_freq buffers among the weights",
            llama(32, 4, 4, 56, 107),
            dtype="f16",
            rewrite=[llama_1_form],
        ),
    ]


def write_model(case, directory, seed):
    model_class = MistralForCausalLM if isinstance(case.config, MistralConfig) else LlamaForCausalLM
    model = models.randomise(model_class(case.config), seed).to(DTYPES[case.dtype])
    model.save_pretrained(directory, max_shard_size=case.shard)
    for rewrite in case.rewrite:
        rewrite(directory)


def prompts(vocab, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def runner(case, directory, dtype=torch.float32):
    """ids -> logits [positions, vocab], by the model in `directory`."""
    if case.token_by_token:
        return lambda ids: models.logits_token_by_token(models.load(directory, dtype), ids)
    model = models.load(directory, dtype)
    return lambda ids: models.logits_of(model, ids)


def continuations(run, vocab, seed):
    """One record a prompt, or None where a continuation is a near-tie or dull."""
    records = []
    for ids in prompts(vocab, seed):
        generated, margin = models.greedy(lambda sequence: run(sequence)[-1], ids)
        if margin < models.GREEDY_MARGIN or len(set(generated)) < models.GREEDY_STEPS // 2:
            return None
        records.append({"input_ids": ids, "greedy_ids": generated, "greedy_margin": round(margin, 6)})
    return records


def difference(a, b):
    return float((a - b).abs().max())


def golden(run, records):
    """log_probs.N [positions, vocab] of each record's input_ids and greedy_ids together."""
    return {
        f"log_probs.{n}": models.log_probs(run(record["input_ids"] + record["greedy_ids"])).contiguous()
        for n, record in enumerate(records)
    }


def check_visible(what, changed, tensors):
    """How far a mistake moves the golden; it must be seen."""
    size = max(difference(changed[name], tensors[name]) for name in tensors)
    if size < VISIBLE:
        raise ValueError(f"{what} changes no log-probability by more than {size}")
    return round(size, 4)


def ablations(case, directory, records, tensors):
    sizes = {}
    for name, ablate in case.ablations.items():
        model = models.load(directory)
        ablate(model)
        changed = golden(lambda ids: models.logits_of(model, ids), records)
        sizes[name] = check_visible(f"{case.name}: {name}", changed, tensors)
    if case.token_by_token:
        one_pass = golden(lambda ids: models.logits_of(models.load(directory), ids), records)
        sizes["one pass, all positions with the frequencies of the whole length"] = check_visible(
            f"{case.name}: one pass", one_pass, tensors
        )
    return sizes


def ends_of_sequence(directory, records):
    """Gives the model four ends of sequence, of which the third stops each continuation."""
    stop = [record["greedy_ids"][step] for record, step in zip(records, (9, 5))]
    edit_json(directory / "generation_config.json", lambda config: config.update(eos_token_id=[2, *stop, 130]))
    model = models.load(directory)
    for record in records:
        ids = record["input_ids"]
        output = model.generate(torch.tensor([ids]), max_new_tokens=models.GREEDY_STEPS, do_sample=False)
        record["greedy_ids_with_eos"] = output[0, len(ids) :].tolist()
        if not len(record["greedy_ids_with_eos"]) < models.GREEDY_STEPS:
            raise ValueError("mistral: no end of sequence was met")


def make_case(case, directory):
    """The first seed whose continuations have clear winners makes the case."""
    model_directory = directory / "model"
    for seed in range(1, 100):
        models.fresh_directory(directory)
        write_model(case, model_directory, seed)
        run = runner(case, model_directory)
        records = continuations(run, case.config.vocab_size, seed)
        if records is not None:
            break
    else:
        raise ValueError(f"{case.name}: no seed gives clear winners")
    if case.name == "mistral":
        ends_of_sequence(model_directory, records)
    tensors = golden(run, records)
    in_f64 = golden(runner(case, model_directory, torch.float64), records)
    save_file(tensors, directory / "golden.safetensors")
    models.write_json(
        directory / "golden.json",
        {
            "what": case.what,
            "weights": case.dtype,
            "seed": seed,
            "prompts": records,
            "largest_difference_from_f64": max(difference(in_f64[name], tensors[name]) for name in tensors),
            "mistakes_would_change": ablations(case, model_directory, records, tensors),
            "versions": models.versions(),
        },
    )


def write_adapter(base_directory, directory, seed, **options):
    """A random adapter over the base, as PEFT saves it."""
    base = models.load(base_directory)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **options)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    model.peft_config["default"].base_model_name_or_path = "mha_untied_f32"
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    # PEFT keeps the names as a set and writes them in the order of the day.
    edit_json(directory / "adapter_config.json", lambda config: config["target_modules"].sort())


def make_adapter(directory, base_directory, what, wrong_scale, **options):
    """`wrong_scale` is a factor of the scaling that an engine could get wrong."""
    base_run = runner(Case("", "", None), base_directory)
    vocab = models.load(base_directory).config.vocab_size
    for seed in range(1, 100):
        models.fresh_directory(directory)
        write_adapter(base_directory, directory / "adapter", seed, **options)
        model = PeftModel.from_pretrained(models.load(base_directory), directory / "adapter").eval()
        records = continuations(lambda ids: models.logits_of(model, ids), vocab, seed)
        if records is not None:
            break
    else:
        raise ValueError(f"{directory.name}: no seed gives clear winners")
    tensors = golden(lambda ids: models.logits_of(model, ids), records)
    mistakes = {"no adapter": check_visible("no adapter", golden(base_run, records), tensors)}
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= wrong_scale
    wrong = golden(lambda ids: models.logits_of(model, ids), records)
    mistakes[f"scaling times {wrong_scale}"] = check_visible("scaling", wrong, tensors)
    merged = PeftModel.from_pretrained(models.load(base_directory), directory / "adapter").merge_and_unload().eval()
    merged_tensors = golden(lambda ids: models.logits_of(merged, ids), records)
    tensors |= {f"merged_{name}": tensor for name, tensor in merged_tensors.items()}
    save_file(tensors, directory / "golden.safetensors")
    models.write_json(
        directory / "golden.json",
        {
            "what": what,
            "base": "mha_untied_f32/model",
            "seed": seed,
            "prompts": records,
            "largest_difference_of_merged": max(
                difference(tensors[f"merged_log_probs.{n}"], tensors[f"log_probs.{n}"]) for n in range(len(records))
            ),
            "mistakes_would_change": mistakes,
            "versions": models.versions(),
        },
    )


def make(output):
    """Writes every case under `output`."""
    for case in cases():
        make_case(case, output / case.name)
    same_golden(output / "rope_llama3", output / "rope_llama3_sharded")
    base = output / "mha_untied_f32" / "model"
    make_adapter(
        output / "lora_q_v",
        base,
        "LoRA of rank 4, alpha 8 (scaling 2) on q_proj and v_proj",
        0.5,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
    )
    make_adapter(
        output / "rslora_all",
        base,
        "rank-stabilised LoRA of rank 6, alpha 3 (scaling 3 / sqrt 6) on all seven projections",
        6**-0.5,
        r=6,
        lora_alpha=3,
        use_rslora=True,
        target_modules=PROJECTIONS,
    )


def same_golden(a, b):
    one, other = load_file(a / "golden.safetensors"), load_file(b / "golden.safetensors")
    if any(not torch.equal(one[name], other[name]) for name in one):
        raise ValueError(f"{a.name} and {b.name} hold the same weights but differ")
