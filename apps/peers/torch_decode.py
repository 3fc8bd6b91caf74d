"""A whole decode step in PyTorch: a Llama of the same shape with random weights, a static cache, flex_attention and
greedy sampling, compiled by torch.compile and replayed as one CUDA graph. Prints the bench's CSV columns.

The graph is captured here: torch.compile's own mode for that leaves a step out whose caches are written in place.
Needs torch 2.6 or later (with CUDA to measure). `--device cpu --no-compile` runs the model without a GPU, for a check
of the script. Formulas: Touvron et al., arXiv 2302.13971; rotary embedding in the rotate-half form.
"""

import statistics
import sys
import time

from common import Output, arguments, percentile, shape


def build(torch, model, batch, capacity, device, dtype):
    """Weights, caches and the function of one step: (ids [batch], position [1]) -> ids [batch]."""
    from torch.nn.attention.flex_attention import flex_attention

    heads, kv_heads, head_dim, hidden = (model[key] for key in ("heads", "kv_heads", "head_dim", "hidden"))
    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim

    def matrix(rows, columns):
        return torch.randn(rows, columns, dtype=dtype, device=device) * columns**-0.5

    embedding = torch.randn(model["vocab"], hidden, dtype=dtype, device=device)
    head = matrix(model["vocab"], hidden)
    layers = [
        {
            "qkv": matrix(q_rows + 2 * kv_rows, hidden),
            "o": matrix(hidden, q_rows),
            "gate_up": matrix(2 * model["ffn"], hidden),
            "down": matrix(hidden, model["ffn"]),
            "k": torch.randn(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device),
            "v": torch.randn(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device),
        }
        for _ in range(model["layers"])
    ]
    half = head_dim // 2
    frequency = model["theta"] ** (-torch.arange(half, device=device, dtype=torch.float32) / half)

    def norm(x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + model["eps"])).to(dtype)

    def rotate(x, position):
        angle = position.float() * frequency
        low, high = x.float().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(dtype)

    def step(ids, position):
        x = embedding[ids]

        def visible(score, _batch, _head, _query, key):
            return torch.where(key <= position[0], score, -float("inf"))

        for layer in layers:
            q, k, v = (norm(x) @ layer["qkv"].T).split((q_rows, kv_rows, kv_rows), -1)
            q = rotate(q.view(batch, heads, 1, head_dim), position)
            layer["k"].index_copy_(2, position, rotate(k.view(batch, kv_heads, 1, head_dim), position))
            layer["v"].index_copy_(2, position, v.view(batch, kv_heads, 1, head_dim))
            attended = flex_attention(q, layer["k"], layer["v"], score_mod=visible, enable_gqa=heads != kv_heads)
            x = x + attended.reshape(batch, q_rows) @ layer["o"].T
            gate, up = (norm(x) @ layer["gate_up"].T).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * up) @ layer["down"].T
        return (norm(x) @ head.T).argmax(-1)

    matrices = [layer[name] for layer in layers for name in ("qkv", "o", "gate_up", "down")] + [head]
    return step, sum(m.numel() * m.element_size() for m in matrices)


class Replayed:
    """A step over fixed tensors: as one CUDA graph on the GPU, called as it is on the CPU. ids are fed back."""

    def __init__(self, torch, step, batch, device):
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.once = lambda: self.ids.copy_(step(self.ids, self.position))
        self.run = self.once
        self.events = None
        if device != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles
                self.once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.once()
        self.run = graph.replay
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def timed(self, position):
        """Seconds until the ids are in hand, as the bench times a step, and seconds on the device."""
        begin = time.perf_counter()
        self.position.fill_(position)
        if self.events is None:
            self.run()
        else:
            self.events[0].record()
            self.run()
            self.events[1].record()
        self.ids.tolist()
        end_to_end = time.perf_counter() - begin
        return end_to_end, self.events[0].elapsed_time(self.events[1]) * 1e-3 if self.events else None


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-compile", action="store_true", help="run the step as it is written")
    options = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        sys.exit(f"error: importing torch: {error}; install torch with CUDA")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: measuring PyTorch: found no usable GPU, expected one; use --device cpu to check the script")
    model = shape(options.model)
    cuda = options.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    output = Output(not options.no_head)
    for batch in options.batch:
        for context in options.context:
            if context <= options.max_tokens:
                sys.exit(f"error: reading --context: found {context}, expected more than --max-tokens {options.max_tokens}")
            step, weight_bytes = build(torch, model, batch, context, options.device, dtype)
            compiled = step if options.no_compile else torch.compile(step, fullgraph=True, dynamic=False)
            steps, on_device, repeats = [], [], []
            with torch.inference_mode():
                replayed = Replayed(torch, compiled, batch, options.device)
                for repeat in range(options.repeats + 1):  # the first warms up
                    first = context - options.max_tokens
                    times = [replayed.timed(first + i) for i in range(options.max_tokens)]
                    if repeat > 0:
                        steps += [pair[0] for pair in times]
                        on_device += [pair[1] for pair in times if pair[1] is not None]
                        repeats.append(batch / statistics.fmean(pair[0] for pair in times))
            device = {}
            if on_device:
                device = {
                    "device_ms": statistics.fmean(on_device) * 1e3,
                    "device_p50_ms": statistics.median(on_device) * 1e3,
                    "device_p99_ms": percentile(on_device, 0.99) * 1e3,
                }
            mean = statistics.fmean(steps)
            element = 2 if cuda else 4
            visible = context - (options.max_tokens - 1) / 2
            kv_bytes = 2 * batch * visible * model["layers"] * model["kv_heads"] * model["head_dim"] * element
            output.row(
                engine=f"pytorch-{torch.__version__}", model=options.model,
                device=torch.cuda.get_device_name() if cuda else "cpu", weights=str(dtype).removeprefix("torch."),
                fill="random", attention="dense", context=context, batch=batch, max_tokens=options.max_tokens,
                repeats=options.repeats, tpot_ms=mean * 1e3, tpot_p50_ms=statistics.median(steps) * 1e3,
                tpot_p99_ms=percentile(steps, 0.99) * 1e3, tokens_per_s=statistics.fmean(repeats),
                tokens_per_s_sd=statistics.stdev(repeats) if len(repeats) > 1 else "",
                weight_bytes=weight_bytes, kv_bytes=kv_bytes,
                gb_per_s=(weight_bytes + kv_bytes) / mean * 1e-9, kept_tokens=visible,
                peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else "", **device,
            )  # fmt: skip


if __name__ == "__main__":
    main()
