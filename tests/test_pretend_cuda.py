"""The tests of a GPU, on the pretend device, in a process of their own."""

import xml.etree.ElementTree as ElementTree

import pytest

from tests import pretend_cuda
from tests.training import run_process


def test_the_gpus_tests_pass_on_the_pretend_device(tmp_path):
    if why := pretend_cuda.missing():
        pytest.skip(why)
    results = tmp_path / "results.xml"
    done = run_process(
        "-m", "tests.pretend_cuda", "-m", "pytest", "tests/test_gpu.py", "-m", "gpu",
        f"--junitxml={results}", "-p", "no:cacheprovider",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    outcomes = {
        case.get("name"): case.find("skipped") is None
        for case in ElementTree.parse(results).iter("testcase")
    }
    skipped = {name.partition("[")[0] for name, ran in outcomes.items() if not ran}
    assert skipped <= {
        "test_texts_are_drawn_by",  # vLLM
        "test_a_row_that_is_left_out_moves_no_other",
        "test_long_rows_of_a_deep_base_have_gradients_of_their_own",
        "test_a_quantised_base_passes_gradients_to_its_adapters",
        "test_two_gpus_train_one_model",
    }
    assert len(outcomes) - len(skipped) >= 15
