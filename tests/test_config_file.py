"""The file as it is read: each value with its line, and one line about what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.config.file import ConfigFileError, Entry, read

pytestmark = pytest.mark.pure


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test puts its file."""
    return tmp_path / "config.yaml"


def refusal(file: Path, content: str | bytes) -> str:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigFileError) as refused:
        read(file)
    line = str(refused.value)
    assert line.splitlines() == [line]
    return line


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "---\n", "null", "{}", "\ufeff"], ids=repr)
def test_nothing(file: Path, content: str) -> None:
    """A file with nothing in it has no keys."""
    file.write_text(content)
    assert read(file) == {}


def test_lines(file: Path) -> None:
    """Each key has the line that it stands in, and so has each item of a list."""
    file.write_text(
        "# a comment\n"
        "v: 1\n"
        "\n"
        "'host-path':\n"
        "  /opt\n"
        "gpus:\n"
        "  # the first\n"
        "  - uuid: GPU-a\n"
        "    shares: 2\n"
        "\n"
        "  -\n"
        "    name: '*'\n"
        "  - word\n"
        "flow: [1,\n"
        "  {a: 2}]\n"
    )
    assert read(file) == {
        "v": Entry(1, 2),
        "host-path": Entry("/opt", 4),
        "gpus": Entry([Entry({"uuid": "GPU-a", "shares": 2}, 8), Entry({"name": "*"}, 12), Entry("word", 13)], 6),
        "flow": Entry([Entry(1, 14), Entry({"a": 2}, 15)], 14),
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1.5", 1.5),
        ("'1'", "1"),
        ("true", True),
        ("", None),
        ("é", "é"),
        ("{a: [b]}", {"a": ["b"]}),
        ("0000:05:00.0", "0000:05:00.0"),  # to YAML 1.1, numbers in base 60
        ("{pci-bus-id: 10:20:30.0}", {"pci-bus-id": "10:20:30.0"}),
        ("12:30", "12:30"),
        *((text, text) for text in ("010", "0x10", "1_000", "0b1", "0o7", "190:20:30", "1e3", ".5")),  # as for flags
    ],
)
def test_values(file: Path, text: str, value: object) -> None:
    """Values have YAML's types, except that a number is only what a flag takes for one."""
    file.write_text(f"key: {text}")
    assert read(file) == {"key": Entry(value, 1)}


def test_a_key_that_is_no_text(file: Path) -> None:
    """It is read as one; what it is good for is the reader's concern."""
    file.write_text("1: a\non: b\n")
    assert read(file) == {"1": Entry("a", 1), "True": Entry("b", 2)}


def test_merge(file: Path) -> None:
    """An anchor's keys can be taken over, at the top and in an item; own ones win."""
    file.write_text(
        "<<: {v: 1, simulate: 2}\n"
        "v: 3\n"
        "gpus:\n"
        "- &whole {uuid: GPU-a, shares: 1}\n"
        "- <<: *whole\n"
        "  <<: {resource: a.b/c}\n"
        "  uuid: GPU-b\n"
    )
    content = read(file)
    assert {name: content[name].value for name in ("v", "simulate")} == {"v": 3, "simulate": 2}
    assert [entry.value for entry in content["gpus"].value] == [
        {"uuid": "GPU-a", "shares": 1},
        {"uuid": "GPU-b", "shares": 1, "resource": "a.b/c"},
    ]


@pytest.mark.parametrize(
    ("content", "key", "line"),
    [
        pytest.param("v: 1\n# more\nv: 1\n", "'v'", 3, id="at the top"),
        pytest.param("v: 1\n'v': 2\n", "'v'", 2, id="quoted once"),
        pytest.param("gpus:\n- uuid: GPU-a\n  shares: 1\n  shares: 2\n", "'shares'", 4, id="in an item"),
        pytest.param('a: {b: [{"b\\nc": 1, "b\\nc": 2}]}', r"'b\nc'", 1, id="deeper, with a newline"),
    ],
)
def test_a_key_that_stands_twice(file: Path, content: str, key: str, line: int) -> None:
    """It is refused with the second place; YAML's readers would take the last one."""
    told = refusal(file, content)
    assert key in told
    assert f"line {line}" in told


@pytest.mark.parametrize("content", ["- v: 1", "v", "17", "false"])
def test_not_a_mapping(file: Path, content: str) -> None:
    """A file that is YAML but no mapping is refused."""
    assert "mapping" in refusal(file, content)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        *(("v: 1\nw: [1", 2), ("v: 1\n  w: /a\n", 2), ("v: 1\n---\nv: 2\n", 2)),
        *(("a: 1\nv: !!python/object:object {}", 2), ("? [v]\n: 1", 1), ("v: &v [*v]", 1), ("<<: 1", 1)),
        *(("v: 1\0", None), ("v: 2020-99-99", None), ("v: " + "9" * 5000, None), ("[" * 1000, None)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_not_yaml(file: Path, content: str, line: int | None) -> None:
    """Errors of the parser are refused with their line, if it names one."""
    told = refusal(file, content)
    assert "YAML" in told
    assert line is None or f"line {line}" in told


def test_not_readable(file: Path) -> None:
    """A file in another encoding, one that is not there, or is no file, is refused with the reason."""
    assert "0xff" in refusal(file, b"host-path: /\xff")
    file.unlink()
    for path, reason in ((file, "Errno 2"), (file.parent, "not a regular file"), (Path("/dev/zero"), "not a regular")):
        with pytest.raises(ConfigFileError, match=reason):
            read(path)


@pytest.mark.parametrize("merge", [False, True], ids=["aliases", "merges"])
def test_bomb(file: Path, merge: bool) -> None:
    """A few hundred bytes that stand for millions of values are refused in a short line."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 10):
        aliases = ", ".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    assert len(refusal(file, "\n".join(lines))) < 200
