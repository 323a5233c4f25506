"""What all tests share: where the real volumes are (beside the repository, if at all), small phantoms."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: a shared machine is slow now and then. The same examples every time: a red test stays red.
settings.register_profile("braincensus", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("braincensus")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def c5image_path() -> Path:
    """Real mesoSPIM volume of cleared mouse cortex, 124 x 86 x 94, 5 x 5.26 x 5.26 um."""
    path = SHARED / "data" / "c5image.tif"
    if not path.exists():
        pytest.skip("the real volume c5image.tif is not beside the repository")
    return path
