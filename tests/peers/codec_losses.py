#!/usr/bin/env python3
"""What does each codec cost in loss, at equal steps, with error feedback and without?

  cargo build --release --workspace
  python3 -m venv .venv && .venv/bin/pip install matplotlib==3.10.7
  .venv/bin/python tests/peers/codec_losses.py --text FILE [--seeds 1 2 3] [--steps 400] [--runs runs/codec-losses]

FILE is one text: the first 90 % are trained on, the rest is held out (Tiny Shakespeare's 1 MB in docs/compression.md). Every run trains the same small Llama with two
workers, of the same seed on the same batches, and ends with the loss over all of the held-out text. `order` is fp32 in one
process, which adds the same gradients in another order: what no codec is to blame for. Runs that are there already are not
repeated. Writes docs/compression-loss.json and docs/compression-loss.svg, and prints one JSON object for each codec: the mean
over seeds of the relative difference to fp32 of the same seed, and its standard error; `commit` is that of its runs. With
`--only` the rows of other codecs stay as they are. Without matplotlib there is no picture.
"""
import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys

RECIPE = """
[model]
hidden_size = 256
intermediate_size = 688
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 4

[tokenizer]
vocab_size = 1024

[data]
source = "text"
train = ["{text}/train.txt"]

[eval]
files = ["{text}/val.txt"]
every = 50
windows = 64

[train]
steps = {steps}
seq_len = 128
micro_batch_size = 2
micro_batches = 2
seed = {seed}

[schedule]
learning_rate = 1e-3
warmup_steps = 40
min_learning_rate = 1e-4

[parallel]
data = 2

[compression]
codec = "{codec}"
{warmup}

[checkpoint]
every = 0

[metrics]
tensorboard = false

[export]
at_end = false
"""
# The bars of DESIGN.md section 9, in percent.
BARS = {"int8": 0.1, "sparse24-int8": 0.3, "int4": 1.0}
CODECS = ["bf16", "int8", "sparse24-int8", "int4", "sparse24-int4"]
# Without the steps in `int8` while the learning rate rises, which are a sparse codec's default.
COLD = "sparse24-int8, no warm-up"
KINDS = [("fp32", True), ("order", True), (COLD, True)] + [(codec, feedback) for feedback in (True, False) for codec in CODECS]


def name(kind, seed):
    codec, feedback = kind
    return f"{codec.replace(', ', '-').replace(' ', '-')}{'' if feedback else '-forgetful'}-{seed}"


def train(options, kind, seed):
    codec, feedback = kind
    folder = options.runs / name(kind, seed)
    summary = folder / "run.json"
    if not (summary.exists() and json.loads(summary.read_text())["status"] == "done"):
        recipe = options.runs / "recipe.toml"
        real = {"order": "fp32", COLD: "sparse24-int8"}.get(codec, codec)
        values = {"text": options.runs.resolve(), "steps": options.steps, "seed": seed, "codec": real}
        recipe.write_text(RECIPE.format(**values, warmup="warmup_steps = 0" if codec == COLD else ""))
        command = [options.binary, "train", recipe, "--name", name(kind, seed), "--set", f"metrics.runs_dir={options.runs}"]
        command += ["--set", f"data.cache_dir={options.runs}/cache"]
        if folder.exists():
            command += ["--resume"]
        if codec == "order":
            command += ["--set", "parallel.data=1", "--set", "train.micro_batches=4"]
        faults = {} if feedback else {"TRIBUTARY_FAULTS": "no-feedback"}
        log = options.runs / f"{name(kind, seed)}.log"
        with open(log, "w") as out:
            subprocess.run(command, env={"PATH": "/usr/bin:/bin", **faults}, stdout=out, stderr=out, check=True)
    return json.loads(summary.read_text())["held_out_bits_per_byte"]


def curve(options, kind):
    """The held-out loss of the first seed by step; nothing where no such run has ended."""
    folder = options.runs / name(kind, options.seeds[0])
    if not (folder / "run.json").exists() or json.loads((folder / "run.json").read_text())["status"] != "done":
        return []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval_loss"]) for line in lines if line["eval_loss"] is not None]


def compare(options, kinds, results):
    rows = []
    for kind in kinds[1:]:
        codec, feedback = kind
        results_here = [100 * (results[name(kind, seed)] / results[name(kinds[0], seed)] - 1) for seed in options.seeds]
        error = statistics.stdev(results_here) / math.sqrt(len(results_here)) if len(results_here) > 1 else None
        rows.append({
            "codec": codec,
            "error_feedback": feedback,
            "seeds": options.seeds,
            "held_out_bits_per_byte": [results[name(kind, seed)] for seed in options.seeds],
            "difference_percent": results_here,
            "mean_percent": statistics.mean(results_here),
            "standard_error_percent": error,
            "bar_percent": BARS.get(codec) if feedback else None,
            "commit": options.commit,
        })
    return rows


def merged(path, rows):
    """These rows, and of the others what was measured before."""
    kind = lambda row: (row["codec"], row["error_feedback"])
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {kind(row): row for row in old + rows}
    return [known[kind] for kind in KINDS if kind in known]


def draw(options, rows):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture", file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "tributary", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[3, 2])
    labels = [label for label in ["order"] + CODECS[:3] + [COLD] + CODECS[3:] if any(row["codec"] == label for row in rows)]
    for feedback, color, shift in [(True, "#1f6f8b", -0.18), (False, "#d1495b", 0.18)]:
        for place, label in enumerate(labels):
            row = next((row for row in rows if row["codec"] == label and row["error_feedback"] == feedback), None)
            if row is None:
                continue
            x = place + (0 if label in ("order", COLD) else shift)
            bars.plot([x] * len(row["seeds"]), row["difference_percent"], ".", color=color, alpha=0.4, markersize=6)
            bars.errorbar(x, row["mean_percent"], yerr=row["standard_error_percent"] or 0, fmt="o", color=color, capsize=3,
                          label=("with error feedback" if feedback else "without") if place == 1 else None)
    for place, label in enumerate(labels):
        if label in BARS:
            bars.hlines(BARS[label], place - 0.4, place + 0.4, color="#555555", linestyle=":", label="bar" if label == "int8" else None)
    bars.axhline(0, color="#999999", linewidth=0.8)
    bars.set_yscale("symlog", linthresh=0.5)
    bars.set_yticks([-0.5, 0, 0.5, 1, 2, 5, 10, 20], ["-0.5", "0", "0.5", "1", "2", "5", "10", "20"])
    bars.set_xticks(range(len(labels)), ["fp32,\nother order"] + [label.replace("24-", "24-\n").replace(", ", ",\n") for label in labels[1:]])
    bars.set_ylabel("held-out loss, % above fp32 of the same seed")
    bars.legend(frameon=False)
    lines = [("fp32", "black"), ("int8", "#1f6f8b"), ("int4", "#edae49"), ("sparse24-int8", "#66a182"), (COLD, "#d1495b")]
    for label, color in lines:
        if points := curve(options, (label, True)):
            curves.plot(*zip(*points), color=color, label=label)
    curves.set_xlabel("step")
    curves.set_ylabel("held-out loss, nats a token")
    curves.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out / "compression-loss.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = pathlib.Path(__file__).resolve().parents[2]
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--binary", type=pathlib.Path, default=root / "target/release/tributary-under-test")
    parser.add_argument("--runs", type=pathlib.Path, default=root / "runs/codec-losses")
    parser.add_argument("--out", type=pathlib.Path, default=root / "docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="+", metavar="CODEC", help="beside fp32; of the others what was measured before stays")
    git = ["git", "-C", root, "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    parser.add_argument("--commit", default=head, help="of the binary")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.only is None or kind[0] in ["fp32", *options.only]]
    options.runs.mkdir(parents=True, exist_ok=True)
    text = options.text.read_bytes()
    cut = len(text) * 9 // 10
    (options.runs / "train.txt").write_bytes(text[:cut])
    (options.runs / "val.txt").write_bytes(text[cut:])
    results = {}
    for seed in options.seeds:
        for kind in kinds:
            results[name(kind, seed)] = train(options, kind, seed)
            print(f"{name(kind, seed)}: {results[name(kind, seed)]:.4f} bits per byte", file=sys.stderr, flush=True)
    rows = compare(options, kinds, results)
    for row in rows:
        print(json.dumps(row))
    path = options.out / "compression-loss.json"
    rows = merged(path, rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(options, rows)


if __name__ == "__main__":
    main()
