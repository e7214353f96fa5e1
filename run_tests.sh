#!/usr/bin/env bash
# Installs what the tests need into .venv and runs lint, types and the suite.
#
#     ./run_tests.sh                 everything that is quick; more arguments go to pytest
#     ./run_tests.sh -m slow         the minutes-long ones, which use the real quick-start model
set -euo pipefail
cd "$(dirname "$0")"
. utils/venv.sh
use_venv requirements-dev.txt

ruff check .
ruff format --check .
mypy
# Tiny models on many threads spend their time waiting for one another.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest --numprocesses auto --dist loadfile "$@"
