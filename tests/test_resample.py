"""Resampling from end to end: what it may know of private data, what it writes, what it spends."""

import json
import os
import re
import shutil
from unittest import mock

import numpy as np
import pytest

from privacy_checks.composition import composed_report
from resample_with_dp_histogram import extract, histogram, release, resample
from resample_with_dp_histogram.clusters import Clusters
from tests.resampling import save_embeddings, unit_vectors
from tests.training import run_process
from utils.cli import UsageError
from utils.files import JsonlAppender, read_jsonl, sha256_of, write_json
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian, compute_epsilon
from utils.privacy.ledger import (
    HISTOGRAM_LEDGER_FILE,
    LEDGER_FILE,
    Ledger,
    head_file,
    read_ledger,
    record_histogram,
)
from utils.privacy.plan import PrivacyPlan
from utils.texts.data_sets import rows_fingerprint
from utils.texts.text_inputs import origins

POOL, PRIVATE, BINS = 400, 120, 8
TEXTS = [f"instruction {number}" for number in range(POOL)]
SKEWED = [0.5, 0.3, 0.1, 0.05, 0.03, 0.02]


@pytest.fixture
def folders(tmp_path):
    """A pool of POOL texts and embeddings, and PRIVATE embeddings of another shape."""
    write_json(tmp_path / "texts.json", TEXTS)
    pool = unit_vectors(POOL, seed=1)
    save_embeddings(tmp_path / "synthetic", pool, private=False, texts=TEXTS)
    private = unit_vectors(PRIVATE, seed=2, weights=SKEWED)
    save_embeddings(tmp_path / "private_data", private, private=True)
    return tmp_path


def flags(folders, output="out", *more):
    return [
        f"--private_embeddings={folders / 'private_data'}",
        f"--synthetic_embeddings={folders / 'synthetic'}",
        f"--synthetic_instructions={folders / 'texts.json'}",
        f"--output={folders / output}", f"--num_bins={BINS}", *more,
    ]  # fmt: skip


def ran(folders, output="out", *more):
    """Run, and return histograms and report."""
    resample.main(flags(folders, output, *more))
    read = [json.loads((folders / output / name).read_text()) for name in (
        "histograms.json", "resampling_report.json",
    )]  # fmt: skip
    return {name: np.array(values) for name, values in read[0].items()}, read[1]


def remove_ledger(folders):
    ledger = folders / "private_data" / HISTOGRAM_LEDGER_FILE
    ledger.unlink()
    head_file(ledger).unlink()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ the guarantee


def test_neighbouring_datasets_share_clusters_and_differ_by_one_in_one_bin(folders):
    """What may see private data: the counts, one row one count; everything else is the same."""
    no_noise = ["--insecure_fixed_noise_seed=0", "--histogram_sigma=0"]
    public = [f"--num_train_examples={PRIVATE}", "--num_samples=100"]
    vectors = unit_vectors(PRIVATE, seed=2, weights=SKEWED)
    whole, report = ran(folders, "whole", *no_noise, *public)
    assert whole["private_noisy"].sum() == PRIVATE
    for left_out in (0, 57, PRIVATE - 1):
        fewer = np.delete(vectors, left_out, axis=0)
        save_embeddings(folders / "private_data", fewer, private=True)
        remove_ledger(folders)
        output = f"without-{left_out}"
        neighbour, other_report = ran(folders, output, *no_noise, *public)
        difference = whole["private_noisy"] - neighbour["private_noisy"]
        assert sorted(difference) == [0] * (BINS - 1) + [1]
        clusters = [(folders / name / "clusters.npz").read_bytes() for name in ("whole", output)]
        assert clusters[0] == clusters[1]
        np.testing.assert_array_equal(whole["synthetic"], neighbour["synthetic"])
        # The total is N, which is public, and not the number of rows that were counted.
        assert neighbour["private"].sum() == pytest.approx(PRIVATE)
        other_report["commands"][-1] = [
            word.replace(str(folders / output), str(folders / "whole"))
            for word in other_report["commands"][-1]
        ]
        volatile = ("ledger", "selection", "outputs_sha256", "total_variation_to_private")
        assert {k: v for k, v in report.items() if k not in volatile} == {
            k: v for k, v in other_report.items() if k not in volatile
        }


def test_a_person_who_is_left_out_moves_the_histogram_by_at_most_1(folders):
    """With one row, 7 or 1,000: by their own weights exactly, and the clusters stay."""
    persons = np.repeat(np.arange(40), [1000, 7] + [1] * 38)
    vectors = unit_vectors(len(persons), seed=2, weights=SKEWED)
    no_noise = ["--insecure_fixed_noise_seed=0", "--histogram_sigma=0", "--unit_column=person"]
    public = ["--num_train_examples=40", "--num_samples=100"]
    save_embeddings(folders / "private_data", vectors, private=True, units=persons)
    whole, report = ran(folders, "whole", *no_noise, *public)
    assert whole["private_noisy"].sum() == pytest.approx(40, abs=1e-5)
    for left_out in (0, 1, 39):
        mine, others = persons == left_out, persons != left_out
        arrays = {"units": persons[others], "vectors": vectors[others]}
        save_embeddings(folders / "private_data", private=True, **arrays)
        remove_ledger(folders)
        neighbour, _ = ran(folders, f"without-{left_out}", *no_noise, *public)
        moved = whole["private_noisy"] - neighbour["private_noisy"]
        with np.load(folders / "whole" / "clusters.npz") as file:
            clusters = Clusters(file["weights"], file["offsets"], 0)
        own = np.bincount(clusters.assign(vectors[mine], ""), minlength=BINS)
        np.testing.assert_allclose(moved, own / mine.sum(), atol=1e-5)
        assert 0 < np.linalg.norm(moved) <= moved.sum() <= 1


def test_n_is_the_number_of_units_wherever_it_counts(folders):
    persons = np.arange(PRIVATE) % 50
    vectors = unit_vectors(PRIVATE, seed=2)
    save_embeddings(folders / "private_data", vectors, private=True, units=persons)
    histograms, report = ran(folders, "out", "--unit_column=person")
    assert histograms["private"].sum() == pytest.approx(50)
    assert report["num_examples"] == report["selection"]["num_samples"] == 50
    assert report["unit"] == (
        "one person: all rows of the train split with the same value of person"
    )
    assert report["unit_column"] == "person"
    assert not any("the unit is a row" in item for item in report["not_covered"])
    assert len(report["not_covered"]) == len(resample.NOT_COVERED) + len(release.NOT_COVERED)
    (event,) = read_ledger(folders / "private_data" / HISTOGRAM_LEDGER_FILE)
    assert (event["num_examples"], event["unit_column"], event["sensitivity"]) == (50, "person", 1)
    # The number of rows is private here: how many a person has.
    text = (folders / "out" / "resampling_report.json").read_text()
    assert str(PRIVATE) not in re.findall(r": (\d+)\b", text)


@pytest.mark.parametrize(
    ("units", "more", "message"),
    [
        (True, [], "no --unit_column: the rows of .* belong to units of 'person'; give"),
        (True, ["--unit_column=chat"], "--unit_column chat: the rows of .* units of 'person'"),
        (False, ["--unit_column=person"], "--unit_column person: .* was embedded without it"),
    ],
)
def test_a_forgotten_or_another_unit_is_refused(folders, units, more, message):
    persons = np.arange(PRIVATE) % 50 if units else None
    save_embeddings(folders / "private_data", unit_vectors(PRIVATE), private=True, units=persons)
    before = contents(folders)
    with pytest.raises(UsageError, match=message):
        resample.main(flags(folders, "out", *more))
    assert contents(folders) == before


def test_all_that_is_released_follows_from_the_noisy_histogram_and_public_data(folders):
    """Other private data with the same noisy histogram leaves every released byte as it is."""
    released = np.array([40.5, -3.25, 20.0, 0.0, 11.0, 30.0, -8.0, 25.0])
    with mock.patch.object(histogram, "noisy_histogram", return_value=released):
        ran(folders, "one", "--num_samples=100")
        remove_ledger(folders)
        save_embeddings(folders / "private_data", unit_vectors(PRIVATE, seed=77), private=True)
        ran(folders, "other", "--num_samples=100")
    one, other = (contents(folders / name) for name in ("one", "other"))
    for path, content in one.items():
        # The chain of a ledger is random.
        if path.name != "resampling_report.json" and path.parent.name != "private":
            assert other[folders / "other" / path.name] == content, path.name


def test_only_what_may_be_released_is_written(folders):
    _, report = ran(folders)
    selected = {"selected.jsonl": sha256_of(folders / "out" / "selected.jsonl")}
    assert report["outputs_sha256"] == selected
    assert {path.name for path in (folders / "out").iterdir()} == {
        "selected.jsonl", "histograms.json", "histograms.png", "clusters.npz",
        "resampling_report.json", "private",
    }  # fmt: skip
    assert {path.name for path in (folders / "private_data").iterdir()} == {
        "private", HISTOGRAM_LEDGER_FILE, f"{HISTOGRAM_LEDGER_FILE}.head.json",
    }  # fmt: skip
    assert (folders / "out" / "histograms.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folders / "out" / "clusters.npz") as file:
        assert {name: file[name].shape for name in file} == {
            "weights": (16, BINS), "offsets": (BINS,), "synthetic_bins": (POOL,),
        }  # fmt: skip


def test_the_fingerprint_of_the_private_rows_goes_to_a_folder_of_their_owner_alone(folders):
    rows = [f"private row {number}" for number in range(PRIVATE)]
    save_embeddings(folders / "private_data", unit_vectors(PRIVATE), private=True, texts=rows)
    before = os.umask(0)
    try:
        ran(folders)
    finally:
        os.umask(before)
    private = folders / "out" / "private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in private.iterdir()} == {"identity.json", "README.md"}
    identity = json.loads((private / "identity.json").read_text())
    assert identity == {"rows_fingerprint": rows_fingerprint(rows)}
    released = [content for path, content in contents(folders / "out").items()
                if path.parent == folders / "out"]  # fmt: skip
    assert len(released) == 5
    assert not any(identity["rows_fingerprint"].encode() in content for content in released)


def test_the_noise_is_fresh_and_the_seed_does_not_reach_it(folders):
    histograms = [ran(folders, str(number), "--num_samples=50")[0] for number in range(2)]
    noise = [found["private_noisy"] for found in histograms]
    assert not np.isclose(*noise).any()
    np.testing.assert_array_equal(*(found["synthetic"] for found in histograms))
    assert np.abs(noise[0] - noise[1]).max() < 10 * 10


def test_a_known_noise_is_allowed_for_tests_and_marks_the_output(folders, capsys):
    fixed = "--insecure_fixed_noise_seed=3"
    one, report = ran(folders, "one", fixed)
    other, _ = ran(folders, "other", fixed)
    np.testing.assert_array_equal(one["private_noisy"], other["private_noisy"])
    assert report["guarantee"] is False
    assert report["covered"] == []
    assert read_ledger(folders / "private_data" / HISTOGRAM_LEDGER_FILE)[0]["insecure"] is True
    assert "NO GUARANTEE" in capsys.readouterr().err


# ------------------------------------------------------------------ the ledger


def make_run(folder, plan):
    """The public part of a finished run's folder."""
    arguments = {"eps": plan.target_epsilon, "insecure_fixed_noise_seed": None}
    write_json(folder / "run_config.json", {"arguments": arguments})
    ledger = Ledger(folder / LEDGER_FILE, plan)
    for step in range(1, plan.steps + 1):
        ledger.record_step(step)
    ledger.close()
    return folder


def test_training_and_histogram_compose_in_one_report(folders, tmp_path):
    """Fails if the event is missing, or recorded with another sigma, sensitivity or N."""
    plan = PrivacyPlan(
        num_examples=PRIVATE, expected_batch_size=12, steps=20, clip_norm=1.0,
        clip_function="flat", loss_normalization="tokens", noise_multiplier=1.0, delta=1e-4,
        target_epsilon=8.0,
    )  # fmt: skip
    run = make_run(tmp_path / "run", plan)
    ran(folders, "one")
    ran(folders, "two", "--histogram_sigma=5")
    ledger = folders / "private_data" / HISTOGRAM_LEDGER_FILE
    # What is released of a histogram knows how long the ledger was with it.
    for lines, name in enumerate(("one", "two"), start=1):
        report = json.loads((folders / name / "resampling_report.json").read_text())
        chain = read_ledger(ledger)[lines - 1]["chain"]
        assert report["ledger"] == {"path": str(ledger), "lines": lines, "chain": chain}
    composed = composed_report(run, [ledger])
    events = [
        SampledGaussian(0.1, 1.0, 20), SampledGaussian(1.0, 10.0, 1), SampledGaussian(1.0, 5.0, 1),
    ]  # fmt: skip
    assert composed["epsilon"][ADD_REMOVE]["upper"] == compute_epsilon(events, 1e-4).upper
    assert composed["epsilon"][ADD_REMOVE]["upper"] > compute_epsilon(events[:1], 1e-4).upper


def test_at_the_setting_of_the_paper_the_histogram_costs_two_hundredths(tmp_path):
    plan = PrivacyPlan(
        num_examples=180_000, expected_batch_size=4096, steps=439, clip_norm=0.5,
        clip_function="flat", loss_normalization="max_seq_len", noise_multiplier=0.81,
        delta=5e-7, target_epsilon=5.94,
    )  # fmt: skip
    run = make_run(tmp_path / "run", plan)
    ledger = tmp_path / "histogram.jsonl"
    record_histogram(ledger, num_examples=180_000, noise_multiplier=10.0, num_bins=1000)
    alone, together = (
        composed_report(run, histograms)["epsilon"][ADD_REMOVE] for histograms in ([], [ledger])
    )
    # What two accountants agree on; the second opinion has its error on top.
    assert alone["estimate"] == pytest.approx(5.8889, abs=5e-4)
    assert alone["pld"] == pytest.approx(5.8889, abs=5e-4)
    assert together["estimate"] == pytest.approx(5.9086, abs=5e-4)
    assert together["pld"] == pytest.approx(5.9086, abs=5e-4)
    assert together["upper"] == together["pld"]
    assert together["prv"] == pytest.approx(5.9086, abs=0.011)


def test_the_event_is_recorded_before_the_noise_is_drawn(folders):
    with (
        mock.patch.object(histogram, "noisy_histogram", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        resample.main(flags(folders))
    (event,) = read_ledger(folders / "private_data" / HISTOGRAM_LEDGER_FILE)
    assert (event["noise_multiplier"], event["num_bins"], event["num_examples"]) == (10, BINS, 120)
    assert not (folders / "out").exists()


# ------------------------------------------------------------------ the selection


def test_the_selection_follows_the_private_histogram(folders):
    histograms, report = ran(folders, "out", "--histogram_sigma=0.5", "--num_samples=60")
    distance = report["total_variation_to_private"]
    assert distance["selected"] < 0.05 < 0.3 < distance["synthetic"]
    rows = list(read_jsonl(folders / "out" / "selected.jsonl"))
    assert [row["instruction"] for row in rows] == [TEXTS[row["row"]] for row in rows]
    assert len({row["row"] for row in rows}) == 60
    counted = np.bincount([row["bin"] for row in rows], minlength=BINS)
    np.testing.assert_array_equal(counted, histograms["selected"])


def test_a_selected_row_leads_back_to_its_samples_line(folders, tmp_path):
    """Sampling folder, extraction, selection: through the rows that extraction drops."""
    texts = [("cut", "length") if n % 50 == 7 else (TEXTS[n], "stop") for n in range(POOL)]
    for rank in (1, 0):
        lines = [
            {"id": n, "prompt": "", "text": text, "num_tokens": 2, "finish_reason": reason}
            for n, (text, reason) in enumerate(texts)
            if n % 2 == rank
        ]
        shard = tmp_path / "sampled" / f"shard-{rank}.jsonl"
        with JsonlAppender(shard) as file:
            file.append(lines[::-1] + [lines[3] | {"id": POOL + rank}])  # a duplicate
    (tmp_path / "more.txt").write_text("one more\nand another\n")
    sources = [str(tmp_path / "more.txt"), str(tmp_path / "sampled")]
    extract.main(["--instructions", *sources, f"--output={tmp_path / 'extracted'}"])
    pool = list(read_jsonl(tmp_path / "extracted" / "instructions.jsonl"))
    assert [row["row"] for row in pool] == list(range(len(pool)))
    assert len(pool) == POOL - 8 + 2
    pool_texts = [row["instruction"] for row in pool]
    vectors = unit_vectors(len(pool), seed=1)
    save_embeddings(folders / "synthetic", vectors, private=False, texts=pool_texts)
    resample.main(
        [
            *flags(folders, "out", f"--num_samples={len(pool)}"),
            f"--synthetic_instructions={tmp_path / 'extracted' / 'instructions.jsonl'}",
        ]
    )
    selected = list(read_jsonl(folders / "out" / "selected.jsonl"))
    assert sorted(row["row"] for row in selected) == list(range(len(pool)))
    for row in selected:
        assert {name: row[name] for name in pool[0]} == pool[row["row"]]
        if row["shard"] is None:
            assert (row["sample_id"], row["row"] < 2) == (None, True)
            continue
        (sample,) = (
            sample for sample in read_jsonl(row["shard"]) if sample["id"] == row["sample_id"]
        )
        assert sample["text"] == row["instruction"]


def test_a_pool_of_samples_or_of_bare_texts_is_traced_as_far_as_it_goes(tmp_path):
    (tmp_path / "shard-0.jsonl").write_text(
        '{"id": 4, "text": "a", "finish_reason": "length"}\n'
        '{"id": 9, "text": "b", "finish_reason": "stop"}\n'
    )
    shard = str(tmp_path / "shard-0.jsonl")
    for source in (tmp_path, tmp_path / "shard-0.jsonl"):
        assert origins(str(source), None, cut=True) == [(4, shard), (9, shard)]
        assert origins(str(source), None, cut=False) == [(9, shard)]
    foreign = '{"instruction": "a", "sample_id": {}, "shard": 5}\n\n"b"\n{"text": "c"}'
    (tmp_path / "texts.jsonl").write_text(foreign)
    assert origins(str(tmp_path / "texts.jsonl"), None, cut=False) == [(None, None)] * 3


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(json.dumps({"instruction": text}) for text in TEXTS),  # the last line has no end
        "".join(json.dumps(text) + "\n\n" for text in TEXTS),
        json.dumps(TEXTS),
    ],
    ids=["no final newline", "bare texts and blank lines", "a list"],
)
def test_a_pool_in_any_form_that_is_read_is_selected_from(folders, content):
    """No budget is spent on a pool whose rows are counted otherwise in the end."""
    (folders / "pool.jsonl").write_text(content)
    pool = f"--synthetic_instructions={folders / 'pool.jsonl'}"
    resample.main([*flags(folders, "out", f"--num_samples={POOL}"), pool])
    selected = list(read_jsonl(folders / "out" / "selected.jsonl"))
    assert sorted(row["row"] for row in selected) == list(range(POOL))
    extract.main([f"--instructions={folders / 'pool.jsonl'}", f"--output={folders / 'kept'}"])
    kept = list(read_jsonl(folders / "kept" / "instructions.jsonl"))
    assert [row["instruction"] for row in kept] == TEXTS


def test_the_size_defaults_to_the_number_of_private_rows(folders):
    histograms, report = ran(folders)
    assert report["selection"]["num_samples"] == histograms["selected"].sum() == PRIVATE
    assert report["num_examples"] == PRIVATE
    histograms, report = ran(folders, "other", "--num_samples=300")
    assert histograms["selected"].sum() == 300
    # The largest private bin wants half of these, and the pool has a sixth of its rows in each.
    assert report["selection"]["overflow"] > 20


def test_conditional_selection_exceeds_the_shape_of_the_pool(folders):
    # The largest bin wants half of these, 450 give or take 16 by the noise and the draw, of 600.
    size = ["--num_samples=900", "--histogram_sigma=0.5"]
    histograms, report = ran(
        folders, "out", "--select=histogram_conditional", "--max_copies=10", *size
    )
    assert histograms["selected"].sum() == 900
    assert report["selection"]["overflow"] == 0
    assert report["total_variation_to_private"]["selected"] < 0.1
    ids = [row["row"] for row in read_jsonl(folders / "out" / "selected.jsonl")]
    assert 2 < np.bincount(ids).max() <= 10
    assert report["selection"]["distinct_rows"] == len(set(ids)) < POOL


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--histogram_sigma=0"], "--histogram_sigma 0 gives no guarantee"),
        (["--histogram_sigma=-1"], "--histogram_sigma -1 gives no guarantee"),
        (["--histogram_sigma=nan"], "--histogram_sigma nan gives no guarantee"),
        (["--histogram_sigma=0.1"], "--histogram_sigma 0.1 gives no guarantee"),
        (["--histogram_sigma=-1", "--insecure_fixed_noise_seed=1"], "gives no guarantee"),
        ([f"--num_bins={POOL + 1}"], "too few for 401 clusters; lower --num_bins"),
        ([f"--num_samples={POOL + 1}"], "401 rows cannot be selected out of 400"),
        (
            [f"--num_samples={4 * POOL + 1}", "--select=histogram_conditional"],
            "1,601 rows cannot be selected out of 400, each at most 4 times",
        ),
    ],
)
def test_meaningless_settings_are_refused_before_anything_is_spent(folders, more, message):
    before = contents(folders)
    with pytest.raises(UsageError, match=message):
        resample.main(flags(folders, "out", *more))
    assert contents(folders) == before


def replace(kind, vectors, **changes):
    def write(folders):
        name = "private_data" if kind == "private" else "synthetic"
        save_embeddings(folders / name, vectors, private=kind == "private", **changes)

    return write


def damaged(rows, seed):
    vectors = unit_vectors(rows, seed=seed)
    vectors[5, 3] = np.nan
    return vectors


BAD = {
    "other model": (
        replace("private", unit_vectors(PRIVATE), model_fingerprint="x", model="another"),
        "with model_fingerprint x, not .*; embed both with the same model",
    ),
    "other count": (
        replace("synthetic", unit_vectors(POOL - 1), texts=TEXTS[1:]),
        "400 instructions and .* 399 embeddings",
    ),
    "other texts": (
        replace("synthetic", unit_vectors(POOL), texts=TEXTS[::-1]),
        "embeddings of other texts",
    ),
    "unfinished": (
        replace("private", unit_vectors(PRIVATE), num_embedded=64),
        "64 of 120 embeddings",
    ),
    "NaN, synthetic": (
        replace("synthetic", damaged(POOL, 1), texts=TEXTS), r"synthetic, row 5 .* NaN",
    ),
    "NaN, private": (replace("private", damaged(PRIVATE, 2)), r"private_data, row 5 .* NaN"),
    "damaged units": (
        lambda folders: (
            save_embeddings(
                folders / "private_data", unit_vectors(PRIVATE), private=True,
                units=np.zeros(PRIVATE, dtype=np.int64),
            ),
            np.save(folders / "private_data/private/units.npy", np.arange(PRIVATE)),
        ),
        "units.npy holds other units than manifest.json next to it says",
    ),
    "no units": (
        replace("private", unit_vectors(PRIVATE), unit_column="person"),
        "units.npy cannot be read: .*; embed the texts again",
    ),
    "public as private": (
        lambda folders: (
            shutil.rmtree(folders / "private_data"),
            save_embeddings(folders / "private_data", unit_vectors(PRIVATE), private=False),
        ),
        "made as public ones, not as private",
    ),
    "ledger of another dataset": (
        lambda folders: record_histogram(
            folders / "private_data" / HISTOGRAM_LEDGER_FILE, num_examples=9,
            noise_multiplier=10.0, num_bins=8,
        ),
        "of a private dataset of 9 examples, not of 120",
    ),
    "output is there": (
        lambda folders: (folders / "out").mkdir(), "--output .* exists; name another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_spent_or_written(folders, case):
    damage, message = BAD[case]
    damage(folders)
    before = contents(folders)
    with pytest.raises(UsageError, match=message) as refused:
        resample.main(flags(folders))
    assert "\n" not in str(refused.value)
    assert contents(folders) == before


def test_the_real_command_ends_with_one_line_and_code_2(folders):
    command = ["-m", "resample_with_dp_histogram.resample", *flags(folders, "out")]
    done = run_process(*command, "--histogram_sigma=0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --histogram_sigma 0 gives no guarantee")
    done = run_process(*command)
    assert done.returncode == 0, done.stderr
    assert "python -m privacy_checks.report RUN --histogram" in done.stderr
