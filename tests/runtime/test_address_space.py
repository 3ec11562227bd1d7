"""A limit on the address space is an error about memory, at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qvl.runtime.errors import BackendError
from qvl.runtime.resources import require_address_space

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux alone")


def test_without_a_limit_nothing_is_refused() -> None:
    require_address_space(1 << 60, "anything")


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, 1 << 20))
    with pytest.raises(BackendError, match=r"too little memory for the context: .* limited to 1 MB, 0 MB"):
        require_address_space(1 << 20, "the context")


@pytest.mark.parametrize("megabytes", [500, 800, 1200, 1600])
def test_no_limit_ends_in_an_abort(megabytes: int) -> None:
    command = f"ulimit -c 0; ulimit -v {megabytes * 1024}; exec {sys.executable} -m qvl.cli caption one.png"
    done = subprocess.run(
        ["bash", "-c", command], cwd="models/samples", capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0 or (done.returncode == 1 and "emory" in done.stderr), done.stderr
    assert "GGML_ASSERT" not in done.stderr and "unexpected" not in done.stderr
    assert done.returncode == 0 or megabytes < 1200  # a small model's tables are small
