#!/usr/bin/env python3
"""Copies of checkpoints in Azure's store, as its emulator Azurite is one on loopback. Needs Node.js and nothing beyond Python's own modules.

  cargo build --release
  npm install --prefix /tmp/azurite azurite@3.37.0
  python3 tests/peers/azure.py [--azurite /tmp/azurite/node_modules/.bin/azurite-blob] [--binary target/release/tributary]

Two ranks of the quickstart with a checkpoint every two steps, whose files go in several parts, are killed after their second
copy. On a "machine" that has nothing of the run, which is another folder, it goes on from the store to its end, and must end at
the parameters of a run that nobody disturbed. Then `verify` reads all that is there, retention must have left what the recipe
says and nothing half-done, and the control: with bytes changed in the emulator's own files, `verify` must notice.

Prints one line of JSON. Exit code 0: all of it was so.
"""
import argparse
import base64
import email.utils
import hashlib
import hmac
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--binary", default="target/release/tributary")
p.add_argument("--azurite", default="/tmp/azurite/node_modules/.bin/azurite-blob")
a = p.parse_args()
BINARY, RECIPE = str(pathlib.Path(a.binary).resolve()), str(pathlib.Path("recipes/quickstart.toml").resolve())
BUCKET, STEPS, WAIT_S = "checkpoints", 24, 300
SMALL = ["checkpoint.every=2", "checkpoint.keep_last=2", "eval.every=0", f"train.steps={STEPS}", "schedule.warmup_steps=4",
         "checkpoint.when_busy=wait"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(what, ready):
    until = time.monotonic() + WAIT_S
    while not ready():
        assert time.monotonic() < until, f"{what}: not in {WAIT_S} s"
        time.sleep(0.05)


def answers(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


class Azure:
    """Azurite, with an account of our own and requests that are signed."""

    def __init__(self, root):
        account, key, port = "tributary", base64.b64encode(b"a key of the test" * 4).decode(), free_port()
        self.root = root
        self.server = subprocess.Popen(
            [a.azurite, "--silent", "--skipApiVersionCheck", "--location", root, "--blobHost", "127.0.0.1", "--blobPort",
             str(port)], env={**os.environ, "AZURITE_ACCOUNTS": f"{account}:{key}"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until("azurite", lambda: answers(port))
        self.url = f"az://{BUCKET}/runs"
        endpoint = f"http://127.0.0.1:{port}/{account}"
        self.environment = {"AZURE_STORAGE_ACCOUNT_NAME": account, "AZURE_STORAGE_ACCOUNT_KEY": key,
                            "AZURE_STORAGE_ENDPOINT": endpoint, "AZURE_ALLOW_HTTP": "true"}
        # Make the container: the only request that is ours.
        date = email.utils.formatdate(usegmt=True)
        lines = ["PUT"] + [""] * 11 + [f"x-ms-date:{date}", "x-ms-version:2021-08-06",
                                       f"/{account}/{account}/{BUCKET}", "restype:container"]
        signature = hmac.new(base64.b64decode(key), "\n".join(lines).encode(), hashlib.sha256).digest()
        request = urllib.request.Request(f"{endpoint}/{BUCKET}?restype=container", method="PUT", headers={
            "x-ms-date": date, "x-ms-version": "2021-08-06",
            "Authorization": f"SharedKey {account}:{base64.b64encode(signature).decode()}"})
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()


def command(store, *arguments):
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", **(store.environment if store else {})}
    return subprocess.run([BINARY, *arguments], env=environment, capture_output=True, text=True, timeout=WAIT_S)


def train(store, folder, *more):
    sets = SMALL + [f"metrics.runs_dir={folder}"] + ([f"checkpoint.upload_to={store.url}"] if store else [])
    return ["train", RECIPE, "--name", "a", *(word for one in sets for word in ("--set", one)), *more]


def events(folder, kind):
    path = folder / "a/events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line may be half-written.
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event["step"] for event in found if event["event"] == kind]


def parameters(folder):
    return json.loads((folder / "a/run.json").read_text())["parameter_hash"]


def killed_after_two_copies(store, folder):
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", **store.environment}
    with open(folder / "log", "w") as log:
        run = subprocess.Popen([BINARY, *train(store, folder)], env=environment, stdout=subprocess.DEVNULL, stderr=log,
                               start_new_session=True)
    wait_until("two copies", lambda: len(events(folder, "uploaded")) >= 2 or run.poll() is not None)
    assert run.poll() is None, "it had ended before it was killed:\n" + (folder / "log").read_text()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return events(folder, "uploaded")


def spoil(root):
    """Changes a byte in every MiB of what the emulator has stored, removed copies among it."""
    for path in (root / "__blobstorage__").iterdir():
        with open(path, "r+b") as file:
            for at in range(1 << 19, path.stat().st_size, 1 << 20):
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 1]))


def check(expected, scratch):
    root, lost, fresh = (scratch / name for name in ("store", "lost", "fresh"))
    for folder in (root, lost, fresh):
        folder.mkdir()
    store = Azure(root)
    try:
        copied = killed_after_two_copies(store, lost)
        ran = command(store, *train(store, fresh, "--resume"))
        assert ran.returncode == 0, ran.stderr
        brought, uploaded = events(fresh, "downloaded"), events(fresh, "uploaded")
        assert brought and brought[0] >= copied[-1], f"{copied} were copied, {brought} came back"
        assert parameters(fresh) == expected, "another end than that of the run that nobody disturbed"
        assert STEPS in uploaded, f"{uploaded} were copied"
        whole = json.loads("[" + ",".join(command(store, "verify", f"{store.url}/a", "--json").stdout.splitlines()) + "]")
        steps = [one["step"] for one in whole]
        assert steps == [STEPS - 2, STEPS] and all(one["whole"] for one in whole), whole
        spoil(root)
        damaged = command(store, "verify", f"{store.url}/a")
        assert damaged.returncode == 1 and "expected" in damaged.stdout, f"the control: {damaged.stdout}{damaged.stderr}"
        return dict(store=store.url, copied_before_the_kill=copied,
                    resumed_from=brought[0], copied_after_it=uploaded, whole=steps, parameters="equal", control="noticed")
    finally:
        store.server.kill()
        store.server.wait()


with tempfile.TemporaryDirectory(prefix="stores-") as scratch:
    scratch = pathlib.Path(scratch)
    (scratch / "undisturbed").mkdir()
    ran = command(None, *train(None, scratch / "undisturbed"))
    assert ran.returncode == 0, ran.stderr
    expected = parameters(scratch / "undisturbed")
    print(json.dumps(check(expected, scratch)))
