#!/usr/bin/env python3
"""Writes a checkpoint of a model's shape with random bf16 weights, in shards as Hugging Face has them: for measuring how
fast checkpoints load where no real one is at hand. Needs torch and safetensors.

    configs/scripts/random_checkpoint.py configs/models/llama-3.1-8b.json FOLDER [SHARD_GB]
    vesper generate --model FOLDER --random-ids 16 --max-tokens 2      # prints what was loaded, and how fast

The folder has no tokenizer, so prompts are ids.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file


def tensors(config):
    """Name and shape of every tensor, in the order of the layers."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: random_checkpoint.py CONFIG.json FOLDER [SHARD_GB]")
    config = json.loads(pathlib.Path(sys.argv[1]).read_text())
    folder = pathlib.Path(sys.argv[2])
    shard_bytes = float(sys.argv[3] if len(sys.argv) == 4 else 5) * 1e9
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)

    shards, held = [{}], 0
    for name, shape in tensors(config):
        size = 2 * torch.Size(shape).numel()
        if held > 0 and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    where, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        data = {}
        for name, shape in shard.items():
            # Of the spread that initialisation has; a norm's weights are around 1.
            data[name] = (torch.randn(shape) * 0.02 + (len(shape) == 1)).bfloat16()
            where[name] = file
            total += data[name].numel() * 2
        save_file(data, folder / file, metadata={"format": "pt"})
        print(f"{file}: {sum(t.numel() for t in data.values()) * 2 / 1e9:.2f} GB", file=sys.stderr)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


main()
