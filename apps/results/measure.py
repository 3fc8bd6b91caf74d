"""Measures what docs/results shows, on this machine's GPU, into a folder: whole steps, the experiments of configs/repro,
crossovers, and dense attention beside its peers.

    apps/results/measure.py docs/results/h100 [--parts steps repro] [--seconds 300] [--commit NAME]
    apps/results/render.py docs/results/h100

A part is one command; its result is a file of the folder, and a part whose file is there is not measured again, so a run
that was interrupted, or ended by --seconds, goes on where it was. run.json tells card, driver, commit, commands, seconds.
Peers need torch with CUDA and flashinfer-python; without them their parts are left out and say so.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ("llama-3.1-8b", "llama-2-7b")
# Of whole steps and crossovers. Spreads of scores as in configs/repro: at 4 about 400 of 32K tokens carry 85 % of the
# attention; vattention draws more than its pilot, and seldom escalates, at 2.5 with neighbours that agree less.
SPARSE = ("quest:token_budget=2048", "twilight:top_p=0.85", "vattention:epsilon=0.1,delta=0.1")
PEAKED = ("--sigma", "4")
FLAT = ("--sigma", "2.5", "--locality", "0.75")
SHORT = ("--repeats", "3", "--max-tokens", "16")
EXPERIMENTS = ("quest-fig9", "quest-fig10", "twilight-fig7", "twilight-fig10", "vattention-speed", "quest-fig8")
# Of dense attention by FlashInfer, for the experiments' cells that are not among those of the dense table.
PEER_CELLS = ("--model", "synthetic:llama-2-7b", "--context", "10k,20k,30k", "--batch", "8,16,32")


@dataclasses.dataclass
class Part:
    kind: str
    result: str  # a file of the folder that is there when the part is done
    command: list
    stdout: bool = True  # whether the command prints the result; it writes the file itself otherwise


def plan(folder, vesper, python):
    bench = [vesper, "bench", "--fill", "synthetic", "--json"]
    peers = ROOT / "apps" / "peers"
    parts = [
        Part("dense", "dense.md", [
            python, str(peers / "dense_table.py"), "--vesper", vesper, "--save", str(folder / "dense.csv"),
        ]),
        Part("peers", "peers-operators.csv", [python, str(peers / "flashinfer_decode.py"), *PEER_CELLS]),
    ]  # fmt: skip
    parts += [
        Part("steps", f"steps-{model}-b{batch}.json", [
            *bench, "--model", f"synthetic:{model}", "--context", "8k,32k,64k,128k", "--batch", str(batch),
            "--attention", "dense", *SPARSE, *PEAKED, *SHORT,
        ])
        for batch in (1, 8)
        for model in MODELS
    ]  # fmt: skip
    parts += [
        Part("repro", f"{name}.json", [
            vesper, "repro", name, "--repeats", "5", "--max-tokens", "16", "--resume", "--out", str(folder),
        ], stdout=False)
        for name in EXPERIMENTS
    ]  # fmt: skip
    below = [f"{arm},dense_below=16384" for arm in SPARSE]
    parts.append(Part("threshold", "threshold.json", [
        *bench, "--model", f"synthetic:{MODELS[0]}", "--context", "1k,8k", "--attention", "dense", *below, *PEAKED,
        "--repeats", "5", "--max-tokens", "16",
    ]))  # fmt: skip
    for model, batch in ((model, batch) for batch in (1, 8) for model in MODELS):
        # The largest context that the card holds beside the weights, in keys and values alone.
        most = {("llama-3.1-8b", 1): "128k", ("llama-2-7b", 1): "64k", ("llama-3.1-8b", 8): "32k"}
        span = f"2k,{most.get((model, batch), '8k')}"
        for scores, arms in ((PEAKED, SPARSE[:2]), (FLAT, SPARSE[2:])):
            name = "-".join(arm.split(":")[0] for arm in arms)
            parts.append(Part("crossover", f"crossover-{model}-b{batch}-{name}.json", [
                *bench, "--crossover", "--model", f"synthetic:{model}", "--context", span, "--batch", str(batch),
                "--attention", "dense", *arms, *scores, *SHORT,
            ]))  # fmt: skip
    return parts


def join_peers(folder):
    """FlashInfer's times of the parts "dense" and "peers" in one file, for --peer-csv; nothing where there are none."""
    columns = ("engine", "model", "attention", "context", "batch", "attention_us")
    rows = []
    for file in (folder / "dense.csv", folder / "peers-operators.csv"):
        if file.exists():
            with open(file, newline="") as text:
                rows += [row for row in csv.DictReader(text) if row["engine"].startswith("flashinfer")]
    if not rows:
        return []
    with open(folder / "peers.csv", "w", newline="") as text:
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return ["--peer-csv", str(folder / "peers.csv")]


def shown(command):
    """As it would be typed, programs by their names alone."""
    words = [pathlib.Path(word).name if word.startswith("/") else word for word in command]
    return " ".join(words)


def card():
    """Name, driver, power limit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return ["unknown"] * 3
    run = subprocess.run(query, capture_output=True, text=True)
    return run.stdout.strip().splitlines()[0].split(", ") if run.returncode == 0 else ["unknown"] * 3


def commit():
    run = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def measure(part, folder, seconds):
    """Seconds that it took, or nothing where it failed or ran out of time."""
    result = folder / part.result
    command = part.command + (join_peers(folder) if part.kind == "repro" else [])
    begin = time.monotonic()
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{part.result}: out of time after {time.monotonic() - begin:.1f} s", file=sys.stderr)
        return None
    if run.returncode != 0:
        print(f"{part.result}: exit code {run.returncode}: {run.stderr.strip()[-400:]}", file=sys.stderr)
        return None
    if part.stdout:
        result.write_text(run.stdout)
    return time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where results are and go")
    parser.add_argument("--vesper", default=str(ROOT / "build" / "bin" / "vesper"), help="the binary")
    parser.add_argument("--python", default=sys.executable, help="one that has the peers")
    kinds = ("dense", "peers", "steps", "repro", "threshold", "crossover")
    parser.add_argument("--parts", nargs="+", choices=kinds, default=kinds, help="what to measure")
    parser.add_argument("--seconds", type=float, default=36000.0, help="end after so many")
    parser.add_argument("--commit", default=commit(), help="of the binary; that of this checkout where it is not given")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    notes = options.folder / "run.json"
    name, driver, power = card()
    document = json.loads(notes.read_text()) if notes.exists() else {"parts": {}}
    document |= {"card": name, "driver": driver, "power_limit": power}
    begin = time.monotonic()
    left = 0
    for part in plan(options.folder, options.vesper, options.python):
        if part.kind not in options.parts or (options.folder / part.result).exists():
            continue
        room = options.seconds - (time.monotonic() - begin)
        took = measure(part, options.folder, room) if room > 0 else None
        if took is None:
            left += 1
            continue
        print(f"{part.result}: {took:.1f} s", file=sys.stderr)
        document["parts"][part.result] = {
            "command": shown(part.command), "seconds": round(took, 1), "commit": options.commit,
        }  # fmt: skip
        notes.write_text(json.dumps(document, indent=2) + "\n")
    if left:
        sys.exit(f"{left} parts are not measured; run it again")


if __name__ == "__main__":
    main()
