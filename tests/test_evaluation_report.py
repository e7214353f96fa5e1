"""The page about a pipeline: what it says, what it must not say, and how it looks."""

import contextlib
import functools
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from evaluation import report
from evaluation.page import material
from evaluation.page.printing import markdown
from evaluation.results import Result, Score, write_result
from privacy_checks import composition
from tests.json_lines import jsonl
from tests.report_folders import ANSWER, LEDGER, file_hashes, make_folders, read_real_rows
from utils.cli import run_cli
from utils.files import JsonlAppender, read_jsonl, write_json
from utils.privacy import guarantee
from utils.privacy.accounting import SampledGaussian, compute_delta, compute_epsilon
from utils.privacy.ledger import read_plan, record_histogram

CHROMIUM = "/usr/bin/chromium"
MARKER = "PLANTED-in-a-private-file"
PLANTED_LOSS, SHOWN_LOSS = 7654321.0, "7.654e+06"
PRIVATE_QUESTION = "what did patient zero say"


@pytest.fixture(scope="module", autouse=True)
def _accountants_that_remember(accountant_that_remembers):
    """The same composition is asked for many times: it is computed once."""
    remembered = functools.cache(lambda events, *rest: compute_delta(list(events), *rest))

    def delta(events, *rest):
        return remembered(tuple(events), *rest)

    epsilons = {name: getattr(guarantee, name) for name in ("compute_epsilon", "epsilon_bounds")}
    with (
        mock.patch.multiple(composition, compute_delta=delta, **epsilons),
        mock.patch.object(material, "compute_delta", delta),
    ):
        yield


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
        assert f"({epsilon:.3f}, 0.001)-differentially private" in content
        found = re.search(r"is right at most ([\d.]+)%", content)
        assert best <= float(found[1]) / 100 <= best + 1.01e-4


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
        assert f"| {each['rows']} | {each['epsilon']:.2f} |" in text
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
        f"to {selection['total_variation_to_private']['selected']:.3f} (0: equal",
        "win rate, answers: 0.58 (0.49 to 0.66) with 0.5 for the control",
        "not told apart from the control",
        "better than the control",
        "python -m privacy_checks.report outputs/instructions outputs/answers --histogram",
        "accelerate launch inference.py --model_name",
        ANSWER,
    ):
        assert content in page, content


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
        assert "2 answers in inference_outputs/answers are not shown" in content


def test_prompts_that_are_public_are_shown_where_the_user_says_so(folders):
    page, _ = page_of(folders, "--public_prompts")
    assert PRIVATE_QUESTION in page
    assert "are not shown" not in page


def test_answers_to_synthetic_prompts_are_shown(folders):
    selected = next(read_jsonl("selected/selected.jsonl"))["instruction"]
    path = Path("inference_outputs/answers/shard-0.jsonl")
    samples = list(read_jsonl(path))
    samples[0] |= {"prompt": selected, "text": "an answer to a synthetic prompt"}
    path.write_text(jsonl(samples))
    page, _ = page_of(folders)
    assert "an answer to a synthetic prompt" in page
    assert "1 answers in inference_outputs/answers are not shown" in page


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
        file.append([record | {"id": "x", "instruction": PRIVATE_QUESTION}])
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
