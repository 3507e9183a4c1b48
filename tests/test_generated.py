"""What is generated is what the definitions say."""

from __future__ import annotations

from pathlib import Path

import generate
import pytest


def generated(directory: Path) -> dict[str, str]:
    """The generated modules below a directory like `src`, by name."""
    files = [*directory.glob("sgpu/api/v*_*.py*"), directory / "sgpu/nvml/_bindings.py"]
    return {str(file.relative_to(directory)): file.read_text() for file in files if file.suffix in (".py", ".pyi")}


def test_the_committed_modules_are_what_the_definitions_generate(tmp_path: Path) -> None:
    """`tox -e generate` makes them anew."""
    generate.main(tmp_path)
    committed = generated(generate.SOURCE)
    assert committed.keys() == generated(tmp_path).keys()
    for name, text in generated(tmp_path).items():
        assert committed[name] == text, f"{name} is not what proto/ generates: run `tox -e generate`"


def test_a_definition_that_does_not_compile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not an empty module."""
    monkeypatch.setattr(generate, "PROTO", tmp_path)
    (tmp_path / "sgpu/api").mkdir(parents=True)
    (tmp_path / "sgpu/api/bad.proto").write_text("not a definition")
    with pytest.raises(SystemExit, match="protoc failed"):
        generate.generate_api(tmp_path)
