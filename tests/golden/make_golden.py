#!/usr/bin/env python3
"""Makes the golden fixtures: tiny random checkpoints of every family and rope kind and their logits, and the rotary
frequencies of published models, all computed by Hugging Face's own code.

    python3 tests/golden/make_golden.py tests/golden

Needs torch, transformers 5 and safetensors; runs on the CPU in half a minute. The fixtures are committed, so this runs
only when a case changes. The seeds are fixed; other library versions may round the logits differently, by some 1e-6.

Each case is a folder under cases/ as save_pretrained leaves it (config.json, model.safetensors or shards with their index), plus
    golden.safetensors   ids    [tokens] i32
                         logits [tokens, vocab] f32: stored weights widened to float32, eager attention, float32 throughout
                         logits_decode_40, logits_decode_all: the same where the last 40 tokens, or all of them, come
                         one at a time over the cache; only where that changes the logits (dynamic rope)
    case.json            what the case is for, and the versions that made it

rope.json holds the frequencies and the attention factor of configs as published, in full float32 precision.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil

import safetensors.torch
import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    tokens: int  # not a multiple of 16: the last page stays partly filled
    dtype: torch.dtype
    tied: bool
    theta: float = 10000.0
    eps: float = 1e-6
    shards: int = 1  # 1 or 3
    family: str = "Llama"  # or Mistral
    positions: int = 256  # max_position_embeddings
    rope: dict = dataclasses.field(default_factory=lambda: {"rope_type": "default"})
    # How config.json says it: "rope_parameters" (transformers 5), or "rope_scaling" with the kind under "rope_type" or
    # "type", theta beside it and torch_dtype (before).
    form: str = "rope_parameters"


def small(name: str, form: str, rope: dict, *, positions: int = 256, theta: float = 10000.0, tied: bool = False,
          family: str = "Llama", dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(name, heads=2, kv_heads=1, head_dim=64, hidden=24, ffn=32, vocab=48, tokens=90, dtype=dtype, tied=tied,
                theta=theta, family=family, positions=positions, rope=rope, form=form)


# Every group size of the issue (1, 3, 4, 7, 8), both head dimensions that CUDA has, every stored type, tied and untied,
# hidden never heads * head_dim (but a multiple of heads, which transformers asks for). Then every rope kind, at positions
# beyond the original 32. Sizes keep all folders together below 4 MB.
CASES = [
    Case("heads4_kv4_d64_f32_tied", 4, 4, 64, 32, 64, 200, 101, torch.float32, True),
    Case("heads6_kv2_d64_f16", 6, 2, 64, 72, 96, 256, 70, torch.float16, False, eps=1e-5),
    Case("heads8_kv2_d64_bf16_sharded", 8, 2, 64, 64, 96, 240, 83, torch.bfloat16, False, theta=500000.0, shards=3),
    Case("heads7_kv1_d128_bf16_tied", 7, 1, 128, 56, 80, 320, 77, torch.bfloat16, True, eps=1e-5),
    Case("heads8_kv1_d128_bf16", 8, 1, 128, 48, 72, 208, 98, torch.bfloat16, False),
    small("rope_linear", "type", {"rope_type": "linear", "factor": 8.0}, positions=32),
    small("rope_dynamic", "type", {"rope_type": "dynamic", "factor": 2.0}, positions=32),
    small("rope_llama3", "rope_type", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                       "original_max_position_embeddings": 32}, theta=500000.0, tied=True),
    small("rope_yarn", "type", {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
                                "finetuned": True}),
    small("rope_yarn_mscale", "rope_parameters",
          {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 8, "beta_slow": 0.5,
           "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}, theta=50000.0),
    small("mistral", "type", {"rope_type": "default"}, theta=1000000.0, family="Mistral", dtype=torch.float16),
    small("mistral_rope_parameters", "rope_parameters", {"rope_type": "linear", "factor": 2.0}, family="Mistral"),
]
LAYERS = 2
MAX_TOTAL_BYTES = 4_000_000

# config.json fragments of published models, and the sequence lengths to ask for.
ROPES = [
    ({}, [1]),  # Llama 2
    ({"rope_theta": 500000.0, "max_position_embeddings": 131072,
      "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                       "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, [1]),  # Llama 3.1
    ({"rope_theta": 500000.0, "max_position_embeddings": 131072, "head_dim": 64,
      "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                       "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, [1]),  # Llama 3.2 1B
    ({"max_position_embeddings": 65536,
      "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True}},
     [1]),  # Yarn-Llama-2-7b-64k
    ({"max_position_embeddings": 131072,
      "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": None, "beta_fast": None,
                          "original_max_position_embeddings": 4096, "attention_factor": 1.5, "truncate": False}}, [1]),
    ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 8.0}}, [1]),
    ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.5}}, [1, 4096, 4097, 20011, 131072]),
    # Beside the parameters, the original length counts more than among them; the kind's own default is the whole.
    ({"max_position_embeddings": 65536, "original_max_position_embeddings": 2048,
      "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn"}}, [1]),
    ({"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, [1]),
    # rope_scaling wins over rope_parameters, which then does not even give theta.
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     [1]),
]


def build_model(case: Case) -> transformers.PreTrainedModel:
    own = {"sliding_window": None} if case.family == "Mistral" else {}
    config = getattr(transformers, case.family + "Config")(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=case.positions,
        rms_norm_eps=case.eps,
        rope_parameters={**case.rope, "rope_theta": case.theta},
        tie_word_embeddings=case.tied,
        bos_token_id=1,
        eos_token_id=2,
        **own,
    )
    assert config.rope_parameters["rope_theta"] == case.theta, config
    return getattr(transformers, case.family + "ForCausalLM")(config)


def write_in_old_form(path: pathlib.Path, kind_key: str) -> None:
    """As transformers wrote config.json before version 5."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {kind_key: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def logits_of(folder: pathlib.Path, ids: torch.Tensor, decoded: int) -> torch.Tensor:
    """All logits, the last `decoded` tokens coming one at a time. From a model read anew, since dynamic rope keeps the
    longest length that it has seen. Read from the files, so that the logits belong to what they say."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    prefilled = len(ids) - decoded
    steps = ([ids[:prefilled]] if prefilled > 0 else []) + [ids[i : i + 1] for i in range(prefilled, len(ids))]
    cache = transformers.DynamicCache() if decoded > 0 else None
    rows = []
    with torch.no_grad():
        for step in steps:
            rows.append(model(step[None], past_key_values=cache, use_cache=cache is not None).logits[0])
    logits = torch.cat(rows)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    return logits.contiguous()


def fill(model: transformers.PreTrainedModel, seed: int) -> None:
    """Matrices of deviation 0.2 make scores of deviation 1 to 3: attention far from uniform and from one-hot. Norm
    weights differ from 1, so that a forgotten product shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(1.0 + 0.2 * noise if "norm" in name else 0.2 * noise)


def stored_bytes(model: transformers.PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())  # a tied head counts once


def make_case(case: Case, seed: int, folder: pathlib.Path) -> None:
    model = build_model(case)
    fill(model, seed)
    model = model.to(case.dtype)
    # Shards of up to 43 %: two cannot hold all, and three can, since no tensor is larger than 14 %.
    shard_bytes = stored_bytes(model) * (43 if case.shards == 3 else 100) // 100
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    (folder / "generation_config.json").unlink(missing_ok=True)
    shards = list(folder.glob("model*.safetensors"))
    assert len(shards) == case.shards, shards

    if case.form != "rope_parameters":
        write_in_old_form(folder / "config.json", case.form)

    ids = torch.randint(3, case.vocab, (case.tokens,), generator=torch.Generator().manual_seed(seed + 1000))
    logits = logits_of(folder, ids, 0)
    golden = {"ids": ids.to(torch.int32), "logits": logits}
    if case.rope["rope_type"] == "dynamic":
        golden["logits_decode_40"] = logits_of(folder, ids, 40)
        golden["logits_decode_all"] = logits_of(folder, ids, case.tokens)
    safetensors.torch.save_file(golden, str(folder / "golden.safetensors"))
    facts = {
        "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "hidden": case.hidden,
        "tokens": case.tokens, "dtype": str(case.dtype).removeprefix("torch."), "tied": case.tied, "shards": case.shards,
        "seed": seed, "torch": torch.__version__, "transformers": transformers.__version__,
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{case.name}: {stored_bytes(model)} bytes of weights, logits of deviation {logits.std():.2f}, "
          f"largest {logits.abs().max():.2f}")


def rope_facts(fragment: dict, length: int) -> dict:
    config = transformers.LlamaConfig.from_dict(json.loads(json.dumps(fragment)))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))  # the update of dynamic frequencies
    return {"config": fragment, "length": length, "attention_factor": rotary.attention_scaling,
            "inv_freq": [float(f"{value:.9g}") for value in rotary.inv_freq.tolist()]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden fixtures: tiny checkpoints and their logits.")
    parser.add_argument("output", type=pathlib.Path, help="tests/golden: cases of the same names and rope.json are replaced")
    output = parser.parse_args().output

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        folder = output / "cases" / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_case(case, seed=20240600 + number, folder=folder)

    ropes = [rope_facts(fragment, length) for fragment, lengths in ROPES for length in lengths]
    lines = ",\n".join(json.dumps(facts) for facts in ropes)
    (output / "rope.json").write_text("[\n" + lines + "\n]\n")

    total = sum(f.stat().st_size for f in (output / "cases").rglob("*") if f.is_file())
    print(f"{total} bytes in all")
    assert total < MAX_TOTAL_BYTES, total


if __name__ == "__main__":
    main()
