"""A signature (Ed25519, RFC 8032) over a composed report and the runs that it is of.

The ledgers' hash chains have no key: whoever keeps them can write others. A signature shows that
report, ledgers and adapters are those that the owner of a key signed, and nothing of how they came
to be.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from utils.cli import UsageError, say
from utils.files import sha256_of, write_json
from utils.privacy.ledger import LEDGER_FILE, read_ledger

SIGNATURE_FILE = "composed_report.sig.json"
# Of each run, next to its ledger's head: what the guarantee is of, and the claim about it.
SIGNED_OF_RUN = (
    "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "privacy_report.json",
    "run_config.json",
)  # fmt: skip
OTHERS_MAY = 0o077


def sign(
    folder: Path,
    names: Sequence[str],
    runs: Sequence[Path],
    ledgers: Sequence[Path],
    key: Ed25519PrivateKey,
    signature_file: str = SIGNATURE_FILE,
) -> Path:
    """Sign a written report, and write the signature next to it; returns its file.

    Args:
        folder: where the report is.
        names: its files, of which those that exist are signed.
        runs, ledgers: the runs' folders and the histograms' ledgers, in the report's order.
        signature_file: its name.
    """
    statement, path = statement_of(folder, names, runs, ledgers), folder / signature_file
    write_json(path, {"signed": statement, "ed25519": key.sign(as_bytes(statement)).hex()})
    return path


def differences(
    folder: Path,
    names: Sequence[str],
    runs: Sequence[Path],
    ledgers: Sequence[Path],
    key: Ed25519PublicKey,
    signature_file: str = SIGNATURE_FILE,
) -> list[str]:
    """What is not as it was signed, in a line each; none if all is. Args: see `sign`.

    Raises:
        UsageError: there is no signature.
    """
    path = folder / signature_file
    try:
        content = json.loads(path.read_text())
        signed, signature = content["signed"], bytes.fromhex(content["ed25519"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is missing or no signature; sign it first") from None
    try:
        key.verify(signature, as_bytes(signed))
        now = statement_of(folder, names, runs, ledgers)
    except InvalidSignature:
        return [f"{path}: signed by another key, or changed afterwards"]
    except UsageError as error:
        return [str(error)]
    return [
        f"{what}: {name} is not what was signed"
        for what in sorted({**now, **signed})
        for name in sorted({**now.get(what, {}), **signed.get(what, {})})
        if now.get(what, {}).get(name) != signed.get(what, {}).get(name)
    ]


def statement_of(
    folder: Path, names: Sequence[str], runs: Sequence[Path], ledgers: Sequence[Path]
) -> dict[str, dict[str, object]]:
    """What is signed: hashes of the report, and of each run and histogram by its number."""
    signed = {"report": _hashes(folder, names)}
    for number, run in enumerate(runs, start=1):
        signed[f"run {number}"] = _hashes(run, SIGNED_OF_RUN) | head_of(run / LEDGER_FILE)
    for number, ledger in enumerate(ledgers, start=1):
        signed[f"histogram {number}"] = head_of(ledger)
    return signed


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, object]:
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def head_of(ledger: Path) -> dict[str, object]:
    """The number of lines and the last chain value of a ledger; nothing where there is none.

    Raises:
        UsageError: it was edited.
    """
    if not ledger.is_file():
        return {}
    records = read_ledger(ledger)
    chain = records[-1]["chain"] if records else ""
    return {"ledger": {"lines": len(records), "chain": chain}}


def as_bytes(statement: dict) -> bytes:
    """The one form of a statement that is signed."""
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def read_private_key(path: Path, flag: str = "--sign") -> Ed25519PrivateKey:
    """Read a private key; warns if others may read it too.

    Args:
        flag: that named it.

    Raises:
        UsageError: none is there, it has a passphrase, or it is of another kind.
    """
    key = _read_key(
        path,
        b"BEGIN OPENSSH",
        lambda content: serialization.load_ssh_private_key(content, None),
        lambda content: serialization.load_pem_private_key(content, None),
    )
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(
            f"{flag} {path}: no Ed25519 private key without a passphrase; make one with "
            "openssl genpkey -algorithm ed25519 -out KEYFILE"
        )
    mode = path.stat().st_mode & 0o777
    if mode & OTHERS_MAY:
        say(f"warning: {flag} {path}: others may read this private key (mode {mode:o}); chmod 600")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key, as PEM or in OpenSSH's format.

    Raises:
        UsageError: none is there, or it is of another kind.
    """
    key = _read_key(
        path, b"ssh-", serialization.load_ssh_public_key, serialization.load_pem_public_key
    )
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(
            f"--verify_key {path}: no Ed25519 public key; make it of the private one with "
            "openssl pkey -in KEYFILE -pubout -out PUBLIC_KEY"
        )
    return key


def _read_key(
    path: Path,
    openssh: bytes,
    load_openssh: Callable[[bytes], object],
    load_pem: Callable[[bytes], object],
) -> object:
    """The key in a file of either format, of whatever kind; None if there is none.

    Args:
        openssh: what stands in files of OpenSSH's format alone.
    """
    try:
        content = path.read_bytes()
        return (load_openssh if openssh in content else load_pem)(content)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
