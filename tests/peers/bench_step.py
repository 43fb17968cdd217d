#!/usr/bin/env python3
"""One training step of ours beside torch's: same shapes, same threads, one after the other in every round.

  python3 tests/peers/bench_step.py --peer PATH/torch_ddp.py --flex target/release/tributary [--libtorch BINARY]

`--libtorch` is a binary built with that feature; LD_LIBRARY_PATH must name torch's libraries for it. The peer script
is what a PyTorch user would write; it prints one JSON line with `step_s`. Prints one JSON line a shape and engine:
medians over the rounds, the largest resident memory, and both as ratios to torch's.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--peer", required=True)
p.add_argument("--flex", required=True)
p.add_argument("--libtorch")
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--steps", type=int, default=10)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()

SHAPES = {"3.4 M": dict(hidden=256, layers=3, ffn=688, heads=4), "27 M": dict(hidden=512, layers=8, ffn=1376, heads=8)}


def run(command):
    """The command's JSON line, and the largest resident memory of its process in bytes (Linux counts in KiB)."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS=str(a.threads)))
    out = child.stdout.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    line = next(line for line in reversed(out.splitlines()) if line.startswith("{"))
    return json.loads(line), usage.ru_maxrss * 1024


for shape, sizes in SHAPES.items():
    options = [x for name, value in sizes.items() for x in (f"--{name}", str(value))]
    options += ["--steps", str(a.steps), "--threads", str(a.threads)]
    engines = {"torch": [sys.executable, a.peer, *options], "flex": [a.flex, "bench", "step", "--json", *options]}
    if a.libtorch:
        engines["libtorch"] = [a.libtorch, "bench", "step", "--json", "--backend", "libtorch", *options]
    found = {engine: [] for engine in engines}
    for _ in range(a.rounds):
        for engine, command in engines.items():
            line, memory = run(command)
            found[engine].append((line["step_s"], memory))
            time.sleep(1)
    median = {e: tuple(statistics.median(column) for column in zip(*rows)) for e, rows in found.items()}
    for engine, (step, memory) in median.items():
        ratios = dict(step_ratio=round(step / median["torch"][0], 3), memory_ratio=round(memory / median["torch"][1], 3))
        print(json.dumps(dict(shape=shape, engine=engine, threads=a.threads, step_s=round(step, 4),
                              tokens_per_s=round(1024 / step), memory_mb=round(memory / 1e6), **ratios)), flush=True)
