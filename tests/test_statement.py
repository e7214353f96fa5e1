"""The statement: what it says is the ledger's, checked or declared, and can be computed anew."""

import contextlib
import io
import json
import re

import pytest
import yaml

from privacy_checks import statement
from privacy_checks.composition import composed_report
from privacy_checks.signature import head_of
from tests.test_report import PLAN, make_run
from tests.test_signature import write_keys
from utils.cli import UsageError
from utils.files import write_json
from utils.folders import LOCK_FILE, locked
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, compute_epsilon
from utils.privacy.guarantee import rounded_up
from utils.privacy.ledger import LEDGER_FILE, record_histogram

# Of a tier-3 entry: what a registry asks for, and the entries here that say it.
TIER_3 = {
    "name", "curator", "purpose", "published", "data", "privacy_loss", "neighbours", "unit",
    "flavour", "trust_model", "trust", "not_covered", "accounting", "mechanisms", "randomness",
    "numerics", "side_channels", "access", "retention", "rationale",
}  # fmt: skip


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    """Where a run, a histogram and their statement are."""
    folder = tmp_path_factory.mktemp("stated")
    run, ledger = make_run(folder / "job"), folder / "histogram.jsonl"
    record_histogram(ledger, num_examples=500, noise_multiplier=4.0, num_bins=10)
    made(folder, run, "--histogram", ledger)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "job")


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "histogram.jsonl"
    record_histogram(path, num_examples=500, noise_multiplier=4.0, num_bins=10)
    return path


def made(tmp_path, *words) -> dict:
    """The JSON of a statement in OUTPUT."""
    assert statement.main([*map(str, words), "--output", str(tmp_path / "out")]) == 0
    return read(tmp_path)


def read(folder) -> dict:
    return json.loads((folder / "out" / "statement.json").read_text())


def printed_by(code: str) -> float:
    """What lines of Python print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return float(printed.getvalue())


def test_it_says_what_the_composed_report_says_in_three_formats(stated):
    found = read(stated)
    epsilon = composed_report(stated / "job", [stated / "histogram.jsonl"])["epsilon"][ADD_REMOVE][
        "upper"
    ]
    assert (found["epsilon"], found["delta"]) == (epsilon, PLAN.delta)
    assert found["warnings"] == []
    assert found["follows"] == "NIST SP 800-226"
    page, text = ((stated / "out" / name).read_text() for name in statement.FILES[:2])
    for shown in (page, text):
        assert f"({rounded_up(epsilon)}, 1e-05)-differentially private" in shown
        assert "follows NIST SP 800-226" in shown
        assert "conform" not in shown
        assert str(stated) not in shown
    assert str(stated) not in json.dumps(found)
    assert page.count("<svg") == 1
    assert not re.search(r"https?://|<script", re.sub(r'xmlns="[^"]+"', "", page))
    # In plain words and in the picture: more than a coin, and less than everything.
    (guess,) = re.findall(r"right at most ([\d.]+)% of the time", found["attack"][0])
    assert 50 < float(guess) < 100
    assert len(found["entries"]["mechanisms"]["lines"]) == 2


def test_every_field_of_a_registry_has_a_source_and_nothing_is_invented(stated):
    entries = read(stated)["entries"]
    assert entries.keys() >= TIER_3
    sources = {statement.LEDGER, statement.CHECKED, statement.NOT_DECLARED}
    assert {entry["source"] for entry in entries.values()} == sources
    assert all(entry["lines"] and all(entry["lines"]) for entry in entries.values())
    for name in statement.OWNER:
        assert entries[name]["lines"] == [entries[name]["source"]] == ["not declared"]


def test_what_the_owner_declares_is_marked_and_the_rest_is_not(run, tmp_path):
    owner = tmp_path / "facts.yaml"
    owner.write_text("retention: rows for <30> days\npublished: 2026-11-01\ncontact:\n")
    entries = made(tmp_path, run, "--owner_file", owner)["entries"]
    declared = {n: e["lines"] for n, e in entries.items() if e["source"] == statement.DECLARED}
    assert declared == {"retention": ["rows for <30> days"], "published": ["2026-11-01"]}
    page = (tmp_path / "out" / "statement.html").read_text()
    assert "rows for &lt;30&gt; days" in page


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epsilon: 1", "'epsilon' is none of name, curator"),
        ("retention: [a, b]", "retention is not one text"),
        ("just words", "--help_owner prints one"),
        ("a: b: c", "is not YAML"),
        ("[" * 9000, "is not YAML"),
        ("", "--help_owner prints one"),
    ],
)
def test_an_owner_file_that_says_something_else_is_refused(run, tmp_path, text, named):
    owner = tmp_path / "facts.yaml"
    owner.write_text(text)
    with pytest.raises(UsageError, match=named) as refused:
        made(tmp_path, run, "--owner_file", owner)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "statement.json").exists()


def test_a_statement_is_replaced_by_a_statement_alone(run, tmp_path):
    made(tmp_path, run)
    signature = tmp_path / "out" / statement.SIGNATURE_FILE
    signature.write_text("of the one before")
    with pytest.raises(UsageError, match="statement.html exists; add --overwrite"):
        made(tmp_path, run)
    made(tmp_path, run, "--overwrite")
    assert not signature.exists()
    (tmp_path / "out" / "statement.html").write_text("a page of somebody else")
    with pytest.raises(UsageError, match="exists and is no statement"):
        made(tmp_path, run, "--overwrite")
    with pytest.raises(UsageError, match="statement.md is a file; --output names a folder"):
        statement.require_room(tmp_path / "out" / "statement.md", overwrite=True)


def test_the_owner_file_to_fill_in_is_one(capsys, tmp_path):
    assert statement.main(["--help_owner"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed).keys() == statement.OWNER.keys()
    (tmp_path / "facts.yaml").write_text(printed)
    assert statement.read_owner(tmp_path / "facts.yaml") == {}


def test_epsilon_is_computed_anew_by_the_lines_on_the_page(stated):
    """As a third party would: with what stands in each of the three files, and nothing else."""
    found = read(stated)
    code = found["recompute"]
    assert code.count("\n") < 10
    assert f"```python\n{code}\n```" in (stated / "out" / "statement.md").read_text()
    page = (stated / "out" / "statement.html").read_text()
    (shown,) = re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    assert shown == code
    assert printed_by(code) == pytest.approx(found["epsilon"], abs=0.005)
    # Were a mechanism left out, the figure would be another one.
    assert printed_by(code.replace(", (1.0, 4.0, 1)", "")) < found["epsilon"] - 0.05


@pytest.mark.slow
def test_a_person_with_several_rows_is_computed_anew_too():
    mechanism = {
        "sampling_rate": 0.02, "noise_multiplier": 1.0, "times": 2, "rows_per_unit": 3
    }  # fmt: skip
    code = statement.recomputed_by([mechanism], 1e-5)
    spent = compute_epsilon([SampledGaussian(0.02, 1.0, 2, 3)], 1e-5).upper
    assert printed_by(code.replace("1e-4", "2e-3")) == pytest.approx(spent, abs=0.01)
    assert printed_by(code.replace("1e-4", "2e-3").replace("2, 3)", "2, 1)")) < spent - 0.05


def edited_ledger(run, ledger):
    path = run / LEDGER_FILE
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))


def another_adapter(run, ledger):
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"another")


def another_run_of_the_data(run, ledger):
    other = make_run(run.parent / "other")
    for folder in (run, other):
        write_json(folder / "private" / "identity.json", {"training_data": "the same"})


def a_histogram_of_the_data(run, ledger):
    data = run.parent / "embedded"
    write_json(run / "private" / "identity.json", {"rows_fingerprint": "the same"})
    write_json(data / "private" / "manifest.json", {"texts_sha256": "the same"})
    record_histogram(
        data / "histogram_ledger.jsonl", num_examples=500, noise_multiplier=20.0, num_bins=10
    )


def no_ledger_of_histograms(run, ledger):
    ledger.unlink()


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (edited_ledger, "was edited"),
        (another_adapter, "is another adapter"),
        (another_run_of_the_data, "other.*not named|not named.*other"),
        (a_histogram_of_the_data, "not named: .*histogram_ledger.jsonl"),
        (no_ledger_of_histograms, "no ledger of histograms|without its ledger|histogram"),
    ],
)
def test_what_is_not_in_order_is_refused_in_one_line(run, ledger, tmp_path, harm, named):
    harm(run, ledger)
    with pytest.raises(UsageError, match=named) as refused:
        made(tmp_path, run, "--histogram", ledger)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "statement.json").exists()


def test_a_run_that_goes_on_is_refused_and_what_a_kill_left_is_not(run, tmp_path):
    with locked(run, ""), pytest.raises(UsageError, match="job is in use by another process"):
        made(tmp_path, run)
    (run / LOCK_FILE).touch()
    assert made(tmp_path, run)


def test_there_is_no_statement_without_a_guarantee_or_a_run(tmp_path):
    run = make_run(tmp_path / "job")
    arguments = {"eps": -1, "insecure_fixed_noise_seed": None}
    write_json(run / "run_config.json", {"arguments": arguments})
    with pytest.raises(UsageError, match="has no guarantee to state"):
        made(tmp_path, run)
    with pytest.raises(UsageError, match="name the RUNs"):
        made(tmp_path)


def audit_of(run, **changes):
    """What an audit of a run wrote."""
    bound = {"attack": "losses of the adapter", "assumes": "f-DP", "without_noise": 3.5}
    found = {
        "run": str(run), **head_of(run / LEDGER_FILE), "canaries": 1000, "claimed_epsilon": 1.5,
        "bounds": [bound | {"confidence": 0.95, "epsilon": 0.75},
                   bound | {"confidence": 0.95, "epsilon": 0.5},
                   bound | {"confidence": 0.99, "epsilon": 0.25, "assumes": "<b>"}],
    }  # fmt: skip
    write_json(run.parent / "audit.json", found | changes)
    return run.parent / "audit.json"


def test_an_audit_is_shown_with_bound_power_and_claim(run, tmp_path):
    assert made(tmp_path, run)["audits"] == []
    found = made(tmp_path, run, "--audit", audit_of(run), "--overwrite")
    assert found["audits"] == [
        {"run": "…/job", "through": "losses of the adapter", "canaries": 1000, "at_95": 0.75,
         "at_99": 0.25, "without_noise": 3.5, "claimed": 1.5}
    ]  # fmt: skip
    page, text = ((tmp_path / "out" / name).read_text() for name in statement.FILES[:2])
    shown = ("1,000", "0.750", "0.250", "3.500", "1.500")
    assert all(f"<td>{each}</td>" in page for each in shown)
    assert "at least 0.750 at 95%, 0.250 at 99%; a run without noise would show 3.500" in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ledger": {"lines": 3, "chain": "of another"}}, "of a run that is not named here"),
        ({"claimed_epsilon": 0.2}, "at least 0.250 and 0.200 was claimed"),
        ({"claimed_epsilon": None}, "no result of an audit of a DP run"),
        ({"claimed_epsilon": float("nan")}, "no result of an audit of a DP run"),
        ({"bounds": []}, "no result of an audit of a DP run"),
        ({"bounds": [7]}, "no result of an audit of a DP run"),
    ],
)
def test_another_audit_and_one_that_refutes_the_claim_are_refused(run, tmp_path, changes, named):
    with pytest.raises(UsageError, match=named) as refused:
        made(tmp_path, run, "--audit", audit_of(run, **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "statement.json").exists()


def plain_run(folder, **identity):
    """A run without a guarantee that was trained to its end."""
    arguments = {"eps": -1, "insecure_fixed_noise_seed": None}
    write_json(folder / "run_config.json", {"arguments": arguments})
    write_json(folder / "adapter" / "adapter_config.json", {"r": 8})
    write_json(folder / "private" / "identity.json", identity)
    return folder


def warned_of(folder, found) -> list[str]:
    """The warnings of a statement, each of which stands in all three files."""
    for line in found["warnings"]:
        assert (
            f'<p class="banner" role="alert">{line}.</p>'
            in (folder / "out" / "statement.html").read_text()
        )
        assert f"> **Warning**: {line}." in (folder / "out" / "statement.md").read_text()
    return found["warnings"]


def test_a_run_of_the_same_rows_without_a_guarantee_is_told_of_first(run, tmp_path):
    write_json(run / "private" / "identity.json", {"rows_fingerprint": "the same"})
    plain = plain_run(tmp_path / "plain", rows_fingerprint="the same")
    plain_run(tmp_path / "foreign", rows_fingerprint="another")
    found = made(tmp_path, run)
    (warning,) = warned_of(tmp_path, found)
    assert "plain was trained on the same private data without a guarantee (trained" in warning
    assert warning in found["entries"]["not_covered"]["lines"]
    epsilon = composed_report(run)["epsilon"][ADD_REMOVE]["upper"]
    # Named, it is told of once, though nothing here knows of which data it is.
    (plain / "private" / "identity.json").unlink()
    assert not made(tmp_path, run, "--overwrite")["warnings"]
    named = made(tmp_path, plain, run, "--overwrite")
    assert (warned_of(tmp_path, named), named["epsilon"]) == ([warning], epsilon)
    assert "plain" not in named["promise"]


def test_a_run_of_a_known_seed_is_told_of_and_not_composed(run, tmp_path):
    other = make_run(tmp_path / "other")
    arguments = {"eps": 2.0, "insecure_fixed_noise_seed": 0}
    write_json(other / "run_config.json", {"arguments": arguments})
    for folder in (run, other):
        write_json(folder / "private" / "identity.json", {"rows_fingerprint": "the same"})
    (warning,) = warned_of(tmp_path, made(tmp_path, run))
    assert "other was trained on the same private data without" in warning
    assert "a known seed" in warning


def test_a_run_that_was_stopped_is_told_of_first(tmp_path):
    run = make_run(tmp_path / "job", range(1, 16), checkpoints=(10,), own_report=False)
    found = made(tmp_path, run)
    (warning,) = warned_of(tmp_path, found)
    assert "job was stopped after step 10 of 20: what is stated covers the 15 steps" in warning
    spent = compute_epsilon([SampledGaussian(10 / 500, 1.0, 15)], 1e-5).upper
    assert found["epsilon"] == spent


@pytest.mark.parametrize("arguments", [3, {}, {"eps": 2.0}])
def test_flags_that_were_damaged_are_refused_in_one_line(run, tmp_path, arguments):
    write_json(run / "run_config.json", {"arguments": arguments})
    with pytest.raises(UsageError, match="run_config.json has no '.*'; restore it from a backup"):
        made(tmp_path, run)


def test_a_signed_statement_is_verified_and_a_changed_one_is_not(run, ledger, tmp_path, capsys):
    secret, public = write_keys(tmp_path)
    words = [run, "--histogram", ledger]
    made(tmp_path, *words, "--key", secret)
    check = [*map(str, words), "--output", str(tmp_path / "out"), "--verify_key", str(public)]
    assert statement.main(check) == 0
    page = tmp_path / "out" / "statement.html"
    page.write_text(page.read_text().replace("epsilon", "Epsilon", 1))
    assert statement.main(check) == 1
    assert "statement.html is not what was signed" in capsys.readouterr().err
