"""Speed against the usual stack, with one command.

    python -m benchmarks train       training throughput, memory, share of the machine's ceiling
    python -m benchmarks scaling     cost by rows, image tokens, length and batch size
    python -m benchmarks aids        cost of each aid that keeps text as it was
    python -m benchmarks eval        scoring a vision task, against one row at a time
    python -m benchmarks retain      scoring text skills, against lm-eval's HFLM
    python -m benchmarks data        opening and checking a million rows

Each takes --help and --json. Nothing else should run on the machine.
"""

import importlib
import sys

MODULES = {
    "train": "train", "scaling": "scaling", "aids": "aids", "eval": "evaluation",
    "retain": "retention_speed", "data": "data",
}  # fmt: skip


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in MODULES:
        sys.exit(f"no benchmark {name!r}; there are {', '.join(MODULES)}.")
    sys.argv = [f"benchmarks {name}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{MODULES[name]}").main()


if __name__ == "__main__":
    main()
