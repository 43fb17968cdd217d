#!/usr/bin/env python3
"""What a checkpoint costs training: ours beside torch's `async_save`, on the same state by the same measures.

  cargo build --release
  python3 -m venv .venv && .venv/bin/pip install torch==2.9.0 numpy safetensors blake3
  .venv/bin/python tests/peers/bench_checkpoint.py [--elements 100000000] [--rounds 5] [--binary target/release/tributary]

The state is f32 parameters and AdamW's two moments. A round does everything once, one after the other: a copy of the state by
one thread into memory that is there, a plain file of the same bytes with fsync, steps of fixed work on one thread alone and
beside a checkpoint, and a checkpoint by itself. `stall` is the time in the call and the excess of the next step over the
median step. Of torch the checkpoint is written by `torch.distributed.checkpoint.async_save` with synced files, as it comes and with a
stager that keeps the memory of its copy. The checkpoint that ours has kept is read by the package
`safetensors`, too, with and without a BLAKE3 check of the file before, which ours always does; each time by a process that has
done nothing before, as ours are, and once more in the same process.

One JSON object an engine: medians over the rounds, of ratios within a round. `--cores 0` pins everything to one core.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--elements", type=int, default=100_000_000)
p.add_argument("--rounds", type=int, default=5)
p.add_argument("--step-ms", type=int, default=20)
p.add_argument("--binary", default="target/release/tributary")
p.add_argument("--folder", default=".", help="on which disk")
p.add_argument("--cores", help="such as 0, or 0,1: the cores that may be used")
p.add_argument("--only", choices=["ours", "torch"], help="leave the other out")
p.add_argument("--load", nargs=2, metavar=("HOW", "FILE"), help="of this script's own processes: load a file with safetensors")
a = p.parse_args()
if a.cores:
    os.sched_setaffinity(0, {int(core) for core in a.cores.split(",")})

import numpy  # noqa: E402  (threads are counted when it is imported)
import torch  # noqa: E402

TENSOR_MAX = 1 << 22
QUIET_STEPS = 6


def ours(folder):
    """The line of our own command, and the checkpoint that it kept."""
    command = [a.binary, "bench", "checkpoint", "--json", "--keep", "--folder", str(folder)]
    command += ["--elements", str(a.elements), "--rounds", str(a.rounds), "--step-ms", str(a.step_ms)]
    line = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return line, pathlib.Path(line.pop("path"))


def timed(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def loads_of(how, file):
    """In a process of its own: seconds in which `safetensors` brings all of a file into new memory, and once more, when the memory of the
    first time was given back to the allocator."""
    from safetensors import numpy as as_numpy
    from safetensors import torch as as_torch
    checked = lambda: blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(file).digest()
    mapped = lambda: {name: tensor.clone() for name, tensor in as_torch.load_file(file).items()}
    if how == "torch, checked":
        import blake3
    run = {"numpy": lambda: as_numpy.load_file(file), "torch": mapped, "torch, checked": lambda: (checked(), mapped())}[how]
    torch.ones(1 << 20).clone()  # its threads are there, as ours are in a process that trains
    return [timed(run)[0] for _ in range(2)]


def safetensors_load_s(checkpoint):
    file, found = checkpoint / "rank-0000.safetensors", {}
    for how in ["numpy", "torch", "torch, checked"]:
        command = [sys.executable, __file__, "--load", how, str(file)] + (["--cores", a.cores] if a.cores else [])
        both = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(a.rounds)]
        key = "safetensors_" + how.replace(", ", "_")
        found |= {f"{key}_load_s": [first for first, _ in both], f"{key}_load_again_s": [again for _, again in both]}
    return found


class Work:
    """A step: matrix products on one thread, always as many."""

    def __init__(self):
        torch.set_num_threads(1)
        self.a, self.b, self.c, self.count = torch.rand(512, 512), torch.rand(512, 512), torch.zeros(512, 512), 100
        self.step_s()
        each = statistics.median(self.step_s() for _ in range(5)) / self.count
        self.count = max(1, round(a.step_ms / 1e3 / each))

    def step_s(self):
        start = time.perf_counter()
        for _ in range(self.count):
            torch.mm(self.a, self.b, out=self.c)
        return time.perf_counter() - start


def state_of_torch():
    lengths = [min(TENSOR_MAX, a.elements - start) for start in range(0, a.elements, TENSOR_MAX)]
    names = [(f"parameter.{i:04}{suffix}", length) for suffix in ("", ".m", ".v") for i, length in enumerate(lengths)]
    return {name: torch.rand(length) for name, length in names}


def plain_write_s(folder, state):
    start = time.perf_counter()
    with open(folder / "plain", "xb", buffering=0) as file:
        for tensor in state.values():
            view = memoryview(tensor.numpy()).cast("B")
            for begin in range(0, len(view), 1 << 20):
                file.write(view[begin:begin + (1 << 20)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (folder / "plain").unlink()
    return seconds


def torchs(folder, cached):
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    folder = folder / f"torch-{cached}"
    folder.mkdir()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    state, work = state_of_torch(), Work()
    copies = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    # Files that are synced before they count, as ours are.
    writer = lambda path: dcp.FileSystemWriter(path, sync_files=True, thread_count=1)
    # The memory of the copy is kept: pinned or not matters to GPUs alone.
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    options = StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=False,
                             use_non_blocking_copy=False)
    more = dict(async_stager=DefaultStager(options)) if cached else {}
    rounds = []
    for number in range(a.rounds + 1):
        memcpy_s, _ = timed(lambda: [numpy.copyto(copies[name].numpy(), tensor.numpy()) for name, tensor in state.items()])
        plain_s = plain_write_s(folder, state)
        quiet = [work.step_s() for _ in range(QUIET_STEPS)]
        start = time.perf_counter()
        call_s, future = timed(lambda: dcp.async_save(state, storage_writer=writer(folder / f"beside-{number}"), **more))
        busy = []
        while not busy or not future.done():
            busy.append(work.step_s())
        future.result()
        beside_s, after = time.perf_counter() - start, busy[0]
        busy = busy[:-1] or busy
        quiet += [work.step_s() for _ in range(QUIET_STEPS)]
        write_s, _ = timed(lambda: dcp.async_save(state, storage_writer=writer(folder / f"alone-{number}"), **more).result())
        middle = statistics.median(quiet)
        stall_s = call_s + max(0.0, after - middle)
        rounds.append(dict(memcpy_s=memcpy_s, copy_s=call_s, stall_s=stall_s, stall_ratio=stall_s / memcpy_s,
                           plain_write_s=plain_s, write_s=write_s, write_ratio=plain_s / write_s, step_s=middle,
                           step_ratio=statistics.median(busy) / middle, beside_s=beside_s, steps_beside=len(busy),
                           step_mean_ratio=statistics.mean(busy) / statistics.mean(quiet)))
        shutil.rmtree(folder / f"beside-{number}")
        if number:
            shutil.rmtree(folder / f"alone-{number - 1}")
    loads = []
    for _ in range(a.rounds):
        loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        loads.append(timed(lambda: dcp.load(loaded, checkpoint_id=folder / f"alone-{a.rounds}"))[0])
    dist.destroy_process_group()
    shutil.rmtree(folder)
    first = rounds.pop(0)
    line = {key: statistics.median(turn[key] for turn in rounds) for key in first}
    return dict(line, first_stall_ratio=first["stall_ratio"], load_s=statistics.median(loads))


def say(engine, line):
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(dict(engine=engine, cores=len(os.sched_getaffinity(0)), **rounded)), flush=True)


if a.load:
    print(json.dumps(loads_of(*a.load)))
    sys.exit()
with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=a.folder) as folder:
    folder = pathlib.Path(folder).resolve()
    if a.only != "torch":
        line, checkpoint = ours(folder)
        others = {key: statistics.median(values) for key, values in safetensors_load_s(checkpoint).items()}
        say("tributary", dict(line, **others))
        shutil.rmtree(checkpoint)
    if a.only != "ours":
        say("torch", torchs(folder, cached=False))
        say("torch, staging kept", torchs(folder, cached=True))
