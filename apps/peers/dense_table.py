"""Dense decode attention of vesper, FlashInfer (both templates) and PyTorch's cuDNN, in turns on one machine, as the
Markdown table of docs/kernels.md: batches and contexts against 8 and 32 KV heads of 128 channels, 32 query heads.

    apps/peers/dense_table.py [--rounds 2] [--seconds 100] [--save cells.csv]

A round takes each batch of each shape first through `vesper bench --kernels --only dense`, then through the peers, all
of them over distinct keys that are larger than the last cache, and checks each output. A peer that cannot be imported
is left out and says so. With --seconds no part begins that would end later, by the longest before it. Needs torch with CUDA.
"""

import argparse
import csv
import gc
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time

from common import shape

HERE = pathlib.Path(__file__).resolve().parent
MODELS = ("synthetic:llama-3.1-8b", "synthetic:llama-2-7b")  # 8 and 32 KV heads
CONTEXTS = {1: (4, 8, 16, 32, 64, 128), 8: (4, 32, 128), 32: (8, 32)}  # of each batch, in units of 1024 tokens
CUDNN_CELLS = ((1, 32), (1, 128))


def vesper_times(binary, model, batch):
    """{context: median seconds} and the read rate, of one run of the kernel bench."""
    command = [
        binary, "bench", "--model", model, "--kernels", "--only", "dense", "--batch", str(batch),
        "--context", ",".join(f"{context}k" for context in CONTEXTS[batch]), "--json",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"error: running {' '.join(command)}: exit code {run.returncode}, {run.stderr.strip()}")
    report = json.loads(run.stdout)
    times = {row["context"] // 1024: row["us"] * 1e-6 for row in report["kernels"] if row["kernel"] == "dense"}
    return times, report["roof"]["read_gb_per_s"] * 1e9


class Peers:
    """The peers that can be imported, measured in this process; they give their memory back after each cell."""

    def __init__(self, repeats):
        self.repeats = repeats
        self.flashinfer = None
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: measuring peers: found no usable GPU, expected one")
        self.torch = torch
        try:
            import flashinfer

            self.flashinfer = flashinfer
        except ImportError as error:
            print(f"left out: flashinfer: {error}", file=sys.stderr)

    def names(self):
        found = [f"torch {self.torch.__version__}"]
        return found + ([f"FlashInfer {self.flashinfer.__version__}"] if self.flashinfer else [])

    def times(self, model, batch, context):
        """{name: median seconds}"""
        import flashinfer_decode
        import sdpa

        found = {}
        if self.flashinfer:
            found |= flashinfer_decode.measure(
                self.torch, self.flashinfer, shape(model), batch, context * 1024, 16, self.repeats
            )
        if (batch, context) in CUDNN_CELLS:
            found |= sdpa.measure(self.torch, shape(model), batch, context * 1024, self.repeats, ("sdpa-cudnn",))
        gc.collect()
        self.torch.cuda.empty_cache()
        return {name: statistics.median(times) for name, times in found.items()}


def markdown(rows, roof, names, card):
    """Medians over rounds; `rows`: (round, model, batch, context, engine, seconds)."""

    def us(model, batch, context, engine):
        times = [row[5] * 1e6 for row in rows if row[1:5] == (model, batch, context, engine)]
        return statistics.median(times) if times else None

    def number(value, digits):
        return "" if value is None else f"{value:.{digits}f}"

    def ratio(other, own):
        if other is None or own is None:
            return ""
        return f"{other / own:.2f}" if other > 1.01 * own else f"{other / own:.3f}"

    lines = [
        f"{card}; {', '.join(names)}; vesper's roof {roof * 1e-9:.0f} GB/s; µs, median of {rows[-1][0] + 1} rounds in turns\n",
        "| batch, context | KV heads | bound | vesper | of the bound | FlashInfer, CUDA cores | tensor cores "
        "| best / vesper | cuDNN | cuDNN / vesper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        heads = shape(model)["kv_heads"]
        for batch, contexts in CONTEXTS.items():
            for context in contexts:
                own = us(model, batch, context, "vesper")
                if own is None:
                    continue
                digits = 1 if own < 1000 else 0
                plain, cores, cudnn = (
                    us(model, batch, context, engine)
                    for engine in ("flashinfer-cuda-cores", "flashinfer-tensor-cores", "sdpa-cudnn")
                )
                best = min((time for time in (plain, cores) if time is not None), default=None)
                bound = 4 * batch * context * 1024 * heads * shape(model)["head_dim"] / roof * 1e6
                lines.append(
                    f"| {batch}, {context}K | {heads} | {number(bound, digits)} | {number(own, digits)} "
                    f"| {bound / own:.0%} | {number(plain, digits)} | {number(cores, digits)} | {ratio(best, own)} "
                    f"| {number(cudnn, digits)} | {ratio(cudnn, own)} |".replace("%", " %")
                )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vesper", default=str(HERE.parents[1] / "build" / "bin" / "vesper"), help="the binary")
    parser.add_argument("--rounds", type=int, default=2, help="times that everything is measured, in turns")
    parser.add_argument("--repeats", type=int, default=9, help="timed replays of a peer's cell")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin nothing that would end later; 0: no limit")
    parser.add_argument("--save", help="also write every round's times as CSV")
    options = parser.parse_args()
    begin = time.monotonic()
    try:
        peers = Peers(options.repeats)
    except ImportError as error:
        sys.exit(f"error: importing torch: {error}; install torch with CUDA")
    rows, roofs, longest = [], [], 0.0
    for turn, batch, model in itertools.product(range(options.rounds), CONTEXTS, MODELS):
        started = time.monotonic()
        if options.seconds and started - begin + longest > options.seconds:
            print(f"out of time in round {turn}", file=sys.stderr)
            break
        times, roof = vesper_times(options.vesper, model, batch)
        roofs.append(roof)
        for context in CONTEXTS[batch]:
            found = {"vesper": times[context]} if context in times else {}
            for engine, seconds in (found | peers.times(model, batch, context)).items():
                rows.append((turn, model, batch, context, engine, seconds))
        took = time.monotonic() - started
        longest = max(longest, took)
        print(f"round {turn}, {model}, batch {batch}: {took:.1f} s", file=sys.stderr)
    if options.save:
        with open(options.save, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            # Names of the bench's CSV columns, so that `vesper repro --peer-csv` reads it.
            writer.writerow(("round", "engine", "model", "attention", "context", "batch", "attention_us"))
            for turn, model, batch, context, engine, seconds in rows:
                name = engine.split("-")[0]
                writer.writerow((turn, name, model, engine, context * 1024, batch, f"{seconds * 1e6:.6g}"))
    if rows:
        print(markdown(rows, max(roofs), peers.names(), peers.torch.cuda.get_device_name()))


if __name__ == "__main__":
    main()
