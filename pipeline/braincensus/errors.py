"""The errors that a user can meet: one family, so that a caller can catch all of them.

A bad argument (`ConfigError`), bad stored data (`InputError`), a place that cannot be written
(`OutputError`) and a run that cannot fit (`PlanError`) are different types, because what the
user does next differs. Each message says what was expected, what was found, the likely cause
and the remedy; the command line prints it without a traceback.
"""

from __future__ import annotations


class BraincensusError(Exception):
    """Anything that braincensus itself refuses or fails at."""


class ConfigError(BraincensusError, ValueError):
    """An option, argument or configuration file that cannot be used."""


class InputError(BraincensusError, ValueError):
    """Stored data that cannot be read, or that is not a volume of voxels."""


class OutputError(BraincensusError, OSError):
    """An output that exists, cannot be written, or is not complete."""


class PlanError(BraincensusError, ValueError):
    """A run that cannot fit in the memory or disk at hand."""


class BlockError(BraincensusError, RuntimeError):
    """A block that failed while the run was under way; names the stage and the voxels."""


def explain(problem: str, *, expected: str = "", found: str = "", cause: str = "", remedy: str = "") -> str:
    """Lay out an error message: the problem, then expected, found, likely cause and remedy.

    Examples
    --------
    >>> print(explain("no voxel size", found="a TIFF without metadata", remedy="give --voxel-size Z,Y,X"))
    no voxel size
      found: a TIFF without metadata
      remedy: give --voxel-size Z,Y,X
    """
    parts = {"expected": expected, "found": found, "likely cause": cause, "remedy": remedy}
    return "\n".join([problem, *(f"  {name}: {text}" for name, text in parts.items() if text)])
