"""The command line in a separate process: exit status, standard output and standard error.

``raydpo`` forks it from the server of tests/distributed.py, which has imported the slow packages. Libraries that raydpo
silences before their import do print there, so tests of every printed line use ``as_a_user``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from distributed import environment, forking

__all__ = ["as_a_user", "raydpo"]

SECONDS = 400


def as_a_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``raydpo ARGUMENTS`` in a new interpreter and wait for its end."""
    return subprocess.run(
        [sys.executable, "-m", "raydpo.cli", *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS
    )


def raydpo(*arguments: object, cwd: Path | None = None, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run ``raydpo ARGUMENTS`` and wait for its end, ``seconds`` at most."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        with environment(PYTHONWARNINGS="ignore"):
            process = forking().Process(target=_command, args=(list(map(str, arguments)), out, err, cwd, dict(os.environ)))
            process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"raydpo {arguments}: {seconds} s were not enough:\n{out.read_text()}\n{err.read_text()}")
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _command(arguments: list[str], out: Path, err: Path, cwd: Path | None, variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    if cwd is not None:
        os.chdir(cwd)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    from raydpo.cli.entry import main

    status: object = 1
    with contextlib.suppress(SystemExit):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
