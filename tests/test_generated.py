"""Generated files match their definitions."""

from __future__ import annotations

from pathlib import Path

import generate
import pytest

pytestmark = pytest.mark.static


def generated(directory: Path) -> dict[str, str]:
    """The generated modules below a directory like `src`, by name."""
    files = [*directory.glob("sgpu/api/[!_]*.py*"), directory / "sgpu/driver/nvml/_bindings.py"]
    return {str(file.relative_to(directory)): file.read_text() for file in files}


def test_the_committed_modules_are_what_the_definitions_generate(tmp_path: Path) -> None:
    """`tox -e generate` makes them anew."""
    generate.main(tmp_path)
    committed, made = generated(generate.SOURCE), generated(tmp_path)
    assert committed.keys() == made.keys()
    out_of_date = [name for name in made if made[name] != committed[name]]
    assert out_of_date == [], "run `tox -e generate`"


def test_a_definition_that_does_not_compile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not an empty module."""
    monkeypatch.setattr(generate, "PROTO", tmp_path)
    (tmp_path / "sgpu/api").mkdir(parents=True)
    (tmp_path / "sgpu/api/bad.proto").write_text("not a definition")
    with pytest.raises(SystemExit, match="protoc failed"):
        generate.generate_api(tmp_path)
