"""Where the repository is; light, for tests that need no more."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
