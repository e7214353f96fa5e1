"""Strings in texts that look like personal data or credentials.

Regular expressions find what has a fixed form, and checksums tell a card or an account from any
other number. What has no form, such as names and addresses of streets, is not found, nor are phone
numbers without a country code in other forms than North America's. Each expression takes time in
proportion to the text, whatever is in it: repetitions are bounded or cannot overlap.
"""

import re
from collections.abc import Callable, Iterator


def luhn(text: str) -> bool:
    """Whether the digits of a card number have the right check digit (ISO/IEC 7812-1)."""
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def iban(text: str) -> bool:
    """Whether an account number has the right check digits (ISO 13616, mod 97)."""
    account = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in account[4:] + account[:4])) % 97 == 1


_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_TOKENS = (
    r"AKIA[0-9A-Z]{16}",  # Amazon
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"gh[pousr]_[0-9A-Za-z]{36,255}",  # GitHub
    r"github_pat_[0-9A-Za-z_]{40,255}",
    r"hf_[0-9A-Za-z]{30,255}",  # Hugging Face
    r"sk-[0-9A-Za-z_-]{20,255}",  # OpenAI, Anthropic
    r"[rs]k_(?:live|test)_[0-9A-Za-z]{16,255}",  # Stripe
    r"xox[abeoprs]-[0-9A-Za-z-]{10,255}",  # Slack
    r"eyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]{10,2000}",  # JSON Web Token
)
_ANY: Callable[[str], bool] = bool
# An expression each, and what a match must also pass.
KINDS = {
    "e-mail addresses": (
        r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24}(?![\w@])",
        _ANY,
    ),
    "phone numbers": (
        r"(?<![\w+.])\+[1-9](?:[ .()-]{0,2}[0-9]){7,14}(?![ .-]?[0-9]|\w)"
        r"|(?<![\w+.-])(?:1[ .-])?(?:\([0-9]{3}\) ?|[0-9]{3}[ .-])[0-9]{3}[ .-][0-9]{4}"
        r"(?![ .-]?[0-9]|\w)",
        _ANY,
    ),
    "payment cards": (
        r"(?<![\w+.-])(?:[2-6][0-9]{12,18}|[2-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}"
        r"|3[47][0-9]{2}([ -])[0-9]{6}\2[0-9]{5})(?![ .-]?[0-9]|\w)",
        luhn,
    ),
    "bank accounts (IBAN)": (
        r"(?<!\w)[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)"
        r"(?!\w)",
        iban,
    ),
    "access tokens": (rf"(?<![\w-])(?:{'|'.join(_TOKENS)})(?![\w-])", _ANY),
    "private keys": (r"-----BEGIN (?:[A-Z]{1,20} ){0,2}PRIVATE KEY-----", _ANY),
    "IPv4 addresses": (rf"(?<![\w.])(?:{_BYTE}\.){{3}}{_BYTE}(?!\w|\.[0-9])", _ANY),
}
# Digits and letters of other scripts have none of these forms.
_COMPILED = [(re.compile(pattern, re.ASCII), passes) for pattern, passes in KINDS.values()]


def find(text: str) -> Iterator[tuple[int, str]]:
    """Every string of a kind: the kind's place in `KINDS`, and the string as it stands there."""
    for kind, (pattern, passes) in enumerate(_COMPILED):
        for match in pattern.finditer(text):
            if passes(match[0]):
                yield kind, match[0]
