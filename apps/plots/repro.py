"""Draws what `vesper repro` saved: python3 apps/plots/repro.py OUT/NAME.json -> OUT/NAME.png, OUT/NAME.svg.

A panel a row. Left: our times over what the bytes take at the read rate probed in the same run (dotted). Right: speed-ups
over the panel's baseline: ours with 95 % intervals, the paper's (squares), by bytes (dotted). Curves over several contexts,
bars at one.
Ends with 3 where matplotlib is not installed.
"""

import json
import pathlib
import sys

TIMES = {"operator": (1.0, "µs"), "step": (1e-3, "ms")}


def panels(rows):
    """Rows by panel, what was not measured left out, in the order they have."""
    by_panel = {}
    for row in rows:
        if row["time_us"] is not None:
            by_panel.setdefault(row["panel"], []).append(row)
    return by_panel


def lines(rows):
    """Rows that are no part of another, by line."""
    by_label = {}
    for row in rows:
        if row["verdict"] != "part":
            by_label.setdefault(row["label"], []).append(row)
    return by_label


def draw_lines(axis, rows, value, style, colours, **more):
    for label, own in lines(rows).items():
        points = [(row["context"], value(row)) for row in own if value(row) is not None]
        if points:
            axis.plot(*zip(*points), style, color=colours[label], **more)


def errors(row):
    return [[row["speedup"] - (row["speedup_low"] or row["speedup"])],
            [(row["speedup_high"] or row["speedup"]) - row["speedup"]]]  # fmt: skip


def finish_sweep(axis, ticker, contexts, unit):
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(contexts)
    axis.set_xticklabels([f"{context / 1024:g}K" if context >= 1024 else str(context) for context in contexts])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel(unit)


def draw_sweep(left, right, rows, scale, unit, colours, plt, ticker):
    """Over several contexts: curves."""
    contexts = sorted({row["context"] for row in rows})
    draw_lines(left, rows, lambda row: row["time_us"] * scale, "o-", colours, markersize=4)
    draw_lines(left, rows, lambda row: row["bound_us"] * scale, ".:", colours, markersize=3)
    finish_sweep(left, ticker, contexts, f"time ({unit})")
    others = [row for row in rows if row["verdict"] != "baseline"]
    draw_lines(right, others, lambda row: row["speedup"], "o-", colours, markersize=4)
    for row in others:
        if row["verdict"] != "part" and row["speedup"]:
            right.errorbar(row["context"], row["speedup"], yerr=errors(row), capsize=2, color=colours[row["label"]])
    draw_lines(right, others, lambda row: row["paper_speedup"], "s--", colours, markersize=6, fillstyle="none",
               linewidth=0.8)  # fmt: skip
    draw_lines(right, others, lambda row: row["speedup_bound"], ".:", colours, markersize=3)
    finish_sweep(right, ticker, contexts, "speed-up over the baseline (×)")
    handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
    left.legend(handles, colours, fontsize=7)


def draw_bars(left, right, rows, scale, unit, colours):
    """At one context: a bar a line, parts of it stacked in its shades."""
    labels = list(lines(rows))
    names = []  # with those of parts, in the order in which they are stacked
    for y, label in enumerate(labels):
        row = lines(rows)[label][0]
        parts = [one for one in rows if one["verdict"] == "part" and one["attention"] == row["attention"]]
        left.barh(y, row["time_us"] * scale, color=colours[label], alpha=0.35 if parts else 0.9)
        begin = 0.0
        for number, part in enumerate(parts):
            width = part["time_us"] * scale
            left.barh(y, width, left=begin, color=colours[label], alpha=0.9 - 0.6 * number / len(parts),
                      edgecolor="white")  # fmt: skip
            begin += width
        left.plot([row["bound_us"] * scale] * 2, [y - 0.4, y + 0.4], "k:")
        names.append("\n".join([label.strip()] + [part["label"].strip() for part in parts]))
        if row["verdict"] == "baseline":
            continue
        right.barh(y, row["speedup"], xerr=errors(row), color=colours[label], alpha=0.9, capsize=2)
        if row["paper_speedup"]:
            right.plot(row["paper_speedup"], y, "ks", fillstyle="none")
        if row["speedup_bound"]:
            right.plot([row["speedup_bound"]] * 2, [y - 0.4, y + 0.4], "k:")
    for axis, texts in ((left, names), (right, labels)):
        axis.set_yticks(range(len(labels)))
        axis.set_yticklabels([text.strip() for text in texts], fontsize=6)
        axis.set_ylim(len(labels) - 0.4, -0.6)
    left.set_xlabel(f"time ({unit}) at {rows[0]['context']} tokens")
    right.set_xlabel(f"speed-up over the baseline (×) at {rows[0]['context']} tokens")


def draw(document, plt, ticker):
    found = panels(document["rows"])
    if not found:
        sys.exit("error: drawing the plot: found no measured row, expected one at least")
    figure, axes = plt.subplots(len(found), 2, figsize=(12, 3.6 * len(found) + 0.6), squeeze=False)
    for (name, rows), (left, right) in zip(found.items(), axes):
        palette = plt.get_cmap("tab10")
        colours = {label: palette(i % 10) for i, label in enumerate(lines(rows))}
        scale, unit = TIMES[rows[0]["measure"]]
        if len({row["context"] for row in rows}) > 1:
            draw_sweep(left, right, rows, scale, unit, colours, plt, ticker)
        else:
            draw_bars(left, right, rows, scale, unit, colours)
        source = f"{rows[0]['source']}, {rows[0]['paper_gpu']}" if rows[0]["source"] else "no published number"
        left.set_title(f"{name}: ours; dotted: bytes / read rate", fontsize=9)
        right.set_title(f"squares: paper ({source}); dotted: by bytes", fontsize=9)
        for axis in (left, right):
            axis.grid(True, which="both", alpha=0.2)
            axis.set_axisbelow(True)
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
