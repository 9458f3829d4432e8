"""Files and folders that appear whole or not at all."""

from pathlib import Path

import pytest

from m2mkd.errors import HubError, WriteError
from m2mkd.files import explained_write_errors, read_json, replaced_file, write_folder, write_json


class TestWriteFolder:
    def test_it_takes_the_place_of_the_old_one(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "model"
        for text in ("old", "new"):
            write_folder(folder, lambda temporary, text=text: (temporary / text).touch())
        assert [path.name for path in folder.iterdir()] == ["new"]
        assert [path.name for path in folder.parent.iterdir()] == ["model"]

    def test_a_write_that_fails_leaves_the_old_one(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_folder(folder, lambda temporary: (temporary / "old").touch())

        def no_space(temporary: Path) -> None:
            (temporary / "new").touch()
            raise OSError(28, "No space left on device")

        with pytest.raises(WriteError, match="No space left on device.*GB are free there. Free up disk space"):
            write_folder(folder, no_space)
        assert [path.name for path in folder.iterdir()] == ["old"]


class TestExplainedWriteErrors:
    def test_torchs_own_error_of_a_full_disk_is_one(self, tmp_path: Path) -> None:
        with pytest.raises(WriteError, match="Cannot write"), explained_write_errors(tmp_path / "x" / "y"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing file")

    def test_another_error_stays_what_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="unrelated"), explained_write_errors(tmp_path):
            raise RuntimeError("unrelated")


def test_json_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_not_written_to_its_end_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), replaced_file(path) as temporary:
        temporary.write_bytes(b"n")
        raise OSError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


class TestReadJson:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"a": "→"})
        assert read_json(tmp_path / "a.json", HubError, "Write it again.") == {"a": "→"}
        assert "→" in (tmp_path / "a.json").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (None, "is missing"),
            (b"{", "is damaged (Expecting"),
            (b"", "is damaged"),
            (b"[]", "is damaged (not a JSON object)"),
            (b"\xff\xfe", "is damaged ('utf-8' codec"),
        ],
    )
    def test_an_error_is_the_caller_s_and_names_its_way_out(
        self, tmp_path: Path, content: bytes | None, what: str
    ) -> None:
        path = tmp_path / "a.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(HubError) as caught:
            read_json(path, HubError, "Write it again.")
        assert str(caught.value).startswith(f"{path} {what}") and str(caught.value).endswith(". Write it again.")

    def test_what_cannot_be_read_is_not_called_damaged(self, tmp_path: Path) -> None:
        with pytest.raises(HubError, match=r"cannot be read \(.*directory.*\). Write it again.$"):
            read_json(tmp_path, HubError, "Write it again.")
