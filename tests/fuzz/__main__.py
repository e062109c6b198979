"""``python -m tests.fuzz``: many inputs of every kind; the counts as JSON."""

import argparse
import json

from . import KINDS
from .runner import run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--examples", type=int, default=100_000, help="inputs of all kinds together")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
args = parser.parse_args()
for name in args.kinds:
    share = -(-args.examples // len(args.kinds))
    print(json.dumps({"kind": name} | run(KINDS[name](), share, args.seed)), flush=True)
