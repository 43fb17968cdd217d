#!/usr/bin/env python3
"""How much faster is our int8 encoder, with error feedback, than a few lines of vectorised torch that do the same?

  cargo build --release
  python3 -m venv .venv && .venv/bin/pip install torch==2.9.0 numpy
  .venv/bin/python tests/peers/bench_codec.py [--elements 67108864] [--rounds 5] [--binary target/release/tributary]

Both quantise blocks of 128 to int8 with one bfloat16 scale that is rounded up, and keep what is left out for the next step.
Torch reuses its memory wherever it can. One JSON object for each number of threads: medians, and torch's over ours. The two
take turns, so that whatever else the machine does meets both alike.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import time

import torch

BLOCK = 128


class Encoder:
    def __init__(self, elements):
        self.y = torch.empty(elements // BLOCK, BLOCK)
        self.q = torch.empty_like(self.y)
        self.out = torch.empty(self.y.shape, dtype=torch.int8)

    def encode(self, gradient, residual):
        """Returns scales and values; `residual` becomes what is left out."""
        torch.add(gradient, residual, out=self.y)
        largest = torch.maximum(self.y.amax(1, keepdim=True), -self.y.amin(1, keepdim=True)) / 127
        bits = (largest.view(torch.int32) + 0xFFFF) >> 16
        scale = (bits << 16).view(torch.float32)
        torch.mul(self.y, 1 / scale, out=self.q).round_()
        self.out.copy_(self.q)
        torch.addcmul(self.y, self.q, scale, value=-1, out=residual)
        return bits.to(torch.int16), self.out


def torch_s(elements, threads, rounds):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    encoder = Encoder(elements)
    gradient = torch.randn(elements // BLOCK, BLOCK) * 1e-3
    residual = torch.zeros_like(gradient)
    times = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        encoder.encode(gradient, residual)
        times.append(time.perf_counter() - start)
    return times[1:]


def ours_s(options, threads):
    command = [options.binary, "bench", "codec", "--codec", "int8", "--json", "--rounds", str(options.rounds)]
    command += ["--elements", str(options.elements), "--threads", str(threads)]
    lines = map(json.loads, subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())
    return next(line["median_s"] for line in lines if line["kernel"] == "encode")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = pathlib.Path(__file__).resolve().parents[2]
    parser.add_argument("--binary", type=pathlib.Path, default=root / "target/release/tributary")
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        theirs, ours = [], []
        for _ in range(3):
            ours.append(ours_s(options, threads))
            theirs += torch_s(options.elements, threads, options.rounds)
        line = {"elements": options.elements, "threads": threads}
        line |= {"torch_s": statistics.median(theirs), "ours_s": statistics.median(ours)}
        print(json.dumps(line | {"times_faster": line["torch_s"] / line["ours_s"]}), flush=True)


if __name__ == "__main__":
    main()
