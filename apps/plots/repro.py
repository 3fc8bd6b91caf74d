"""Draws what `vesper repro` saved: python3 apps/plots/repro.py OUT/NAME.json -> OUT/NAME.png, OUT/NAME.svg.

A panel a row. Left: our times (solid) over what the bytes take at the read rate probed in the same run (dotted).
Right: speed-ups over the panel's baseline: ours (solid, with 95 % intervals), the paper's (hollow), by bytes (dotted).
Ends with 3 where matplotlib is not installed.
"""

import json
import pathlib
import sys

TIMES = {"us": (1.0, "µs"), "ms": (1e-3, "ms")}


def panels(rows):
    """Rows by panel, parts of other lines and what was not measured left out, in the order they have."""
    by_panel = {}
    for row in rows:
        if row["verdict"] not in ("part", "unfit") and row["time_us"] is not None:
            by_panel.setdefault(row["panel"], []).append(row)
    return by_panel


def lines(rows):
    by_label = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    return by_label


def draw_lines(axis, rows, value, style, colours, **more):
    for label, own in lines(rows).items():
        points = [(row["context"], value(row)) for row in own if value(row) is not None]
        if points:
            axis.plot(*zip(*points), style, color=colours[label], **more)


def finish(axis, ticker, contexts, unit, title):
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(contexts)
    axis.set_xticklabels([f"{context / 1024:g}K" if context >= 1024 else str(context) for context in contexts])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=9)
    axis.grid(True, which="both", alpha=0.2)


def draw(document, plt, ticker):
    found = panels(document["rows"])
    if not found:
        sys.exit("error: drawing the plot: found no measured row, expected one at least")
    figure, axes = plt.subplots(len(found), 2, figsize=(11, 3.6 * len(found) + 0.6), squeeze=False)
    for (name, rows), (left, right) in zip(found.items(), axes):
        palette = plt.get_cmap("tab10")
        colours = {label: palette(i % 10) for i, label in enumerate(lines(rows))}
        contexts = sorted({row["context"] for row in rows})
        scale, unit = TIMES["ms" if rows[0]["measure"] == "step" else "us"]
        draw_lines(left, rows, lambda row: row["time_us"] * scale, "o-", colours, markersize=4)
        draw_lines(left, rows, lambda row: row["bound_us"] and row["bound_us"] * scale, ".:", colours, markersize=3)
        finish(left, ticker, contexts, f"time ({unit})", f"{name}: ours; dotted: bytes / read rate")

        others = [row for row in rows if row["verdict"] != "baseline"]
        for label, own in lines(others).items():
            fast = [row for row in own if row["speedup"]]
            low = [row["speedup"] - (row["speedup_low"] or row["speedup"]) for row in fast]
            high = [(row["speedup_high"] or row["speedup"]) - row["speedup"] for row in fast]
            right.errorbar([row["context"] for row in fast], [row["speedup"] for row in fast], yerr=[low, high],
                           fmt="o-", markersize=4, capsize=2, color=colours[label])  # fmt: skip
        draw_lines(right, others, lambda row: row["paper_speedup"], "s--", colours, markersize=6, fillstyle="none",
                   linewidth=0.8)  # fmt: skip
        draw_lines(right, others, lambda row: row["speedup_bound"], ".:", colours, markersize=3)
        source = f"{rows[0]['source']}, {rows[0]['paper_gpu']}" if rows[0]["source"] else "no published number"
        finish(right, ticker, contexts, "speed-up over the baseline (×)",
               f"hollow: paper ({source}); dotted: by bytes")  # fmt: skip
        handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
        left.legend(handles, [label.strip() for label in colours], fontsize=7)
    run = document["run"]
    figure.suptitle(f"{document['title']}\n{run['device']}, {run['read_gb_per_s']:.0f} GB/s read, {run['command']}",
                    fontsize=10)  # fmt: skip
    figure.tight_layout()
    return figure


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: repro.py NAME.json")
    try:
        import matplotlib
    except ImportError:
        sys.exit(3)
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    path = pathlib.Path(sys.argv[1])
    figure = draw(json.loads(path.read_text()), pyplot, ticker)
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix("." + ending), dpi=150)


if __name__ == "__main__":
    main()
