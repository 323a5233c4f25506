"""Phantoms: synthetic light-sheet volumes whose cells are known, rendered box by box.

First in the flow of a test or a demo: a phantom stands where a microscope would, and its
list of cells is what a census is compared with. Nothing here ever holds the volume.

Every random number is a hash of the seed and of *where* it is used (a tile, a cell, a voxel),
never of the order of use, so a voxel has one value whatever box it is rendered in:

1. **How many** (`tissue`, `counts`). A lattice of tiles covers the volume. The number of cells is
   split over planes of tiles, rows of a plane, tiles of a row, by repeated halving: each half takes
   a binomial share by its tissue volume, but never more than fits. Counts so add up to the number
   asked for, vary from place to place as random counts do, and those of one row need no other row's.
2. **Where** (`placement`). Cells are placed by random trials no closer than the minimum separation.
   A cell belongs to the part of its tile that its first trial fell in: around a corner, along an
   edge, on a face, or the inside. Parts are wide enough that two of one kind are always farther
   apart than the separation, so that placing corners, then edges, faces and insides needs a tile's
   26 neighbours and no more.
3. **What they look like** (`profiles`, `look`, `camera`). A cell is a ball of uniform brightness
   blurred by the point-spread function, from a table; tissue, artefacts, shading and noise are
   functions of position.

`model` has the class `Phantom`, which asks these in turn; `hashing` has the random numbers of all.
"""

from braincensus_kernels.phantom.model import Cells, Phantom

__all__ = ["Cells", "Phantom"]
