"""A short run of the fuzzer, always the same cases; `make fuzz` runs ten thousand of each kind."""

from __future__ import annotations

import random

import pytest

from fuzz.__main__ import FINE, run
from fuzz.gguf_parts import GGUFParts
from fuzz.kinds import KINDS
from fuzz.mutate import dump, mutate_json
from qvl.models import embedded
from qvl.runtime.files import parse_json

CASES = {"text": 25, "mmproj": 25, "checkpoint": 12, "image": 80, "video": 25}


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_gets_through(kind: str) -> None:
    n = CASES.get(kind, 60)
    verdicts = dict(run(kind, 0, n))
    assert len(verdicts) == n
    assert not {number: verdict for number, verdict in verdicts.items() if verdict not in FINE}


def test_what_dies_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With children that know nothing of qvl."""
    from fuzz import __main__ as fuzzer

    code = (
        "import os, sys, time\n"
        "first = int(sys.argv[sys.argv.index('--first') + 1])\n"
        "for n in range(first, 5):\n"
        "    os.abort() if n == 1 else time.sleep(99) if n == 3 else print(n, 'ok', flush=True)\n"
    )
    real = fuzzer.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        return real([command[0], "-c", code, *command[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzzer.subprocess, "Popen", popen)
    monkeypatch.setattr(fuzzer, "SECONDS", 2)
    verdicts = dict(run("any", 0, 5))
    assert [verdicts[n] for n in (0, 2, 4)] == ["ok"] * 3
    assert verdicts[1].startswith("ended with -6")
    assert verdicts[3] == "hang"


def test_a_header_taken_apart_and_put_together_is_the_same() -> None:
    path = next(embedded.path().glob("mmproj*.gguf"))
    data = path.read_bytes()
    assert GGUFParts(data).pack() == data


def test_json_is_written_at_any_depth() -> None:
    value = {"a": [1, None, {"b": "x\n"}, []], "c": {}}
    assert parse_json(dump(value)) == value
    changed = [dump(mutate_json(value, random.Random(i))) for i in range(50)]
    assert len(set(changed)) > 40
