"""From the `compute` section to a Dask client: here, on GPUs, SLURM, Kubernetes, or at a scheduler's address.

`resources` says what a run would have, and starts nothing; `connect` starts it or connects to it. `files` is
what the file of a SLURM or Kubernetes cluster may say, `tls` where certificates come from. The clusters
themselves are those of distributed, dask-cuda, dask-jobqueue and dask-kubernetes.

Nothing listens beyond localhost unless workers on other machines are asked for. One worker process holds one
device; its Dask threads are also the threads that one network patch may use, so that torch and Dask never ask
for more threads than there are cores.
"""

from braincensus.cluster.connect import connect
from braincensus.cluster.resources import GIB, Resources, resources_for

__all__ = ["GIB", "Resources", "connect", "resources_for"]
