import gc
import os
import subprocess
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from raydpo.data import spool as spool_module
from raydpo.data.spool import Spool, spooled
from raydpo.errors import RaydpoError

SCHEMA = pa.schema([("key", pa.binary(16)), ("ids", pa.list_(pa.int32())), ("name", pa.string()), ("weight", pa.float64())])
TABLE = pa.table([[b"a" * 16, b"b" * 16, b"c" * 16], [[1, 2], [], [3]], ["x", "", "yz"], [1.0, 2.0, 3.0]], schema=SCHEMA)


def test_what_goes_in_comes_out_in_one_chunk():
    pieces = [TABLE, TABLE.slice(1), TABLE.slice(0, 0), TABLE.slice(2, 1), pa.concat_tables([TABLE, TABLE.slice(1, 1)])]
    found = spooled(pieces, SCHEMA)
    assert found.to_pydict() == pa.concat_tables(pieces).to_pydict()
    found.validate(full=True)
    assert all(column.num_chunks == 1 for column in found.columns)
    assert spooled([], SCHEMA).num_rows == 0


def test_more_values_than_32_bits_count(monkeypatch):
    monkeypatch.setattr(spool_module, "MOST_SMALL", 2)
    found = spooled([TABLE, TABLE], SCHEMA)
    assert pa.types.is_large_list(found["ids"].type) and found["ids"].to_pylist() == 2 * [[1, 2], [], [3]]


def test_a_wide_table_goes_into_another_spool(monkeypatch):
    monkeypatch.setattr(spool_module, "MOST_SMALL", 2)
    wide = spooled([TABLE, TABLE], SCHEMA)
    assert pa.types.is_large_list(wide["ids"].type) and pa.types.is_large_string(wide["name"].type)
    again = spooled([TABLE, wide.slice(1, 4), wide.slice(5), TABLE.slice(0, 0)], SCHEMA)
    assert again.to_pylist() == [*TABLE.to_pylist(), *wide.to_pylist()[1:]]
    again.validate(full=True)


def test_files_have_no_name_and_go_with_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(SCHEMA)
    spool.append(TABLE)
    found = spool.finish()
    assert os.listdir(tmp_path) == [] and found["name"].to_pylist() == ["x", "", "yz"]
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().count(str(tmp_path))
    del found, spool
    gc.collect()
    assert mapped > 0 and str(tmp_path) not in maps.read_text()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(RaydpoError, match=rf"no room for the tokenised pairs in {tmp_path} .*set TMPDIR"):
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
            spooled([TABLE] * 3000, SCHEMA)
        gc.collect()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_nulls_are_refused():
    with pytest.raises(ValueError, match="column name has nulls"):
        spooled([TABLE.set_column(2, "name", pa.array(["x", None, "y"]))], SCHEMA)
