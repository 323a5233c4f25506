"""Tables: parts written by tasks, read lazily in order; missing and damaged parts named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from braincensus.errors import ConfigError, OutputError
from braincensus.store import (
    CellTable,
    Output,
    create_output,
    open_cells,
    write_blocks_table,
    write_cells_part,
)

PARTS = "tables/cells/table.parquet"


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return create_output(tmp_path / "out.zarr", overwrite=False, voxel_size_um=(5.0, 1.0, 1.0))


def columns(first: int, n: int) -> dict[str, np.ndarray]:
    label = np.arange(first, first + n)
    return {
        "label": label,
        "z_um": label * 0.5,
        "voxels": (label % 7).astype(np.uint32),
        "touches_border": label % 2 == 0,
    }


def write_parts(output: Output, *, order: tuple[int, ...] = (0, 1, 2), rows: int = 100) -> None:
    for part in order:
        write_cells_part(output, part, columns(1 + part * rows, rows))


def test_parts_written_in_any_order_read_in_order(output):
    write_parts(output, order=(2, 0, 1))
    cells = open_cells(output)
    assert len(cells) == 300
    assert cells.columns == ("label", "z_um", "voxels", "touches_border")
    assert [str(field.type) for field in cells.schema] == ["int64", "double", "uint32", "bool"]
    whole = columns(1, 300)
    found = cells.to_pandas()
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name].to_numpy(), values)
        assert found[name].dtype == values.dtype


def test_columns_come_in_the_order_asked_for(output):
    write_parts(output)
    cells = open_cells(output)
    assert list(cells.to_pandas(columns=["voxels", "label"])) == ["voxels", "label"]
    assert cells.to_arrow(columns=["z_um"]).column("z_um").to_pylist()[:3] == [0.5, 1.0, 1.5]
    with pytest.raises(ConfigError, match=r"no column nope[\s\S]*label, z_um"):
        cells.to_pandas(columns=["label", "nope"])


def test_batches_are_bounded_and_complete(output):
    write_parts(output)
    batches = list(open_cells(output).iter_batches(rows=64, columns=["voxels", "label"]))
    assert max(batch.num_rows for batch in batches) <= 64
    assert all(batch.schema.names == ["voxels", "label"] for batch in batches)
    labels = np.concatenate([batch.column("label").to_numpy() for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(1, 301))


def test_a_table_is_read_only_when_asked(output):
    write_parts(output)
    cells = open_cells(output)
    batches = cells.iter_batches(columns=["label"])
    assert next(batches).num_rows == 100
    (output.path / PARTS / "part-000002.parquet").write_bytes(b"broken")
    assert next(batches).num_rows == 100
    with pytest.raises(OutputError, match=r"cannot read .*part-000002\.parquet"):
        next(batches)


def test_no_cells_is_a_table_without_rows(output):
    write_cells_part(output, 0, columns(1, 0))
    cells = open_cells(output)
    assert len(cells) == 0
    assert cells.columns == ("label", "z_um", "voxels", "touches_border")
    assert cells.to_pandas().shape == (0, 4)
    assert cells.to_pandas()["voxels"].dtype == np.uint32


def test_a_part_without_rows_among_others_does_no_harm(output):
    write_cells_part(output, 0, columns(1, 5))
    write_cells_part(output, 1, columns(1, 0))
    assert open_cells(output).to_pandas()["label"].tolist() == [1, 2, 3, 4, 5]


def test_the_same_rows_make_the_same_bytes(output):
    write_parts(output)
    before = [path.read_bytes() for path in open_cells(output).files]
    write_parts(output, order=(1, 2, 0))
    assert [path.read_bytes() for path in open_cells(output).files] == before


def test_missing_and_damaged_parts_are_named(output):
    with pytest.raises(OutputError, match=r"lacks .*part-000000\.parquet"):
        open_cells(output)
    write_parts(output)
    (output.path / PARTS / "part-000001.parquet").unlink()
    with pytest.raises(OutputError, match=r"lacks .*part-000001\.parquet"):
        open_cells(output)
    write_cells_part(output, 1, columns(101, 100))
    part = output.path / PARTS / "part-000001.parquet"
    good = part.read_bytes()
    for kept in (0, 10, len(good) // 2, len(good) - 1):
        part.write_bytes(good[:kept])
        for read in (CellTable.to_pandas, CellTable.__len__):
            with pytest.raises(OutputError, match=r"cannot read .*part-000001\.parquet"):
                read(open_cells(output))


def test_a_flipped_bit_in_a_part_is_found(output):
    write_parts(output)
    part = output.path / PARTS / "part-000000.parquet"
    good = part.read_bytes()
    start = pa_parquet.ParquetFile(part).metadata.row_group(0).column(1).data_page_offset
    for at in range(start, start + 400, 80):
        part.write_bytes(good[:at] + bytes([good[at] ^ 8]) + good[at + 1 :])
        with pytest.raises(OutputError, match=r"cannot read .*part-000000\.parquet"):
            open_cells(output).to_pandas()


def test_half_written_parts_are_not_read(output):
    write_parts(output)
    (output.path / PARTS / ".part-000003.parquet.77.partial").write_bytes(b"half")
    assert len(open_cells(output)) == 300


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"z_um": np.zeros(3)}, "needs a column `label`"),
        ({"label": np.array([1, 3, 2])}, "rise"),
        ({"label": np.array([1, 1])}, "rise"),
        ({"label": np.array([1.0, 2.0])}, "integers"),
        ({"label": np.arange(3), "z_um": np.zeros(2)}, "one length"),
        ({"label": np.arange(4).reshape(2, 2)}, "one-dimensional"),
    ],
)
def test_columns_that_make_no_cell_table_are_refused(output, bad, problem):
    with pytest.raises(ValueError, match=problem):
        write_cells_part(output, 0, bad)
    assert not (output.path / PARTS).exists()


def test_an_arrow_table_is_a_part_too(output):
    write_cells_part(output, 0, pa.table({"label": [1, 2], "acronym": ["CA1", "DG"]}))
    assert open_cells(output).to_pandas()["acronym"].tolist() == ["CA1", "DG"]


def test_block_table_from_rows_or_columns(output):
    rows = [{"block": n, "cells_owned": 2 * n, "complete": n != 1, "seconds": 0.25 * n} for n in range(3)]
    file = output.path / "tables/blocks/table.parquet/part-000000.parquet"
    write_blocks_table(output, rows)
    assert pa_parquet.read_table(file).to_pylist() == rows
    write_blocks_table(output, {name: np.array([row[name] for row in rows]) for name in rows[0]})
    assert pa_parquet.read_table(file).to_pylist() == rows
    with pytest.raises(ValueError, match="needs a column `block`"):
        write_blocks_table(output, [{"cells_owned": 1}])
