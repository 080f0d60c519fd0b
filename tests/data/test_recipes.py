import importlib.metadata
import subprocess
import sys

import pytest

from kimi_pretrain.data.documents import Document
from kimi_pretrain.data.readers import read
from kimi_pretrain.data.recipes import RECIPES, capped, license_of

CLASSIFIER = "Classifier: License :: OSI Approved"


@pytest.fixture(scope="module")
def default():
    return RECIPES["default"].collect()


def test_default_has_three_domains_of_enough_text(default):
    """At least 20 MB; prose is counted after reading, for most of its input is code."""
    assert list(default) == ["code", "math", "prose"]
    sizes = {name: sum(unit.size for unit in domain.units) for name, domain in default.items()}
    assert 10e6 < sizes["code"] <= 12e6
    assert 7e6 < sizes["math"] <= 8e6
    assert set(RECIPES["default"].sample_bytes) == set(default)


@pytest.mark.slow
def test_default_is_at_least_twenty_megabytes_of_text(default):
    size = sum(
        len(item.text.encode())
        for domain in default.values()
        for unit in domain.units
        for item in read(unit)
        if isinstance(item, Document)
    )
    assert size >= 20e6


def test_prose_reads_as_prose(default):
    """A sample of it: docstrings of numpy, torch and others, and the language reference."""
    domain = default["prose"]
    sources = {unit.source.split()[0] for unit in domain.units}
    assert {"CPython", "numpy", "torch", "matplotlib", "networkx", "sympy"} <= sources
    texts = [
        item.text
        for unit in [unit for unit in domain.units if unit.source.startswith("CPython")][:1]
        for item in read(unit)
        if isinstance(item, Document)
    ]
    assert any("statement" in text for text in texts)
    assert not any(text.lstrip().startswith(("import ", "def ")) for text in texts)


def test_every_source_has_a_licence(default):
    for domain in default.values():
        for unit in domain.units:
            assert domain.licenses[unit.source] not in ("", "not stated")
    assert default["code"].licenses[default["code"].units[0].source] == "PSF-2.0"
    assert any("BSD" in value for value in default["math"].licenses.values())


def test_no_domain_holds_a_file_of_another(default):
    paths = [path for domain in default.values() for unit in domain.units for path in unit.paths]
    assert len(paths) == len(set(paths))


def test_collecting_repeats(default):
    again = RECIPES["default"].collect()
    assert again == default


def test_collecting_imports_nothing_heavy():
    """A run on a prepared corpus must not pay for importing sympy or torch to find them."""
    script = (
        "import sys; from kimi_pretrain.data.recipes import RECIPES; RECIPES['default'].state();"
        "RECIPES['stdlib_tiny'].collect();"
        "sys.exit(bool({'torch', 'sympy', 'matplotlib', 'tiktoken'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        check=False,
    )
    assert result.returncode == 0


def test_tiny_is_small_code():
    domains = RECIPES["stdlib_tiny"].collect()
    assert list(domains) == ["code"]
    assert sum(len(unit.paths) for unit in domains["code"].units) == 40
    assert 300e3 < sum(unit.size for unit in domains["code"].units) < 2e6


def test_caps_are_kept_and_chosen_by_path_alone(tmp_path):
    for index in range(30):
        folder = tmp_path / ("tests" if index % 3 == 0 else "kept")
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.py").write_text("#" * 100)
    (tmp_path / "kept/tiny.py").write_text("#")
    (tmp_path / "kept/huge.py").write_text("#" * 600_000)
    (tmp_path / "kept/other.txt").write_text("#" * 100)
    chosen = capped(tmp_path, (".",), 1000, skip=frozenset({"tests"}))
    assert len(chosen) == 10
    assert {path.parent.name for path in chosen} == {"kept"}
    (tmp_path / "kept/0.py").write_text("#" * 101)
    assert set(capped(tmp_path, (".",), skip=frozenset({"tests"}))) >= set(chosen)
    assert chosen != sorted(chosen), "in order of a hash: any run of neighbours is a fair sample"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["License-Expression: MIT", "Classifier: License :: OSI Approved :: BSD License"], "MIT"),
        (
            ["License: The whole text", "Classifier: License :: OSI Approved :: BSD License"],
            "BSD License",
        ),
        (["License: Apache 2.0", "Classifier: Topic :: Text"], "Apache 2.0"),
        ([], "not stated"),
    ],
)
def test_licence_from_metadata(tmp_path, lines, expected):
    folder = tmp_path / "x-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", "Name: x", *lines, "", "Text"])
    )
    found = importlib.metadata.Distribution.at(folder)
    assert license_of(found.metadata) == expected
