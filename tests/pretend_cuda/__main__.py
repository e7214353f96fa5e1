"""Run a script of this repository, or a module, on the pretend device; called as Python itself is.

python -m tests.pretend_cuda train.py --dataset_name ...
python -m tests.pretend_cuda -m pytest -m gpu
"""

import runpy
import sys

from tests import pretend_cuda

pretend_cuda.install()

from tests.pretend_cuda.device import counts  # noqa: E402

sys.argv = sys.argv[1:]
try:
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(f"{counts.kernels.total():,} kernels; waited for the device:", file=sys.stderr)
    for place, number in counts.synchronisations.most_common(20):
        print(f"{number:8,}  {place}", file=sys.stderr)
