"""Dense decode attention of PyTorch's scaled_dot_product_attention: its cuDNN and FlashAttention-2 kernels, one query a
sequence over contiguous keys and values, cold cache. Prints the bench's CSV columns with attention_us.

Needs torch with CUDA. Output is checked against the same product in fp32 for the first KV head.
"""

import sys

from common import arguments, cold_times, print_operators, turns_for


def attend(torch, q, k, v, group):
    """The truth: softmax(q k / sqrt(d)) v in fp32 for query heads that share one KV head."""
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores, -1) @ v.float()


BACKENDS = {"sdpa-cudnn": "CUDNN_ATTENTION", "sdpa-flash": "FLASH_ATTENTION"}


def measure(torch, model, batch, context, repeats, names=tuple(BACKENDS)):
    """{backend: seconds a launch of each replay} at one cell; a backend that refuses it is left out and says why."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads, head_dim = model["heads"], model["kv_heads"], model["head_dim"]
    elements = batch * kv_heads * context * head_dim
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    turns = turns_for(4 * elements, l2_bytes, torch.cuda.mem_get_info()[0] * 0.8)
    if turns < 2:
        return {}
    k = torch.randn(turns, batch, kv_heads, context, head_dim, dtype=torch.bfloat16, device="cuda")
    v = torch.randn_like(k)
    q = torch.randn(turns, batch, heads, 1, head_dim, dtype=torch.bfloat16, device="cuda")
    measured = {}
    for name in names:
        outputs = [None] * turns

        def launch(turn):
            outputs[turn] = torch.nn.functional.scaled_dot_product_attention(
                q[turn], k[turn], v[turn], enable_gqa=heads != kv_heads
            )

        try:
            with sdpa_kernel(getattr(SDPBackend, BACKENDS[name])):
                times = cold_times(torch, turns, launch, repeats)
        except RuntimeError as error:
            print(f"left out: {name} at context {context}, batch {batch}: {error}", file=sys.stderr)
            continue
        group = heads // kv_heads
        truth = attend(torch, q[0, 0, :group, 0], k[0, 0, 0], v[0, 0, 0], group)
        error = (outputs[0][0, :group, 0].float() - truth).abs().max().item()
        if not error <= 2**-7 * v[0, 0, 0].abs().max().item():
            sys.exit(f"error: checking {name}: found an error of {error}, expected two roundings of bf16")
        measured[name] = times
    return measured


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    try:
        import torch
    except ImportError as error:
        sys.exit(f"error: importing torch: {error}; install torch with CUDA")
    if not torch.cuda.is_available():
        sys.exit("error: measuring PyTorch: found no usable GPU, expected one")
    print_operators(
        torch, options, f"pytorch-{torch.__version__}", lambda *cell: measure(torch, *cell, options.repeats)
    )


if __name__ == "__main__":
    main()
