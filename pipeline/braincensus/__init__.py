"""braincensus: every labelled cell of a cleared brain, counted once.

>>> import braincensus
>>> result = braincensus.run("brain.ome.zarr", "brain.census.zarr")    # doctest: +SKIP
>>> result.n_cells, result.cells.to_pandas()                            # doctest: +SKIP

Names are imported when first used, so that `braincensus --help` need not load torch and Dask.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braincensus.blockwise import label_blocks
    from braincensus.census import plan, preflight, run
    from braincensus.config import RunConfig
    from braincensus.errors import (
        BlockError,
        BraincensusError,
        ConfigError,
        InputError,
        OutputError,
        PlanError,
    )
    from braincensus.planning import Plan
    from braincensus.preflight_checks import Preflight
    from braincensus.result import Result, open_result
    from braincensus.volume import Volume, open_volume

_HOME = {
    "BlockError": "errors",
    "BraincensusError": "errors",
    "ConfigError": "errors",
    "InputError": "errors",
    "OutputError": "errors",
    "Plan": "planning",
    "Preflight": "preflight_checks",
    "PlanError": "errors",
    "Result": "result",
    "RunConfig": "config",
    "Volume": "volume",
    "label_blocks": "blockwise",
    "open_result": "result",
    "open_volume": "volume",
    "plan": "census",
    "preflight": "census",
    "run": "census",
}

__version__ = version("braincensus")

__all__ = [
    "BlockError",
    "BraincensusError",
    "ConfigError",
    "InputError",
    "OutputError",
    "Plan",
    "PlanError",
    "Preflight",
    "Result",
    "RunConfig",
    "Volume",
    "__version__",
    "label_blocks",
    "open_result",
    "open_volume",
    "plan",
    "preflight",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'braincensus' has no attribute {name!r}")
    value = getattr(import_module(f"braincensus.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
