"""The generator of training commands, through its own command line."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import generate_train_command
from tests.paths import ROOT
from tests.training import flags, run_process, save_dataset
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.command_line.training_flags import (
    TrainingSettings,
    module_settings,
    plan_of,
    settle_delta,
)
from utils.files import write_json
from utils.privacy.banded import band_coefficients, deviations
from utils.privacy.ledger import LEDGER_FILE, Ledger
from utils.privacy.plan import num_steps
from utils.texts.data_sets import count_train_examples, load_splits

ARENA = (
    "--dataset_name chatbot_arena_instructions_train180k --model_name yahma/llama-13b-hf "
    "--job_sess debug --perdevice_bs 4 --gpus 1 --max_seq_len 1024 "
    "--prompt_style uncond_generation --no_eval_at_start "
)
PRIVATE_13B = "--delta 5e-7 --total_bs 4096 --num_epochs 10 --lr 1e-3 --clip 0.5 "
TYPE_A_C = {
    "A without DP": ARENA + "--eps -1 --total_bs 32 --num_epochs 3",
    "A at 2.86": ARENA + PRIVATE_13B + "--eps 2.86",
    "A at 5.94": ARENA + PRIVATE_13B + "--eps 5.94",
    "C on real pairs": (
        "--dataset_name labelled_real_arena180k --model_name yahma/llama-7b-hf --job_sess debug "
        "--eps 5.94 --delta 5e-7 --perdevice_bs 2 --gpus 1 --max_seq_len 2048 --total_bs 4096 "
        "--num_epochs 10 --prompt_style vicuna --lr 1e-3 --clip 1.0"
    ),
    "C on synthetic pairs": (
        "--dataset_name labelled_syn300k_13b_eps594_uncond_syn_clip05_13b_selected_sigma10_1000bins"
        " --model_name yahma/llama-7b-hf --job_sess debug --eps -1 --perdevice_bs 4 --gpus 1 "
        "--max_seq_len 1024 --total_bs 32 --num_epochs 3 --prompt_style vicuna"
    ),
}


@pytest.fixture
def generate(capsys, monkeypatch, tmp_path):
    """Run the generator in an empty folder; returns its stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[str, str]:
        assert generate_train_command.main(list(argv)) == 0
        return capsys.readouterr()

    return call


@pytest.fixture
def base(tmp_path):
    """Make the base m, of so many features a token, as far as its shapes go."""

    def make(width: int) -> None:
        config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "intermediate_size": 8, "vocab_size": 99}  # fmt: skip
        (tmp_path / "m").mkdir(exist_ok=True)
        write_json(tmp_path / "m" / "config.json", config)

    return make


def understood(line: str) -> TrainingSettings:
    """What `train.py` understands by a launch line."""
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return read_flags(TrainingSettings, None, words[script + 1 :])


@pytest.mark.parametrize("command", TYPE_A_C.values(), ids=TYPE_A_C.keys())
def test_published_commands_print_a_line_that_train_parses(generate, command):
    line, summary = generate(*shlex.split(command), "--num_train_examples", "180000")
    assert line.count("\n") == 1
    args = understood(line)
    asked = read_flags(generate_train_command.Settings, None, shlex.split(command))
    calibrated = {"noise_multiplier", "num_train_examples"}
    for name, value in vars(args).items():
        if name not in calibrated:
            assert value == getattr(asked, name), name
    assert args.num_train_examples == 180_000
    assert "180,000" in summary
    if asked.eps > 0:
        assert "439" in summary  # floor(10 · 180000 / 4096)
        # 0.81 gives 5.889 and 1.11 gives 2.919, so the targets need a little less noise.
        low, high = (0.800, 0.810) if asked.eps == 5.94 else (1.105, 1.135)
        assert low < args.noise_multiplier < high
    else:
        assert args.noise_multiplier is None
        assert "NONE" in summary


def test_missing_data_is_an_error_without_its_size_and_a_warning_with_it(generate):
    command = shlex.split(TYPE_A_C["A without DP"])
    with pytest.raises(ValueError, match=r"no data set 'chatbot_arena.*--num_train_examples"):
        generate(*command)
    _, summary = generate(*command, "--num_train_examples", "1000")
    assert "warning: chatbot_arena_instructions_train180k is not here" in summary


def test_the_size_comes_from_the_data(generate, tmp_path, tiny_model_dir):
    data = save_dataset(tmp_path, rows=100)
    line, _ = generate(*flags(tiny_model_dir, data, tmp_path))
    args = understood(line)
    assert args.num_train_examples == count_train_examples(data) == 100
    with pytest.raises(ValueError, match="--num_train_examples 99, but .* has 100"):
        generate(*flags(tiny_model_dir, data, tmp_path, "--num_train_examples=99"))


def test_a_topic_for_every_row_is_asked_for_where_the_data_is(generate, tmp_path, tiny_model_dir):
    by_topic = (tmp_path, "--prompt_style=topic_generation")
    with_topics, without = save_dataset(tmp_path, topics=True), save_dataset(tmp_path)
    line, _ = generate(*flags(tiny_model_dir, with_topics, *by_topic, dp=False))
    assert understood(line).prompt_style == "topic_generation"
    with pytest.raises(UsageError, match=r"lacks column 'topic'.* python -m topics.assign --priv"):
        generate(*flags(tiny_model_dir, without, *by_topic, dp=False))
    labelled = save_dataset(tmp_path, labelled=True)
    with pytest.raises(UsageError, match="which --prompt_style topic_generation does not fit"):
        generate(*flags(tiny_model_dir, labelled, *by_topic, dp=False))


def test_canaries_count_in_n_beside_the_rows_of_the_data_set(generate, tmp_path, tiny_model_dir):
    """The line means the plan that `train.py` makes of it; a stated size is the data set's own."""
    data = save_dataset(tmp_path, rows=100)
    command = flags(tiny_model_dir, data, tmp_path, "--num_canaries=10", "--canary_repeats=3")
    line, summary = generate(*command)
    assert "N  130, of which 30 rows of canaries" in re.sub(" {2,}", "  ", summary)
    assert "sampling rate 0.06154" in summary  # 8 / 130
    assert generate(*command, "--num_train_examples=100") == (line, summary)
    args = understood(line)
    assert (args.num_train_examples, args.num_canaries, args.canary_repeats) == (100, 10, 3)
    trained_on = args.canaries.added_to(load_splits(data)["train"], data, args.prompt_style)
    # The noise multiplier that the line gives is held against --eps here.
    plan, _ = plan_of(args, len(trained_on))
    assert plan == plan_of(read_flags(generate_train_command.Settings, None, command), 130)[0]
    assert (plan.num_examples, plan.steps) == (130, 16)
    with pytest.raises(ValueError, match="--num_train_examples 130, but .* has 100"):
        generate(*command, "--num_train_examples=130")
    # Those of an audit are counted whatever their coins will be.
    line, summary = generate(*command, "--audit_canaries=20")
    assert "N  150, of which 50 rows of canaries" in re.sub(" {2,}", "  ", summary)
    assert (understood(line).num_train_examples, understood(line).audit_canaries) == (100, 20)


def test_delta_auto_is_a_tenth_of_1_over_n_or_less_and_its_number_is_printed(
    generate, tmp_path, tiny_model_dir
):
    data = save_dataset(tmp_path, rows=100)
    auto = ["--delta=auto", "--noise_multiplier=5"]
    line, summary = generate(*flags(tiny_model_dir, data, tmp_path, *auto))
    assert understood(line).delta == 1e-3  # exactly 1/(10 N)
    assert "(8, 0.001)-DP, one example added or removed, delta at most 1/(10 N)" in summary
    assert "above 1/(10 N)" not in summary
    line, _ = generate(*flags(tiny_model_dir, data, tmp_path, *auto, "--num_canaries=1"))
    assert understood(line).delta == 1e-4
    # Of persons where they are drawn.
    data = save_rows(tmp_path, [f"u{row % 10}" for row in range(100)])
    line, _ = generate(*persons(data, tmp_path, *auto))
    assert understood(line).delta == 1e-2


def test_delta_auto_by_size():
    settings = read_flags(TrainingSettings, None, flags("m", "d", "o", "--delta=auto"))
    for size in (1, 2, 9, 10, 11, 99, 100, 101, 5824, 180_000, 10**6, 10**6 + 1):
        delta = settle_delta(settings, size).delta
        assert delta <= 1 / (10 * size) < 10 * delta * (1 + 1e-12)
    assert settle_delta(replace(settings, delta=0.3), 10).delta == 0.3


def test_the_summary_says_what_is_wrong_with_a_recipe(generate, tmp_path, tiny_model_dir):
    data = save_dataset(tmp_path, rows=100)
    known = ["--delta=auto", "--noise_multiplier=5"]
    _, summary = generate(*flags(tiny_model_dir, data, tmp_path, *known))
    # 8 · 0.5 over a noise of 0.5 sigma sqrt(3,584).
    assert re.search(
        r"signal over noise +at most 0\.\d+ a step and \S+ in all, with 3,584", summary
    )
    _, summary = generate(
        *flags(tiny_model_dir, data, tmp_path, *known, "--num_epochs=0.2", "--clip=10")
    )
    assert "warning: too few logical steps to learn from, 2:" in summary
    assert "warning: --clip 10 is above the norm of most gradients" in summary


def save_rows(folder, owners) -> str:
    """A data set of a row for each owner, as JSON lines; returns its path."""
    lines = [json.dumps({"instruction": "a", "who": owner}) for owner in owners]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "rows.jsonl")


def persons(data, tmp_path, *more):
    unit = ["--unit_column=who", "--max_rows_per_unit=2", "--total_bs=4"]
    return flags("model", data, tmp_path, *unit, *more)


def test_persons_are_counted_in_the_data_and_their_number_reaches_the_line(generate, tmp_path):
    data = save_rows(tmp_path, [f"u{row % 40}" for row in range(100)])
    line, summary = generate(*persons(data, tmp_path))
    args = understood(line)
    assert (args.num_train_units, args.num_train_examples) == (40, None)
    assert (args.unit_column, args.max_rows_per_unit) == ("who", 2)
    summary = re.sub(" {2,}", "  ", summary)
    assert "training units N  40\n" in summary
    assert "unit  the rows of one who, at most 2 rows a step\n" in summary
    assert "-DP, one unit added or removed" in summary
    assert "logical steps  10\n" in summary  # 1 epoch of 40 persons, 4 a step
    assert "batch size  4, sampling rate 0.1\n" in summary
    assert generate(*persons(data, tmp_path, "--num_train_units=40", "--num_train_examples=100"))
    with pytest.raises(ValueError, match="--num_train_units 41, but .* has 40"):
        generate(*persons(data, tmp_path, "--num_train_units=41"))
    with pytest.raises(ValueError, match="--total_bs 41 exceeds the 40 values of who"):
        generate(*persons(data, tmp_path, "--total_bs=41"))


def test_rows_of_persons_count_up_to_the_cap(generate, tmp_path):
    data = save_rows(tmp_path, ["a"] * 5 + ["b"] + [f"u{row}" for row in range(50)])
    line, summary = generate(*persons(data, tmp_path, "--unit_sampling=rows"))
    args = understood(line)
    assert (args.num_train_units, args.num_train_examples) == (None, 53)
    assert "the rows of one who, at most 2 rows in all" in summary
    more_noise = args.noise_multiplier
    line, _ = generate(*flags("model", data, tmp_path, "--total_bs=4"))
    assert more_noise > understood(line).noise_multiplier


def test_the_number_of_persons_is_stated_where_the_data_is_elsewhere(generate, tmp_path):
    with pytest.raises(ValueError, match="state its size with --num_train_units"):
        generate(*persons("far/away", tmp_path))
    line, _ = generate(*persons("far/away", tmp_path, "--num_train_units=500"))
    assert understood(line).num_train_units == 500


@pytest.mark.parametrize(
    ("owners", "flag", "message"),
    [
        (["a", None] * 30, "--unowned_rows_are_units", "row 2 has no owner.*--unowned_rows"),
        (["a", ["b", "c"]] * 30, "--owner=first", "row 2 has a list of 2 owners.*--owner first"),
    ],
)
def test_rows_of_nobody_and_of_several_are_refused_unless_a_flag_decides(
    generate, tmp_path, owners, flag, message
):
    data = save_rows(tmp_path, [*owners, *(f"u{row}" for row in range(20))])
    with pytest.raises(ValueError, match=message):
        generate(*persons(data, tmp_path))
    line, _ = generate(*persons(data, tmp_path, flag))
    assert understood(line).num_train_units == {"--owner=first": 22}.get(flag, 51)


def test_a_column_that_is_not_there_is_named_with_those_that_are(generate, tmp_path):
    data = save_rows(tmp_path, ["a"])
    with pytest.raises(ValueError, match="--unit_column author.*only instruction, who"):
        generate(*persons(data, tmp_path, "--unit_column=author"))


THIRTEEN = {
    "model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 32_000,
    "intermediate_size": 13_824, "num_attention_heads": 40,
}  # fmt: skip


def test_a_card_that_is_too_small_is_said_with_the_flags_to_change(generate, tmp_path):
    model, data = tmp_path / "model", save_dataset(tmp_path)
    model.mkdir()
    (model / "config.json").write_text(json.dumps(THIRTEEN))

    def said(*more):
        command = flags(model, data, tmp_path, "--max_seq_len=1024", "--perdevice_bs=4", *more)
        line, summary = generate(*command)
        assert "--card" not in line
        return [each for each in summary.splitlines() if "--card" in each]

    assert said() == said("--card=80") == []
    (line,) = said("--card=40")
    assert re.match(r"warning: --card 40: the run does not fit, it takes about \d+ GiB", line)
    assert line.endswith("; use --perdevice_bs 1")
    assert said("--card=40", "--perdevice_bs=1") == said("--card=40", "--perdevice_bs=auto") == []
    assert said("--card=24")[0].endswith("--gradient_checkpointing --load_in_8bit")
    assert said("--card=24", "--perdevice_bs=1", "--gradient_checkpointing", "--fsdp",
                "--gpus=8") == []  # fmt: skip
    (line,) = said("--card=24", "--dtype=float32", "--lora_r=512", "--target_modules", "all-linear")
    assert line.endswith("use a smaller model, or --fsdp and more --gpus")


def test_a_card_means_nothing_without_the_shapes_of_the_model(generate, tmp_path, monkeypatch):
    data = save_dataset(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    for model in (tmp_path / "empty", tmp_path / "nowhere", "some/where", "a/b/c"):
        _, summary = generate(*flags(model, data, tmp_path, "--card=80"))
        assert f"--card 80: whether the run fits is not known, since {model} has" in summary
    (tmp_path / "config.json").write_text(json.dumps(THIRTEEN))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json")
    )
    _, summary = generate(*flags("some/where", data, tmp_path, "--card=24"))
    assert "the run does not fit" in summary


def test_awkward_values_survive_the_shell(generate, tmp_path):
    data = save_dataset(tmp_path)
    awkward = 'it\'s a $HOME `id` "job" ; \\ é *'
    command = flags("/models/an 'odd' $name", data, tmp_path / "out put$", "--lr=1e-05")
    line, _ = generate(*command, f"--job_sess={awkward.replace(chr(92), '')}")
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split("\0")[:-1] == shlex.split(line)
    args = understood(line)
    assert args.job_sess == awkward.replace("\\", "")
    assert args.model_name == "/models/an 'odd' $name"
    assert args.lr == 1e-5


def test_reserving_a_histogram_asks_for_more_noise(generate, tmp_path):
    command = flags("model", save_dataset(tmp_path), tmp_path, "--eps=2")

    def noise_multiplier(*more):
        line, _ = generate(*command, *more)
        return understood(line).noise_multiplier

    assert noise_multiplier("--reserve_histogram_sigma=3") > noise_multiplier()


SIZED = (
    "--model_name=m", "--dataset_name=elsewhere", "--num_train_examples=5824", "--eps=5.94",
    "--delta=1e-5", "--job_sess=t", "--prompt_style=uncond_generation", "--max_seq_len=64",
)  # fmt: skip


def advised(generate, *more):
    """The lines of a plan for 5,824 rows of at most 64 tokens, as cells."""
    out, _ = generate(*SIZED, *(more or ["--num_epochs=1"]), "--advise")
    return [line.split() for line in out.splitlines()]


def test_advice_is_a_table_and_the_flags_of_its_best_line(generate, base):
    base(576)
    head, *lines, _, flags_of_best = advised(generate)
    assert head[:2] == ["total_bs", "num_epochs"]
    assert [line[0] for line in lines] == ["64", "128", "256"]
    assert [int(line[2]) for line in lines] == [91, 45, 22]
    (best,) = [line for line in lines if line[-1] == "<-"]
    assert max(lines, key=lambda line: float(line[6])) is best
    assert flags_of_best[:4] == ["--total_bs", best[0], "--num_epochs", best[1]]
    assert flags_of_best[-4:] == ["--warmup_steps", "2", "--lr", "0.012"]
    # What is pasted is what the line says, and so is what is followed without pasting.
    pasted, _ = generate(*SIZED, *flags_of_best)
    settings = understood(pasted)
    assert f"{settings.noise_multiplier:.3f}" == best[3]
    assert num_steps(settings.num_epochs, 5824, settings.total_bs) == int(best[2])
    followed, summary = generate(*SIZED, "--num_epochs=1", "--advised")
    assert followed == pasted
    assert "warning: --lr" not in summary


def test_a_wide_base_begins_at_a_lower_rate_and_so_does_one_of_unknown_width(generate, base):
    def rates(*more):
        advice, _ = generate(*SIZED, "--num_epochs=1", "--advise", *more)
        line, summary = generate(*SIZED, "--num_epochs=1", "--advised", *more)
        assert advice.endswith(f"--lr {understood(line).lr:g}\n")
        return understood(line).lr, advice, summary

    lr, advice, summary = rates()
    assert lr == 0.0031
    told = "m has no config.json here that tells its width, so --lr is that of 4,096 features"
    for text in (advice, summary):
        assert told in text
        assert "up to 576 learns more at 0.012" in text
    _, summary = generate(*SIZED, "--clip=1", "--total_bs=128", "--num_epochs=1", "--lr=1")
    assert "what to start from" not in summary
    of_sgd, _ = generate(*SIZED, "--num_epochs=1", "--advise", "--optimizer=sgd")
    assert "tells its width" not in of_sgd  # of any width it is the same
    for width, expected in ((4096, 0.0031), (2304, 0.0046), (576, 0.012)):
        base(width)
        lr, advice, summary = rates()
        assert lr == expected
        assert "tells its width" not in advice + summary
    base(2304)
    _, summary = generate(*SIZED, "--clip=1", "--total_bs=128", "--num_epochs=1", "--lr=2e-2")
    assert "warning: --lr 0.02 is 4.3 times what to start from in 45 steps" in summary


def test_the_quick_start_trains_what_is_marked_for_it(generate, base):
    base(576)
    script = (ROOT / "quickstart.sh").read_text().replace("\\\n", " ")
    run_of_both = re.search(r'instructions="([^"]*)"', script)[1].split()
    asked = re.search(r"--advise \$instructions \$base (.*) >&2", script)[1].split()
    sizes = ("--model_name=m", "--max_seq_len=128", "--num_train_examples=4576")
    marked = understood(generate(*sizes, *run_of_both, *asked, "--advised")[0])
    trained = re.search(r"--run \$instructions \$base \$private(.*)", script)[1].split()
    for flag, value in zip(trained[::2], trained[1::2]):
        name = flag.removeprefix("--")
        if name not in ("max_eval_examples", "save_steps", "keep_checkpoints"):
            assert str(getattr(marked, name)) == value, flag
    assert {"--lr", "--bands", "--noise_multiplier", "--total_bs"} <= set(trained)


def test_advice_names_the_flags_that_learnt_more(generate):
    def sentence(*more):
        out, _ = generate(*SIZED, "--compute=60000", "--advise", *more)
        return out.splitlines()[-2]

    both = "by --target_modules all-linear and --noise banded: add"
    assert both in sentence()
    assert "by --noise banded: add" in sentence("--target_modules=all-linear")
    # It would be refused.
    assert "by --target_modules all-linear: add" in sentence("--optimizer=adamw_corrected")
    assert "learnt more" not in sentence(
        "--target_modules=all-linear", "--optimizer=adamw_corrected"
    )


def test_a_run_that_is_continued_keeps_the_recipe_it_began_with(generate, tmp_path, monkeypatch):
    command = [*SIZED, "--num_epochs=1", "--advised", "--resume=auto"]
    line, _ = generate(*command)
    begun = understood(line)
    folder = tmp_path / "outputs" / "t"
    folder.mkdir(parents=True)
    write_json(folder / "run_config.json", {"arguments": begun.run_settings})
    # Advice changes: more is known of the base by now, or of recipes.
    largest_is_best = "generate_train_command.promise"
    monkeypatch.setattr(largest_is_best, lambda plan, *_: plan.expected_batch_size / 1e6)
    other, _ = generate(*command, "--job_sess=other")
    assert understood(other).total_bs != begun.total_bs
    line, summary = generate(*command, "--num_epochs=9")
    assert understood(line) == begun
    assert "--advised goes on as outputs/t began: --loss_normalization tokens" in summary
    assert f"--num_epochs {begun.num_epochs:g} --warmup_steps" in summary


def test_flags_that_were_advised_are_kept_and_read_again(generate, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("advised: true\ncompute: 372736\n")
    line, _ = generate(*SIZED, f"--config={file}")
    assert generate(f"--config={tmp_path / 'outputs' / 't.yaml'}")[0] == line


def test_advice_for_correlated_noise_raises_the_rate(generate, base, monkeypatch):
    base(576)
    monkeypatch.setattr("utils.privacy.plan.best_bands", lambda *_: 8)
    line, summary = generate(*SIZED, "--num_epochs=1", "--advised", "--noise=banded")
    args = understood(line)
    assert (args.noise, args.bands) == ("banded", 8)
    assert float(re.search(r"against white noise +([\d.]+) times in a step", summary)[1]) > 1.5
    steps = num_steps(args.num_epochs, 5824, args.total_bs)
    of_a_step, of_all = deviations(band_coefficients(8, steps), steps)
    rate = 0.01 * 60**0.5 * of_a_step / of_all
    assert args.lr == pytest.approx(min(rate, 0.02), rel=0.05)
    assert args.lr > 1.5 * 0.01 * (60 / steps) ** 0.5


def test_noise_is_compared_with_white_noise_of_the_same_guarantee_alone(generate):
    """And a plan is not refused for want of that white noise."""
    recipe = ["--clip=1", "--total_bs=128", "--num_epochs=1", "--noise=banded", "--bands=4"]
    _, summary = generate(*SIZED, *recipe)
    assert "against white noise" in summary
    # It spends less than --eps.
    _, summary = generate(*SIZED, *recipe, "--noise_multiplier=3")
    assert "correlated noise     4 bands" in summary
    assert "against white noise" not in summary
    many = [word for word in SIZED if not word.startswith(("--num_train", "--delta"))]
    many += ["--num_train_examples=10000000", "--delta=auto", "--clip=1", "--total_bs=64"]
    for bands in ("8", "auto"):
        line, summary = generate(*many, "--num_epochs=1e-4", "--noise=banded", f"--bands={bands}")
        assert understood(line).bands >= 2
        assert "against white noise" not in summary


def test_one_band_is_told_to_be_white_noise(generate):
    recipe = ["--clip=1", "--num_epochs=9", "--noise=banded", "--total_bs=5824"]
    line, summary = generate(*SIZED, *recipe)
    assert understood(line).bands == 1
    assert "correlated noise     none: one band is white noise" in summary


@pytest.mark.parametrize(
    "own", ["--lr=1e-3", "--total_bs=64", "--clip=2", "--warmup_steps=4", "--lr_scheduler=linear",
            "--loss_normalization=max_seq_len", "--lr=3e-4", "--total_bs=32", "--clip=0.5",
            "--warmup_steps=30", "--lr_scheduler=constant", "--loss_normalization=tokens"],
)  # fmt: skip
def test_what_is_advised_is_not_given_as_well(generate, own):
    """Nor at its default."""
    with pytest.raises(UsageError, match=f"--advised chooses {own.partition('=')[0]}; leave one"):
        generate(*SIZED, "--advised", own)
    with pytest.raises(UsageError, match=f"--advised chooses {own.partition('=')[0]}; leave one"):
        generate(*SIZED, "--advised", *own.split("="))


def test_a_value_that_is_the_name_of_a_flag_is_no_flag(generate):
    line, _ = generate(*SIZED, "--num_epochs=1", "--advised", "--job_sess", "lr")
    assert understood(line).job_sess == "lr"


def test_a_schedule_that_leads_nowhere_is_warned_of(generate, base):
    base(576)
    sizes = ["--clip=1", "--total_bs=256", "--num_epochs=1", "--lr_scheduler=cosine"]
    _, summary = generate(*SIZED, *sizes)
    assert (
        "warning: --warmup_steps 30 of 22 steps: --lr is reached never; use --warmup_steps 1"
        in (summary)
    )
    assert "warning: --lr 0.0003 is 0.02 times what to start from in 22 steps" in summary
    assert "use --lr 0.015 --lr_scheduler cosine --warmup_steps 1" in summary
    # Without privacy a rate is the user's own affair.
    _, summary = generate(*(word for word in SIZED if "eps" not in word), "--eps=-1", *sizes[1:])
    assert "--lr is reached never" in summary
    assert "what to start from" not in summary


def test_a_rate_that_low_ranks_bore_with_white_noise_is_warned_of_with_any_other(generate, base):
    base(576)
    sizes = ["--clip=0.5", "--total_bs=128", "--num_epochs=1", "--lr=0.04", "--warmup_steps=2"]
    high = "what to start from in 45 steps, and fell apart"
    for more, is_warned in (
        (["--lora_r=4"], False),
        (["--lora_r=4", "--rank_pattern", "q_proj=8"], True),
        (["--lora_r=8"], True),
        (["--lora_r=4", "--noise=banded", "--bands=45"], True),
    ):
        assert (high in generate(*SIZED, *sizes, *more)[1]) is is_warned


def test_advice_comes_after_what_is_to_be_warned_of(generate):
    sized = [word for word in SIZED if "delta" not in word]
    known = ["--num_epochs=1", "--delta=1e-4", "--insecure_fixed_noise_seed=3", "--advise"]
    _, summary = generate(*sized, *known)
    assert "warning: --insecure_fixed_noise_seed: the noise is known" in summary
    assert "warning: --delta 0.0001 is above 1/(10 N)" in summary
    assert "warning: elsewhere is not here" in summary


def test_advice_spends_the_compute_that_there_is():
    def spent(*more):
        argv = ["--model_name=m", "--dataset_name=d", "--eps=1", "--job_sess=t", "--num_epochs=3",
                "--prompt_style=uncond_generation", *more]  # fmt: skip
        settings = read_flags(generate_train_command.Settings, None, argv)
        return generate_train_command.tokens_to_spend(settings, of_an_epoch=100)

    assert spent() == 300
    assert spent("--compute=40") == 40
    assert spent("--hours=0.5", "--tokens_per_second=2") == 3600


def test_what_only_advice_reads_needs_it(generate):
    for flag in ("compute", "hours", "tokens_per_second"):
        with pytest.raises(UsageError, match=f"--{flag} needs --advise or --advised"):
            generate(*flags("m", "elsewhere", "out", f"--{flag}=1e6"))


def test_a_size_that_cannot_be_had_is_left_out_and_named(generate, monkeypatch):
    def made(settings, num_examples):
        if settings.total_bs > 128:
            raise UsageError("cannot be met")
        return plan_of(replace(settings, noise_multiplier=9.0), num_examples)

    monkeypatch.setattr(generate_train_command, "plan_of", made)
    _, *lines, left_out, _, _ = advised(generate)
    assert [line[0] for line in lines] == ["64", "128"]
    assert " ".join(left_out) == "Another size is left out: cannot be met"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--num_epochs=1e300"], r"--num_epochs 1e\+300 .* takes more than 100,000 steps"),
        (["--num_epochs=1e308", "--total_bs=1"], r"takes more than 100,000 steps, the most"),
        (["--delta=0.5"], "--delta 0.5: must be below 1/N"),
        (["--delta=nan"], "--delta nan: must be between 0 and 1"),
        (["--delta=1e-13"], "--delta 1e-13: must be between 1e-12 and 0.01"),
        (["--noise_multiplier=0.01"], "--noise_multiplier 0.01: must be between 0.3 and 100"),
        (["--reserve_histogram_sigma=1e3"], "--reserve_histogram_sigma 1000: must be between 0.3"),
        (["--clip=1e308"], r"clip norm of 1e-06 to 1e\+06, found --clip 1e\+308; use --clip 0.5"),
        (["--clip=1e-320"], "clip norm of 1e-06 .*, found --clip 9.99"),
        (["--clip=nan"], "clip norm of 1e-06 .*, found --clip nan"),
        (["--eps=-1", "--bands=4"], "--bands needs --eps"),
    ],
)
def test_a_number_that_nothing_is_accounted_for_is_a_line_that_names_its_flag(generate, more, why):
    with pytest.raises(UsageError, match=why):
        generate(*SIZED, "--clip=1", *more)


def test_a_sampling_rate_that_is_too_small_is_a_line_with_the_batch_that_is_not(generate):
    command = [*SIZED, "--clip=1", "--num_train_examples=100000000", "--delta=auto"]
    command += ["--num_epochs=0.00001"]
    with pytest.raises(
        UsageError, match="sampling rate below 1e-05 .* use --total_bs 1000 or more"
    ):
        generate(*command, "--total_bs=999")
    assert generate(*command, "--total_bs=1000")


def test_a_single_example_gets_the_largest_delta_that_there_is(generate):
    line, _ = generate(*SIZED, "--clip=1", "--num_train_examples=1", "--delta=auto", "--total_bs=1")
    assert understood(line).delta == 0.01


def test_a_number_that_no_computer_has_is_a_line(generate, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate(*SIZED, "--clip=1", f"--num_train_examples={'9' * 331}")
    assert "is not a whole number below 2^63; --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--hours=1"], "--hours needs --tokens_per_second"),
        (["--tokens_per_second=1"], "--hours needs --tokens_per_second"),
        (["--hours=1", "--tokens_per_second=9", "--compute=5"], "leave one out"),
        (["--eps=-1"], "--eps -1 has none"),
        (["--noise_multiplier=1"], "leave it out"),
        (["--run"], "leave --run, --advised and rehearsals out"),
        (["--check"], "leave --run, --advised and rehearsals out"),
        (["--advised"], "leave --run, --advised and rehearsals out"),
        (["--hours=1e300", "--tokens_per_second=1e300"], "inf tokens are more than 1e.18"),
        (["--compute=1e300"], "1e.300 tokens are more than 1e.18"),
        (["--noise=banded", "--bands=1000"], "use --bands 91 or fewer"),
        (["--compute=1e5", "--num_epochs=3"], "--compute and --num_epochs both say how much"),
        (["--hours=1", "--tokens_per_second=9", "--num_epochs=3"], "--hours and --num_epochs both"),
        (["--compute=63"], "one draw takes 64 tokens, --max_seq_len, and there are fewer to spend"),
        (
            [
                "--compute=9999",
                "--unit_column=who",
                "--max_rows_per_unit=500",
                "--num_train_units=5824",
            ],
            "one draw takes 32,000 tokens, --max_seq_len x --max_rows_per_unit, .*; lower these",
        ),
        (
            ["--hours=1e9", "--tokens_per_second=1e3"],
            "take more than 100,000 steps.*; lower --comp",
        ),
    ],
)
def test_advice_that_cannot_be_given_is_a_line(generate, more, why):
    with pytest.raises(UsageError, match=why):
        advised(generate, *more)


def test_a_batch_that_no_rule_wanted_is_not_called_one(generate):
    usual, _ = generate(*SIZED, "--num_epochs=1", "--advise")
    assert "Of batches of 64 or more that make 12 to 512 steps, the marked one" in usual
    few, _ = generate(*SIZED, "--compute=20000", "--advise")
    many = [word for word in SIZED if "num_train" not in word]
    many, _ = generate(*many, "--num_train_examples=100", "--num_epochs=900", "--advise")
    for out in (few, many):
        assert len(out.splitlines()) == 4
        assert "No batch is of 64 or more that make 12 to 512 steps; this is the largest" in out


def toeplitz(column):
    """A lower-triangular matrix whose columns are this one, shifted."""
    size = len(column)
    return np.array([[column[i - j] if i >= j else 0 for j in range(size)] for i in range(size)])


def test_the_number_of_bands_is_settled_in_the_line(
    generate, tmp_path, tiny_model_dir, monkeypatch
):
    monkeypatch.setattr("utils.privacy.plan.best_bands", lambda *_: 8)
    command = flags(tiny_model_dir, save_dataset(tmp_path), tmp_path, "--noise=banded")
    line, summary = generate(*command)
    args = understood(line)
    assert args.bands == 8
    plan, _ = plan_of(args, 64)
    assert (plan.bands, plan.noise_multiplier) == (8, args.noise_multiplier)
    # All of one group of eight in a step; the tiny model's adapter has 3,584 numbers.
    kept = f"7 past noises, {7 * 8 * 3584 / 2**30:.2g} GiB in the main process's memory"
    assert f"8 bands: a row takes part in at most one step; {kept}" in summary
    white = understood(generate(*command, "--noise=white")[0]).noise_multiplier
    inverse = np.linalg.inv(toeplitz([*plan.coefficients, *[0] * plan.steps][: plan.steps]))
    of_a_step, of_all = (
        plan.noise_multiplier / white * np.linalg.norm(vector)
        for vector in (inverse[-1], inverse.sum(axis=0) / np.sqrt(plan.steps))
    )
    assert f"{of_a_step:.2g} times in a step, {of_all:.2g} times in the sum" in summary
    assert of_all < 1 < of_a_step


def test_a_run_that_is_continued_keeps_the_noise_it_began_with(generate, tmp_path, monkeypatch):
    command = [*SIZED, "--clip=1", "--total_bs=128", "--num_epochs=1", "--noise=banded"]
    begun = understood(generate(*command, "--bands=9")[0])
    folder = tmp_path / "outputs" / "t"
    folder.mkdir(parents=True)
    write_json(folder / "run_config.json", {"arguments": begun.run_settings})
    plan, _ = plan_of(begun, 5824)
    Ledger(folder / LEDGER_FILE, plan)
    # Another release has other bands for the same target, and more noise for the same bands.
    monkeypatch.setattr("utils.privacy.plan.best_bands", lambda *_: 22)
    assert understood(generate(*command, "--job_sess=other")[0]).bands == 22
    more = lambda *_: 2 * plan.noise_multiplier  # noqa: E731
    monkeypatch.setattr("utils.privacy.plan.calibrate_noise_multiplier", more)
    args = understood(generate(*command, "--resume=auto")[0])
    assert (args.bands, args.noise_multiplier) == (9, plan.noise_multiplier)
    with pytest.raises(UsageError, match="holds a run with --bands 9, not 22; use that value"):
        generate(*command, "--bands=22", "--resume=auto")


def test_many_machines_get_one_line_each_which_differ_in_the_rank(generate, tmp_path):
    command = flags("model", save_dataset(tmp_path), tmp_path, "--fsdp", "--gpus=8")
    command += ["--num_machines=4", "--main_process_ip=10.0.0.1"]
    lines = [shlex.split(generate(*command, f"--machine_rank={rank}")[0]) for rank in range(4)]
    for rank, words in enumerate(lines):
        launcher = " ".join(words[: words.index(str(ROOT / "train.py"))])
        assert launcher == (
            "accelerate launch --quiet --num_machines 4 --num_processes 32 --mixed_precision no "
            f"--dynamo_backend no --machine_rank {rank} --main_process_ip 10.0.0.1 "
            "--main_process_port 29500 --multi_gpu"
        )
        args = understood(shlex.join(words))
        assert args.fsdp
        assert [a for a, b in zip(words, lines[0]) if a != b] == ([str(rank)] if rank else [])


def test_flags_of_base_and_adapters_reach_the_line(generate, tmp_path):
    more = ["--load_in_4bit", "--use_rslora", "--rank_pattern", "q_proj=16", "self_attn.v_proj=4"]
    more += ["--alpha_pattern", "q_proj=1e1", "--target_modules", "all-linear"]
    line, _ = generate(*flags("model", save_dataset(tmp_path), tmp_path), *more)
    args = understood(line)
    assert args.load_in_4bit
    assert not args.load_in_8bit
    assert args.use_rslora
    assert args.target_modules == ["all-linear"]
    assert module_settings(args.rank_pattern, int) == {"q_proj": 16, "self_attn.v_proj": 4}
    assert module_settings(args.alpha_pattern, float) == {"q_proj": 10.0}
    line, _ = generate(*flags("model", str(tmp_path / "letters"), tmp_path))
    assert understood(line).target_modules is None


def test_a_run_in_the_way_is_refused_before_anything_starts(generate, tmp_path):
    (tmp_path / "out" / "job").mkdir(parents=True)
    (tmp_path / "out" / "job" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="another --job_sess"):
        generate(*flags("model", save_dataset(tmp_path), tmp_path / "out"))


def test_the_script_answers_without_torch_and_exits_with_its_codes(tmp_path, tiny_model_dir):
    """One line on stdout, the rest on stderr; 2 for wrong usage."""
    data = save_dataset(tmp_path)
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = flags(tiny_model_dir, data, tmp_path / "outputs")
    done = run_process("-c", script, "generate_train_command.py", *command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("False\n"), "torch was imported"
    assert done.stdout.startswith("accelerate launch ")
    assert done.stdout.count("\n") == 1

    wrong = run_process("generate_train_command.py", *command, "--delta=0.5")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --delta 0.5")
    mistyped = run_process("generate_train_command.py", *command, "--epss=1")
    assert mistyped.returncode == 2
    assert mistyped.stderr.splitlines() == [
        "error: unrecognized arguments: --epss=1; --help explains every flag"
    ]
    assert "Traceback" not in wrong.stderr


def run_from(folder, model, output_dir):
    """What the command does with --run in another folder than the toolkit's."""
    data = save_dataset(folder)
    command = flags(model, data, output_dir, "--num_epochs=0.2", "--no_eval_at_start", "--run")
    return subprocess.run(
        [sys.executable, str(ROOT / "generate_train_command.py"), *command], cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_run_executes_the_line_from_any_folder(tmp_path, tiny_model_dir):
    done = run_from(tmp_path, tiny_model_dir, "out put")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (tmp_path / "out put" / "job" / "adapter" / "adapter_model.safetensors").is_file()


# The generator of sampling passes one on in the same way, and always says so.
@pytest.mark.slow
def test_run_passes_the_exit_code_on(tmp_path):
    failed = run_from(tmp_path, "/nowhere", tmp_path)
    assert failed.returncode == 2
    assert "error: no model at '/nowhere'" in failed.stderr
    assert "Traceback" not in failed.stderr
