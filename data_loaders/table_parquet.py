"""A Parquet file in batches of rows, row group after row group, from any row on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from dlrm_xla.specs import UserError

BATCH_ROWS = 1 << 15


def open_parquet(path: Path) -> parquet.ParquetFile:
    """Raises UserError."""
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot read it as Parquet: {_cause(error)}") from None


def parquet_types(path: Path) -> dict[str, pa.DataType]:
    """Type of each column, by name. Raises UserError where a name is there twice."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; a name must be there once, so rename one")
    return dict(zip(schema.names, schema.types, strict=True))


def num_rows(path: Path) -> int:
    """Of the whole file. Raises UserError."""
    with open_parquet(path) as file:
        return file.metadata.num_rows


def parquet_batches(path: Path, columns: Sequence[str], row: int) -> Iterator[tuple[list[pa.Array], int, int]]:
    """(the columns' cells, number of the first row, of the next batch's) from `row` on, counted from 0. A batch does not cross row groups,
    and is the same wherever reading began (at a batch's start). Raises UserError for damage."""
    with open_parquet(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if first + group_rows > row:
                try:
                    yield from _group(file, group, columns, first, row)
                except (pa.ArrowException, OSError) as error:
                    rows = f"rows {first + 1} to {first + group_rows}"
                    raise UserError(f"{path}: row group {group} ({rows}): {_cause(error)}; fetch it again") from None
            first += group_rows


def _group(file: parquet.ParquetFile, group: int, columns: Sequence[str], first: int, row: int) -> Iterator[tuple[list[pa.Array], int, int]]:
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(dict.fromkeys(columns)), use_threads=False):
        following = first + batch.num_rows
        if following > row:
            yield [batch.column(name) for name in columns], first, following
        first = following


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
