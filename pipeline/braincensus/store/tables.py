"""The tables of the output: folders of Parquet parts, written by tasks and read lazily.

Parts are numbered from 0 and read in that order, so that rows come in order of label. Nobody holds
a table of all cells: a task writes its part, `CellTable` streams them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from braincensus.errors import ConfigError, explain
from braincensus.store.files import unreadable, write_whole

if TYPE_CHECKING:
    from braincensus.store.container import Output

CELLS, BLOCKS = "tables/cells", "tables/blocks"


def write_cells_part(output: Output, number: int, columns: Mapping[str, np.ndarray] | pa.Table) -> None:
    """Write one part of the cell table; a part that is there is replaced.

    Parameters
    ----------
    output
        The output.
    number
        Position of the part, from 0; labels rise from part to part.
    columns
        One-dimensional columns of one length, ``label`` (integers that rise) among them. No rows is fine.

    Raises
    ------
    ValueError
        If the columns do not make such a table.
    OutputError
        If the file cannot be written.
    """
    table = columns if isinstance(columns, pa.Table) else _table(columns)
    if "label" not in table.column_names:
        raise ValueError(f"the cell table needs a column `label`, got {table.column_names}")
    label = table.column("label").to_numpy()
    if label.dtype.kind not in "iu" or (len(label) > 1 and not (label[1:] > label[:-1]).all()):
        raise ValueError("the labels of a part must be integers that rise from row to row")
    _write(part_path(output.path, CELLS, number), table)


def write_blocks_table(output: Output, rows: Sequence[Mapping[str, Any]] | Mapping[str, np.ndarray]) -> None:
    """Write the block table: a row (or a column) for each entry; every row has a ``block`` number."""
    if isinstance(rows, Mapping):
        table = _table(rows)
    else:
        names = list(rows[0]) if rows else ["block"]
        table = _table({name: np.asarray([row[name] for row in rows]) for name in names})
    if "block" not in table.column_names:
        raise ValueError(f"the block table needs a column `block`, got {table.column_names}")
    _write(part_path(output.path, BLOCKS, 0), table)


def _table(columns: Mapping[str, np.ndarray]) -> pa.Table:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    lengths = {name: values.shape for name, values in arrays.items()}
    if any(len(shape) != 1 for shape in lengths.values()) or len(set(lengths.values())) > 1:
        raise ValueError(f"columns of a table must be one-dimensional and of one length, got {lengths}")
    return pa.table(arrays)


def part_path(root: Path, table: str, number: int) -> Path:
    """Where part `number` of a table is."""
    return root / table / "table.parquet" / f"part-{number:06d}.parquet"


def _write(path: Path, table: pa.Table) -> None:
    def write(file: IO[bytes]) -> None:
        pa_parquet.write_table(table, file, compression="zstd", write_page_checksum=True)

    write_whole(path, write, durable=True)


def part_files(root: Path, table: str) -> list[Path]:
    """Return the parts of a table in order.

    Raises
    ------
    OutputError
        If there is none, or one is missing in between.
    """
    folder = root / table / "table.parquet"
    found = sorted(folder.glob("part-*.parquet")) if folder.is_dir() else []
    expected = [part_path(root, table, number) for number in range(max(1, len(found)))]
    if found != expected:
        missing = next((path for path in expected if path not in found), expected[0])
        raise unreadable(missing, FileNotFoundError(str(missing)))
    return found


@dataclass(frozen=True)
class CellTable:
    """A table on disk, one row per cell in order of label; read only when asked, part by part.

    Examples
    --------
    >>> cells = open_result("brain.census.zarr").cells       # doctest: +SKIP
    >>> len(cells), cells.columns[:2]                         # doctest: +SKIP
    (4217, ('label', 'z_um'))
    >>> cells.to_pandas(columns=["label", "volume_um3"])      # doctest: +SKIP
    """

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return sum(int(self._look(path, pa_parquet.read_metadata).num_rows) for path in self.files)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.schema.names)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self._look(self.files[0], pa_parquet.read_schema)

    def iter_batches(
        self, *, columns: Sequence[str] | None = None, rows: int = 131_072
    ) -> Iterator[pa.RecordBatch]:
        """Yield the table in order, at most `rows` rows at a time."""
        self._check(columns)
        for path in self.files:
            try:
                with pa_parquet.ParquetFile(path, page_checksum_verification=True) as part:
                    for batch in part.iter_batches(batch_size=rows, columns=columns and list(columns)):
                        yield batch.select(list(columns)) if columns else batch
            except (pa.ArrowException, OSError) as err:
                raise unreadable(path, err) from err

    def to_arrow(self, *, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the table, or some columns of it, into memory as an Arrow table."""
        names = list(columns) if columns is not None else list(self.columns)
        batches = list(self.iter_batches(columns=names))
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches([batch.cast(schema) for batch in batches], schema=schema)

    def to_pandas(self, *, columns: Sequence[str] | None = None) -> Any:
        """Read the table, or some columns of it, into memory as a pandas DataFrame.

        Raises
        ------
        ImportError
            If pandas is not installed; `to_arrow` and `iter_batches` need none.
        """
        return self.to_arrow(columns=columns).to_pandas()

    @staticmethod
    def _look(path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except (pa.ArrowException, OSError) as err:
            raise unreadable(path, err) from err

    def _check(self, columns: Sequence[str] | None) -> None:
        unknown = [name for name in columns or () if name not in self.columns]
        if unknown:
            raise ConfigError(
                explain(
                    f"the table has no column {', '.join(unknown)}",
                    expected=f"some of {', '.join(self.columns)}",
                )
            )


def open_cells(output: Output) -> CellTable:
    """Open the cell table; nothing is read yet.

    Raises
    ------
    OutputError
        If the table is missing or lacks a part.
    """
    return CellTable(tuple(part_files(output.path, CELLS)))
