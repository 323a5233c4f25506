"""Memory is a contract: what labelling a block takes stays within what the plan projects for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from braincensus.allocator import ENVIRONMENT

# In a process of its own, so that nothing but this block sets its peak; compiling takes more memory than a
# block does, so another process does that first and leaves the kernels in numba's cache.
MEASURE = """
import sys
import numpy as np
import psutil
from scipy import ndimage
from braincensus.config import RunConfig
from braincensus.labelling import labeller_for
from braincensus_kernels.boxes import Box

times, dense, settings = int(sys.argv[1]), sys.argv[2] == "dense", eval(sys.argv[3])
labeller = labeller_for(RunConfig().merged({"labelling": settings}).labelling, (5.0, 5.0, 5.0))
noise = ndimage.gaussian_filter(np.random.default_rng(0).random((44,) * 3), 1.2, mode="wrap")
tile = (np.clip((noise - (0.5 if dense else 0.57)) * 12, -0.5, 0.5) + 0.5) * 65535

def label(times):
    image = np.tile(tile.astype(np.uint16), (times,) * 3)
    box = Box.whole(image.shape)
    before = psutil.Process().memory_info().rss
    found = labeller.label(image, outer=box, core=box, volume_shape=image.shape, threshold=0.5 * 65535)
    status = open("/proc/self/status").read()  # getrusage's peak would begin with the parent's
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return found, (peak - before) / image.size

label(1)
found, per_voxel = label(times)
assert len(found.seeds) > 100 or times == 1
print(per_voxel + 2, labeller.bytes_per_voxel)
"""

SETTINGS = {
    "voronoi-otsu": {},
    "components": {"method": "components", "outline_sigma": 0.65},
    "watershed": {"method": "watershed", "seed_threshold": 0.7},
    "distance": {"method": "watershed", "seeds": "distance"},
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("volume", ["sparse", "dense"])
@pytest.mark.parametrize("method", SETTINGS)
def test_labelling_stays_within_its_projection(method, volume):
    for times in ("1", "5"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, times, volume, repr(SETTINGS[method])],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | ENVIRONMENT,  # as in a worker
        )
    assert run.returncode == 0, run.stderr
    measured, projected = (float(number) for number in run.stdout.split())
    assert 2 < measured <= projected
