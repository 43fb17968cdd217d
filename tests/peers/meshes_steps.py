"""Step times of one rank, of two tensor ranks, two stages and two replicas on the same cores: the same model, batch and text.

    python3 tests/peers/meshes_steps.py TRIBUTARY TEXT [ROUNDS]

TRIBUTARY is the binary, TEXT a text file to train on. Prints one JSON object a run, with medians of steps 5 to 24, rounds one after
the other, so that a machine that becomes slower is seen. Needs nothing but Python.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = """
[model]
hidden_size = 256
intermediate_size = 768
num_hidden_layers = 8
num_attention_heads = 8
num_key_value_heads = 4
[tokenizer]
vocab_size = 1024
[data]
source = "text"
train = [{text}]
[train]
steps = 24
seq_len = 128
micro_batch_size = 2
micro_batches = 8
[schedule]
learning_rate = 1e-3
[parallel]
verify_every = 0
[checkpoint]
every = 0
[export]
at_end = false
"""

CASES = {
    "one rank": [],
    "tensor 2": ["parallel.tensor=2"],
    "stages 2, 1f1b": ["parallel.pipeline=2"],
    "stages 2, gpipe": ["parallel.pipeline=2", "parallel.schedule=gpipe"],
    "stages 2, interleaved x 2": [
        "parallel.pipeline=2",
        "parallel.schedule=interleaved",
        "parallel.virtual_stages=2",
    ],
    "stages 2, 1f1b, bf16 activations": ["parallel.pipeline=2", "parallel.activation_codec=bf16"],
    "data 2, fp32 gradients": ["parallel.data=2", "train.micro_batches=4", "compression.codec=fp32"],
}


def run(binary, folder, name, sets):
    """One run; returns its lines of metrics without the first steps."""
    command = [binary, "train", "recipe.toml", "--name", name]
    for item in sets:
        command += ["--set", item]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr}")
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][4:]


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    binary, text = (str(Path(path).resolve()) for path in sys.argv[1:3])
    rounds = int(sys.argv[3]) if len(sys.argv) == 4 else 3
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "recipe.toml").write_text(RECIPE.format(text=json.dumps(text)))
        for number in range(rounds):
            for case, (name, sets) in enumerate(CASES.items()):
                steps = run(binary, folder, f"round-{number}-case-{case}", sets)
                of = lambda key: round(statistics.median(step[key] or 0.0 for step in steps), 4)
                print(
                    json.dumps(
                        {
                            "round": number,
                            "case": name,
                            "step_s": of("step_s"),
                            "stage_wait_s": of("stage_wait_s"),
                            "wire_bytes_sent": of("wire_bytes_sent"),
                            "loss": steps[-1]["loss"],
                        }
                    ),
                    flush=True,
                )


main()
