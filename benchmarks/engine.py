"""One engine in a process of its own: `python -m benchmarks.engine JOB`, with a job as JSON.

Prints one JSON object: seconds of the timed steps, processed tokens, and the peak of memory in the
steps beyond what the interpreter and its libraries take (on a GPU: what torch had allocated).
"""

import importlib
import json
import sys

import psutil
import torch

from benchmarks.jobs import OURS, Job

MODULES = {"published-loop": "published_loop", "opacus-hooks": "opacus", "opacus-ghost": "opacus"}


def main(argv: list[str]) -> None:
    """Run the job and print what it took."""
    job = Job(**json.loads(argv[0]))
    name = "ours" if job.engine in OURS else MODULES.get(job.engine, job.engine)
    module = importlib.import_module(f"benchmarks.engines.{name}")
    libraries = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    result = module.run(job)
    result["peak_memory_mib"] = (result.pop("peak_memory") - libraries) / 2**20
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
