"""What is down and why, on disk."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu import state
from sgpu.health import Cure, Fault
from sgpu.monitor import Memory

BOOT = "e2a8e0c5-3c5d-4e38-9a0e-2f1a5c1d0b7e"
MEMORY = Memory("550.54.15", {"GPU-a": (Fault("XID 79: off the bus", 1_700_000_000.25, Cure.RESET),)})

TEXTS = st.text(st.characters(), max_size=20)
FAULTS = st.builds(
    Fault, reason=TEXTS, since=st.floats(allow_nan=False, allow_infinity=False), cure=st.sampled_from(Cure)
)
MEMORIES = st.builds(
    Memory,
    driver_version=TEXTS,
    faults=st.dictionaries(TEXTS, st.lists(FAULTS, max_size=3).map(tuple), max_size=3),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the state goes: a directory that is not there yet."""
    return tmp_path / "run" / "sgpu" / "state.json"


def aside(path: Path) -> Path:
    return path.with_name("state.json.unusable")


def write(path: Path, content: object) -> bytes:
    """A state file with that content: bytes as they are, anything else as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    return raw


def content(**changes: Any) -> dict[str, Any]:  # noqa: ANN401  # whatever JSON has
    """What a good file holds, but for the changes."""
    return {"version": 1, "boot_id": BOOT, "driver_version": "550.54.15", "faults": {}} | changes


def with_fault(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a good file with one fault holds, but for changes in the fault."""
    return content(faults={"GPU-a": [{"reason": "XID 79", "since": 1.5, "cure": "reset"} | changes]})


class TestRoundTrip:
    @given(MEMORIES)
    def test_any(self, memory: Memory) -> None:
        """What is loaded in the same boot is what was saved, whatever the texts are."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "state.json")
            state.save(path, BOOT, memory)
            assert state.load(path, BOOT) == memory

    def test_the_last_one_counts(self, path: Path) -> None:
        """Each save replaces the one before."""
        state.save(path, BOOT, MEMORY)
        state.save(path, BOOT, Memory("560.1"))
        assert state.load(path, BOOT) == Memory("560.1")

    def test_a_fault_in_words(self, path: Path) -> None:
        """For whoever looks into the file; a format that older files have, so never to be changed without VERSION."""
        state.save(path, BOOT, MEMORY)
        assert json.loads(path.read_text()) == {
            "version": 1,
            "boot_id": BOOT,
            "driver_version": "550.54.15",
            "faults": {"GPU-a": [{"reason": "XID 79: off the bus", "since": 1_700_000_000.25, "cure": "reset"}]},
        }

    def test_no_boot_id_on_either_side(self, path: Path) -> None:
        """A kernel that does not tell: as if it were one boot."""
        state.save(path, "", MEMORY)
        assert state.load(path, "") == MEMORY


class TestLoad:
    def test_no_file(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The first start in a boot: nothing to know, nothing to say, nothing to make."""
        assert state.load(path, BOOT) == Memory()
        assert caplog.messages == []
        assert not path.parent.exists()

    @pytest.mark.parametrize(("saved", "now"), [(BOOT, "another"), ("", BOOT), (BOOT, "")])
    def test_another_boot(self, path: Path, caplog: pytest.LogCaptureFixture, saved: str, now: str) -> None:
        """All is forgotten without a word, the driver's version too; the next save overwrites the file."""
        state.save(path, saved, MEMORY)
        assert state.load(path, now) == Memory()
        assert caplog.messages == []
        assert path.exists()

    @pytest.mark.parametrize(
        ("unusable", "words"),
        [
            pytest.param(b"", "JSONDecodeError", id="empty"),
            pytest.param(b"\0" * 100, "JSONDecodeError", id="zeros, as after a crash of the machine"),
            pytest.param(json.dumps(with_fault()).encode()[:-20], "JSONDecodeError", id="cut short"),
            pytest.param(json.dumps(content()).encode() + b"{", "JSONDecodeError", id="more after it"),
            pytest.param(b"\xff\xfe{}", "invalid start byte", id="not UTF-8"),
            pytest.param(b"[" * 100_000, "RecursionError", id="nested without end"),
            pytest.param(b'{"version": ' + b"1" * 5000 + b"}", "", id="an endless number"),
            pytest.param(None, "TypeError", id="null"),
            pytest.param(1, "TypeError", id="a number"),
            pytest.param("version", "TypeError", id="a word"),
            pytest.param([], "TypeError", id="a list"),
            pytest.param({}, "KeyError: 'version'", id="no version"),
            pytest.param(content(version=2), "version 2 is not 1", id="a newer version"),
            pytest.param(content(version="1"), "version '1' is not 1", id="a version in words"),
            pytest.param(content(version=None), "version None is not 1", id="version null"),
            pytest.param({"version": 2}, "version 2 is not 1", id="a newer version that has other keys"),
            pytest.param({"version": 1}, "KeyError: 'boot_id'", id="no boot id"),
            pytest.param({"version": 1, "boot_id": BOOT}, "KeyError: 'faults'", id="no faults"),
            pytest.param(
                {"version": 1, "boot_id": BOOT, "faults": {}}, "KeyError: 'driver_version'", id="no driver version"
            ),
            pytest.param(content(faults=[]), "AttributeError", id="a list of faults"),
            pytest.param(content(faults=None), "AttributeError", id="faults null"),
            pytest.param(content(faults={"GPU-a": None}), "TypeError", id="null for a GPU"),
            pytest.param(content(faults={"GPU-a": 7}), "TypeError", id="a number for a GPU"),
            pytest.param(content(faults={"GPU-a": "XID"}), "TypeError", id="a word for a GPU"),
            pytest.param(content(faults={"GPU-a": [[]]}), "TypeError", id="a list for a fault"),
            pytest.param(content(faults={"GPU-a": [{}]}), "KeyError: 'reason'", id="an empty fault"),
            pytest.param(with_fault(since=None), "TypeError", id="no time"),
            pytest.param(with_fault(since="yesterday"), "ValueError", id="a time in words"),
            pytest.param(with_fault(since=float("nan")), "", id="a time that is none"),
            pytest.param(with_fault(since=float("inf")), "", id="a time that never comes"),
            pytest.param(with_fault(since=10**400), "OverflowError", id="a time beyond measure"),
            pytest.param(with_fault(cure="prayer"), "ValueError: 'prayer'", id="no such cure"),
            pytest.param(with_fault(cure=["reset"]), "ValueError", id="a list of cures"),
        ],
    )
    def test_unusable(self, path: Path, caplog: pytest.LogCaptureFixture, unusable: object, words: str) -> None:
        """Nothing is known then; the file is set aside as it was, and one warning has its name and what is wrong."""
        before = write(path, unusable)
        assert state.load(path, BOOT) == Memory()
        assert not path.exists()
        assert aside(path).read_bytes() == before
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert str(path) in record.message
        assert words in record.message
        assert "faults from before are not known" in record.message

    def test_set_aside_once_more(self, path: Path) -> None:
        """The last one is kept: there is no end of them otherwise."""
        for raw in (b"first", b"second"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
            state.load(path, BOOT)
        assert [file.read_bytes() for file in path.parent.iterdir()] == [b"second"]

    def test_a_directory_is_in_its_place(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """As Kubernetes makes one for a hostPath that was meant to be a file. Set aside too: a save works then."""
        path.mkdir(parents=True)
        assert state.load(path, BOOT) == Memory()
        assert len(caplog.records) == 1
        assert aside(path).is_dir()
        state.save(path, BOOT, MEMORY)
        assert state.load(path, BOOT) == MEMORY

    def test_it_can_t_be_read(
        self, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that fails is no reason to fail."""

        def read_text(path: Path, encoding: str) -> str:
            raise OSError(5, "Input/output error")

        write(path, content())
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", read_text)
            assert state.load(path, BOOT) == Memory()
        assert "Input/output error" in caplog.text
        assert aside(path).exists()

    def test_it_can_t_be_set_aside(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Said, and no more: the next save may succeed all the same."""
        write(path, b"?")
        aside(path).mkdir()
        assert state.load(path, BOOT) == Memory()
        assert len(caplog.records) == 2
        assert "can't be set aside either" in caplog.messages[1]

    def test_a_file_is_where_the_directory_should_be(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is known, and the save that follows says it properly."""
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "state.json"
        assert state.load(path, BOOT) == Memory()
        with pytest.raises(OSError, match="file"):
            state.save(path, BOOT, MEMORY)


class TestSave:
    def test_directories_are_made(self, path: Path) -> None:
        """/run is empty after each boot."""
        state.save(path, BOOT, MEMORY)
        assert path.is_file()

    def test_nothing_else_is_left(self, path: Path) -> None:
        """The file, and nothing beside it."""
        state.save(path, BOOT, MEMORY)
        state.save(path, BOOT, Memory())
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("moment", ["fchmod", "replace"])
    def test_a_reader_never_sees_half(self, path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
        """Up to its last moment a save leaves the old file as it was, and what a save left half is no harm later."""
        state.save(path, BOOT, MEMORY)
        before = path.read_bytes()
        seen: list[bytes] = []

        def stopped(*arguments: object, **options: object) -> int:
            seen.append(path.read_bytes())
            if moment == "fchmod":
                path.with_name("state.json.new").write_bytes(b'{"vers')
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            if moment == "fchmod":
                patched.setattr(os, "fchmod", stopped)
            else:
                patched.setattr(os, "replace", stopped)
            with pytest.raises(OSError, match="No space left"):
                state.save(path, BOOT, Memory("560.1"))
        assert seen == [before]
        assert state.load(path, BOOT) == MEMORY
        state.save(path, BOOT, Memory("560.1"))
        assert state.load(path, BOOT) == Memory("560.1")

    def test_the_new_file_has_all_of_it_when_it_takes_its_place(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One step from the old to the new, within one directory."""
        steps: list[tuple[Path, Path, bool]] = []
        replace: Callable[[Path, Path], None] = os.replace

        def watched(source: Path, target: Path) -> None:
            steps.append((source.parent, target, state.load(source, BOOT) == MEMORY))
            replace(source, target)

        monkeypatch.setattr(os, "replace", watched)
        state.save(path, BOOT, MEMORY)
        assert steps == [(path.parent, path, True)]

    def test_it_can_t_be_written(self, tmp_path: Path) -> None:
        """The caller's to say, and to live with."""
        (tmp_path / "state.json").mkdir()
        with pytest.raises(OSError, match=r"state\.json"):
            state.save(tmp_path / "state.json", BOOT, MEMORY)


class TestBootId:
    def test_it_is_the_kernel_s(self) -> None:
        """One line, the same each time."""
        assert state.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip() != ""

    def test_it_is_not_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Empty then."""
        monkeypatch.setattr(state, "BOOT_ID", tmp_path / "missing")
        assert state.boot_id() == ""
