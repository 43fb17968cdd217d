"""Reads a checkpoint with nothing of ours: the JSON of its manifest and the package `safetensors` (with numpy).

    python3 tests/peers/read_checkpoint.py CHECKPOINT [INSPECTED.json]

Prints every tensor with its shape and the CRC-32 of its elements. With the package `blake3` it checks the manifest's own
hash and that of every file; without, it says that it did not. Packed files (checkpoint.zstd = "on") want the package
`zstandard`; without, it says so and exits with 2. INSPECTED.json is what `tributary inspect CHECKPOINT --json
--checksums` printed: step, files, state, tensors and checksums are compared, and the exit code is 1 where they differ.
docs/checkpoint-format.md is all that this script knows.
"""

import json
import pathlib
import sys
import zlib

import numpy
from safetensors.numpy import load, load_file

try:
    from blake3 import blake3
except ImportError:
    blake3 = None

try:
    import zstandard
except ImportError:
    zstandard = None

FOLDER = pathlib.Path(sys.argv[1])
DIGITS = 64
PIECE = 1 << 20


def check_hashes(text, body):
    """The hashes of the manifest and of all files."""
    if blake3 is None:
        return "not checked: there is no package blake3"
    start = text.index(b'"blake3": "') + len(b'"blake3": "')
    said = text[start:start + DIGITS]
    assert start == 15, "the hash begins with byte 15"
    assert blake3(text[:start] + b"0" * DIGITS + text[start + DIGITS:]).hexdigest().encode() == said, "manifest.json is damaged"
    for name, entry in body["files"].items():
        content = (FOLDER / name).read_bytes()
        assert len(content) == entry["bytes"], f"{name} has another size"
        assert blake3(content).hexdigest() == entry["blake3"], f"{name} is damaged"
    return f"BLAKE3 of the manifest and of {len(body['files'])} files is right"


def unpacked(name, entry):
    """The safetensors file for which a packed one stands."""
    if zstandard is None:
        print(f"{name} is packed: install the package zstandard to read it", file=sys.stderr)
        sys.exit(2)
    stored = (FOLDER / name).read_bytes()
    stream = zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True).read()
    assert len(stream) == entry["unpacked_bytes"], f"{name} unpacks to {len(stream)} bytes"
    start = 8 + int.from_bytes(stream[:8], "little")
    pieces = (numpy.frombuffer(stream[at:at + PIECE], "u1") for at in range(start, len(stream), PIECE))
    return stream[:start] + b"".join(planes.reshape(4, -1).T.tobytes() for planes in pieces)


def tensors_of(name, entry):
    """The tensors of one file by key."""
    return load(unpacked(name, entry)) if "unpacked_bytes" in entry else load_file(FOLDER / name)


def read(body):
    """Name, array and the number of elements that no piece holds, in name order."""
    pieces = {piece["file"] for tensor in body["tensors"].values() for piece in tensor["pieces"]}
    files = {name: tensors_of(name, body["files"][name]) for name in pieces}
    for name, tensor in sorted(body["tensors"].items(), key=lambda item: item[0].encode()):
        assert tensor["dtype"] == "F32"
        whole = numpy.zeros(tensor["shape"], "<f4")
        held = numpy.zeros(whole.shape, bool)
        for piece in tensor["pieces"]:
            region = piece["region"]
            box = (*map(slice, region["start"], region["end"]), ...)
            for array, values in ((whole, files[piece["file"]][piece["key"]].ravel()), (held, True)):
                flat = array[box].ravel()
                flat[region["flat_start"]:region["flat_end"]] = values
                array[box] = flat.reshape(array[box].shape)
        yield name, whole if held.all() else whole[held], int((~held).sum()), tensor["shape"]


text = (FOLDER / "manifest.json").read_bytes()
body = json.loads(text)["body"]
assert body["format"] == "tributary-checkpoint" and body["version"] in (1, 2)
hashes = check_hashes(text, body)

found = {}
for name, values, absent, shape in read(body):
    found[name] = {"shape": shape, "absent_elements": absent, "crc32": f"{zlib.crc32(values.tobytes()):08x}"}
    print(name, shape, found[name]["crc32"], f"{absent} elements are not here" if absent else "")
print(f"step {body['step']}: {len(found)} tensors; {hashes}")

if len(sys.argv) > 2:
    said = json.load(open(sys.argv[2]))
    files = {file["name"]: {key: file[key] for key in file if key != "name"} for file in said["files"]}
    tensors = {tensor["name"]: {key: tensor[key] for key in ("shape", "absent_elements", "crc32")} for tensor in said["tensors"]}
    # Values of blocks are not told: they are in the manifest, and proved by the hash of the file.
    stored = {name: {key: entry[key] for key in entry if key != "subtrees"} for name, entry in body["files"].items()}
    equal = [said["step"] == body["step"], files == stored, said["state"] == body["state"], tensors == found]
    print("equal to what inspect says" if all(equal) else f"inspect says something else (step, files, state, tensors): {equal}")
    sys.exit(0 if all(equal) else 1)
