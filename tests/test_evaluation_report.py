"""The page about a pipeline: what it says, what it must not say, and how it looks."""

import contextlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import inference
from evaluation import report
from evaluation.page.printing import markdown, percent
from evaluation.page.project import with_project
from evaluation.results import Result, Score, write_result
from privacy_checks import composition
from query_gpt35_for_annotation import annotate
from resample_with_dp_histogram import extract
from tests import training
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.report_folders import (
    ANSWER,
    LEDGER,
    file_hashes,
    make_folders,
    read_real_rows,
    rehash,
)
from utils.cli import UsageError, run_cli
from utils.command_line.parser import read_flags
from utils.files import JsonlAppender, read_jsonl, write_json
from utils.privacy.accounting import SampledGaussian, compute_delta, compute_epsilon
from utils.privacy.guarantee import rounded_up
from utils.privacy.ledger import read_plan, record_histogram

CHROMIUM = "/usr/bin/chromium"
MARKER = "PLANTED-in-a-private-file"
PLANTED_LOSS, SHOWN_LOSS = 7654321.0, "7.654e+06"
PRIVATE_QUESTION = "what did patient zero say"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_dir):
    """A folder in which the pipeline ran, with a marker in every private file; and the flags."""
    folder = tmp_path_factory.mktemp("alice_home")
    # Results keep the command line, and that of the tests may name what must not be on the page.
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["tests"]):
        argv = make_folders(tiny_model_dir)
        for path in sorted(path for path in Path().glob("**/private/**/*") if path.is_file()):
            plant(path)
    return folder, argv


def plant(path: Path) -> None:
    """Put a marker into a private file, where its reader would find it."""
    if path.name == "metrics.jsonl":
        with JsonlAppender(path) as file:
            file.append([{"step": 9, "train_loss": PLANTED_LOSS, "seconds": 1.0}])
    elif path.parent.parent.name == "results" and path.suffix == ".json":
        result = json.loads(path.read_text())
        result["notes"].append(f"{MARKER} {path.name}")
        result["scores"].append(result["scores"][0] | {"subject": f"{MARKER} score {path.name}"})
        write_json(path, result)
    else:
        with open(path, "ab") as file:
            file.write(MARKER.encode())


@pytest.fixture
def folders(made, tmp_path, monkeypatch):
    """A copy of `made` to work in; the flags."""
    shutil.copytree(made[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return list(made[1])


def page_of(argv: list[str], *more: str, code: int = 0) -> tuple[str, str]:
    """HTML and Markdown of the page with these flags."""
    shutil.rmtree("out", ignore_errors=True)
    assert report.main([*argv, "--output", "out", *more]) == code
    place = Path("out/private/report-internal" if "--internal" in more else "out/report")
    return place.with_suffix(".html").read_text(), place.with_suffix(".md").read_text()


class Reader(html.parser.HTMLParser):
    """Elements, ids and cells of a page; fails on a tag that is not closed in order."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.ids, self.links, self.cells, self._open = [], [], [], [], []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        assert not [name for name in values if name.startswith("on")]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("td", "li", "blockquote", "dd"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "li", "blockquote", "dd"):
            self.cells[-1] += data


@pytest.mark.parametrize("more", [[], ["--internal"]])
def test_a_project_is_what_its_folders_are(folders, more):
    argv = ["--project", ".", "--synthetic_runs", "outputs/synthetic_answers", "--output", "out"]
    found = read_flags(report.Settings, None, [*argv, *more])
    named = vars(read_flags(report.Settings, None, [*folders, "--output", "out", *more]))
    for name, value in vars(with_project(found, Path())).items():
        if name != "project":
            expected = named[name]
            assert value == (sorted(expected) if isinstance(expected, list) else expected)


def test_a_run_without_privacy_in_a_project_takes_the_guarantee_away(folders, capsys):
    """Nothing here shows that the rows of outputs/synthetic_answers were synthetic."""
    assert "trained without differential privacy" in "".join(page_of(["--project", "."], code=1))
    with pytest.raises(UsageError, match="name the RUNs, or the folder that they are in"):
        report.main(["--output", "out"])


# ------------------------------------------------------------------ what it says


def test_the_guarantee_is_of_all_runs_and_histograms_together(folders):
    plans = [
        read_plan(f"outputs/{name}/privacy_ledger.jsonl") for name in ("instructions", "answers")
    ]
    events = [event for plan in plans for event in plan.events(4)] + [SampledGaussian(1.0, 10.0, 1)]
    page, text = page_of(folders)
    epsilon = compute_epsilon(events, 1e-3).upper
    best = (1 + compute_delta(events, 0.0)) / 2
    for content in (page, text):
        assert f"({rounded_up(epsilon)}, 0.001)-differentially private" in content
        assert "The chain has no key: it shows accidents, not a dishonest curator" in content
        found = re.search(r"is right at most ([\d.]+)%", content)
        assert best <= float(found[1]) / 100 <= best + 1.01e-4


def test_more_than_a_run_was_planned_for_is_said_first_and_exits_1(folders, capsys):
    assert "ABOVE TARGET" not in "".join(page_of(folders))
    record_histogram("more.jsonl", num_examples=64, noise_multiplier=1.0, num_bins=4)
    folders.insert(folders.index(LEDGER), "more.jsonl")
    said = "outputs/answers was planned for 3."
    for more, code in (([], 1), (["--allow_above_target"], 0)):
        capsys.readouterr()
        for content in page_of(folders, *more, code=code):
            assert content.index("ABOVE TARGET") < content.index("-differentially private")
            assert said in content
        err = capsys.readouterr().err
        assert said in err
        assert ("add --allow_above_target" in err) == bool(code)


def test_n_stands_next_to_every_figure(folders):
    _, text = page_of(folders, "--internal")
    tables = [line for line in text.splitlines() if line.startswith("| measure | of |")]
    assert len(tables) == 4
    assert all(line.startswith("| measure | of | n | value |") for line in tables)
    assert "| win rate | answers | 1,234 | 0.58 | 0.49 to 0.66 |" in text
    # A result of an earlier version.
    assert "| win rate | base | not on record | 0.5 |" in text


def test_the_two_bounds_on_the_page_are_reconciled(folders):
    """How often a guess is right, and how sure the rarest outcome makes, look like a conflict."""
    for content in page_of(folders):
        (guess,) = set(re.findall(r"is right at most ([\d.]+%) of the time", content))
        found = re.search(
            r"Both hold: ([\d.]+%) is how often the best guess is right over all .*; ([\d.]+%) is "
            r"how sure somebody who believed 50% before can become .* outcomes are rare",
            content,
        )
        assert found[1] == guess
        assert float(found[2][:-1]) > float(guess[:-1])
        assert content.count(found[2]) > 1  # in the table of the odds, too


def test_the_curve_of_epsilon_names_each_run(folders):
    page, text = page_of(folders)
    (chart,) = [svg for svg in page.split("<svg ") if "epsilon at delta" in svg]
    (words,) = [line for line in text.splitlines() if line.startswith("*Privacy spent over")]
    for name in ("1. outputs/instructions", "2. outputs/answers"):
        assert f">{name}</text>" in chart  # in the legend
        assert f"{name}: from" in words
    assert len(set(re.findall(r'<use href="#(m\w+)"', chart))) > 2  # ticks, and a mark each run


def test_odds_guesses_and_several_rows_are_said_as_they_are(folders):
    composed = composition.composed_report(
        [Path("outputs/instructions"), Path("outputs/answers")], [Path(LEDGER)]
    )
    more = composed["epsilon"]["add_or_remove_one"]["probability_of_more"]
    assert more > 1.5 * composed["delta"]
    page, text = (re.sub(r"\s+", " ", content) for content in page_of(folders))
    for content in (page, text):
        assert f"except with probability about {more:.2g}, that of a privacy loss" in content
        assert "chance of about delta" not in content
        assert "cannot break ChaCha20" in content
        assert "unlimited computers" not in content
        assert content.count("rom even odds") >= 2
        assert "N is the published size" in content
    for each in composed["rows_of_one_person"]:
        assert f"| {each['rows']} | {rounded_up(each['epsilon'], '.2f')} |" in text
    assert len(composed["rows_of_one_person"]) == 5


def test_html_and_markdown_hold_the_same_facts(folders):
    for more in ([], ["--internal", "--real", "letters", "--split", "train"]):
        page, text = page_of(folders, *more)
        cells = Reader(page).cells
        assert len(cells) > 60
        for cell in cells:
            assert markdown(cell) in text


def test_every_stage_is_there_with_its_numbers(folders):
    page, _ = page_of(folders)
    extraction = json.loads(Path("synthetic/preparation.json").read_text())
    selection = json.loads(Path("selected/resampling_report.json").read_text())
    for content in (
        "64 rows, expected batch 8, 4 of 4 steps",
        "outputs/synthetic_answers was trained without differential privacy on synthetic data",
        "80 asked for, 80 drawn",
        f"{extraction['kept']} distinct instructions kept",
        f"of {selection['selection']['pool']} over 4 bins",
        "asked 8 instructions: 8 ok; 80 prompt and 160 answer tokens; $0.0003",
        f"{percent(selection['total_variation_to_private']['selected'])} of them would have to be",
        "answers: a judge preferred its answers in 58% of 1,234 pairs (49% to 66%); 50% is a draw.",
        f"Selecting 8 of {selection['selection']['pool']} synthetic texts",
        "not told apart from the control",
        "better than the control",
        "python -m privacy_checks.report outputs/instructions outputs/answers --histogram",
        "accelerate launch inference.py --model_name",
        "python -m resample_with_dp_histogram.extract --instructions inference_outputs/instruct",
        "python -m resample_with_dp_histogram.resample --private_embeddings private_data --synth",
        "python -m query_gpt35_for_annotation.annotate --instructions selected/selected.jsonl "
        "--output annotations --max_tokens 64",
        "python -m evaluation.report outputs/instructions outputs/answers --histogram",
        "<h1>Synthetic instructions learnt from letters and labelled_letters</h1>",
        "run 2 begins",
    ):
        assert content in html.unescape(page), content
    assert ANSWER in page
    page, text = page_of(folders, "--overwrite", "--data_name", "our <support> letters")
    assert "<h1>Synthetic instructions learnt from our &lt;support&gt; letters</h1>" in page
    assert re.search(r"\nMade on \d+ \w+ 20\d\d", text)


def test_the_internal_page_has_what_is_private_and_says_so(folders):
    page, text = page_of(folders, "--internal", "--real", "letters", "--split", "train")
    real = read_real_rows()[:6]
    for content in (page, text):
        assert "Do not share it" in content
        assert f"{MARKER} distribution.json" in content
        assert f"{MARKER} score memorisation.json" in content
        assert SHOWN_LOSS in content
        assert "s in its steps" in content
        assert PRIVATE_QUESTION in content
        assert real[3].strip() in content
    assert "noise" in Path("out/private/README.md").read_text()
    assert not Path("out/report.html").exists()


# ------------------------------------------------------------------ what it must not say


def test_the_page_for_release_is_the_same_without_anything_private(folders, capsys):
    pages = page_of(folders)
    assert "-differentially private for adding or removing one" in capsys.readouterr().out
    for path in [*Path().glob("**/private"), Path("letters"), Path("labelled_letters"),
                 Path("questions.txt")]:  # fmt: skip
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not [path for path in Path().rglob("*") if "private" in path.parts]
    assert page_of(folders) == pages


def test_nothing_from_a_private_file_is_on_the_page_for_release(folders):
    hidden = [MARKER, SHOWN_LOSS, PRIVATE_QUESTION, "MAUVE", "exposure"]
    hidden += [row for row in read_real_rows() if len(row) > 8]
    assert len(hidden) > 40
    answers = [sample["text"] for sample in read_jsonl("inference_outputs/answers/shard-0.jsonl")]
    hidden += [line for text in answers for line in text.splitlines() if len(line) > 8]
    for content in page_of(folders):
        for text in hidden:
            assert text not in content
        assert "Nothing of inference_outputs/answers is shown" in content


def test_prompts_that_are_public_are_shown_where_the_user_says_so(folders):
    page, _ = page_of(folders, "--public_prompts")
    assert PRIVATE_QUESTION in page
    assert "inference_outputs/answers is shown" not in page


def test_answers_are_shown_if_every_prompt_is_synthetic(folders):
    selected = [row["instruction"] for row in read_jsonl("selected/selected.jsonl")]
    path = Path("inference_outputs/answers/shard-0.jsonl")
    samples = list(read_jsonl(path))
    for sample, prompt in zip(samples, selected):
        sample |= {"prompt": prompt, "text": "an answer to a synthetic prompt"}
    path.write_text(jsonl(samples))
    rehash()
    page, _ = page_of(folders)
    assert page.count("an answer to a synthetic prompt") == len(samples)
    assert "inference_outputs/answers is shown" not in page


def test_texts_that_equal_private_prompts_are_neither_shown_nor_counted(folders):
    """Which of twenty private prompts the pool holds, or how many, is a fact about them."""
    equal = list(dict.fromkeys(row["instruction"] for row in read_jsonl("selected/selected.jsonl")))
    prompts = [*equal[:3], *(f"{PRIVATE_QUESTION} {number}" for number in range(17))]
    path = Path("inference_outputs/answers/shard-0.jsonl")
    first = next(read_jsonl(path))
    samples = [
        first | {"id": number, "prompt": prompt, "text": f"private answer {number}"}
        for number, prompt in enumerate(prompts)
    ]
    path.write_text(jsonl(samples))
    manifest = Path("inference_outputs/answers/manifest.json")
    write_json(manifest, json.loads(manifest.read_text()) | {"num_samples": 20})
    rehash()
    folders += ["--num_shown", "80"]
    page_of(folders)
    for file in sorted(path for path in Path("out").rglob("*") if path.is_file()):
        content = file.read_text()
        assert "private answer" not in content
        assert PRIVATE_QUESTION not in content
        assert "Nothing of inference_outputs/answers is shown" in content
        (stage,) = re.findall(r"^.*inference_outputs/answers: from.*$", content, re.MULTILINE)
        assert "not shown, since its prompts may be private" in stage
        assert not re.search(r"\b(3|17|20)\b", stage)


# ------------------------------------------------------------------ the chain of hashes


def test_private_rows_in_the_form_of_samples_do_not_reach_the_page(folders, capsys):
    rows = [
        {"id": number, "prompt": "", "text": text, "finish_reason": "stop", "num_tokens": 9}
        for number, text in enumerate(read_real_rows())
    ]
    Path("fake").mkdir()
    Path("fake/shard-0.jsonl").write_text(jsonl(rows))
    extract.main(["--instructions", "fake", "--output", "extracted"])
    folders[folders.index("synthetic")] = "extracted"
    line = refused([*folders, "--output", "out"], capsys)
    assert "--extraction extracted: made of fake/shard-0.jsonl, which leads back to no run" in line
    assert "name the --samples that wrote it, or leave --extraction out" in line
    # Nor as a further shard of a folder that was sampled.
    folders[folders.index("extracted")] = "synthetic"
    shutil.copy("fake/shard-0.jsonl", "inference_outputs/instructions/shard-1.jsonl")
    line = refused([*folders, "--output", "out"], capsys)
    assert "inference_outputs/instructions: shard-1.jsonl is not what manifest.json says" in line
    assert not Path("out").exists()


def test_private_rows_of_a_text_file_do_not_reach_the_page(folders, capsys):
    Path("rows.txt").write_text("\n".join(row.strip() for row in read_real_rows()))
    extract.main(["--instructions", "rows.txt", "--output", "extracted"])
    folders[folders.index("synthetic")] = "extracted"
    line = refused([*folders, "--output", "out"], capsys)
    assert "made of rows.txt, which leads back to no run named here" in line


def test_a_selection_from_another_runs_samples_is_refused(folders, capsys):
    shutil.copytree("inference_outputs/instructions", "another_run")
    shard = Path("another_run/shard-0.jsonl")
    shard.write_text(shard.read_text().replace('"text": "', '"text": "x'))
    extract.main(["--instructions", "another_run", "--output", "extracted"])
    report_file = Path("selected/resampling_report.json")
    content = json.loads(report_file.read_text())
    hashes = json.loads(Path("extracted/preparation.json").read_text())["outputs_sha256"]
    source = {"extracted/instructions.jsonl": hashes["instructions.jsonl"]}
    write_json(report_file, content | {"inputs_sha256": source})
    line = refused([*folders, "--output", "out"], capsys)
    assert "--selection selected: made of extracted/instructions.jsonl, which leads back" in line
    # The extraction that it was made of leads to samples that are not named.
    folders[folders.index("synthetic")] = "extracted"
    line = refused([*folders, "--output", "out"], capsys)
    assert "--extraction extracted: made of another_run/shard-0.jsonl" in line


def test_texts_that_were_changed_afterwards_are_refused(folders, capsys):
    for file, flag in (("inference_outputs/instructions/shard-0.jsonl", "samples"),
                       ("synthetic/instructions.jsonl", "extraction"),
                       ("selected/selected.jsonl", "selection")):  # fmt: skip
        path = Path(file)
        before = path.read_bytes()
        path.write_bytes(before.replace(b'"', b' "', 1))
        line = refused([*folders, "--output", "out"], capsys)
        assert f"--{flag} {path.parent}: {path.name} is not what" in line
        path.write_bytes(before)
    page_of(folders)


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ("inference_outputs/instructions/manifest.json", "give its inference command again"),
        ("synthetic/preparation.json", "run extract again, with another --output"),
        ("selected/resampling_report.json", "select again from what extract writes now"),
        ("annotations/manifest.json", "give its annotate command again"),
    ],
)
def test_what_an_earlier_version_wrote_is_refused_with_a_remedy(folders, capsys, record, remedy):
    path = Path(record)
    content = json.loads(path.read_text())
    for name in ("inputs_sha256", "outputs_sha256"):
        content.pop(name, None)
    write_json(path, content)
    line = refused([*folders, "--output", "out"], capsys)
    assert f"{path.parent}: its {path.name} has no" in line
    assert remedy in line
    assert PRIVATE_QUESTION in page_of(folders, "--internal")[0]


def test_the_remedies_of_sampling_and_annotating_work(folders, tiny_model_dir):
    """The same command draws and asks nothing that is there, and adds the hashes."""
    path = Path("inference_outputs/instructions/manifest.json")
    whole = json.loads(path.read_text())
    write_json(path, {name: whole[name] for name in whole if name != "outputs_sha256"})
    assert training.in_process(inference.main, [
        f"--model_name={tiny_model_dir}", "--max_seq_len=100", "--seed=3",
        f"--instruction_file={ROOT / 'utils/syn_instruct.txt'}",
        "--adapter_path=outputs/instructions/adapter", "--job_sess=instructions",
        "--prompt_style=uncond_generation", "--num_samples=80",
    ]) == 0  # fmt: skip
    assert json.loads(path.read_text()) == whole
    path = Path("annotations/manifest.json")
    whole = json.loads(path.read_text())
    write_json(path, {name: whole[name] for name in whole if name != "inputs_sha256"})
    assert annotate.main([
        "--instructions=selected/selected.jsonl", "--output=annotations", "--max_tokens=64",
        "--drop_parameters=top_p",
    ]) == 0  # fmt: skip
    assert json.loads(path.read_text()) == whole
    page_of(folders)


def test_no_path_of_the_machine_and_no_secret_is_on_the_page(folders, made):
    file = Path("outputs/instructions/run_config.json")
    config = json.loads(file.read_text())
    config["argv"] = [
        "/home/alice/train.py", "--dataset_name", f"{Path.cwd()}/letters",
        "--output_dir=/home/alice smith/outputs", "--model_name", "~/models/llama",
        "--api_key", "verysecret", "../../alice/x.json", "hf_abcdefgh12345",
    ]  # fmt: skip
    config["arguments"]["model_name"] = "/home/alice/models/llama"
    write_json(file, config)
    absolute = [str(Path(word).absolute()) if Path(word).exists() else word for word in folders]
    elsewhere = made[0] / "outputs/answers"
    absolute[1] = str(elsewhere)
    for content in page_of(absolute):
        for secret in ("alice", "/home", "/tmp", "verysecret", "hf_abcdefgh", str(Path.home())):
            assert secret not in content
        assert "--dataset_name letters" in content
        assert "…/llama" in content
        assert "…/answers" in content
        assert "outputs/instructions" in content


def test_hostile_texts_stay_texts(folders):
    hostile = '<script>alert(1)</script> | `code` \u202egnirts\u0000 \ud800 **bold** <!-- & "q"'
    path = Path("inference_outputs/instructions/shard-0.jsonl")
    samples = list(read_jsonl(path))
    samples[0] |= {"text": hostile, "id": 0}
    path.write_text(jsonl(samples))
    rehash()
    write_result(Path("hostile"), Result(
        "other", "<b>title</b>", False, "x", [Score("</svg><script>", "<i>", 1.0, 0.5, 1.5, 0.2)],
        "<u>",
    ), {})  # fmt: skip
    page, text = page_of([*folders, "--evaluations", "hostile"])
    read = Reader(page)
    assert "script" not in read.tags
    assert not {"i", "u"} & set(read.tags)
    assert read.tags.count("b") == 2  # epsilon and delta
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | `code` \ufffdgnirts\ufffd \ufffd" in page
    assert "<script" not in text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| \`code\`" in text
    assert r"\*\*bold\*\*" in text


def test_the_page_needs_nothing_from_outside_and_no_id_twice(folders):
    for more in ([], ["--internal"]):
        page, _ = page_of(folders, *more)
        read = Reader(page)
        assert len(read.ids) == len(set(read.ids))
        assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
        assert all(link.startswith("#") and link[1:] in read.ids for link in read.links)
        assert not re.search(r"url\((?!#)|@import|https?://(?!api\.openai)", page)
        assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(read.ids)
        assert (
            read.tags.count("svg") == page.count("<svg viewBox=") == page.count('role="img"') >= 4
        )
        assert '<html lang="en">' in page


# ------------------------------------------------------------------ no guarantee


def test_without_a_guarantee_the_page_says_so_and_nothing_else(folders):
    argv = ["outputs/synthetic_answers", *folders]
    del argv[argv.index("--synthetic_runs") :]
    page, text = page_of(argv, code=1)
    for content in (page, text):
        assert "trained without differential privacy" in content
        assert ANSWER not in content
        assert "win rate" not in content
    assert "No privacy guarantee" in page
    assert "NO PRIVACY GUARANTEE" in text
    page, _ = page_of(argv, "--internal", code=1)
    assert "No privacy guarantee" in page
    assert ANSWER in page


# ------------------------------------------------------------------ refusals


def refused(argv: list[str], capsys) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: report.main(argv))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_only_a_page_of_its_own_is_replaced_and_only_when_told(folders, capsys):
    page_of(folders)
    before = file_hashes(Path("out"))
    assert "add --overwrite" in refused([*folders, "--output", "out"], capsys)
    assert file_hashes(Path("out")) == before
    assert report.main([*folders, "--output", "out", "--overwrite", "--num_shown", "1"]) == 0
    assert file_hashes(Path("out")) != before
    Path("out/report.md").write_text("mine")
    line = refused([*folders, "--output", "out", "--overwrite"], capsys)
    assert "is not a page of this tool" in line
    assert Path("out/report.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("outputs/answers/run_config.json", None, "outputs/answers holds no run"),
        ("outputs/answers/run_config.json", "[]", "run_config.json is missing or not what"),
        ("outputs/answers/privacy_report.json", "{}", "privacy_report.json is missing or not"),
        ("inference_outputs/answers/manifest.json", None, "manifest.json is missing or not"),
        ("inference_outputs/answers/shard-0.jsonl", None, "no shard-*.jsonl"),
        ("inference_outputs/answers/shard-0.jsonl", '{"id": 1}\n', "inference_outputs/answers is"),
        ("synthetic/preparation.json", '{"kept": "x"}', "preparation.json is missing or not"),
        ("selected/histograms.json", '{"private": [1]}', "selected is missing or not what"),
        ("selected/resampling_report.json", "{}", "resampling_report.json is missing or not"),
        ("selected/selected.jsonl", None, "selected is missing or not what"),
        ("annotations/answers.jsonl", None, "no answers.jsonl there"),
        ("annotations/answers.jsonl", '{"id": 1}\n', "annotations is missing or not what"),
        ("results/judge.json", "{", "judge.json is not a result of an evaluation"),
        ("results/judge.json", '{"tool": "judge", "private": false}', "not what evaluation.judge"),
        ("results", None, "--evaluations results: no result that may be released there"),
        (LEDGER, None, "no ledger of histograms"),
    ],
)
def test_damaged_input_is_one_line_and_exit_code_2(folders, capsys, path, content, message):
    path = Path(path)
    if content:
        path.write_text(content)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert message in refused([*folders, "--output", "out"], capsys)
    assert not Path("out").exists()


def test_a_selection_whose_histogram_is_not_composed_is_refused(folders, capsys):
    other = Path("other.jsonl")
    record_histogram(other, num_examples=64, noise_multiplier=10.0, num_bins=4)
    folders[folders.index(LEDGER)] = str(other)
    line = refused([*folders, "--output", "out"], capsys)
    assert f"its cost would be left out; add --histogram {LEDGER}" in line


def test_samples_of_an_adapter_that_is_not_covered_are_refused(folders, capsys):
    folders.remove("outputs/answers")
    line = refused([*folders, "--output", "out"], capsys)
    assert "inference_outputs/answers: sampled from the adapter outputs/answers/adapter" in line
    assert "name its run" in line


def test_annotated_instructions_that_may_be_private_are_refused(folders, capsys):
    record = next(read_jsonl("annotations/answers.jsonl"))
    with JsonlAppender("annotations/answers.jsonl") as file:
        file.append([record | {"instruction_sha256": "0" * 64, "instruction": PRIVATE_QUESTION}])
    assert "1 of 9 instructions are in none of" in refused([*folders, "--output", "out"], capsys)
    page, _ = page_of(folders, "--internal")
    assert PRIVATE_QUESTION in page


def test_a_private_run_is_no_synthetic_one(folders, capsys):
    folders.remove("outputs/answers")
    argv = [*folders, "outputs/answers", "--output", "out"]
    assert "name it before the flags, as a RUN" in refused(argv, capsys)


def test_samples_of_an_unknown_model_are_a_claim(folders):
    path = Path("inference_outputs/instructions/manifest.json")
    known = json.loads(path.read_text()) | {"adapter_path": None, "adapter_sha256": None}
    base = json.loads(Path("outputs/answers/run_config.json").read_text())["base_model_fingerprint"]
    for fingerprint, claims in ((base, 0), ("another", 1)):
        write_json(path, known | {"model_fingerprint": fingerprint})
        page, _ = page_of(folders)
        assert page.count("that it read no private rows is a claim") == claims


def test_an_output_that_is_a_file_is_refused(folders, capsys):
    assert "is not a folder" in refused([*folders, "--output", "questions.txt"], capsys)


def test_real_texts_need_the_internal_page(folders, capsys):
    argv = [*folders, "--output", "out", "--real", "letters"]
    assert "add --internal" in refused(argv, capsys)


# ------------------------------------------------------------------ how it looks

MEASURE = """<!doctype html><iframe src="{page}" style="width:{width}px;height:900px"></iframe>
<pre id="told"></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const root = frame.contentDocument.documentElement;
  const requests = frame.contentWindow.performance.getEntriesByType("resource");
  document.querySelector("#told").textContent =
    `width ${{root.clientWidth}} scroll ${{root.scrollWidth}} requests ${{requests.length}}`;
}};
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no {CHROMIUM}")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("more", [[], ["--internal"]])
def test_a_browser_scrolls_down_only_and_fetches_nothing(folders, width, more):
    page, _ = page_of(folders, *more, "--num_shown", "20")
    Path("page.html").write_text(page)
    Path("frame.html").write_text(MEASURE.format(page="page.html", width=width))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom",
         f"--window-size={width + 100},1000", f"file://{Path.cwd()}/frame.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"width (\d+) scroll (\d+) requests (\d+)", done.stdout)
    assert found, done.stderr[-2000:]
    inner, scroll, requests = map(int, found.groups())
    assert inner == width
    assert scroll <= inner
    assert requests == 0
