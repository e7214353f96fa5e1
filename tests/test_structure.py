"""The rooms of the project: who may import whom."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.training import ROOT

PACKAGES = (
    "utils", "data", "evaluation", "privacy_checks", "query_gpt35_for_annotation",
    "resample_with_dp_histogram", "benchmarks", "benchmarks/engines",
)  # fmt: skip
FILES = [
    path
    for folder in (ROOT, *(ROOT / package for package in PACKAGES))
    for path in sorted(folder.glob("*.py"))
]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
NO_TORCH = ("generate_train_command", "generate_inference_command", "utils.accounting",
            "utils.privacy_plan", "utils.data_utils")  # fmt: skip


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_by(path) -> set[str]:
    """Names of the project's modules that a file imports, anywhere in it."""
    known = {module_name(file) for file in FILES}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & known


def test_imports_form_no_cycle():
    graph = {module_name(path): imported_by(path) - {module_name(path)} for path in FILES}
    assert len(graph["train"]) > 5
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("utils.cli") < order.index("train")


def test_only_what_tests_the_scripts_imports_them():
    importers = {module_name(path) for path in FILES if imported_by(path) & SCRIPTS}
    # The audit and the benchmark are of the training run itself, so they have to run that.
    assert importers <= {"privacy_checks.observed_run", "benchmarks.engines.ours"}


@pytest.mark.parametrize("module", NO_TORCH)
def test_planning_does_without_torch(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
