"""requirements.txt names what the code imports, and nothing that it can do without."""

import re
import sys

import pytest

from tests.paths import ROOT
from tests.test_structure import FILES, PACKAGES, SCRIPTS, names_imported

# Where a distribution's name is not that of its module.
DISTRIBUTIONS = {"faiss": "faiss-cpu", "yaml": "PyYAML", "sklearn": "scikit-learn"}
# Named though nothing imports them.
LOADED_BY_OTHERS = {
    "sentencepiece": "transformers, for LLaMA's tokenizers",
    "protobuf": "transformers, for SentencePiece models",
    "gguf": "transformers, for the quick start's model file",
}
# Imported where a flag or a benchmark asks for them, from environments of their own.
IN_OTHER_ENVIRONMENTS = {
    "vllm": "benchmarks/requirements-vllm.txt",
    "opacus": "benchmarks/requirements.txt",
    "opake": "benchmarks/requirements.txt",
}


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(file: str = "requirements.txt") -> dict[str, str]:
    """Version by name of a requirements file; every line must pin one and say why."""
    versions = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==(\S+) +# \S.*", line).groups()
            versions[normalised(name)] = version
    return versions


def third_party(sources: list[str]) -> set[str]:
    """Distributions of the modules that sources import, anywhere in them."""
    modules = {name.partition(".")[0] for source in sources for name in names_imported(source)}
    modules -= {*sys.stdlib_module_names, *PACKAGES, *SCRIPTS}
    return {normalised(DISTRIBUTIONS.get(module, module)) for module in modules}


@pytest.fixture(scope="module")
def imported():
    """What the code imports beyond Python and itself."""
    found = third_party([path.read_text() for path in FILES])
    assert {"torch", "numpy", "faiss-cpu", "opacus"} <= found
    return found


def test_what_is_imported_is_named(imported):
    assert imported - IN_OTHER_ENVIRONMENTS.keys() - pinned().keys() == set()


def test_what_is_named_is_imported_or_loaded(imported):
    assert pinned().keys() - imported == LOADED_BY_OTHERS.keys()


def test_what_has_an_environment_of_its_own_is_named_there(imported):
    assert IN_OTHER_ENVIRONMENTS.keys() <= imported
    for name, file in IN_OTHER_ENVIRONMENTS.items():
        assert name in (ROOT / file).read_text()
        assert name not in pinned()


def test_peers_run_beside_the_versions_that_are_tested():
    ours, theirs = pinned(), pinned("benchmarks/requirements.txt")
    shared = ours.keys() & theirs.keys()
    assert "torch" in shared
    assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}


@pytest.mark.parametrize(
    "source",
    ["import absent", "from absent.part import thing", "def f():\n    import absent.part"],
)
def test_a_missing_line_is_noticed(source):
    assert third_party([source, "import json\nfrom utils.cli import say\nimport train"]) == {
        "absent"
    }
