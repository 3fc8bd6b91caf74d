"""Dense decode attention of PyTorch's scaled_dot_product_attention: its cuDNN and FlashAttention-2 kernels, one query a
sequence over contiguous keys and values, cold cache. Prints the bench's CSV columns with attention_us.

Needs torch with CUDA. Output is checked against the same product in fp32 for the first KV head.
"""

import sys

from common import Output, arguments, cold_times, median, shape, turns_for


def attend(torch, q, k, v, group):
    """The truth: softmax(q k / sqrt(d)) v in fp32 for query heads that share one KV head."""
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores, -1) @ v.float()


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as error:
        sys.exit(f"error: importing torch: {error}; install torch with CUDA")
    if not torch.cuda.is_available():
        sys.exit("error: measuring PyTorch: found no usable GPU, expected one")
    model = shape(options.model)
    heads, kv_heads, head_dim = model["heads"], model["kv_heads"], model["head_dim"]
    device = torch.cuda.get_device_properties(0)
    output = Output(not options.no_head)
    backends = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    for batch in options.batch:
        for context in options.context:
            elements = batch * kv_heads * context * head_dim
            turns = turns_for(4 * elements, device.L2_cache_size, torch.cuda.mem_get_info()[0] * 0.8)
            if turns < 2:
                print(f"left out: context {context}, batch {batch} does not fit", file=sys.stderr)
                continue
            k = torch.randn(turns, batch, kv_heads, context, head_dim, dtype=torch.bfloat16, device="cuda")
            v = torch.randn_like(k)
            q = torch.randn(turns, batch, heads, 1, head_dim, dtype=torch.bfloat16, device="cuda")
            for name, backend in backends.items():
                outputs = [None] * turns

                def launch(turn):
                    outputs[turn] = torch.nn.functional.scaled_dot_product_attention(
                        q[turn], k[turn], v[turn], enable_gqa=heads != kv_heads
                    )

                try:
                    with sdpa_kernel(backend):
                        times = cold_times(torch, turns, launch, options.repeats)
                except RuntimeError as error:
                    print(f"left out: {name} at context {context}, batch {batch}: {error}", file=sys.stderr)
                    continue
                group = heads // kv_heads
                truth = attend(torch, q[0, 0, :group, 0], k[0, 0, 0], v[0, 0, 0], group)
                error = (outputs[0][0, :group, 0].float() - truth).abs().max().item()
                if not error <= 2**-7 * v[0, 0, 0].abs().max().item():
                    sys.exit(f"error: checking {name}: found an error of {error}, expected two roundings of bf16")
                output.row(
                    engine=f"pytorch-{torch.__version__}", model=options.model, device=device.name, weights="bf16",
                    fill="random", attention=name, context=context, batch=batch, repeats=options.repeats,
                    kv_bytes=4 * elements, attention_us=median(times) * 1e6, kept_tokens=context,
                    peak_memory_bytes=torch.cuda.max_memory_allocated(),
                )  # fmt: skip
            del k, v, q


if __name__ == "__main__":
    main()
