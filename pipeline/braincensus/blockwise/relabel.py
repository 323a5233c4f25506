"""Step 4: each core gets its final labels, through a lookup of that block's own cells."""

from __future__ import annotations

from distributed import Client

from braincensus.blockwise.join import Joined
from braincensus.blockwise.spec import Spec
from braincensus.tasks import map_blocks
from braincensus_kernels.relabel import apply_lookup


def run(spec: Spec, client: Client | None, joined: Joined) -> None:
    """Write the labels of all blocks, in the type that the number of cells asks for."""
    spec.work.create_labels(joined.final.dtype)
    blocks = range(len(spec.work.grid))
    for _ in map_blocks(_relabel_block, spec, blocks, client=client, stage="relabel", name="relabel-block"):
        pass


def _relabel_block(spec: Spec, number: int) -> None:
    """Step 4: write the final labels of a core; its own cells' lookup is all that it reads of them."""
    block = spec.work.grid[number]
    with spec.work.writing_block():
        lookup = spec.work.lookup_of(number)
        spec.work.write_labels(block.core, apply_lookup(spec.work.read_tile(block, block.core), lookup))
