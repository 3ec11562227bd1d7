"""Mutations of torch's pickled weights: of the pickle's operations, and of the archive around them."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from random import Random
from typing import Final

from fuzz.mutate import INTEGERS, mutate_bytes

NAMES: Final = (
    b"os\nsystem", b"builtins\neval", b"torch\nFloatStorage", b"torch\nQUInt8Storage", b"torch\nSize",
    b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"collections\nOrderedDict",
    b"torch\nHalfStorage", b"a.b.c\nd.e", b"\n", b"torch.storage\n_load_from_bytes",
)  # fmt: skip
PIECES: Final = (
    *(bytes([code]) for code in b"012(t}])RQNb\x81\x85\x93."),
    b"K\x00", b"\x8a\xff" + b"\x7f" * 255, b"\x96" + struct.pack("<Q", 1 << 60), b"h\xff",
    b"B" + struct.pack("<I", 0xFFFFFFFF), b"r\xff\xff\xff\x7f", b"(" * 3000, b"2" * 5000,
)  # fmt: skip


def mutate_program(data: bytes, rng: Random) -> bytes:
    """Change, remove, repeat, swap or insert some of a pickle's operations."""
    found = list(pickletools.genops(data))
    ends = [at for _, _, at in found[1:]] + [len(data)]
    ops = [(op.name, arg, data[at:end]) for (op, arg, at), end in zip(found, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(ops))
        name, argument, raw = ops[i]
        match rng.randrange(7):
            case 0:
                del ops[i]
            case 1:
                ops.insert(i, ops[rng.randrange(len(ops))])
            case 2:
                j = rng.randrange(len(ops))
                ops[i], ops[j] = ops[j], ops[i]
            case 3:
                ops.insert(i, ("", None, rng.choice(PIECES)))
            case _ if name == "GLOBAL":
                ops[i] = (name, argument, b"c" + rng.choice(NAMES) + b"\n")
            case _ if isinstance(argument, int):
                value = rng.choice((*INTEGERS, argument - 1, argument + 1, -1, argument * 2)) & (
                    (1 << 64) - 1
                )
                raw = struct.pack("<i", value % (1 << 31)) if rng.random() < 0.6 else struct.pack("<Q", value)
                ops[i] = (name, argument, (b"J" if len(raw) == 4 else b"\x8a\x08") + raw)
            case _ if isinstance(argument, str):
                value = rng.choice(
                    (b"", b"x" * 9000, b"0", b"\xff", b"cuda:0", b"storage", argument.encode()[:-1])
                )
                ops[i] = (name, argument, b"X" + struct.pack("<I", len(value)) + value)
            case _:
                ops[i] = (name, argument, mutate_bytes(raw, rng))
        if not ops:
            break
    return b"".join(raw for _, _, raw in ops)


def mutate_archive(data: bytes, rng: Random) -> bytes:
    """Write torch's archive again with one member changed, renamed, compressed, repeated or missing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    what = rng.randrange(8)
    if what < 4:
        members[pickled] = mutate_program(members[pickled], rng)
    out = io.BytesIO()
    chosen = rng.choice(sorted(members))
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            method = zipfile.ZIP_STORED
            if name == chosen and what == 4:
                continue
            if name == chosen and what == 5:
                name = rng.choice(
                    ("x/data.pkl", "../a", "archive/data/" + "9" * 300, "archive/code/a", "archive/data/0")
                )
            if name == chosen and what == 6:
                method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
            if name == chosen and what == 7:
                content = rng.choice((b"", content[:-1], content * 2, b"big"))
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def as_legacy(data: bytes, rng: Random) -> bytes:
    """The archive's content in the format before torch 1.6, its storages cut or miscounted at times."""
    import pickle

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    program = next(content for name, content in members.items() if name.endswith("data.pkl"))
    storages = {name.rpartition("/")[2]: content for name, content in members.items() if "/data/" in name}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    tail = pickle.dumps([*storages], 2)
    if rng.random() < 0.7:
        program = mutate_program(program, rng)
    else:
        i = rng.randrange(4)
        if i == 3:
            tail = mutate_program(tail, rng)
        else:
            head[i] = mutate_program(head[i], rng)
    parts = [*head, program, tail]
    for content in storages.values():
        n = len(content) // 2
        parts += [struct.pack("<q", rng.choice((n,) * 20 + (n + 1, 0, -1, 1 << 62))), content]
    return b"".join(parts)
