"""How often the next token is right, on a model that always says the same one."""

import json

from benchmarks import next_tokens
from privacy_checks.tiny_model import byte_tokenizer
from tests.test_engines import constant_model
from tests.training import in_process
from utils.files import write_json


def test_every_token_with_loss_counts_once_whatever_it_is_padded_to(tmp_path):
    logits = [0.0] * 259
    logits[byte_tokenizer().convert_tokens_to_ids("a")] = 50.0
    constant_model(logits).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_json(tmp_path / "texts.json", ["aab", "b", "aaaaaaaa"])
    flags = [
        f"--texts={tmp_path / 'texts.json'}", f"--model_name={tmp_path / 'model'}",
        "--prompt_style=uncond_generation", "--dtype=float32", f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    # Of 4, 2 and 9 tokens with their ends; then cut after 4, of which the beginning is one.
    for longest, share in (("20", 10 / 15), ("4", 5 / 8)):
        assert in_process(next_tokens.main, [*flags, f"--max_seq_len={longest}"]) == 0
        found = json.loads((tmp_path / "out" / next_tokens.FILE).read_text())
        assert found == {str(tmp_path / "model"): share}
