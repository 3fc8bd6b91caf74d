"""Makes a folder that apps/results/measure.py filled readable: README.md, steps.csv, and pictures (PNG and SVG) of the
whole steps, of the papers' speed-ups beside ours and of attention against its bytes; draws the experiments that have no
picture yet, and names what measure.py has not measured yet. Files note-*.md of the folder are taken into README.md.

    apps/results/render.py docs/results/h100 [--configs configs/attention/h100]

--configs: also writes what the crossovers found as configurations of attention, one for each model, batch and attention
that is faster than dense at some context. Needs matplotlib. Nothing is measured here: the same files give the same words.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys

from measure import plan, shown

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLOTS = ROOT / "apps" / "plots" / "repro.py"
# The lines of the papers' headlines: experiment, panel, line, context.
HEADLINES = (
    ("quest-fig9", "self-attention", "Quest, budget 2048", 32768),
    ("quest-fig10", "16-bit weights", "Quest, budget 2048", 32768),
    ("quest-fig10", "4-bit weights", "Quest, budget 2048", 32768),
    ("twilight-fig7", "batch 8", "Quest-Twi", 30720),
    ("twilight-fig7", "batch 32", "Quest-Twi", 30720),
    ("twilight-fig10", "batch 32", "Quest-Twi", 32768),
    ("vattention-speed", "operator, 32 KV heads", "vAttention, 0.1", 32768),
    ("vattention-speed", "operator, 32 KV heads", "vAttention, 0.1", 131072),
    ("vattention-speed", "step, Llama-2-7B", "vAttention, 0.1", 32768),
)
# Cells whose attentions are held against what their bytes allow: experiment, panel, context.
BOUND_CELLS = (
    ("quest-fig9", "self-attention", 32768),
    ("twilight-fig7", "batch 8", 30720),
    ("twilight-fig7", "batch 32", 30720),
    ("vattention-speed", "operator, 32 KV heads", 32768),
    ("vattention-speed", "operator, 32 KV heads", 131072),
)


def tokens(count):
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def percent(share):
    return f"{100 * share:.0f} %"


def interval(row, digits=2):
    text = f"{row['speedup']:.{digits}f}"
    if row["speedup_low"] is None or row["speedup_high"] is None:
        return text
    return f"{text} ({row['speedup_low']:.{digits}f}-{row['speedup_high']:.{digits}f})"


def short(model):
    return model.removeprefix("synthetic:")


def load(folder, pattern):
    return [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]


def headline_rows(experiments):
    """(experiment, row) of HEADLINES, as far as they were measured."""
    found = []
    for name, panel, label, context in HEADLINES:
        for row in experiments.get(name, {"rows": []})["rows"]:
            if (row["panel"], row["label"], row["context"]) == (panel, label, context) and row["time_us"] is not None:
                found.append((name, row))
    return found


def bound_rows(experiments):
    """[(cell's name, its whole lines)] of BOUND_CELLS, as far as they were measured."""
    cells = []
    for name, panel, context in BOUND_CELLS:
        rows = [
            row for row in experiments.get(name, {"rows": []})["rows"]
            if (row["panel"], row["context"]) == (panel, context) and row["verdict"] != "part" and row["bound_share"]
        ]  # fmt: skip
        if rows:
            cells.append((f"{name}, {tokens(context)}, batch {rows[0]['batch']}", rows))
    return cells


def headline_table(found):
    lines = [
        "| experiment | line | context, batch | paper | ours (95 %) | by bytes | of the byte bound | over the peer "
        "| kept tokens, mass | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found:
        paper = f"{row['paper_speedup']:.2f}x" if row["paper_speedup"] else "-"
        share = percent(row["bound_share"]) if row["bound_share"] else "-"
        peer = f"{row['peer_speedup']:.2f}x" if row["peer_speedup"] and row["measure"] == "operator" else "-"
        lines.append(
            f"| [{name}]({name}.md) | {row['panel']}: {row['label']} | {tokens(row['context'])}, {row['batch']} | {paper} "
            f"| {interval(row)} | {row['speedup_bound']:.2f} | {share} | {peer} "
            f"| {row['kept_tokens']:.0f}, {percent(row['kept_mass'])} | {row['verdict']} |"
        )
    return lines


def step_table(runs):
    lines = [
        "| model | batch | context | attention | TPOT, ms | of the roof | over dense (95 %) | ceiling | attention, µs a layer "
        "| kept tokens | mass | σ |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for row in run["rows"]:
            share = "" if row["roof_share"] is None else percent(row["roof_share"])
            dense = row["attention"] == run["baseline"]
            lines.append(
                f"| {short(row['model'])} | {row['batch']} | {tokens(row['context'])} | {row['attention']} "
                f"| {row['tpot_ms']:.2f} | {share} | {'1' if dense else interval(row)} | {row['ceiling']:.2f} "
                f"| {row['attention_us']:.1f} | {row['kept_tokens']:.0f} | {percent(row['kept_mass'])} | {row['sigma']:.2f} |"
            )
    return lines


def crossover_table(runs):
    lines = [
        "| model | batch | attention | faster than dense from | measured: context, speed-up |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        low, high = run["contexts"]
        for found in run["crossovers"]:
            below = found["dense_below"]
            answer = (
                f"never up to {tokens(high)}" if below is None
                else f"{tokens(low)} at the latest" if below == 0
                else f"{below} tokens (`dense_below` {below})"
            )  # fmt: skip
            points = ", ".join(
                f"{point['context']}: {'dense' if point['dense'] else format(point['speedup'], '.2f')}"
                for point in found["points"]
            )
            lines.append(f"| {short(run['model'])} | {run['batch']} | {found['attention']} | {answer} | {points} |")
    return lines


def write_configs(folder, runs):
    """A configuration for each crossover: dense layers 0 and 1, and the others sparse from dense_below on."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    for run in runs:
        for found in run["crossovers"]:
            if found["dense_below"] is None:
                continue
            backend, _, settings = found["attention"].partition(":")
            pairs = [pair.split("=") for pair in settings.split(",") if pair]
            rule = {"layers": "2-", "backend": backend} | {key: json.loads(value) for key, value in pairs}
            rule["dense_below"] = found["dense_below"]
            fields = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rule.items())
            text = f'{{\n  "attention": [\n    {{ "layers": "all", "backend": "dense" }},\n    {{ {fields} }}\n  ]\n}}\n'
            (folder / f"{short(run['model'])}-batch-{run['batch']}-{backend}.json").write_text(text)


def write_steps(folder, runs):
    rows = [row for run in runs for row in run["rows"]]
    if not rows:
        return
    with open(folder / "steps.csv", "w", newline="") as file:
        names = [name for name in rows[0] if name not in ("stages", "sigma_range")]
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_steps(folder, runs, plt, ticker, source):
    """A panel a model and batch: speed-up over dense by context, the ceiling dotted."""
    runs = [run for run in runs if run["rows"]]
    figure, axes = plt.subplots(1, len(runs), figsize=(3.4 * len(runs), 3.6), squeeze=False)
    palette = plt.get_cmap("tab10")
    for axis, run in zip(axes[0], runs):
        sparse = [name for name in dict.fromkeys(row["attention"] for row in run["rows"]) if name != run["baseline"]]
        contexts = sorted({row["context"] for row in run["rows"]})
        for number, name in enumerate(sparse):
            rows = [row for row in run["rows"] if row["attention"] == name]
            axis.plot([row["context"] for row in rows], [row["speedup"] for row in rows], "o-", color=palette(number),
                      markersize=4, label=name.split(":")[0])  # fmt: skip
        ceiling = {row["context"]: row["ceiling"] for row in run["rows"]}
        axis.plot(contexts, [ceiling[context] for context in contexts], "k.:", label="ceiling by bytes")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts)
        axis.set_xticklabels([tokens(context) for context in contexts])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel("context (tokens)")
        axis.set_title(f"{short(run['rows'][0]['model'])}, batch {run['rows'][0]['batch']}", fontsize=9)
        axis.grid(True, alpha=0.2)
    axes[0][0].set_ylabel("decode step: speed-up over dense (×)")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(source, fontsize=9)
    save(folder, "steps", figure)


def draw_headlines(folder, found, plt, source):
    """Speed-ups: ours as bars, the papers' as squares, bytes dotted. Left operators, right steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8))
    for axis, measure, title in ((axes[0], "operator", "attention of a layer"), (axes[1], "step", "decode step, end to end")):
        rows = [(name, row) for name, row in found if row["measure"] == measure]
        for y, (_, row) in enumerate(rows):
            axis.barh(y, row["speedup"], color=plt.get_cmap("tab10")(0), alpha=0.9)
            axis.plot([row["speedup_bound"]] * 2, [y - 0.4, y + 0.4], "k:")
            if row["paper_speedup"]:
                axis.plot(row["paper_speedup"], y, "ks", fillstyle="none")
        axis.set_yticks(range(len(rows)))
        axis.set_yticklabels(
            [f"{name}\n{row['panel']}: {row['label']}, {tokens(row['context'])}" for name, row in rows], fontsize=7
        )
        axis.invert_yaxis()
        axis.set_xlabel("speed-up over dense attention of the same run (×)")
        axis.set_title(f"{title}; squares: paper, dotted: by bytes", fontsize=9)
        axis.grid(True, axis="x", alpha=0.2)
        axis.set_axisbelow(True)
    figure.suptitle(source, fontsize=9)
    save(folder, "papers", figure)


def draw_bounds(folder, cells, plt, source):
    """What share of a layer's time its bytes account for, a group of bars a cell."""
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.24 * sum(len(rows) + 1 for _, rows in cells)))
    names = []
    for number, (cell, rows) in enumerate(cells):
        for row in rows:
            y = len(names) + number
            label = f"{row['time_us']:.0f} µs, by bytes {row['bound_us']:.0f}; {row['kept_tokens']:.0f} tokens kept"
            axis.barh(y, 100 * row["bound_share"], color=plt.get_cmap("tab10")(number), alpha=0.85)
            axis.text(1, y, label, va="center", fontsize=7)
            names.append((y, f"{row['label'].replace(' (paper: FlashInfer)', '')} ({cell})"))
    axis.set_yticks([y for y, _ in names])
    axis.set_yticklabels([name for _, name in names], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel("bytes / read rate, of the time (%)")
    axis.set_title(f"attention of a layer against its byte bound\n{source}", fontsize=9)
    axis.grid(True, axis="x", alpha=0.2)
    axis.set_axisbelow(True)
    save(folder, "bounds", figure)


def missing(folder):
    """What measure.py would measure next, as it would be typed."""
    parts = [part for part in plan(folder, "vesper", "python3") if not (folder / part.result).exists()]
    if not parts:
        return []
    text = ["", "## Not measured yet", "", f"`make results RESULTS={folder}` goes on with these, and leaves the others:", ""]
    return text + [f"- `{shown(part.command)}`" for part in parts]


def save(folder, name, figure):
    figure.tight_layout()
    for ending in ("png", "svg"):
        # No date and no random ids: the same figures give the same file.
        more = {"metadata": {"Date": None}} if ending == "svg" else {}
        figure.savefig(folder / f"{name}.{ending}", dpi=120, **more)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="that of apps/results/measure.py")
    parser.add_argument("--configs", type=pathlib.Path, help="where crossovers go as configurations")
    options = parser.parse_args()
    folder = options.folder
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: drawing results: found no matplotlib; pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vesper"
    from matplotlib import pyplot, ticker

    run = json.loads((folder / "run.json").read_text())
    commits = ", ".join(dict.fromkeys(part["commit"] for part in run["parts"].values()))
    source = f"{run['card']}, driver {run['driver']}, power limit {run['power_limit']}, commit {commits}"
    steps = [found for batch in (1, 8) for found in load(folder, f"steps-*-b{batch}.json")]
    crossovers = [found for batch in (1, 8) for found in load(folder, f"crossover-*-b{batch}-*.json")]
    experiments = {
        file.stem: document
        for file in sorted(folder.glob("*.json"))
        if "experiment" in (document := json.loads(file.read_text()))
    }
    text = [f"# Results on one {run['card']}", "", source + ".", ""]
    text += ["Measured by `apps/results/measure.py`, drawn and written by `apps/results/render.py`; commands and seconds"]
    text += ["are in [run.json](run.json). How figures are taken: [bench.md](../../bench.md), [repro.md](../../repro.md)."]
    found = headline_rows(experiments)
    if found:
        draw_headlines(folder, found, pyplot, source)
        text += ["", "## The papers' headlines", "", "![papers](papers.png)", "", *headline_table(found)]
        text += ["", "Speed-ups are over vesper's own dense attention in the same run; \"over the peer\" is FlashInfer's dense"]
        text += ["attention on the same card over ours. All lines, stages and verdicts:", ""]
        for name, document in experiments.items():
            if not (folder / f"{name}.png").exists():
                subprocess.run([sys.executable, str(PLOTS), str(folder / f"{name}.json")], check=True)
            text.append(f"- [{document['title']}]({name}.md) ([picture]({name}.png), [CSV]({name}.csv))")
    cells = bound_rows(experiments)
    if cells:
        draw_bounds(folder, cells, pyplot, source)
        text += ["", "## Attention against its bytes", "", "![attention against its byte bound](bounds.png)"]
    if steps:
        write_steps(folder, steps)
        draw_steps(folder, steps, pyplot, ticker, source)
        text += ["", "## The whole step", "", "![steps](steps.png)", "", *step_table(steps), ""]
        text += [f"- Left out: {short(step['model'])}, {reason}." for step in steps for reason in step["skipped"]]
        text += ["", "All columns: [steps.csv](steps.csv)."]
    for document in load(folder, "threshold.json"):
        text += ["", "## Sparse layers under their threshold", "", "Contexts of at most `dense_below` attend dense:", ""]
        text += step_table([document])
    if crossovers:
        text += ["", "## From which context sparse is faster", "", *crossover_table(crossovers)]
        if options.configs:
            write_configs(options.configs, crossovers)
            text += ["", f"As configurations, one for each that is faster somewhere: `{options.configs}/`."]
    if (folder / "dense.md").exists():
        text += ["", "## Dense attention beside its peers", "", (folder / "dense.md").read_text().strip()]
        text += ["", "Every round: [dense.csv](dense.csv). FlashInfer at the experiments' lengths:"]
        text += ["[peers-operators.csv](peers-operators.csv)."]
    for notes in sorted(folder.glob("note-*.md")):
        text += ["", notes.read_text().strip()]
    text += missing(folder)
    (folder / "README.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
