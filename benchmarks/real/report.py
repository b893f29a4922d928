"""The rows of the study as a table, and whether its goals are reached."""

import itertools
import math

import tables

import keras_bilinear

VARIANTS = ("original", "fitted", "svd", "recovered")
NUMBERS = {"float32": None, "dynamic int8": "dynamic_int8", "int8": "int8"}
KEY = ("model", "variant", "budget", "numbers")
FIELDS = (*KEY, "epochs", "parameters", "bytes", "ratio", "metric", "also", "seconds", "note")
# A file that takes longer than this many times the original's file counts as slower.
SLOWER = 1.05
# Of the original's int8 file: the share of its bytes, and of the metric that may be lost.
GOALS = {"half": (0.5, 0.01), "a quarter": (0.25, 0.03)}


def verdict(case, rows):
    """For each goal, a sentence that says whether a rewritten file reaches it."""
    measured = [row for row in rows if row["bytes"]]
    of = {(row["variant"], row["numbers"]): row for row in measured}
    sizes = [
        int(of["original", numbers]["bytes"])
        for numbers, quantize in NUMBERS.items()
        if quantize and ("original", numbers) in of
    ]
    if not sizes or ("original", "float32") not in of:
        return ["The original's files are not measured."]
    best = float(of["original", "float32"]["metric"])
    rewritten = [
        row
        for row in measured
        if row["variant"] in ("fitted", "recovered") and row["numbers"] != "float32"
    ]
    if not rewritten:
        return ["No rewritten int8 file is measured."]
    sentences = []
    for name, (share, allowed) in GOALS.items():
        goal = f"{name.capitalize()} of int8's bytes at {100 * allowed:g}% lost, not slower"
        small = [row for row in rewritten if int(row["bytes"]) <= share * min(sizes)]

        def distance(row, allowed=allowed):
            """What a file is above both limits by; 0 reaches the goal."""
            lost = max(0.0, case.lost(float(row["metric"]), best) - allowed)
            return lost + max(0.0, float(row["ratio"]) - SLOWER), int(row["bytes"])

        if not small:
            sentences.append(f"{goal}: **no**, no rewritten int8 file is so small.")
            continue
        row = min(small, key=distance)
        answer = "**no**, the nearest is" if distance(row)[0] else "**yes**,"
        sentences.append(
            f"{goal}: {answer} {row['variant']} at {row['budget']} in {row['numbers']}, with "
            f"{100 * int(row['bytes']) / min(sizes):.0f}% of the bytes, "
            f"{100 * case.lost(float(row['metric']), best):.1f}% lost, {row['ratio']}x the time."
        )
    return sentences


def tabulate(rows, cases):
    """The table as Markdown."""
    lines = [
        "# real models",
        "",
        "`python benchmarks/real_models.py`; keras-bilinear "
        f"{keras_bilinear.__version__}, {tables.machine()}, one thread, XNNPACK on. All scores are "
        "of the LiteRT files, on test inputs. Time: as many times the original's file of the same "
        "kind takes, both timed by turns. Lost: the share of the metric of the original's float32 "
        f"file. The goals compare with the smaller int8 file of the original; {SLOWER:g} times the "
        "time is not slower. Seconds: for the plan and the fit, or `recover` after them.",
    ]
    for case, case_rows in cases_of(rows, cases):
        (best,) = [
            float(row["metric"])
            for row in case_rows
            if (row["variant"], row["numbers"]) == ("original", "float32") and row["metric"]
        ] or [math.nan]
        header = f"| variant | budget | numbers | parameters | bytes | time | {case.metric} | lost "
        lines += ["", f"## {case.requirement}", "", *verdict(case, case_rows), ""]
        lines += [header + f"| {case.also} | seconds |", "|" + "---|" * 10]
        for row in case_rows:
            lines.append(_line(case, row, best))
    return lines


def cases_of(rows, cases):
    """`(case, its rows)`, in the order of `cases` and of the flags."""
    order = itertools.product(VARIANTS, NUMBERS)
    order = {key: number for number, key in enumerate(order)}
    for name, case in cases.items():
        found = [row for row in rows if row["model"] == name]
        found.sort(key=lambda row: (-float(row["budget"]), order[row["variant"], row["numbers"]]))
        if found:
            yield case, found


def _line(case, row, best):
    variant = row["variant"] + (f", {row['epochs']} epochs" if row["epochs"] else "")
    start = f"| {variant} | {row['budget']} | {row['numbers']} | "
    if row["note"]:
        return f"{start}{row['parameters']} | {row['note'].replace('|', '/')} | | | | | |"
    lost = round(100 * case.lost(float(row["metric"]), best), 1) + 0.0  # and no -0.0
    return (
        f"{start}{int(row['parameters']):,} | {int(row['bytes']):,} | {float(row['ratio']):.2f}x | "
        f"{float(row['metric']):.4f} | {lost:.1f}% | {float(row['also']):.4f} | {row['seconds']} |"
    )
