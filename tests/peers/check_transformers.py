#!/usr/bin/env python3
"""Does Hugging Face's transformers load an export of Tributary, and agree with it?

  cargo build -p tests --bin logits
  python3 tests/peers/check_transformers.py runs/quickstart/export [PROMPT]

Needs torch and transformers (see docs/testing.md). Prints the largest difference of the logits, relative to the largest
logit, and fails beyond 1e-4; the tokens must be the same.
"""
import json
import os
import pathlib
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

folder = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "fn main() {\n    let mut words: Vec<String> = Vec::new();\n"
root = pathlib.Path(__file__).parents[2]
target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target"))
built = [target / profile / "logits" for profile in ("release", "debug")]
binary = max((path for path in built if path.exists()), key=lambda path: path.stat().st_mtime)
ours = json.loads(subprocess.run([binary, folder, prompt], check=True, capture_output=True).stdout)

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
assert isinstance(model, LlamaForCausalLM), type(model)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
assert ids[0].tolist() == ours["ids"], (ids[0].tolist(), ours["ids"])
assert tokenizer.decode(ids[0]) == prompt
with torch.no_grad():
    theirs = model(ids).logits[0]
mine = torch.tensor(ours["logits"]).view(-1, ours["vocab"])
difference = ((mine - theirs).abs().max() / theirs.abs().max()).item()
print(json.dumps(dict(tokens=len(ours["ids"]), vocab=ours["vocab"], largest_relative_difference=difference)))
sys.exit(0 if difference <= 1e-4 else f"differs by {difference}")
