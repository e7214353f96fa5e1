"""Adapters of strangers: what does not fit the model, whole, is refused."""

import json
import pickle
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from utils.cli import UsageError
from utils.models.loading import load_base_model, load_tokenizer
from utils.models.lora import load_adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """The folder of an adapter as PEFT writes one."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    model = get_peft_model(load_base_model(tiny_model_dir, torch.float32), config)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor)
    model.save_pretrained(folder)
    return folder


def changed(adapter, tmp_path, *, config=None, weights=None, raw=()):
    """A copy of the adapter with another configuration, other weights or other files."""
    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder)
    if config:
        known = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(known | config))
    if weights:
        save_file(weights(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    for name, content in dict(raw).items():
        (folder / name).write_bytes(content)
    return folder


def load(folder, tiny_model_dir, merge):
    return load_adapted(tiny_model_dir, folder, torch.float32, merge=merge)


@pytest.mark.parametrize("merge", [True, False])
def test_a_whole_adapter_changes_the_base(adapter, tiny_model_dir, merge):
    ids = torch.arange(3, 20)[None]
    base = load_base_model(tiny_model_dir, torch.float32)(input_ids=ids).logits
    adapted = load(adapter, tiny_model_dir, merge)(input_ids=ids).logits
    assert (adapted - base).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_into_a_base_of_the_dtype_that_is_asked_for(
    adapter, tiny_model_dir, dtype, monkeypatch
):
    """No process holds a float32 copy of a base in bfloat16; each sum is rounded once."""
    merging, dtypes = Linear.get_delta_weight, []

    def watched(layer, name):
        delta = merging(layer, name)
        dtypes.append((layer.base_layer.weight.dtype, delta.dtype))
        return delta

    monkeypatch.setattr(Linear, "get_delta_weight", watched)
    merged = load_adapted(tiny_model_dir, adapter, dtype, merge=True)
    assert dtypes == [(dtype, torch.float32)] * 4
    assert {tensor.dtype for tensor in merged.parameters()} == {dtype}
    weights, base = load_file(adapter / WEIGHTS), load_base_model(tiny_model_dir, dtype)
    for name, tensor in base.named_parameters():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = tensor
        if f"{layer}.lora_A.weight" in weights:
            low, high = (weights[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            expected = (tensor.float() + 2 * (high @ low)).to(dtype)
            assert not torch.equal(expected, tensor)
        assert torch.equal(merged.get_parameter(name), expected), name


def test_an_adapter_that_is_kept_apart_stays_as_it_is(adapter, tiny_model_dir):
    model = load_adapted(tiny_model_dir, adapter, torch.bfloat16, merge=False)
    kept = {f"base_model.model.{name.replace('.default', '')}": tensor
            for name, tensor in model.named_parameters() if "lora_" in name}  # fmt: skip
    weights = load_file(adapter / WEIGHTS)
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


def without_first(tensors):
    return {name: tensors[name] for name in sorted(tensors)[1:]}


def renamed(tensors):
    return {name.replace("layers.0.", "layers.9."): tensor for name, tensor in tensors.items()}


def more(tensors):
    return tensors | {"base_model.model.extra.lora_A.weight": torch.zeros(2)}


def smaller(tensors):
    return {name: tensor[:2].clone() for name, tensor in tensors.items()}


UNFIT = {
    "a tensor is missing": ({"weights": without_first}, "lacks base_model.*lora_A"),
    "tensors have other names": ({"weights": renamed}, r"lacks .*layers\.0"),
    "all tensors are missing": ({"weights": lambda _: {"x": torch.zeros(1)}}, "lacks"),
    "a tensor more": ({"weights": more}, "has base_model.model.extra.lora_A.weight, which no"),
    "other shapes": ({"weights": smaller}, "does not fit.*size mismatch"),
    "a rank that no memory holds": ({"config": {"r": 10**12}}, "does not fit"),
    "a rank of another size": ({"config": {"r": 8}}, "does not fit"),
    "a rank that is none": ({"config": {"r": "many"}}, "does not fit"),
    "no rank": ({"config": {"r": 0}}, "does not fit"),
    "other layers": ({"config": {"target_modules": ["nowhere"]}}, "does not fit"),
    "layers that are none": ({"config": {"target_modules": 5}}, "does not fit"),
    "another kind": ({"config": {"peft_type": "PROMPT_TUNING"}}, "kind 'PROMPT_TUNING'.*'LORA'"),
    "an unknown kind": ({"config": {"peft_type": ["x"]}}, "kind"),
    "no object": ({"raw": {CONFIG: b"[1]"}}, "is not a JSON object"),
    "no JSON": ({"raw": {CONFIG: b"\xff{"}}, "is not a JSON object"),
    "a pointer": ({"raw": {WEIGHTS: POINTER}}, "git-lfs pointer"),
    "a pointer for a configuration": ({"raw": {CONFIG: POINTER}}, "git-lfs pointer"),
    "weights that are cut": ({"raw": {WEIGHTS: b"\x10\0\0\0\0\0\0\0{"}}, "does not fit"),
    "a header without end": ({"raw": {WEIGHTS: b"\xff" * 100}}, "does not fit"),
    "no weights at all": ({"raw": {WEIGHTS: b""}}, "does not fit"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_one_line(adapter, tiny_model_dir, tmp_path, case):
    changes, message = UNFIT[case]
    folder = changed(adapter, tmp_path, **changes)
    with pytest.raises(UsageError, match=message) as refused:
        load(folder, tiny_model_dir, True)
    assert "\n" not in str(refused.value)


class Evil:
    def __reduce__(self):
        return open, ("executed", "w")


def test_pickled_weights_are_not_executed(adapter, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = changed(adapter, tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="does not fit"):
        load(folder, tiny_model_dir, True)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------ models of strangers


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(
    tiny_model_dir, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    mapping = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config |= {"auto_map": mapping, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UsageError, match="cannot load a model"):
        load_base_model(str(folder), torch.float32)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_that_was_not_fetched_is_one_line(tiny_model_dir, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / name).write_bytes(POINTER)
    for loading in (lambda: load_base_model(str(folder), torch.float32),
                    lambda: load_tokenizer(str(folder))):  # fmt: skip
        with pytest.raises(UsageError, match=f"{name} is a git-lfs pointer"):
            loading()


def test_weights_that_are_cut_are_one_line(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot load a model"):
        load_base_model(str(folder), torch.float32)
