"""The command line starts fast: ``edgetrain --help`` against an interpreter that does nothing, medians of 20.

To show: at most 0.2 s more.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import executable, parser, report


def main() -> None:
    made = parser(__doc__)
    options = made.parse_args()
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "edgetrain --help": [*executable(), "--help"],
        "edgetrain --version": [*executable(), "--version"],
        "edgetrain train --help": [*executable(), "train", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(6 if options.quick else 21):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if number:  # the first fills the disk's cache
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    bare = medians["python -c pass"]
    rows = [[name, f"{1000 * median:.0f}", f"{1000 * (median - bare):.0f}"] for name, median in medians.items()]
    report(options.out, "Start, ms", ["command", "median", "more than bare"], rows)


if __name__ == "__main__":
    main()
