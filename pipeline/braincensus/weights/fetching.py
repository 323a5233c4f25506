"""Published weights: from their home into a cache on this machine, only when asked to.

    name -> archive over https (pooch) -> its one state dict -> safetensors in the cache, with a record

No author gives checksums of these files, so the first download's SHA-256 is recorded beside it, and every
later download, whoever serves it, must be the same bytes. Nothing from an archive is executed or unpacked
onto the disk by its own name: one member is read, by the name that the registry gives it.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pooch
import requests
from torch import Tensor

from braincensus.errors import ConfigError, InputError, OutputError, explain
from braincensus.store.files import write_json, writing
from braincensus_kernels.models.checkpoints import file_sha256, load_checkpoint, save_weights
from braincensus_kernels.models.registry import REGISTRY, WNET3D, NamedWeights, Published
from braincensus_kernels.models.supervised.networks import load_supervised, network_metadata

_TIMEOUT_S = 30
_SLACK = 2.0
"""How many times larger than its home lists it a download may be."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def cache_folder() -> Path:
    """Return where fetched weights are kept: ``$BRAINCENSUS_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("BRAINCENSUS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(pooch.os_cache("braincensus"))


def cached(name: str) -> Path | None:
    """Return the file of published weights that were fetched, or None if they were not.

    Raises
    ------
    InputError
        If the file is not the one that was fetched.
    """
    path, record = _places(name)
    if not (path.is_file() and record.is_file()):
        return None
    expected, found = _read(record)["weights_sha256"], file_sha256(path)
    if expected != found:
        raise InputError(
            explain(
                f"the fetched weights {name} are not what they were",
                expected=f"SHA-256 {expected}",
                found=f"SHA-256 {found} of {path}",
                cause="a damaged disk, or a file that somebody changed",
                remedy=f"remove {path} and run `braincensus weights fetch {name}` again",
            )
        )
    return path


def fetch(
    name: str,
    *,
    mirror: str | None = None,
    archive: Path | None = None,
    accept_change: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Bring published weights into the cache, checked, as safetensors.

    Parameters
    ----------
    name
        Of `REGISTRY`.
    mirror
        Another address of the same archive; https (or http on this machine). None: its home.
    archive
        The archive, downloaded by hand where there is no network. Excludes `mirror`.
    accept_change
        Take an archive whose SHA-256 is not that of the first download.
    progress
        Called as ``progress(bytes_done, bytes_in_all)``.

    Returns
    -------
    Path
        Of the safetensors file; at once, if it is there already.

    Raises
    ------
    ConfigError
        On a name that has no home, or an address that is not https.
    InputError
        If the network or the server fails, or what came is not what it should be. Nothing is kept then.
    OutputError
        If the cache cannot be written.
    """
    entry = _entry(name)
    home = entry.published
    assert home is not None
    if mirror is not None and archive is not None:
        raise ConfigError("give a mirror or an archive, not both")
    if mirror is None and archive is None and not accept_change:
        here = cached(name)
        if here is not None:
            return here
    path, record = _places(name)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    known = None if accept_change or not record.is_file() else str(_read(record)["archive_sha256"])
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=path.parent) as scratch:
        if archive is None:
            urls = (mirror,) if mirror is not None else home.urls
            archive, origin = _download(entry, urls, Path(scratch), progress)
        else:
            origin = f"{archive} (by hand)"
            if not archive.is_file():
                raise ConfigError(f"there is no archive {archive}")
        found = file_sha256(archive)
        if known is not None and found != known:
            raise InputError(
                explain(
                    f"the archive of {name} is not the one that was fetched first",
                    expected=f"SHA-256 {known}",
                    found=f"SHA-256 {found} from {origin}",
                    cause="a new release under the same name, or a server that is not what it seems",
                    remedy="find out which; then --accept-change (accept_change=True) takes the new one",
                )
            )
        state_file = _member(entry, home, archive, Path(scratch))
        metadata = {
            "name": entry.title,
            "architecture": entry.architecture,
            "licence": entry.licence,
            "citation": entry.citation,
            "expected_input": entry.expected_input,
            "fetched_from": origin,
            "archive_sha256": found,
        }
        sha256 = _convert(entry, state_file, path, metadata)
    write_json(
        record,
        {
            "name": name,
            "from": origin,
            "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
            "archive_sha256": found,
            "weights_sha256": sha256,
        },
    )
    return path


def _entry(name: str) -> NamedWeights:
    entry = REGISTRY.get(name)
    if entry is None or entry.published is None:
        raise ConfigError(
            explain(
                f"{name!r} cannot be fetched",
                expected=", ".join(n for n, e in REGISTRY.items() if e.published is not None),
                found="weights that are shipped with braincensus" if entry is not None else "an unknown name",
                remedy="" if entry is not None else "`braincensus weights list` shows the names",
            )
        )
    return entry


def _places(name: str) -> tuple[Path, Path]:
    folder = cache_folder() / "weights"
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _read(record: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(record.read_text(encoding="utf-8"))
        return {key: str(loaded[key]) for key in ("archive_sha256", "weights_sha256", "from", "fetched")}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(
            explain(
                f"cannot read what was recorded about fetched weights in {record}",
                found=f"{type(err).__name__}: {err}",
                remedy="remove that file and the weights beside it, and fetch them again",
            )
        ) from err


class _Limit:
    """Stops a download that is larger than it should be; passes progress on."""

    def __init__(self, most: int, tell: Callable[[int, int], None] | None) -> None:
        self.total, self._most, self._tell, self._done = 0, most, tell, 0

    def update(self, n: int) -> None:
        self._done += n
        if max(self._done - n, self.total) > self._most:
            raise _TooLargeError(max(self._done, self.total))
        if self._tell is not None:
            self._tell(min(self._done, self.total or self._done), self.total)

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        pass


class _TooLargeError(Exception):
    pass


def _download(
    entry: NamedWeights,
    urls: tuple[str, ...],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> tuple[Path, str]:
    """Try the addresses in turn; return the archive, and where it came from."""
    assert entry.published is not None
    most = int(entry.published.about_mb * 1e6 * _SLACK)
    failures = []
    for url in urls:
        _refuse_insecure(url)
        downloader = pooch.HTTPDownloader(
            progressbar=_Limit(most, progress), timeout=_TIMEOUT_S, hooks={"response": _refuse_insecure_reply}
        )
        place = folder / "archive.tar.gz"
        try:
            with writing(place), place.open("wb") as file:
                try:
                    downloader(url, file, None)
                except requests.RequestException as err:  # of the network; other OSErrors are of the disk
                    failures.append(f"{url}: {_reason(err)}")
                    continue
            return place, url
        except _TooLargeError as err:
            raise InputError(
                explain(
                    f"{url} is too large to be {entry.name}",
                    expected=f"about {entry.published.about_mb} MB",
                    found=f"{int(str(err)) / 1e6:,.0f} MB or more",
                    remedy=f"look at {entry.published.home}",
                )
            ) from None
    raise InputError(
        explain(
            f"{entry.name} could not be fetched",
            found="; ".join(failures),
            cause="no network here, or a proxy that is not set (HTTPS_PROXY)",
            remedy=f"on another machine download {urls[0]}, copy it here, and run "
            f"`braincensus weights fetch {entry.name} --archive FILE.tar.gz`",
        )
    )


def _reason(err: requests.RequestException) -> str:
    if err.response is not None:
        return f"the server answered {err.response.status_code} {err.response.reason}"
    if isinstance(err, requests.Timeout):
        return f"no answer within {_TIMEOUT_S} s"
    if isinstance(err, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return f"no connection ({type(err).__name__})"


def _refuse_insecure(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return
    raise ConfigError(
        explain(
            "weights are fetched over https only",
            expected="https://...",
            found=url,
            remedy="or download the archive yourself and give it with --archive",
        )
    )


def _refuse_insecure_reply(reply: requests.Response, *_: Any, **__: Any) -> None:
    """Look at every reply, redirections too: none may lead off https."""
    _refuse_insecure(reply.url)
    if reply.is_redirect:
        _refuse_insecure(urljoin(reply.url, reply.headers["location"]))


def _member(entry: NamedWeights, home: Published, archive: Path, folder: Path) -> Path:
    """Read the one file that is wanted out of the archive, never larger than it may be."""
    most = int(home.about_mb * 1e6 * _SLACK)
    out = folder / "state.pth"
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).name != home.file:
                    continue
                if member.size > most:
                    raise InputError(f"{home.file} in the archive claims {member.size:,} bytes: too many")
                source = tar.extractfile(member)
                assert source is not None
                with writing(out), source, out.open("wb") as file:
                    while block := source.read(1 << 20):
                        file.write(block)
                return out
    except (tarfile.TarError, EOFError, OSError) as err:
        if isinstance(err, OutputError):
            raise
        raise InputError(
            explain(
                f"the archive of {entry.name} cannot be read",
                found=f"{type(err).__name__}: {err}",
                cause="a download that was cut short, or a page instead of a file",
                remedy=f"look at {home.home}",
            )
        ) from err
    raise InputError(f"the archive of {entry.name} holds no {home.file}; look at {home.home}")


def _convert(entry: NamedWeights, state_file: Path, out: Path, metadata: dict[str, str]) -> str:
    try:
        if entry.architecture == WNET3D:
            state: Mapping[str, Tensor] = load_checkpoint(state_file).state
        else:
            supervised = load_supervised(state_file)
            state = supervised.state
            metadata = metadata | network_metadata(supervised.kind, size=supervised.size)
        with writing(out):
            return save_weights(out, state, metadata)
    except ValueError as err:
        raise InputError(f"what was fetched as {entry.name} cannot be used: {err}") from err
