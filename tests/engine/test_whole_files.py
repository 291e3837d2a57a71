"""Files are replaced as a whole or not at all."""

from pathlib import Path

import pytest

from engine.whole_files import UNFINISHED, replacing


def fail_halfway(path: Path) -> None:
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write("half of the n")
        raise OSError("full")


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert list(tmp_path.glob(UNFINISHED)) == [temporary]
    with pytest.raises(OSError, match="full"):
        fail_halfway(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
