"""Speeds of two versions of the package, side by side.

    keras-bilinear benchmark --suite=dense --output=BEFORE   # with the one version installed
    keras-bilinear benchmark --suite=dense --output=AFTER    # with the other version
    python benchmarks/compare_versions.py --before=BEFORE.json --after=AFTER.json --name=speed_house

`--before` and `--after` may be repeated, once for each suite. Writes a table into
`benchmarks/results/NAME.md`: how many times as fast as the full layer each bilinear layer is in
either version. The full layer is Keras' own in both, so what its ratio to itself differs by
(the last column) is the noise of the machine.
"""

import json
import math
import pathlib
import statistics

import tables
from absl import app, flags

BEFORE = flags.DEFINE_multi_string("before", None, "JSON of the version before.", required=True)
AFTER = flags.DEFINE_multi_string("after", None, "JSON of the version after.", required=True)
NAME = flags.DEFINE_string("name", "speed_versions", "Name of the file of results.")
CALLS = {"forward": "forward", "step": "training step"}


def read(paths):
    """`{(case, call): (seconds of the full layer, of the bilinear layer)}`, and the files."""
    times, files = {}, [json.loads(pathlib.Path(path).read_text()) for path in paths]
    for file in files:
        (records,) = file["records"].values()
        for record in records:
            for call in CALLS:
                if call in record:
                    times[record["case"], call] = tuple(record[call][:2])
    return times, files


def main(argv):
    del argv
    (before, _), (after, files) = read(BEFORE.value), read(AFTER.value)
    rows, changes, noise = [], [], []
    for (case, call), (full, bilinear) in after.items():
        full_before, bilinear_before = before[case, call]
        ratios = full_before / bilinear_before, full / bilinear
        changes.append(ratios[1] / ratios[0])
        noise.append(full / full_before)
        rows.append(
            f"| {case} | {CALLS[call]} | {ratios[0]:.2f}x | {ratios[1]:.2f}x | "
            f"{changes[-1]:.2f} | {noise[-1]:.2f} |"
        )
    mean, spread = (
        math.exp(function(map(math.log, changes))) for function in (statistics.fmean, _deviation)
    )
    versions = ", ".join(
        f"{key} {files[0][key]}" for key in ("machine", "python", "keras", "tensorflow", "numpy")
    )
    tables.write_lines(
        f"{NAME.value}.md",
        [
            "# Speed of two versions",
            "",
            f"{', '.join('`' + file['command'] + '`' for file in files)}, with each of them, one "
            "after the other for each suite, then "
            "`python benchmarks/compare_versions.py`; "
            f"{versions}; float32, medians. Before and after: how many times as fast as the full "
            "layer. Last column: seconds of the full layer, after / before, which is noise.",
            "",
            "| layer | call | before | after | after / before | seconds of the full layer |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Geometric mean of after / before: {mean:.3f}; a deviation of it is a factor of "
            f"{spread:.2f}; the full layer's own seconds differ by a factor of "
            f"{math.exp(_deviation(map(math.log, noise))):.2f}.",
        ],
    )


def _deviation(values):
    return statistics.pstdev([*values])


if __name__ == "__main__":
    app.run(main)
