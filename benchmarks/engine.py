"""One engine in a process of its own: `python -m benchmarks.engine JOB`, with a job as JSON.

Prints one JSON object: seconds of the timed steps, processed tokens, and the peak of memory beyond
what the interpreter and its libraries take (on a GPU: the peak that torch allocated).
"""

import importlib
import json
import resource
import sys

import psutil
import torch

from benchmarks.jobs import OURS, Job

MODULES = {"published-loop": "published_loop", "opacus-hooks": "opacus", "opacus-ghost": "opacus"}


def main(argv: list[str]) -> None:
    """Run the job and print what it took."""
    settings = json.loads(argv[0])
    job = Job(**(settings | {"targets": tuple(settings["targets"])}))
    name = "ours" if job.engine in OURS else MODULES.get(job.engine, job.engine)
    module = importlib.import_module(f"benchmarks.engines.{name}")
    before = psutil.Process().memory_info().rss
    result = module.run(job)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps(result | {"peak_memory_mib": peak / 2**20}))


if __name__ == "__main__":
    main(sys.argv[1:])
