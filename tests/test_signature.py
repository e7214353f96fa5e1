"""Signed composed reports: whatever is changed afterwards, or signed by another, is refused."""

import json
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy_checks import report
from tests.test_report import make_run
from utils.cli import run_cli
from utils.privacy.ledger import LEDGER_FILE, record_histogram

PLAIN = serialization.NoEncryption()
PEM, OPENSSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH


def write_keys(folder, name="key", form=serialization.PrivateFormat.PKCS8, kind=Ed25519PrivateKey):
    """A private key for its owner alone, and the public one next to it."""
    private = kind.generate()
    secret, public = folder / name, folder / f"{name}.pub"
    secret.write_bytes(private.private_bytes(PEM, form, PLAIN))
    secret.chmod(0o600)
    forms = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    if form != OPENSSH:
        forms = (PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(private.public_key().public_bytes(*forms))
    return secret, public


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "job")


@pytest.fixture
def words(run, tmp_path):
    ledger = tmp_path / "histogram.jsonl"
    record_histogram(ledger, num_examples=500, noise_multiplier=20.0, num_bins=10)
    return [str(run), "--histogram", str(ledger), "--output", str(tmp_path / "out")]


def verified(words, public) -> int:
    return report.main([*words, "--verify_key", str(public)])


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, OPENSSH])
def test_what_was_signed_is_verified(words, tmp_path, capsys, form):
    secret, public = write_keys(tmp_path, form=form)
    assert report.main([*words, "--sign", str(secret)]) == 0
    assert "warning" not in capsys.readouterr().err
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert verified(words, public) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    # No byte of the private key is written anywhere, or said.
    body = b"".join(secret.read_bytes().splitlines()[1:-1])
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret]
    assert not [path for path in written if body[-20:] in path.read_bytes()]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("out/composed_report.json", "report: composed_report.json is not what was signed"),
        ("out/composed_report.md", "report: composed_report.md is not what was signed"),
        ("out/epsilon_over_steps.png", "report: epsilon_over_steps.png is not what was signed"),
        ("job/adapter/adapter_model.safetensors", "run 1: adapter/adapter_model.safetensors is"),
        ("job/adapter/adapter_config.json", "run 1: adapter/adapter_config.json is not what"),
        ("job/privacy_report.json", "run 1: privacy_report.json is not what was signed"),
        (f"job/{LEDGER_FILE}", "this ledger was edited"),
        ("histogram.jsonl", "histogram.jsonl, line 1 "),
        ("out/composed_report.sig.json", "signed by another key, or changed afterwards"),
    ],
)
def test_a_changed_byte_is_refused(words, tmp_path, capsys, name, said):
    secret, public = write_keys(tmp_path)
    assert report.main([*words, "--sign", str(secret)]) == 0
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    # A digit where there is one, so that the file stays one of its form.
    place = next((i for i in range(len(content) // 2, len(content)) if content[i] in b"12345"), 2)
    content[place] ^= 2
    file.write_bytes(content)
    assert verified(words, public) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert "NOT VERIFIED" in told.out


def test_another_key_another_run_and_further_steps_are_refused(words, run, tmp_path, capsys):
    secret, public = write_keys(tmp_path)
    _, other = write_keys(tmp_path, "other")
    assert report.main([*words, "--sign", str(secret)]) == 0
    assert verified(words, other) == 1
    assert "signed by another key" in capsys.readouterr().err
    # A histogram that was added to the ledger afterwards.
    record_histogram(words[2], num_examples=500, noise_multiplier=20.0, num_bins=10)
    assert verified(words, public) == 1
    assert "histogram 1: ledger is not what was signed" in capsys.readouterr().err
    assert verified([words[0], *words[3:]], public) == 1
    shutil.rmtree(run / "adapter")
    assert verified(words, public) == 1
    assert "run 1: adapter/adapter_config.json is not" in capsys.readouterr().err


def test_a_key_that_others_may_read_is_warned_about(words, tmp_path, capsys):
    secret, _ = write_keys(tmp_path)
    secret.chmod(0o644)
    assert report.main([*words, "--sign", str(secret)]) == 0
    assert "others may read this private key (mode 644); chmod 600" in capsys.readouterr().err


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: report.main(words))
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_wrong_keys_are_one_line_and_nothing_is_written(words, tmp_path, capsys):
    secret, public = write_keys(tmp_path)
    kind, kind_public = write_keys(tmp_path, "kind", kind=X25519PrivateKey)
    locked = tmp_path / "locked"
    phrase = serialization.BestAvailableEncryption(b"phrase")
    form = serialization.PrivateFormat.PKCS8
    locked.write_bytes(Ed25519PrivateKey.generate().private_bytes(PEM, form, phrase))
    for key in (public, kind, locked, tmp_path / "nowhere"):
        line = refused([*words, "--sign", str(key)], capsys)
        assert f"--sign {key}: no Ed25519 private key without a passphrase" in line
        assert not (tmp_path / "out").exists()
    for key in (secret, kind_public, tmp_path / "nowhere"):
        assert "no Ed25519 public key" in refused([*words, "--verify_key", str(key)], capsys)
    assert "is missing or no signature" in refused([*words, "--verify_key", str(public)], capsys)
    assert "need --output" in refused([words[0], "--sign", str(secret)], capsys)


def test_the_keys_of_the_help_are_taken(words, tmp_path):
    for make, public in (
        (["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "ssh"], "ssh.pub"),
        (["openssl", "genpkey", "-algorithm", "ed25519", "-out", "ssl"], "ssl.pub"),
    ):
        name = public.removesuffix(".pub")
        if shutil.which(make[0]) is None:
            continue
        subprocess.run(make, cwd=tmp_path, check=True)
        if name == "ssl":
            command = ["openssl", "pkey", "-in", "ssl", "-pubout", "-out", "ssl.pub"]
            subprocess.run(command, cwd=tmp_path, check=True)
        given = [*words[:-1], str(tmp_path / f"out-{name}")]
        assert report.main([*given, "--sign", str(tmp_path / name)]) == 0
        assert verified(given, tmp_path / public) == 0
        assert json.loads((tmp_path / f"out-{name}/composed_report.sig.json").read_text())["signed"]
