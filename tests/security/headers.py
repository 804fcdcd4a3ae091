"""Headers of safetensors files, changed so that they lie."""

import json
import random
import struct

_NUMBERS = (0, 1, -1, 2**31, 2**32, 2**63, 2**64 - 1, 10**30, 1.5, None, "8", [], True)
_TYPES = ("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "", "float", "F32\0", None, 7)


def mutate(good: bytes, draw: random.Random) -> bytes:
    """Change the header of a file in one of many ways.

    Args:
        good: a whole safetensors file.
        draw: decides.
    Returns:
        Another file.
    """
    size = struct.unpack("<Q", good[:8])[0]
    header, payload = good[8 : 8 + size], good[8 + size :]
    way = draw.randrange(8)
    if way == 0:  # the length of the header
        return (
            struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, draw.randrange(2**40)]))
            + good[8:]
        )
    if way == 1:  # some bytes of it
        damaged = bytearray(header)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        return good[:8] + bytes(damaged) + payload
    if way == 2:  # an end that comes early
        return good[: draw.randrange(len(good))]
    if way == 3:  # text that is no object, or nested too deep
        text = draw.choice(
            [b"[]", b"null", b"[" * 50_000, b'{"a":' * 20_000, b"", b"\xff\xfe", b'{"a": 1}', b"{}", b'""']
        )
        return struct.pack("<Q", len(text)) + text + payload
    content = json.loads(header)
    name = draw.choice([key for key in content if key != "__metadata__"])
    if way == 4:
        content[name]["dtype"] = draw.choice(_TYPES)
    elif way == 5:
        content[name]["shape"] = draw.choice(
            [[draw.choice(_NUMBERS), draw.choice(_NUMBERS)], [2**32] * 3, [0], None, "x"]
        )
    elif way == 6:
        content[name]["data_offsets"] = draw.choice(
            [
                [draw.choice(_NUMBERS), draw.choice(_NUMBERS)],
                [len(payload), 0],
                [0, len(payload) * 2],
                [1],
                None,
                [0, 0],
            ]
        )
    else:  # another name, a name twice, one missing, or words where tables belong
        entry = content.pop(name)
        twice = draw.choice(
            ["", "../" + name, name + "\0", "x" * 100_000, "__metadata__", draw.choice([*content, "new"])]
        )
        if draw.random() < 0.8:
            content[twice] = draw.choice([entry, "table", None, 3, {"dtype": "F32"}])
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + payload
