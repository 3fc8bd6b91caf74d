"""Dense paged decode attention of FlashInfer, both of its templates (CUDA cores and tensor cores), on shuffled page
tables with keys and values of each sequence's own, cold cache. Prints the bench's CSV columns with attention_us.

Needs torch with CUDA and flashinfer-python. Output is checked against the same product in fp32 for the first KV head.
"""

import sys

from common import arguments, cold_times, print_operators, turns_for
from sdpa import attend


def measure(torch, flashinfer, model, batch, context, page, repeats):
    """{template: seconds a launch of each replay} at one cell; nothing where two distinct caches do not fit."""
    heads, kv_heads, head_dim = model["heads"], model["kv_heads"], model["head_dim"]
    pages = -(-context // page)
    elements = batch * pages * page * kv_heads * head_dim
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    turns = turns_for(4 * elements, l2_bytes, torch.cuda.mem_get_info()[0] * 0.8)
    if turns < 2:
        return {}
    # Layout HND: [pages, {k, v}, kv_heads, page_tokens, head_dim].
    cache = torch.randn(turns, batch * pages, 2, kv_heads, page, head_dim, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(turns, batch, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(batch * pages, device="cuda").int()
    indptr = torch.arange(batch + 1, device="cuda").int() * pages
    last = torch.full((batch,), (context - 1) % page + 1, device="cuda").int()
    measured = {}
    for tensor_cores in (False, True):
        name = "flashinfer-tensor-cores" if tensor_cores else "flashinfer-cuda-cores"
        workspace = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_cuda_graph=True, use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=indptr.clone(), paged_kv_indices_buffer=table.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
        )  # fmt: skip
        wrapper.plan(
            indptr, table, last, heads, kv_heads, head_dim, page,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        outputs = [None] * turns

        def launch(turn):
            outputs[turn] = wrapper.run(q[turn], cache[turn])

        measured[name] = cold_times(torch, turns, launch, repeats)
        own = cache[0][table[:pages].long()]
        k = own[:, 0, 0].reshape(-1, head_dim)[:context]
        v = own[:, 1, 0].reshape(-1, head_dim)[:context]
        group = heads // kv_heads
        error = (outputs[0][0, :group].float() - attend(torch, q[0, 0, :group], k, v, group)).abs().max().item()
        if not error <= 2**-7 * v.abs().max().item():
            sys.exit(f"error: checking {name}: found an error of {error}, expected two roundings of bf16")
    return measured


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    try:
        import flashinfer
        import torch
    except ImportError as error:
        sys.exit(f"error: importing the peer: {error}; install torch with CUDA and flashinfer-python")
    if not torch.cuda.is_available():
        sys.exit("error: measuring FlashInfer: found no usable GPU, expected one")
    print_operators(
        torch, options, f"flashinfer-{flashinfer.__version__}",
        lambda *cell: measure(torch, flashinfer, *cell, options.page_tokens, options.repeats),
    )  # fmt: skip


if __name__ == "__main__":
    main()
