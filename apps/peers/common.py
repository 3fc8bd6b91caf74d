"""What the peers share: shapes, the bench's CSV columns, and times of CUDA graphs over cold data.

Needs torch with CUDA to measure; nothing to be imported.
"""

import argparse
import csv
import json
import pathlib
import statistics
import sys

# The head of `vesper bench --csv`; a test of the project compares them.
COLUMNS = (
    "engine,model,device,weights,fill,attention,context,batch,max_tokens,repeats,ttft_ms,"
    "prefill_tflop_per_s,prefill_share,"
    "tpot_ms,tpot_p50_ms,tpot_p99_ms,device_ms,device_p50_ms,device_p99_ms,tokens_per_s,tokens_per_s_sd,"
    "weight_bytes,kv_bytes,metadata_bytes,gb_per_s,roof_gb_per_s,roof_share,attention_us,"
    "kept_tokens,kept_tokens_p99,kept_mass,sigma,speedup,speedup_low,speedup_high,ceiling,peak_memory_bytes"
).split(",")

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "models"


def shape(name):
    """A shape of configs/models by its name, as synthetic:NAME has it."""
    path = CONFIGS / f"{name.removeprefix('synthetic:')}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        sys.exit(f"error: reading --model: found {name}, expected one of {known}")
    config = json.loads(path.read_text())
    heads = config["num_attention_heads"]
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab": config["vocab_size"],
        "theta": float(config.get("rope_theta", 10000.0)),
        "eps": float(config["rms_norm_eps"]),
    }


def sizes(text):
    """"1k,8k" -> [1024, 8192], as --context and --batch of the bench."""
    values = []
    for word in text.split(","):
        number, unit = (word[:-1], 1024) if word[-1:] in ("k", "K") else (word, 1)
        if not number.isdigit() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"found {word!r}, expected whole numbers as in 1k,8k")
        values.append(int(number) * unit)
    return values


def arguments(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="synthetic:llama-3.1-8b", help="a shape of configs/models")
    parser.add_argument("--context", type=sizes, default=[1024], help="tokens in the cache; a list, k is 1024")
    parser.add_argument("--batch", type=sizes, default=[1], help="sequences side by side; a list")
    parser.add_argument("--repeats", type=int, default=9, help="timed replays")
    parser.add_argument("--max-tokens", type=int, default=32, help="decode steps of a repeat")
    parser.add_argument("--page-tokens", type=int, default=16, help="tokens a page")
    parser.add_argument("--no-head", action="store_true", help="leave the CSV head out")
    return parser


class Output:
    """Rows on stdout, a head first."""

    def __init__(self, with_head=True):
        self.writer = csv.DictWriter(sys.stdout, COLUMNS, restval="", lineterminator="\n")
        if with_head:
            self.writer.writeheader()

    def row(self, **values):
        rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        self.writer.writerow(rounded)
        sys.stdout.flush()


def turns_for(bytes_each, l2_bytes, room):
    """Distinct data sets of bytes_each that together are over four times L2, as far as memory holds them."""
    wanted = max(2, 4 * l2_bytes // bytes_each + 1)
    return min(int(wanted), 64, int(room // bytes_each))


# Launches that a graph has at least: a replay's begin and end are shared out over them, as in the kernel bench.
LEAST_LAUNCHES = 24


def cold_times(torch, turns, launch, replays):
    """Seconds a launch: rounds of `launch(turn)` over all turns are one CUDA graph, replayed and timed by events."""
    rounds = max(1, LEAST_LAUNCHES // turns)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(turns):
            launch(turn)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in list(range(turns)) * rounds:
            launch(turn)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / (rounds * turns))
    return times


def median(values):
    return statistics.median(values)


def percentile(values, share):
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def print_operators(torch, options, engine, measure):
    """A row for every name of measure(model, batch, context) -> {name: seconds a launch of each replay}."""
    model = shape(options.model)
    output = Output(not options.no_head)
    for batch in options.batch:
        for context in options.context:
            measured = measure(model, batch, context)
            if not measured:
                print(f"left out: context {context}, batch {batch} does not fit", file=sys.stderr)
            for name, times in measured.items():
                output.row(
                    engine=engine, model=options.model, device=torch.cuda.get_device_name(), weights="bf16",
                    fill="random", attention=name, context=context, batch=batch, repeats=options.repeats,
                    kv_bytes=4 * batch * context * model["kv_heads"] * model["head_dim"],
                    attention_us=median(times) * 1e6, kept_tokens=context,
                    peak_memory_bytes=torch.cuda.max_memory_allocated(),
                )  # fmt: skip
