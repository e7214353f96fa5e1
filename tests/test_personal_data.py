"""What counts as personal data, what only looks like it, and how long that takes to tell."""

import re
import time

import pytest

from evaluation.measures.personal_data import KINDS, find, iban, luhn

NAMES = list(KINDS)
RIGHT = {
    "e-mail addresses": [
        "jane.doe@example.com", "j+news@mail.example.co.uk", "a_b%c@x-y.org", "x@1.de",
    ],
    "phone numbers": [
        "+49 30 1234567", "+1 (555) 123-4567", "+442071838750", "(555) 123-4567", "555-123-4567",
        "555.123.4567", "1-800-555-0199",
    ],
    "payment cards": [
        "4111111111111111", "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005",
        "3782 822463 10005",
    ],
    "bank accounts (IBAN)": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32"],
    "access tokens": [
        "AKIA" + "ABCDEFGHIJ123456", "ghp_" + "a1B2" * 9, "hf_" + "abcDEF" * 6,
        "sk-proj-" + "Ab3_" * 8, "xoxb-" + "123456789012-abc", "AIza" + "x" * 35,
        "sk_live_" + "a1" * 12, "eyJhbGciOiJIUz.eyJzdWIiOiIxMj.SflKxwRJSMeKKF",
    ],
    "private keys": [
        "-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
    "IPv4 addresses": ["192.168.0.1", "8.8.8.8", "255.255.255.255", "10.0.0.0"],
}  # fmt: skip
NEAR_MISSES = [
    "jane.doe@example", "@example.com", "jane doe at example.com", "a@b@c", "a@.com", "x@y.z",
    "+12", "+0123456789", "555-1234", "555-123-45678", "12345678901234567890", "1234-5678-9012",
    "2 4 6 8 10 12 14 16 18 20 22 24", "2024-11-24 09:39:45", "3.14159265358979",
    "4111111111111112", "4111 1111 1111 1112", "9111111111111111", "41111111111111111111111",
    "0000 0000 0000 0000", "4111-1111 1111-1111",
    "DE88370400440532013000", "GB82 WEST 1234 5698 7654 33", "de89370400440532013000",
    "AKIAABCDEF", "ghp_short", "sk-learn", "task-force-of-the-united-kingdom", "AIza123", "eyJ.eyJ",
    "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "BEGIN PRIVATE KEY",
    "256.1.1.1", "1.2.3", "1.2.3.4.5", "01.2.3.4", "v1.2.3.4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"), [(k, text) for k, found in RIGHT.items() for text in found]
)
@pytest.mark.parametrize("frame", ["{}", "call {} please", "({}), or else", "«{}»\n", "{}. Then 7"])
def test_what_has_the_form_is_found_whole_and_once(kind, text, frame):
    assert list(find(frame.format(text))) == [(NAMES.index(kind), text)]


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_what_only_looks_like_it_is_not(text):
    assert list(find(f"see {text} there")) == []


def test_several_are_all_found():
    text = "a@b.com c@d.org 10.0.0.1 a@b.com"
    assert [found for _, found in find(text)] == ["a@b.com", "c@d.org", "a@b.com", "10.0.0.1"]


def test_checksums_know_a_changed_digit():
    """Luhn's and mod 97 find every single wrong digit; the first also most swapped neighbours."""
    for check, number in ((luhn, "4539578763621486"), (iban, "GB82WEST12345698765432")):
        assert check(number)
        for match in re.finditer("[0-9]", number):
            for digit in set("0123456789") - {match[0]}:
                assert not check(number[: match.start()] + digit + number[match.end() :])


HOSTILE = [
    "a", "1", "1 ", "a@", "a.", "a@a.", "@", "a@b.c", "+1", "+1 ", "4111 ", "-", "DE89 ", "DE89",
    "AAAA ", "eyJ", "eyJaaaaaaaaaa.", "eyJaaaaaaaaaa.eyJ", "sk-", "-----BEGIN ", "BEGIN RSA ", "1.",
    "255.", "(555", "555-", "xoxb-", "\u0661", "é", " ", "\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_takes_no_longer_than_its_length_asks(unit):
    """A quarter of a million characters, with which squares would take minutes."""
    began = time.process_time()
    for text in (unit * (250_000 // len(unit)), "x@" + unit * (250_000 // len(unit))):
        for _ in find(text):
            pass
    assert time.process_time() - began < 5
