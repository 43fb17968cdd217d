#!/usr/bin/env python3
"""Is docs/payload-format.md enough? A decoder and a slow encoder that were written from that page alone.

  cargo run -p compression --example payload_vectors | python3 tests/peers/decode_payload.py

Needs Python 3 and nothing else. Reads a JSON object a line; floats are numbers of 32 bits:

  {"codec", "gradient", "residual", "payload", "next"}   they are encoded as payload (hexadecimal); next is the new residual
  {"codec", "gradient", "residual", "payload": null}     they cannot be sent
  {"codec", "elements", "bytes", "decoded"}              what bytes decode to, or null where they are refused

Fails at the first line on which this encoder or this decoder differs in a bit, and when the lines leave one of the
page's rules untried. `--wrong tie`, `--wrong up`, `--wrong nibble`, `--wrong tail` and `--wrong hold` break one rule each:
the control.
"""
import collections
import json
import math
import struct
import sys

WRONG = sys.argv[2] if sys.argv[1:2] == ["--wrong"] else None
BLOCK = 128
# The largest q, bits of a value, and whether two of four are sent.
BLOCK_CODECS = {
    "int8": (127, 8, False),
    "int4": (7, 4, False),
    "sparse24-int8": (127, 8, True),
    "sparse24-int4": (7, 4, True),
}
SCALE_BITS_MIN = 0x0D80
SCALE_BITS_MAX = {127: 0x7B02, 7: 0x7D13}
TOO_LARGE = 2.0**126


class Refused(Exception):
    """No payload of so many elements."""


class NotFinite(Exception):
    """What cannot be sent."""


def value_of(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(value):
    """Of an f32; rounds what is not one to the nearest, ties to even."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f32(value):
    return value_of(bits_of(value))


def exact(value):
    """What the page says is exact."""
    assert f32(value) == value, value
    return value


def sent_of(n, sparse):
    return 2 * (n // 4) + min(n % 4, 2) if sparse else n


def planes_of(n, width, sparse):
    """Bytes of the scales, the bitmap and the values."""
    k = sent_of(n, sparse)
    return 2 * -(-n // BLOCK), -(-n // 8) if sparse else 0, k if width == 8 else -(-k // 2)


def bytes_of(codec, n):
    if codec in ("fp32", "bf16"):
        return n * (4 if codec == "fp32" else 2)
    _, width, sparse = BLOCK_CODECS[codec]
    return sum(planes_of(n, width, sparse))


def decode(codec, n, payload):
    """The bits of n elements."""
    if len(payload) != bytes_of(codec, n):
        raise Refused("length")
    if codec in ("fp32", "bf16"):
        bits = [bits << 16 for (bits,) in struct.iter_unpack("<H", payload)]
        if codec == "fp32":
            bits = [bits for (bits,) in struct.iter_unpack("<I", payload)]
        if any(bits >> 23 & 0xFF == 0xFF for bits in bits):
            raise Refused("not finite")
        return bits
    largest_q, width, sparse = BLOCK_CODECS[codec]
    scale_bytes, bitmap_bytes, _ = planes_of(n, width, sparse)
    scales = [bits for (bits,) in struct.iter_unpack("<H", payload[:scale_bytes])]
    bitmap = payload[scale_bytes : scale_bytes + bitmap_bytes]
    values = values_in(payload[scale_bytes + bitmap_bytes :], width, sent_of(n, sparse))
    if any(bits != 0 and not SCALE_BITS_MIN <= bits <= SCALE_BITS_MAX[largest_q] for bits in scales):
        raise Refused("scale")
    if any(q < -largest_q for q in values):
        raise Refused("-128" if width == 8 else "-8")
    sent = sent_in(bitmap, n, scales) if sparse else [True] * n
    out, values = [], iter(values)
    for i in range(n):
        q = next(values) if sent[i] else 0
        bits = scales[i // BLOCK]
        if bits == 0 and q != 0:
            raise Refused("value without a scale")
        out.append(bits_of(exact(q * value_of(bits << 16))))
    return out


def values_in(plane, width, k):
    if width == 8:
        return list(struct.unpack(f"{k}b", plane))
    halves = [half for byte in plane for half in (byte & 0xF, byte >> 4)]
    if any(halves[k:]):
        raise Refused("half a byte")
    return [half - 16 if half >= 8 else half for half in halves[:k]]


def sent_in(bitmap, n, scales):
    bits = [bool(byte >> at & 1) for byte in bitmap for at in range(8)]
    if any(bits[n:]):
        raise Refused("bits of no element")
    for start in range(0, n, 4):
        group = bits[start : min(start + 4, n)]
        if sum(group) != min(len(group), 2):
            raise Refused("ones in a group")
        if scales[start // BLOCK] == 0 and not all(group[:2]):
            raise Refused("bitmap of a block of zeros")
    return bits[:n]


def bf16_up(value):
    bits = bits_of(value)
    return (bits + (0x8000 if WRONG == "up" else 0xFFFF)) >> 16


def bf16_nearest(value):
    """By comparing with both neighbours."""
    bits = bits_of(value)
    below = bits & 0xFFFF0000
    above = below + 0x10000
    to_below, to_above = abs(value - value_of(below)), abs(value_of(above) - value)
    if to_below != to_above:
        return (below if to_below < to_above else above) >> 16
    return (below if below >> 16 & 1 == 0 else above) >> 16


def encode(codec, gradient, residual):
    """y, its payload, what is left of it, and the new residual."""
    holds = BLOCK_CODECS.get(codec, (0, 0, False))[2] and WRONG != "hold"
    held = [f32(r * (31 / 32)) if holds else 0.0 for r in residual]
    y = [f32(f32(g + exact_or_not_finite(r - h)) + 0.0) for g, r, h in zip(gradient, residual, held)]
    payload, left = encode_sum(codec, y)
    following = [f32(rest + h) for rest, h in zip(left, held)]
    for start in range(0, len(y), BLOCK):
        looks = max(map(abs, y[start : start + BLOCK])) >= 2.0**121
        if looks and not all(abs(value) < TOO_LARGE for value in following[start : start + BLOCK]):
            raise NotFinite
    return y, payload, left, following


def exact_or_not_finite(value):
    return exact(value) if math.isfinite(value) else value


def encode_sum(codec, y):
    """The payload of y and what is left of it."""
    # The comparison is false for NaN.
    if not all(abs(value) < TOO_LARGE for value in y):
        raise NotFinite
    if codec == "fp32":
        return b"".join(struct.pack("<f", value) for value in y), [0.0] * len(y)
    if codec == "bf16":
        rounded = [bf16_nearest(value) for value in y]
        left = [exact(value - value_of(bits << 16)) for value, bits in zip(y, rounded)]
        return b"".join(struct.pack("<H", bits) for bits in rounded), left
    largest_q, width, sparse = BLOCK_CODECS[codec]
    n, left = len(y), list(y)
    scales, sent, values = [], [], []
    for start in range(0, n, BLOCK):
        block = y[start : start + BLOCK]
        bits = bf16_up(f32(max(map(abs, block)) / largest_q))
        scale = value_of(bits << 16)
        zeros = scale < 2.0**-100
        scales.append(0 if zeros else bits)
        inverse = 0.0 if zeros else f32(1 / scale)
        for at in sent_by(block, sparse, zeros, sent):
            # Python rounds halves to even.
            q = 0 if zeros else max(-largest_q, min(largest_q, round(f32(block[at] * inverse))))
            values.append(q)
            if not zeros:
                left[start + at] = exact(block[at] - q * scale)
    payload = b"".join(struct.pack("<H", bits) for bits in scales)
    if sparse:
        bits = sent + [False] * (-n % 8)
        payload += bytes(sum(bit << at for at, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))
    if width == 8:
        return payload + struct.pack(f"{len(values)}b", *values), left
    halves = [q & 0xF for q in values] + [0] * (len(values) % 2)
    low, high = (1, 0) if WRONG == "nibble" else (0, 1)
    return payload + bytes(halves[i + low] | halves[i + high] << 4 for i in range(0, len(halves), 2)), left


def sent_by(block, sparse, zeros, sent):
    """Which elements of a block are sent; appends a bit for each to `sent`."""
    chosen = []
    for start in range(0, len(block), 4):
        group = list(range(start, min(start + 4, len(block))))
        if not sparse:
            chosen += group
            continue
        tie = -1 if WRONG == "tie" else 1
        by_size = group if zeros else sorted(group, key=lambda at: (-abs(block[at]), tie * at))
        two = sorted(by_size[: 1 if WRONG == "tail" and len(group) == 2 else 2])
        sent += [at in two for at in group]
        chosen += two
    return chosen


def check(vector, tried):
    codec = vector["codec"]
    if "bytes" in vector:
        try:
            decoded = decode(codec, vector["elements"], bytes.fromhex(vector["bytes"]))
            tried[codec, "damaged and read"] += 1
        except Refused as why:
            decoded = None
            tried[codec, f"refused: {why}"] += 1
        assert decoded == vector["decoded"], "decoded differs"
        return
    gradient, residual = ([value_of(bits) for bits in vector[name]] for name in ("gradient", "residual"))
    try:
        y, payload, left, following = encode(codec, gradient, residual)
    except NotFinite:
        assert vector["payload"] is None, "what cannot be sent differs"
        tried[codec, "cannot be sent"] += 1
        return
    assert vector["payload"] is not None, "what can be sent differs"
    theirs = bytes.fromhex(vector["payload"])
    assert payload == theirs, f"payload differs: {payload.hex()}"
    assert [bits_of(value) for value in following] == vector["next"], "the new residual differs"
    decoded = decode(codec, len(y), theirs)
    sums = [bits_of(value_of(bits) + rest) for bits, rest in zip(decoded, left)]
    assert sums == [bits_of(value) for value in y], "payload and left are not y"
    tried[codec, "encoded and decoded"] += 1


def rules():
    """What must have been tried: (codec, rule)."""
    for codec in ("fp32", "bf16", *BLOCK_CODECS):
        for rule in ("encoded and decoded", "cannot be sent", "damaged and read", "refused: length"):
            yield codec, rule
    yield from ((codec, "refused: not finite") for codec in ("fp32", "bf16"))
    for codec, (_, width, sparse) in BLOCK_CODECS.items():
        yield from ((codec, f"refused: {why}") for why in ("scale", "value without a scale"))
        yield codec, "refused: -128" if width == 8 else "refused: -8"
        if width == 4:
            yield codec, "refused: half a byte"
        if sparse:
            for why in ("bits of no element", "ones in a group", "bitmap of a block of zeros"):
                yield codec, f"refused: {why}"


def main():
    tried = collections.Counter()
    for number, line in enumerate(sys.stdin, 1):
        try:
            check(json.loads(line), tried)
        except AssertionError as error:
            sys.exit(f"line {number}: {error}\n{line[:2000]}")
    untried = [f"{codec}: {rule}" for codec, rule in rules() if tried[codec, rule] == 0]
    for (codec, rule), count in sorted(tried.items()):
        print(f"{codec:14} {count:6}  {rule}")
    if untried:
        sys.exit("never tried:\n  " + "\n  ".join(untried))
    print(f"{sum(tried.values())} lines agree, bit for bit")


main()
