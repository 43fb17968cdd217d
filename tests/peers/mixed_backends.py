"""Two processes of one run, one on `flex` and one on LibTorch, joined by `--join` as machines are (docs/parallel.md).

    python3 tests/peers/mixed_backends.py --tributary target/libtorch/release/tributary

Needs a binary built with the feature `libtorch` (docs/testing.md), its LD_LIBRARY_PATH, and Python alone. With
`optimizer.sharded = true`, in `fp32` and in `int8` gradients and parameters, both ranks compare the hash of all parameters
after every step (`parallel.verify_every = 1`), and a difference ends the run. Printed for each run: that hash at the end,
and how far its losses are from those of the same run on `flex` alone and on LibTorch alone, as the largest relative
difference over all steps. The exit code is 1 where

- a run fails, as it does when the ranks' parameters differ in one bit;
- the mixture has the hash of a run on one backend: both would have computed on the same one;
- a loss is farther from either run of one backend than --limit;
- the control passes: without `optimizer.sharded` the coordinator must refuse the mixture by name, with exit code 2;
- the other control is within the limit: another seed is another run.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

RECIPE = """
[model]
hidden_size = 256
intermediate_size = 512
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2

[tokenizer]
vocab_size = 300

[data]
source = "text"
train = ["{root}/ARCHITECTURE.md", "{root}/docs/parallel.md"]
cache_dir = "cache"

[train]
steps = {steps}
seq_len = 64
micro_batch_size = 2

[schedule]
learning_rate = 2e-3

[optimizer]
sharded = true

[parallel]
data = 2
verify_every = 1

[checkpoint]
every = 0

[metrics]
log_every = 1
tensorboard = false

[export]
at_end = false
"""
WAIT_S = 300
CODECS = {"fp32": ["compression.codec=fp32", "compression.parameter_codec=fp32"],
          "int8": ["compression.codec=int8", "compression.parameter_codec=int8"]}


class Runs:
    def __init__(self, tributary, folder, steps):
        self.tributary, self.folder = str(tributary.resolve()), pathlib.Path(folder)
        root = pathlib.Path(__file__).resolve().parents[2]
        (self.folder / "recipe.toml").write_text(RECIPE.format(root=root, steps=steps))

    def start(self, name, words):
        log = self.folder / f"{name}.log"
        with open(log, "w") as file:
            return subprocess.Popen([self.tributary, *words], cwd=self.folder, stdout=file, stderr=file), log

    def run(self, name, backends, sets):
        """A coordinator and a worker on each of the backends, each with its own runs/: their exit codes and what they said."""
        sets = [word for key in sets for word in ("--set", key)]
        coordinator = self.start(f"{name}-coordinator", ["coordinator", "recipe.toml", "--name", name, "--listen", "127.0.0.1:0", *sets])
        processes = [coordinator]
        try:
            address = self.address(*coordinator)
            for rank, backend in enumerate(backends):
                own = ["--set", f"device.backend={backend}", "--set", "device.threads=1", "--set", f"metrics.runs_dir=runs-{rank}"]
                processes.append(self.start(f"{name}-{rank}", ["worker", "--join", address, "--rank", str(rank), *own]))
            codes = [process.wait(timeout=WAIT_S) for process, _ in processes]
        finally:
            for process, _ in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return codes, [log.read_text() for _, log in processes]

    def address(self, process, log):
        """Where the coordinator listens, as soon as it says so; its end without that is an error."""
        while True:
            ended = process.poll() is not None
            said = re.search(r" ranks at ([0-9.]+:[0-9]+): ", log.read_text())
            if said:
                return said.group(1)
            if ended:
                sys.exit(f"the coordinator gave no address:\n{log.read_text()}")
            try:
                process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                pass

    def result(self, name, backends, sets):
        """Hash and losses of a run that must end well: a rank whose parameters differ at any step ends all of them."""
        codes, said = self.run(name, backends, sets)
        if any(codes):
            sys.exit(f"{name}: exit codes {codes}, expected zeros:\n" + "\n".join(said))
        folder = self.folder / "runs-0" / name
        summary = json.loads((folder / "run.json").read_text())
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if summary["status"] != "done" or not summary["parameter_hash"] or None in losses:
            sys.exit(f"{name}: status {summary['status']}, hash {summary['parameter_hash']}, losses {losses}")
        return summary["parameter_hash"], losses


def apart(one, other):
    assert len(one) == len(other), f"{len(one)} and {len(other)} steps"
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in zip(one, other))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tributary", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=float, default=1e-4, help="of the relative difference of a loss")
    args = parser.parse_args()
    wrong, hashes = [], set()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args.tributary, folder, args.steps)
        for codec, sets in CODECS.items():
            found, mixed = runs.result(f"{codec}-mixed", ["flex", "libtorch"], sets)
            row = {"codec": codec, "steps": len(mixed), "parameter_hash": found, "first_loss": mixed[0], "last_loss": mixed[-1]}
            for backend in ["flex", "libtorch"]:
                other, curve = runs.result(f"{codec}-{backend}", [backend] * 2, sets)
                row[f"apart_from_{backend}"] = far = apart(mixed, curve)
                if other == found:
                    wrong.append(f"{codec}: the mixture has the parameters of {backend} alone, bit for bit")
                if far > args.limit:
                    wrong.append(f"{codec}: a loss is {far} from {backend} alone, more than {args.limit}")
            _, seeded = runs.result(f"{codec}-seed", ["flex"] * 2, [*sets, "train.seed=7"])
            row["apart_from_another_seed"] = far = apart(mixed, seeded)
            if far <= args.limit:
                wrong.append(f"{codec}: another seed is within the limit, {far}: the limit says nothing")
            # Tensors of fewer than 65 536 elements travel as fp32 with every codec.
            if found in hashes:
                wrong.append(f"{codec}: another codec has the same parameters, bit for bit: nothing was compressed")
            hashes.add(found)
            print(json.dumps(row), flush=True)
        codes, said = runs.run("refused", ["flex", "libtorch"], ["optimizer.sharded=false"])
        told = [line for text in said for line in text.splitlines() if "backend" in line and "has flex" in line and "has libtorch" in line]
        print(json.dumps({"without_sharding": codes, "said": told[:1]}), flush=True)
        if codes != [2, 2, 2] or not told:
            wrong.append(f"without sharding: exit codes {codes}, expected 2 of all and the name of the key:\n" + "\n".join(said))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
