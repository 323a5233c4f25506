"""A local cluster that does not start is one clear error; one that others can look at is told."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from braincensus import ConfigError, RunConfig
from braincensus.cluster import connect
from braincensus.progress import Silent


def test_workers_that_are_killed_while_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What distributed raises then; the campaign of faults has seen it."""

    def dies(**_: Any) -> None:
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(sys.modules[connect.__module__], "LocalCluster", dies)
    compute = RunConfig().merged({"compute": {"workers": 1, "dashboard_port": 0}}).compute
    with (
        pytest.raises(ConfigError, match=r"(?s)could not be started.*Nanny failed.*fewer --workers"),
        connect(compute, None),
    ):
        pass


class Said(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_dashboard_that_others_reach_is_told(
    host: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(**options: Any) -> None:
        assert options["dashboard_address"].startswith(f"{host}:")
        raise RuntimeError("not meant to start")

    monkeypatch.setattr(sys.modules[connect.__module__], "LocalCluster", stops)
    compute = {"workers": 1, "dashboard_port": 0, "dashboard_host": host}
    said = Said()
    with (
        pytest.raises(ConfigError, match="not meant to start"),
        connect(RunConfig().merged({"compute": compute}).compute, None, said),
    ):
        pass
    assert any(f"listens on {host}" in text and "without a password" in text for text in said.said) == told
