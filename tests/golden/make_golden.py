#!/usr/bin/env python3
"""Makes the golden fixtures: tiny random Llama checkpoints and their logits, computed by Hugging Face's own model.

    python3 tests/golden/make_golden.py tests/golden/cases

Needs torch, transformers 5 and safetensors; runs on the CPU in half a minute. The fixtures are committed, so this runs
only when a case changes. The seeds are fixed; other library versions may round the logits differently, by some 1e-6.

Each case is a folder as save_pretrained leaves it (config.json, model.safetensors or shards with their index), plus
    golden.safetensors   ids    [tokens] i32
                         logits [tokens, vocab] f32: stored weights widened to float32, eager attention, float32 throughout
    case.json            what the case is for, and the versions that made it
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


# Every group size of the issue (1, 3, 4, 7, 8), both head dimensions that CUDA has, every stored type, tied and untied,
# hidden never heads * head_dim (but a multiple of heads, which transformers asks for). Sizes keep all folders together below 3 MB.
CASES = [
    Case("heads4_kv4_d64_f32_tied", 4, 4, 64, 32, 64, 200, 101, torch.float32, True),
    Case("heads6_kv2_d64_f16", 6, 2, 64, 72, 96, 256, 70, torch.float16, False, eps=1e-5),
    Case("heads8_kv2_d64_bf16_sharded", 8, 2, 64, 64, 96, 240, 83, torch.bfloat16, False, theta=500000.0, shards=3),
    Case("heads7_kv1_d128_bf16_tied", 7, 1, 128, 56, 80, 320, 77, torch.bfloat16, True, eps=1e-5),
    Case("heads8_kv1_d128_bf16", 8, 1, 128, 48, 72, 208, 98, torch.bfloat16, False),
]
LAYERS = 2
MAX_TOTAL_BYTES = 3_000_000


def build_model(case: Case) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=256,
        rms_norm_eps=case.eps,
        rope_parameters={"rope_type": "default", "rope_theta": case.theta},
        tie_word_embeddings=case.tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    assert config.rope_parameters["rope_theta"] == case.theta, config
    return transformers.LlamaForCausalLM(config)


def fill(model: transformers.LlamaForCausalLM, seed: int) -> None:
    """Matrices of deviation 0.2 make scores of deviation 1 to 3: attention far from uniform and from one-hot. Norm
    weights differ from 1, so that a forgotten product shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(1.0 + 0.2 * noise if "norm" in name else 0.2 * noise)


def stored_bytes(model: transformers.LlamaForCausalLM) -> int:
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

    # Read back, so that the logits belong to what the files say.
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    ids = torch.randint(3, case.vocab, (case.tokens,), generator=torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        logits = loaded(ids[None], use_cache=False).logits[0]
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()

    safetensors.torch.save_file(
        {"ids": ids.to(torch.int32), "logits": logits.contiguous()}, str(folder / "golden.safetensors"))
    facts = {
        "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "hidden": case.hidden,
        "tokens": case.tokens, "dtype": str(case.dtype).removeprefix("torch."), "tied": case.tied, "shards": case.shards,
        "seed": seed, "torch": torch.__version__, "transformers": transformers.__version__,
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{case.name}: {stored_bytes(model)} bytes of weights, logits of deviation {logits.std():.2f}, "
          f"largest {logits.abs().max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden fixtures: tiny Llama checkpoints and their logits.")
    parser.add_argument("output", type=pathlib.Path, help="folder for the cases; those of the same names are replaced")
    output = parser.parse_args().output

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        folder = output / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_case(case, seed=20240600 + number, folder=folder)

    total = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    print(f"{total} bytes in all")
    assert total < MAX_TOTAL_BYTES, total


if __name__ == "__main__":
    main()
