"""The file as it is read: each value with its line, and one line about what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.configfile import ConfigFileError, Entry, read

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


class TestRead:
    @pytest.mark.parametrize(
        "content", ["", "\n\n", "# nothing yet\n", "---\n", "null", "{}", "\ufeff"], ids=lambda text: repr(text)
    )
    def test_nothing(self, file: Path, content: str) -> None:
        """A file with nothing in it has no keys."""
        file.write_text(content)
        assert read(file) == {}

    def test_lines(self, file: Path) -> None:
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
            pytest.param("1", 1, id="number"),
            pytest.param("1.5", 1.5, id="fraction"),
            pytest.param("'1'", "1", id="quoted number"),
            pytest.param("true", True, id="boolean"),
            pytest.param("no", False, id="another boolean"),
            pytest.param("", None, id="nothing"),
            pytest.param("é", "é", id="not ASCII"),
            pytest.param("{a: [b]}", {"a": ["b"]}, id="mapping"),
            pytest.param("0000:05:00.0", "0000:05:00.0", id="PCI bus id that YAML 1.1 takes for a number"),
            pytest.param("05:00.0", "05:00.0", id="PCI bus id without a domain"),
            pytest.param("{pci-bus-id: 10:20:30.0}", {"pci-bus-id": "10:20:30.0"}, id="PCI bus id in a mapping"),
            pytest.param("12:30", "12:30", id="whole number in base 60"),
        ],
    )
    def test_values(self, file: Path, text: str, value: object) -> None:
        """Values have YAML's types, but that a colon does not make a number."""
        file.write_text(f"key: {text}")
        assert read(file) == {"key": Entry(value, 1)}

    def test_a_key_that_is_no_text(self, file: Path) -> None:
        """It is read as one; what it is good for is the reader's concern."""
        file.write_text("1: a\non: b\n")
        assert read(file) == {"1": Entry("a", 1), "True": Entry("b", 2)}

    def test_merge(self, file: Path) -> None:
        """An anchor's keys can be taken over, at the top and in an item; own ones win."""
        file.write_text(
            "<<: {v: 1, simulate: 2}\n"
            "v: 3\n"
            "gpus:\n"
            "- &whole {uuid: GPU-a, shares: 1, resource: example.com/whole}\n"
            "- <<: *whole\n"
            "  uuid: GPU-b\n"
        )
        content = read(file)
        assert {name: content[name].value for name in ("v", "simulate")} == {"v": 3, "simulate": 2}
        assert [entry.value["uuid"] for entry in content["gpus"].value] == ["GPU-a", "GPU-b"]
        assert [entry.value["shares"] for entry in content["gpus"].value] == [1, 1]


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "line"),
        [
            pytest.param("v: 1\n# more\nv: 1\n", "has 'v' twice, the second time in line 3", id="at the top"),
            pytest.param("v: 1\n'v': 2\n", "has 'v' twice, the second time in line 2", id="quoted once"),
            pytest.param("1: a\n1: b\n", "has '1' twice, the second time in line 2", id="number"),
            pytest.param(
                "gpus:\n- uuid: GPU-a\n  shares: 1\n  shares: 2\n",
                "has 'shares' twice, the second time in line 4",
                id="in an item",
            ),
            pytest.param("a: {b: [{c: 1, c: 2}]}", "has 'c' twice, the second time in line 1", id="deeper"),
            pytest.param('a: {"b\\nc": 1, "b\\nc": 2}', r"has 'b\nc' twice, the second time in line 1", id="newline"),
        ],
    )
    def test_twice(self, file: Path, content: str, line: str) -> None:
        """A key that stands twice is refused with the second place; YAML's readers would take the last one."""
        assert refusal(file, content) == line

    @pytest.mark.parametrize("content", ["- v: 1", "v", "17", "false"])
    def test_not_a_mapping(self, file: Path, content: str) -> None:
        """A file that is YAML but no mapping is told what is expected."""
        assert refusal(file, content) == "takes a mapping of settings, as in `gpu-duplication-factor: 50`"

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            pytest.param("v: 1\nw: [1", "expected ',' or ']', but got '<stream end>' in line 2", id="unclosed list"),
            pytest.param("v: 1\n  w: /a\n", "mapping values are not allowed here in line 2", id="wrong indent"),
            pytest.param("a: 1\n\tv: 1", "found character '\\t' that cannot start any token in line 2", id="tab"),
            pytest.param("v: 1\n---\nv: 2\n", "but found another document in line 2", id="two documents"),
            pytest.param("a: 1\nv: !!python/object:object {}", "in line 2", id="a tag for Python"),
            pytest.param("? [v]\n: 1", "found unhashable key in line 1", id="a list for a key"),
            pytest.param("? {v: 1}\n: 1", "found unhashable key in line 1", id="a mapping for a key"),
            pytest.param("a: 1\nv: *other", "found undefined alias 'other' in line 2", id="unknown alias"),
            pytest.param("v: &v [*v]", "found unconstructable recursive node in line 1", id="in itself"),
            pytest.param("<<: 1", "but found scalar in line 1", id="nothing to merge"),
        ],
    )
    def test_not_yaml(self, file: Path, content: str, line: str) -> None:
        """What the parser complains of is told with the line."""
        told = refusal(file, content)
        assert told.startswith("is not YAML: ")
        assert told.endswith(line)

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param("v: 1\0", id="NUL"),
            pytest.param("v: 2020-99-99", id="no such day"),
            pytest.param("v: !!int x", id="a tag that does not hold"),
            pytest.param("v: !!bool x", id="no such boolean"),
            pytest.param("v: " + "9" * 5000, id="endless number"),
            pytest.param("[" * 3000, id="endless nesting"),
        ],
    )
    def test_what_the_parser_trips_over(self, file: Path, content: str) -> None:
        """Errors that PyYAML lets through are the file's fault like any other."""
        assert refusal(file, content).startswith("is not YAML: ")

    def test_not_utf8(self, file: Path) -> None:
        """A file in another encoding can't be read."""
        assert refusal(file, b"host-path: /\xff").startswith("can't be read: 'utf-8' codec can't decode byte 0xff")

    def test_missing(self, file: Path) -> None:
        """Nor can one that is not there, or is no file."""
        with pytest.raises(ConfigFileError, match=r"^can't be read: \[Errno 2\] No such file or directory"):
            read(file)
        with pytest.raises(ConfigFileError, match=r"^can't be read: \[Errno 21\] Is a directory"):
            read(file.parent)
