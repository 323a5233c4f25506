"""Published weights from a real server on this machine: checked, cached, refused when they are not right."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from braincensus import ConfigError, InputError
from braincensus.weights import fetching
from braincensus.weights.fetching import cached, fetch
from braincensus.weights.files import find_weights, read_weights
from braincensus_kernels.models.checkpoints import Checkpoint
from braincensus_kernels.models.registry import REGISTRY
from braincensus_kernels.models.supervised.networks import SupervisedWeights, build_network
from braincensus_kernels.models.wnet3d import WNet3D

NAME = "cellseg3d-wnet3d"


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return WNet3D(channels=(4, 8, 8, 8), dropout=0.0).state_dict()


def tar_gz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return out.getvalue()


def pth(seed: int = 0) -> bytes:
    out = io.BytesIO()
    torch.save(state(seed), out)
    return out.getvalue()


class Home:
    """A server whose answers the tests change."""

    def __init__(self) -> None:
        self.body = tar_gz({"wnet_latest.pth": pth()})
        self.claim: int | None = None
        self.status = 200
        self.location = ""
        self.asked = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        request.send_response(self.status)
        if self.location:
            request.send_header("Location", self.location)
        request.send_header("Content-Length", str(len(self.body) if self.claim is None else self.claim))
        request.end_headers()
        request.wfile.write(self.body)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, home: Home, *args: object) -> None:
        self.home = home
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.home.answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Home, str]]:
    monkeypatch.setenv("BRAINCENSUS_CACHE", str(tmp_path / "cache"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    made = Home()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, made)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield made, f"http://127.0.0.1:{server.server_port}/wnet_latest.tar.gz"
        server.shutdown()
        thread.join()


def leftovers() -> list[str]:
    folder = fetching.cache_folder() / "weights"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_fetched_once_checked_and_found_by_name(home: tuple[Home, str]) -> None:
    server, url = home
    assert cached(NAME) is None
    seen: list[tuple[int, int]] = []
    path = fetch(NAME, mirror=url, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(server.body)
    assert leftovers() == [f"{NAME}.json", f"{NAME}.safetensors"]
    assert fetch(NAME) == path  # from the cache: the home of the registry was not asked
    assert find_weights(NAME) == str(path)
    loaded = read_weights(NAME)
    assert isinstance(loaded, Checkpoint)
    assert all(torch.equal(value, state()[key]) for key, value in loaded.state.items())
    assert loaded.weights.metadata["licence"] == REGISTRY[NAME].licence
    assert loaded.weights.metadata["fetched_from"] == url


def test_a_supervised_network_is_fetched_and_checked_too(home: tuple[Home, str]) -> None:
    server, url = home
    out = io.BytesIO()
    published = build_network("segresnet").state_dict()
    torch.save(published, out)
    server.body = tar_gz({"SegResNet_latest.pth": out.getvalue()})
    fetch("cellseg3d-segresnet", mirror=url)
    loaded = read_weights("cellseg3d-segresnet")
    assert isinstance(loaded, SupervisedWeights)
    assert (loaded.kind, loaded.threshold, loaded.input_percentiles) == ("segresnet", 0.3, (1.0, 99.0))
    assert all(torch.equal(value, published[key]) for key, value in loaded.state.items())


def test_the_first_checksum_binds_later_downloads(home: tuple[Home, str]) -> None:
    server, url = home
    path = fetch(NAME, mirror=url)
    before = path.read_bytes()
    server.body = tar_gz({"wnet_latest.pth": pth(seed=1)})
    with pytest.raises(InputError, match="not the one that was fetched first"):
        fetch(NAME, mirror=url)
    assert path.read_bytes() == before
    fetch(NAME, mirror=url, accept_change=True)
    assert path.read_bytes() != before


def test_a_changed_file_in_the_cache_is_refused(home: tuple[Home, str]) -> None:
    path = fetch(NAME, mirror=home[1])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="not what they were"):
        find_weights(NAME)


def cut_short(server: Home) -> None:
    server.claim = len(server.body)
    server.body = server.body[:-100]


def half_an_archive(server: Home) -> None:
    server.body = server.body[: len(server.body) // 2]


def a_page(server: Home) -> None:
    server.body = b"<html>please log in</html>"


def another_member(server: Home) -> None:
    server.body = tar_gz({"other.pth": pth()})


def code(server: Home) -> None:
    # What pickle would call if it were allowed to: os.system("true").
    server.body = tar_gz({"wnet_latest.pth": b"cos\nsystem\n(S'true'\ntR."})


def another_network(server: Home) -> None:
    out = io.BytesIO()
    torch.save({"layer.weight": torch.zeros(3)}, out)
    server.body = tar_gz({"wnet_latest.pth": out.getvalue()})


def not_there(server: Home) -> None:
    server.status, server.body = 404, b""


def too_large(server: Home) -> None:
    server.claim = 10**10


def off_https(server: Home) -> None:
    server.status, server.location, server.body = 302, "http://example.org/wnet_latest.tar.gz", b""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "broke off"),
        (half_an_archive, "cut short"),
        (a_page, "cannot be read"),
        (another_member, "holds no wnet_latest.pth"),
        (code, "cannot be used"),
        (another_network, "cannot be used"),
        (not_there, "404"),
        (too_large, "too large"),
        (off_https, "https only"),
    ],
)
def test_what_is_not_right_leaves_nothing(
    home: tuple[Home, str], spoil: Callable[[Home], None], message: str
) -> None:
    server, url = home
    spoil(server)
    with pytest.raises((InputError, ConfigError), match=message):
        fetch(NAME, mirror=url)
    assert leftovers() == []
    assert cached(NAME) is None


def test_no_network_is_said_with_the_way_round(home: tuple[Home, str]) -> None:
    with pytest.raises(InputError, match=r"(?s)could not be fetched.*no connection.*--archive"):
        fetch(NAME, mirror="https://127.0.0.1:1/wnet_latest.tar.gz")


def test_an_archive_by_hand(home: tuple[Home, str], tmp_path: Path) -> None:
    server, _ = home
    by_hand = tmp_path / "downloaded.tar.gz"
    by_hand.write_bytes(server.body)
    assert fetch(NAME, archive=by_hand).is_file()
    assert server.asked == 0
    assert by_hand.read_bytes() == server.body
    with pytest.raises(ConfigError, match="no archive"):
        fetch(NAME, archive=tmp_path / "absent.tar.gz")


def test_a_member_cannot_leave_the_scratch_folder(home: tuple[Home, str], tmp_path: Path) -> None:
    server, url = home
    server.body = tar_gz({"../../../wnet_latest.pth": pth()})
    fetch(NAME, mirror=url)
    assert leftovers() == [f"{NAME}.json", f"{NAME}.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize("name", ["compact", "nonsense"])
def test_only_published_names_can_be_fetched(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be fetched"):
        fetch(name)


@pytest.mark.parametrize("url", ["http://example.org/a.tar.gz", "ftp://example.org/a", "file:///etc/passwd"])
def test_only_https(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINCENSUS_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="https only"):
        fetch(NAME, mirror=url)


def test_a_name_that_was_not_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINCENSUS_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=f"weights fetch {NAME}"):
        find_weights(NAME)
