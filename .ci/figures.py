"""Prints how much a run of the suite tests: `python .ci/figures.py pytest.log`.

The log is what `pytest --cov=keras_bilinear --cov-branch --hypothesis-show-statistics` prints.
"""

import re
import sys


def figures(log):
    """Tests, drawn examples and coverage, as text by name."""
    closing = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ passed.*?) in ([\d.]+)s", log, re.MULTILINE)[-1]
    drawn = [int(number) for number in re.findall(r"(\d+) passing,", log)]
    total = re.search(r"^TOTAL +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)%$", log, re.MULTILINE)
    statements, missed, branches, partial, percent = map(int, total.groups())
    return {
        "tests": re.sub(r", \d+ warnings?", "", closing[0]),
        "drawn examples": f"{sum(drawn)} in {len(drawn)} tests",
        "coverage of statements and branches": f"{percent}%",
        "statements missed": f"{missed} of {statements}",
        "branches taken one way only": f"{partial} of {branches}",
        "seconds": f"{float(closing[1]):.0f}",
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as log:
        for name, value in figures(log.read()).items():
            print(f"{name}: {value}")
