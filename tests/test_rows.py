"""One file, read by training, counted, and read as instructions: always the same rows."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from tests.json_lines import jsonl
from tests.paths import ROOT
from utils.cli import UsageError
from utils.texts import rows
from utils.texts.data_sets import count_train_examples, load_split, load_splits
from utils.texts.rows import MissingColumn, raw_rows, read_rows
from utils.texts.text_inputs import read_entries, read_instructions
from utils.texts.units import read_units

TEXTS = ["one", "two\nlines", "Grüße, 你好 😀", "a\u2028b\x85c\x0bd", "", "one", "a\0b"]
COLUMNS = {"instruction": ("instruction",)}


def lines(ends="\n", **others) -> str:
    """JSON lines whose text stands as it is, line separators of Unicode included."""
    objects = [{"instruction": text} | others for text in TEXTS]
    return "".join(json.dumps(row, ensure_ascii=False) + ends for row in objects)


def members(indent=None) -> str:
    return json.dumps(
        [{"instruction": text, "id": n} for n, text in enumerate(TEXTS)], indent=indent
    )


def mixed(*values) -> str:
    """JSON lines with another column, whose values take turns."""
    objects = [
        {"other": values[n % len(values)], "instruction": text} for n, text in enumerate(TEXTS)
    ]
    return jsonl(objects)


def table(delimiter=",", ends="\r\n", quoting=csv.QUOTE_ALL, before="") -> str:
    """A table of texts, with a column that nobody reads."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=ends, quoting=quoting)
    writer.writerows([["id, or number", "instruction"], *enumerate(TEXTS)])
    return before + text.getvalue()


SAME = {
    "plain.jsonl": lines(),
    "no_final_newline.jsonl": lines().rstrip("\n"),
    "windows.jsonl": lines("\r\n"),
    "windows_no_final_newline.jsonl": lines("\r\n").rstrip("\r\n"),
    "blank_lines.jsonl": "\n \t\n" + lines("\n\n\r\n") + "\n",
    "mark.jsonl": "\ufeff" + lines(),
    "mark_and_blank_line.jsonl": "\ufeff\n" + lines(),
    "escaped.jsonl": mixed(1),
    "numbers_among_strings.jsonl": mixed("id", 4),
    "lists_among_objects.jsonl": mixed({"a": 1}, [1], None, {"a": "x"}),
    "surrogate_elsewhere.jsonl": mixed("\ud83d"),
    "list.jsonl": members(),
    "list.json": members(),
    "indented.json": members(2),
    "mark.json": "\ufeff" + members(),
    "mark_no_final_newline.json": "\ufeff \n" + members().rstrip(),
    "texts.json": json.dumps(TEXTS),
    "columns.json": json.dumps({"id": list(range(len(TEXTS))), "instruction": TEXTS}),
    "columns_of_pandas.json": json.dumps({"instruction": dict(enumerate(TEXTS))}),
    "table.csv": table(),
    "sparing.csv": table(quoting=csv.QUOTE_MINIMAL, ends="\n").replace("\n3,", "\n\n\n3,"),
    "mark.csv": "\ufeff" + table(),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "stated.csv": table("|", before="sep=|\n"),
    "no_final_newline.csv": table().rstrip(),
    "table.tsv": table("\t", quoting=csv.QUOTE_MINIMAL),
    "packed.csv.gz": gzip.compress(table().encode()),
    "lines.json": lines(),
    "lines_with_mark.json": "\ufeff" + lines("\r\n"),
    "packed.jsonl.gz": gzip.compress(lines().encode()),
    "packed.json.gz": gzip.compress(("\ufeff" + members()).encode()),
}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def require_same_rows(path: str, texts=TEXTS) -> None:
    assert read_instructions(path, "train") == texts
    assert count_train_examples(path) == len(texts)
    train = load_splits(path)["train"]
    assert train.column_names == ["instruction"]
    assert train["instruction"][:] == texts


@pytest.mark.parametrize("name", SAME)
def test_every_reader_takes_the_same_rows_from_a_text(name, tmp_path):
    require_same_rows(write(tmp_path / name, SAME[name]))


def save_parquet(path):
    others = {"id": list(range(len(TEXTS))), "meta": [{"a": [n]} for n in range(len(TEXTS))]}
    table = pyarrow.table({"instruction": TEXTS} | others)
    pyarrow.parquet.write_table(table, path, row_group_size=3)


def save_categories(path):
    column = pyarrow.array(TEXTS).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": column}), path)


def save_dict(path):
    train = Dataset.from_dict({"instruction": TEXTS, "id": list(range(len(TEXTS)))})
    DatasetDict(train=train, test=train.select([0])).save_to_disk(
        path, num_shards={"train": 3, "test": 1}
    )


def save_folder(path):
    path.mkdir()
    write(path / "train.jsonl", lines())
    write(path / "val.json", '["val"]')
    write(path / "preparation.json", "{}")


def save_as_on_the_hub(path):
    (path / "data").mkdir(parents=True)
    for number, part in enumerate((TEXTS[:3], TEXTS[3:])):
        file = path / "data" / f"train-0000{number}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"instruction": part}), file)
    write(path / "data" / "test-00000-of-00001-0a1b2c.jsonl", lines())
    write(path / "README.md", "")
    write(path / "dataset_infos.json", "{}")


TABLES = {
    "a.parquet": save_parquet, "categories.parquet": save_categories, "saved": save_dict,
    "folder": save_folder, "hub": save_as_on_the_hub,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_reader_takes_the_same_rows_from_a_table(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "TABLE_BLOCK", 2)
    TABLES[name](tmp_path / name)
    require_same_rows(str(tmp_path / name))


def test_a_lone_row_is_read_with_and_without_a_final_newline(tmp_path):
    for number, end in enumerate(("", "\n", "\r\n", "\n\n")):
        require_same_rows(
            write(tmp_path / f"{number}.jsonl", '{"instruction":"only"}' + end), ["only"]
        )


GOOD = '{"instruction": "good"}\n' * 7
WRONG = {
    "number.jsonl": (
        GOOD + '{"instruction": 42}\n', "entry 8, column 'instruction' is .* int, not text$"
    ),
    "null.jsonl": (GOOD + '{"instruction": null}\n', "entry 8, column 'instruction' .* NoneType"),
    "after_blank_line.jsonl": ("\n" + GOOD + '{"instruction": 42}\n', "entry 8, column"),
    "list.json": ('["a", ["b"]]', "entry 2 is neither a text nor an object but of type list"),
    "surrogate.jsonl": (
        GOOD + '{"instruction": "half \\ud83d"}\n', "entry 8, .* not valid Unicode: it has half a",
    ),
    "latin.jsonl": (GOOD.encode() + b'{"instruction": "\xe9"}\n', "line 8 is not UTF-8"),
    "latin.json": (b'["a",\n"\xe9"]', "line 2 is not UTF-8"),
    "utf16.jsonl": (GOOD.encode("utf-16"), "it is UTF-16 or UTF-32, not UTF-8; save it as UTF-8"),
    "utf16_without_mark.jsonl": (GOOD.encode("utf-16-be"), "it is UTF-16"),
    "utf32.json": ("[]".encode("utf-32"), "it is UTF-16 or UTF-32"),
    "commas.jsonl": (GOOD.replace("\n", ",\n"), "line 1 is not .*: it ends with a comma"),
    "commas.json": (GOOD.replace("\n", ",\n"), "line 1 .* remove the comma at the end of every"),
    "comma.json": ('["a", "b", ]', "a comma stands after the last entry, 2; remove it"),
    "no_comma.json": ('["a" "b"]', "entry 2 cannot be read as JSON: a comma before it"),
    "two_commas.json": ('["a",, "b"]', "entry 2 cannot be read as JSON"),
    "first_comma.json": (', "b"]', "line 1 is not a JSON object"),
    "open.json": ('["a"', "entry 2 cannot be read as JSON: a comma .*, or the end of the list, is"),
    "cut.json": ('["a", {"instr', "entry 2 cannot be read as JSON: Unterminated string"),
    "more.json": ('["a"]\n["b"]', "more stands after the end of its list"),
    "cut.jsonl": (GOOD + '{"instr', "line 8 is not a JSON object: the file ends in it"),
    "torn.jsonl": (GOOD + '{"instr\n' + GOOD, "line 8 is not a JSON object: Invalid"),
    "key.json": ('{"data": [{"instruction": "a"}]}', "must hold a list .* under 'data' alone"),
    "keys.json": ('{\n  "version": 1,\n  "rows": [\n"a"]}', "save what stands under 'rows' alone"),
    "turns.json": ('{\n"messages": [{"role": "user"}]}', "put \\[ before and \\] after"),
    "parts.json": ('{\n"instruction": ["a"], "id": []}', "put \\[ before and \\] after"),
    "short.csv": ("id,instruction\n\n1,a\n2\n", "line 4 .* as a row: it has 1 fields, .* header 2"),
    "long.csv": ("instruction\nHello, you\n", "line 2 .* it has 2 fields, .* header 1; put double"),
    "quotes.csv": ('instruction\n"a\nb" c\n', "line 2 .* .*double the quotes"),
    "open.csv": ('instruction\na\n"b\nc\n', "line 3 cannot be read as a row: unexpected end"),
    "open_header.csv": ('"instruction\n', "line 1 cannot be read as names of columns"),
    "empty.csv": ("\n", "it has no first line with the names of the columns"),
    "twice.csv": ("instruction,instruction\na,b\n", "two columns have the name 'instruction'"),
    "latin.csv": (b"instruction\na\n\xe9\n", "line 3 is not UTF-8"),
    "utf16.csv": (table().encode("utf-16"), "it is UTF-16 or UTF-32, not UTF-8; save it as UTF-8"),
    "object.json": ('{\n"instruction": "a"\n}', "must hold a list .* put \\[ before and \\] after"),
    "empty.json": ("", "must hold a list of texts or of objects as JSON"),
    "deep.json": ("[" * 100_000, "cannot be read"),
    "packed.jsonl.gz": (gzip.compress(GOOD.encode())[:-9], "cannot be read"),
    "not_packed.json.gz": (b"[]  ", "cannot be read"),
    "a.parquet": (b"PAR1", "cannot be read"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "by: git lfs pull"),
    "pointer.csv": (b"version https://git-lfs.github.com/spec/v1\n", "by: git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_every_reader_refuses_a_wrong_file_in_the_same_words(name, tmp_path):
    content, message = WRONG[name]
    path = write(tmp_path / name, content)
    for read in (read_instructions, count_train_examples, load_splits):
        with pytest.raises(UsageError, match=message) as error:
            read(path)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


PRIVATE = "My name is Ada Lovelace and I live in 12 St James's Square, London"


def test_a_table_without_a_header_is_not_shown_whole(tmp_path):
    """What passes for names of columns is a private row."""
    fields = [PRIVATE, *(f"field {n}" for n in range(30))]
    for name in ("a.csv", "labelled.csv"):
        path = write(tmp_path / name, ",".join(f'"{field}"' for field in fields) + "\n" + "x," * 30)
        reads = [load_splits, count_train_examples, lambda path: read_units(path, "who")]
        for read in reads + [read_instructions] * (name == "a.csv"):
            with pytest.raises(UsageError, match="does the first line of the file name") as error:
                read(path)
            assert PRIVATE[:40] + "..." in str(error.value)
            assert "field 18, 11 more (does" in str(error.value)
    twice = write(tmp_path / "twice.csv", f'"{PRIVATE}","{PRIVATE}"\n')
    with pytest.raises(UsageError, match="two columns have the name 'My") as error:
        read_instructions(twice)
    assert PRIVATE[40:] not in str(error.value)


def save_table(path: Path, table: pyarrow.Table) -> str:
    """As parquet, or as a stream of Arrow, by the suffix."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused_in_a_table(suffix, tmp_path):
    names = ["instruction", "id", "instruction"]
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names)
    file = Path(save_table(tmp_path / f"a.{suffix}", table))
    for read in (rows.names_of_table, lambda file: next(read_rows([file], COLUMNS))):
        with pytest.raises(UsageError, match="two columns have the name 'instruction'; rename one"):
            read(file)


def test_an_arrow_stream_without_a_batch_has_names_and_no_row(tmp_path):
    schema = pyarrow.schema([("instruction", pyarrow.string())])
    file = Path(save_table(tmp_path / "a.arrow", schema.empty_table()))
    assert rows.names_of_table(file) == ["instruction"]
    assert list(read_rows([file], COLUMNS)) == []
    assert rows.count_rows([file], COLUMNS) == 0


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_value_of_another_kind_in_a_table_is_named_with_its_entry(suffix, tmp_path):
    path = str(tmp_path / f"labelled.{suffix}")
    table = Dataset.from_dict({"instruction": ["a"] * 9, "answer": ["b"] * 7 + [None, "b"]})
    getattr(table, {"jsonl": "to_json", "parquet": "to_parquet"}[suffix])(path)
    with pytest.raises(UsageError, match="entry 8, column 'answer' is of type NoneType, not text"):
        load_splits(path)
    assert read_instructions(path) == ["a"] * 9  # the answers are none of its columns


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
def test_a_missing_column_is_named_with_all_that_are_there(suffix, tmp_path):
    path = tmp_path / f"labelled.{suffix}"
    if suffix == "saved":
        columns = Dataset.from_dict({"instruction": ["a"], "input": ["b"], "output": [3]})
        DatasetDict(train=columns).save_to_disk(path)
    elif suffix == "parquet":
        table = pyarrow.table({"instruction": ["a"], "input": ["b"], "output": [3]})
        pyarrow.parquet.write_table(table, path)
    else:
        write(path, '{"instruction": "a", "input": "b", "output": 3}\n')
    wanted = r"lacks column 'answer': it has instruction, input, output, and"
    for read in (count_train_examples, load_splits):
        with pytest.raises(UsageError, match=wanted):
            read(str(path))
    (file,) = rows.split_files(path)["train"] if suffix == "saved" else [path]
    with pytest.raises(MissingColumn, match="no column 'question' or 'q', only instruction, input"):
        next(read_rows([file], {"question": ("question", "q")}))


def test_a_part_of_the_instruction_that_is_not_read_is_named_once(tmp_path, capsys):
    row = {"instruction": "a", "input": "b", "answer": "c"}
    for name, content in {
        "labelled.jsonl": jsonl([row]), "labelled.csv": "instruction,input,answer\na,b,c\n"
    }.items():  # fmt: skip
        path = write(tmp_path / name, content)
        count_train_examples(path), load_splits(path), read_instructions(path)
        (said,) = capsys.readouterr().err.splitlines()
        assert f"{name}: the column 'input' is not read; python -m data.prepare_inst" in said
    write(tmp_path / "plain.jsonl", jsonl([{"instruction": "a", "output": "c"}]))
    count_train_examples(str(tmp_path / "plain.jsonl"))
    assert capsys.readouterr().err == ""


def test_a_column_has_the_first_of_its_names_that_a_row_has(tmp_path):
    file = tmp_path / "a.jsonl"
    write(file, '{"text": "a", "instruction": "b"}\n{"text": "c"}\n')
    assert read_instructions(str(file)) == ["b", "c"]
    columns = {"prompt": ("text", "instruction")}
    assert list(read_rows([file, file], columns)) == [{"prompt": "a"}, {"prompt": "c"}] * 2


def test_of_a_table_only_the_asked_columns_are_read(tmp_path):
    save_parquet(tmp_path / "a.parquet")
    save_dict(tmp_path / "saved")
    for file in [tmp_path / "a.parquet", *rows.split_files(tmp_path / "saved")["test"]]:
        assert next(raw_rows(file, ["instruction", "absent"])) == {"instruction": "one"}


def test_a_shard_may_end_in_a_torn_line_and_no_other_file(tmp_path):
    content = '{"text": "a", "finish_reason": "stop"}\n{"text": "b", "finish_reason": "stop"}'
    write(tmp_path / "shard-0.jsonl", content + '\n{"text": "c')
    write(tmp_path / "shard-1.jsonl", content)
    write(tmp_path / "other.jsonl", content + '\n{"text": "c')
    assert read_entries(str(tmp_path)) == ["a", "b", "a", "b"]
    assert read_entries(str(tmp_path / "shard-0.jsonl")) == ["a", "b"]
    with pytest.raises(UsageError, match="line 3 is not a JSON object: the file ends in it"):
        read_entries(str(tmp_path / "other.jsonl"))


def test_text_files_may_begin_with_a_mark_and_are_never_utf16(tmp_path):
    path = tmp_path / "a.txt"
    assert read_instructions(write(path, "\ufeffone\r\n\r\ntwo\u2028more")) == [
        "one",
        "two\u2028more",
    ]
    block = "### BOI ### 2\none\ntwo\n### EOI ###"
    assert read_instructions(write(path, "\ufeff" + block)) == ["one\ntwo"]
    write(tmp_path / "a.txt.gz", gzip.compress(b"packed"))
    assert read_instructions(str(tmp_path / "a.txt.gz")) == ["packed"]
    for encoding in ("utf-16", "utf-16-le"):
        with pytest.raises(UsageError, match="it is UTF-16 .* iconv -f UTF-16 -t UTF-8"):
            read_instructions(write(path, block.encode(encoding)))
    with pytest.raises(UsageError, match="line 2 is not UTF-8"):
        read_instructions(write(path, b"one\n\xe9"))


def test_the_splits_that_are_there_are_named(tmp_path):
    part = Dataset.from_dict({"instruction": ["a"]})
    DatasetDict(train_sft=part, test_sft=part).save_to_disk(tmp_path / "x")
    for read in (count_train_examples, load_splits):
        with pytest.raises(
            UsageError, match="no train split; it has test_sft, train_sft; .*--input_split NAME"
        ):
            read(str(tmp_path / "x"))
    assert load_split(str(tmp_path / "x"), "test_sft")["instruction"][:] == ["a"]
    write(tmp_path / "x" / "train_sft" / "state.json", "{}")
    with pytest.raises(UsageError, match="state.json is damaged"):
        read_instructions(str(tmp_path / "x"), "train_sft")


@pytest.mark.parametrize("block", [1, 3, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_across_blocks(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(rows, "JSON_BLOCK", block)
    values = [{"a": [1, {"b": "}"}]}, 'a "quoted ] , [" text', 12345, None, [], "", 7]
    path = tmp_path / "rows.json"
    write(path, "\ufeff" + json.dumps(values, indent=indent) + "\n")
    assert list(raw_rows(path)) == values
    write(path, "[ ]")
    assert list(raw_rows(path)) == []


def test_nothing_that_is_read_stays_in_a_cache_and_counting_loads_no_library(tmp_path):
    save_parquet(tmp_path / "a.parquet")
    save_dict(tmp_path / "saved")
    write(tmp_path / "a.jsonl", lines())
    script = """
import sys
from utils.texts.data_sets import count_train_examples, load_splits
names = sys.argv[1:]
assert [count_train_examples(name) for name in names] == [7, 7, 7]
assert not {"torch", "datasets"} & sys.modules.keys()
from utils.texts.text_inputs import read_instructions
for name in names:
    assert read_instructions(name, "train") == load_splits(name)["train"]["instruction"][:]
"""
    names = [str(tmp_path / name) for name in ("a.parquet", "saved", "a.jsonl")]
    home = tmp_path / "home"
    folders = {name: str(home) for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    home.mkdir()
    subprocess.run(
        [sys.executable, "-c", script, *names], cwd=ROOT, env=os.environ | folders, check=True
    )
    assert [path for path in home.rglob("*") if path.is_file()] == []
