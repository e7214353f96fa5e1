"""What else read the private data of a run is found by fingerprints that stay under private/."""

import json
import shutil
from pathlib import Path

import pytest

from privacy_checks import report
from tests.resampling import save_embeddings, unit_vectors
from tests.test_report import PAIRS, PAIRS_PLAN, TRAINING, make_run
from utils.files import write_json
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, compute_epsilon
from utils.privacy.guarantee import rounded_up
from utils.privacy.ledger import HISTOGRAM_LEDGER_FILE, LEDGER_FILE, head_file, record_histogram
from utils.texts.data_sets import rows_fingerprint

TEXTS = [f"text {number}" for number in range(500)]
ROWS = rows_fingerprint(TEXTS)
pytestmark = pytest.mark.usefixtures("short_curves")
HISTOGRAM = SampledGaussian(1.0, 10.0, 1)


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    """A run whose training data is known, in outputs/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    return known_run("outputs/job")


def known_run(folder: str, **facts) -> Path:
    plan = {"plan": PAIRS_PLAN, "recorded": range(1, 26), "checkpoints": (25,)}
    made = make_run(Path(folder), **({} if folder == "outputs/job" else plan))
    write_json(made / "private" / "identity.json", facts or {"rows_fingerprint": ROWS})
    return made


def count_texts(folder: str, texts: list[str] = TEXTS) -> Path:
    """A histogram of the embeddings of texts; its ledger."""
    save_embeddings(Path(folder), unit_vectors(len(texts)), private=True, texts=texts)
    ledger = Path(folder) / HISTOGRAM_LEDGER_FILE
    record_histogram(ledger, num_examples=500, noise_multiplier=10.0, num_bins=9)
    return ledger


def written(*argv: str) -> tuple[dict, str]:
    """The report as JSON and as a page, in a folder that is taken away."""
    assert report.main([*map(str, argv), "--output=out"]) == 0
    texts = [Path("out", f"composed_report.{kind}").read_text() for kind in ("json", "md")]
    shutil.rmtree("out")
    assert not any(ROWS in text for text in texts)
    return json.loads(texts[0]), texts[1]


def epsilon(*events: SampledGaussian) -> float:
    return compute_epsilon(list(events), 1e-5).upper


def test_runs_and_histograms_of_the_same_data_are_named_with_what_all_spent(run, capsys):
    other = known_run("outputs/other", training_data="of tokens", rows_fingerprint=ROWS)
    ledger = count_texts("resampling/mine/private_data")
    known_run("outputs/foreign", rows_fingerprint="another")
    count_texts("resampling/foreign", TEXTS[::-1])
    told, page = written(run)
    assert told["left_out"] == [str(other), str(ledger)]
    spent = epsilon(TRAINING, PAIRS, HISTOGRAM)
    assert told["epsilon_with_left_out"][ADD_REMOVE]["upper"] == spent
    assert told["epsilon"][ADD_REMOVE]["upper"] == epsilon(TRAINING)
    sentence = (
        f"{other}, {ledger}: of the same private data, and left out here; with it epsilon is "
        f"{rounded_up(spent)} ({ADD_REMOVE}) at delta 1e-05"
    )
    assert sentence in page
    assert sentence in capsys.readouterr().out
    # Whichever is named, the others are found.
    assert written(run, "--histogram", ledger)[0]["left_out"] == [str(other)]
    assert written(other)[0]["left_out"] == [str(run), str(ledger)]


def test_a_run_without_a_guarantee_is_named_and_none_of_what_was_spent(run):
    plain = Path("outputs/plain")
    arguments = {"eps": -1, "insecure_fixed_noise_seed": None}
    write_json(plain / "run_config.json", {"arguments": arguments})
    write_json(plain / "private" / "identity.json", {"rows_fingerprint": ROWS})
    assert "without_guarantee" not in written(run)[0]  # it has learnt nothing yet
    (plain / "checkpoints" / "step-000001").mkdir(parents=True)
    found, page = written(run)
    assert found["without_guarantee"] == [str(plain)]
    assert "left_out" not in found
    assert f"{plain} was trained on the same private data without a guarantee" in page


def test_a_ledger_of_another_name_is_found_by_the_selection_that_it_paid_for(run):
    shutil.move(count_texts("resampling/mine"), "kept.jsonl")
    shutil.move("resampling/mine/histogram_ledger.jsonl.head.json", "kept.jsonl.head.json")
    assert "left_out" not in written(run)[0]
    selection = {"ledger": {"path": "kept.jsonl", "lines": 1}}
    Path("resampling/mine/resampling_report.json").write_text(json.dumps(selection))
    assert written(run)[0]["left_out"] == ["kept.jsonl"]


def test_nothing_is_left_out_where_all_is_named_or_unknown(run):
    other, ledger = known_run("outputs/other"), count_texts("embeddings/mine")
    assert "left_out" not in written(run, other, "--histogram", ledger)[0]
    for folder in (run, other):
        shutil.rmtree(folder / "private")
    shutil.rmtree("embeddings/mine/private")
    assert "left_out" not in written(run)[0]


def test_copies_are_no_other_runs_and_a_run_without_a_step_spent_nothing(run, tmp_path):
    shutil.copytree(run, "outputs/copy")
    begun = known_run("outputs/begun")
    ledger = begun / LEDGER_FILE
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    assert "left_out" not in written(run)[0]
    assert "left_out" not in written("outputs/copy")[0]


def test_a_ledger_that_goes_on_after_the_named_copy_of_it_is_found(run):
    ledger = count_texts("resampling/mine")
    shutil.copy(ledger, "copied.jsonl")
    shutil.copy(head_file(ledger), head_file(Path("copied.jsonl")))
    assert "left_out" not in written(run, "--histogram", "copied.jsonl")[0]
    record_histogram(ledger, num_examples=500, noise_multiplier=10.0, num_bins=9)
    told, _ = written(run, "--histogram", "copied.jsonl")
    assert told["left_out"] == [str(ledger)]
    spent = epsilon(TRAINING, HISTOGRAM, HISTOGRAM)
    assert told["epsilon_with_left_out"][ADD_REMOVE]["upper"] == pytest.approx(spent, abs=1e-9)


def test_runs_next_to_a_named_one_are_found_wherever_they_lie(run):
    elsewhere = known_run("elsewhere/job")
    other = known_run("elsewhere/other")
    assert set(written(elsewhere)[0]["left_out"]) == {str(run), str(other)}


def test_what_cannot_be_composed_is_named_all_the_same(run):
    other = known_run("outputs/other")
    lines = (other / LEDGER_FILE).read_text().splitlines(keepends=True)
    (other / LEDGER_FILE).write_text("".join([lines[0], *lines[2:]]))
    told, page = written(run)
    assert (told["left_out"], told["epsilon_with_left_out"]) == ([str(other)], None)
    assert "what all of it spent together is not known: outputs/other/privacy_ledger" in page


def test_the_projects_of_the_script_are_searched(tmp_path, monkeypatch):
    """What another project on the same file spent, and a project's own histogram, from anywhere."""
    mine = known_run("work/one/outputs/instructions", rows_fingerprint=ROWS)
    own = count_texts("work/one/resampling/private_data")
    other = known_run("work/two/outputs/instructions", rows_fingerprint=ROWS)
    for folder in ("work/one/stages", "work/two/stages"):
        Path(folder).mkdir()
    known_run("work/no_project/outputs/instructions", rows_fingerprint=ROWS)
    found = {str(other.resolve()), str(own.resolve())}
    shutil.rmtree("outputs")  # which is searched, too
    assert {*written(mine)[0]["left_out"]} == found
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    mine = tmp_path / mine
    assert {*written(mine)[0]["left_out"]} == found
    # And those here, of a run elsewhere.
    shutil.move(tmp_path / "work", "projects")
    moved = known_run("../away/run", rows_fingerprint=ROWS)
    assert len(written(moved)[0]["left_out"]) == 3
