"""What all commands share: consoles, errors as one message, and how texts such as 5,5.26,5.26 are read."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

stdout = Console()
stderr = Console(stderr=True)

TRIPLE = "Z,Y,X"


@contextmanager
def explaining() -> Iterator[None]:
    """Turn the family of errors into one message, without a traceback."""
    from braincensus.errors import BraincensusError

    logging.getLogger("distributed").setLevel(logging.ERROR)
    # A lost scheduler is told by our own message; Dask would add a traceback. A level would not last.
    logging.getLogger("distributed.client").addFilter(_only_critical)
    # SIGTERM is what schedulers of clusters send before they kill: stop as for Ctrl-C, and give back locks.
    stopping = _Stopping()
    before = {number: signal.signal(number, stopping) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BraincensusError as err:
        first, _, rest = str(err).partition("\n")
        stderr.print(f"[bold red]error:[/bold red] {plain(first)}", highlight=False, soft_wrap=True)
        if rest:
            stderr.print(plain(rest), highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr.print("[bold red]stopped[/bold red]; `run` goes on where it stopped when it is called again")
        raise typer.Exit(stopping.exit_code) from None
    finally:
        if stopping.asked:  # Python takes a moment to end: a second SIGTERM must not change the exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


def _only_critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL


class _Stopping:
    """The first signal stops in order, the second at once: all that is left behind then is the lock."""

    exit_code = 130
    asked = False

    def __call__(self, number: int, _: object) -> None:
        """Receive a signal; the exit code is 128 and its number, as shells have it."""
        if self.asked:
            os._exit(self.exit_code)
        self.asked, self.exit_code = True, 128 + number
        raise KeyboardInterrupt


def plain(text: str) -> str:
    """Return text in which the console sees no markup."""
    from rich.markup import escape

    return escape(text)


def read_triple(text: str, option: str) -> tuple[float, float, float]:
    """Read one number, or three as Z,Y,X."""
    from braincensus.errors import ConfigError, explain

    try:
        numbers = [float(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise ConfigError(
            explain(
                f"{option} {text!r} is not understood", expected="one number, or three as Z,Y,X", found=text
            )
        )
    return numbers[0], numbers[1], numbers[2]


def read_whole(text: str, option: str) -> tuple[int, int, int]:
    """Read whole numbers of voxels."""
    from braincensus.errors import ConfigError

    numbers = read_triple(text, option)
    if any(n != int(n) or n < 1 for n in numbers):
        raise ConfigError(f"{option} needs whole numbers of voxels, at least 1: got {text}")
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def read_threshold(text: str, option: str) -> str | float:
    """Read `otsu` or a probability."""
    from braincensus.errors import ConfigError

    if text == "otsu":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected `otsu` or a number from 0 to 1") from None


def read_range(text: str, option: str) -> tuple[float, float]:
    """Read two numbers as LOW,HIGH."""
    from braincensus.errors import ConfigError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected two numbers as LOW,HIGH, such as 0.35,1") from None
    return low, high
