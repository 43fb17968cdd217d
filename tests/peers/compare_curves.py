#!/usr/bin/env python3
"""How far apart are the losses of two runs of one recipe?

  python3 tests/peers/compare_curves.py runs/A/metrics.jsonl runs/B/metrics.jsonl [STEPS]

Prints the largest relative difference of the loss and its step, over the first STEPS steps or all, and fails beyond
1e-4. The runs must have the same steps, and skip the same ones. Needs Python alone.
"""
import json
import sys

LIMIT = 1e-4


def losses(path, last):
    with open(path) as lines:
        return {line["step"]: line["loss"] for line in map(json.loads, lines) if line["step"] <= last}


if len(sys.argv) not in (3, 4):
    sys.exit(__doc__.strip())
last = int(sys.argv[3]) if len(sys.argv) == 4 else float("inf")
a, b = (losses(path, last) for path in sys.argv[1:3])
if not a or a.keys() != b.keys():
    sys.exit(f"expected the same steps, found {len(a)} and {len(b)}, {len(a.keys() & b.keys())} of them in both")
uneven = [step for step in a if (a[step] is None) != (b[step] is None)]
if uneven:
    sys.exit(f"step {uneven[0]}: one run has a loss, the other skipped the step")
taken = [step for step in a if a[step] is not None]
differences = {step: abs(a[step] - b[step]) / max(abs(a[step]), abs(b[step]), 1e-30) for step in taken}
if not differences:
    sys.exit("no step of either run has a loss")
worst = max(differences, key=differences.get)
print(json.dumps(dict(steps=len(a), largest_relative_difference=differences[worst], step=worst)))
sys.exit(0 if differences[worst] <= LIMIT else f"differs by {differences[worst]} at step {worst}, more than {LIMIT}")
