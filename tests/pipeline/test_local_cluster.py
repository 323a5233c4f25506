"""A local cluster that does not start is one clear error."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from braincensus import ConfigError, RunConfig
from braincensus.cluster import connect


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
