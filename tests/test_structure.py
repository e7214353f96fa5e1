"""The rooms of the project: who may import whom."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.paths import ROOT

PACKAGES = (
    "utils", "data", "evaluation", "privacy_checks", "query_gpt35_for_annotation",
    "resample_with_dp_histogram", "topics", "benchmarks",
)  # fmt: skip
FILES = sorted(ROOT.glob("*.py")) + sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
NO_TORCH = ("generate_train_command", "generate_inference_command", "generate_pipeline_script",
            "utils.privacy.accounting",
            "utils.models.footprint", "utils.privacy.plan", "utils.texts.canaries",
            "utils.texts.audit_canaries",
            "utils.texts.data_sets", "utils.texts.forms", "utils.texts.units",
            "data.prepare_instructions")  # fmt: skip
# What a wing of utils/ never imports: other wings, or libraries.
NEVER = {
    "privacy": {"texts", "models", "sampling", "runs", "command_line", "transformers", "peft",
                "datasets", "argparse"},
    "texts": {"privacy", "models", "sampling", "runs", "command_line"},
    "models": {"privacy", "texts", "sampling", "runs", "command_line"},
    "sampling": {"privacy", "texts", "runs", "command_line"},
    "runs": {"texts", "sampling", "command_line"},
    "command_line": set(),
}  # fmt: skip


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names_imported(source: str) -> set[str]:
    """Names of all that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_by(path) -> set[str]:
    """Names of the project's modules that a file imports, anywhere in it."""
    return names_imported(path.read_text()) & {module_name(file) for file in FILES}


def broken_rules(wing: str, source: str) -> set[str]:
    """What a source in a wing of utils/ imports against its rules."""
    return {
        name
        for name in names_imported(source)
        for forbidden in NEVER[wing]
        if f"{name}.".startswith((f"utils.{forbidden}.", f"{forbidden}."))
    }


def test_imports_form_no_cycle():
    graph = {module_name(path): imported_by(path) - {module_name(path)} for path in FILES}
    assert len(graph["train"]) > 5
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("utils.cli") < order.index("train")


def test_only_what_tests_the_scripts_imports_them():
    importers = {module_name(path) for path in FILES if imported_by(path) & SCRIPTS}
    # The audit and the benchmark are of the training run itself, so they have to run that.
    assert importers <= {"privacy_checks.observed_run", "benchmarks.engines.ours"}


@pytest.mark.parametrize("wing", NEVER)
def test_a_wing_never_imports_what_it_must_not_know(wing):
    files = sorted((ROOT / "utils" / wing).rglob("*.py"))
    assert len(files) > 2
    assert {str(path): broken_rules(wing, path.read_text()) for path in files} == {
        str(path): set() for path in files
    }


def test_every_folder_of_utils_has_rules():
    assert {path.parent.name for path in ROOT.glob("utils/*/__init__.py")} == NEVER.keys()


@pytest.mark.parametrize(
    "line",
    [
        "from utils.models.lora import attach_lora",
        "from utils import models",
        "def f():\n    import utils.models.loading",
        "from transformers import PreTrainedModel",
        "import peft",
        "from utils.command_line.parser import make_parser",
    ],
)
def test_a_model_in_the_privacy_wing_is_noticed(line):
    source = (ROOT / "utils" / "privacy" / "plan.py").read_text()
    assert broken_rules("privacy", f"{source}\n{line}\n")


@pytest.mark.parametrize("module", NO_TORCH)
def test_planning_does_without_torch(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def functions_of(path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_loop_of_training_knows_no_privacy():
    """What a step does to the data is the mechanism's: the loop is the same for every kind."""
    functions = functions_of(ROOT / "train.py")
    nodes = [node for name in ("learn", "add_own_share") for node in ast.walk(functions[name])]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {"draw", "capture", "release", "divisor", "statistics"} <= names
    privacy = {"plan", "private", "plain", "eps", "clip", "noise_multiplier", "total_bs"}
    assert not privacy & {name.lower() for name in names}


def test_no_function_of_train_is_longer_than_a_screen_or_two():
    functions = functions_of(ROOT / "train.py").values()
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 110
