"""One process of a job that `accelerate launch` starts: training runs, watched, one after another.

    accelerate launch ... tests/distributed_worker.py JOBS.json

JOBS.json holds a list of objects: `name`; `argv`, flags of train.py; `by_rank`, flags that only
some ranks get (by rank, as text); `public_steps`, whether the optimizer is given one public vector
in place of every gradient, so that each step starts from the same parameters whatever was summed;
`memory`, the padded tokens of a pass that fit on some ranks (by rank, as text); `other_adapter`,
ranks (as text) whose libraries draw another adapter from the seed.
A process leaves NAME-RANK.npz (`clipped_sums`, on rank 0; `batches`, numbers of examples of its own
in every step; `layers`, numbers of frozen parameters in the layers of a sharded base, here and in
all) or, if the run was refused, NAME-RANK.json with the exit code and message.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import train
from privacy_checks.observed_run import PublicSteps, observe
from tests.test_out_of_memory import starve
from tests.training import draw_before_adapter
from utils.cli import UsageError
from utils.privacy.mechanism import Private


class OwnShare(Private):
    """Counts the examples of this process in every step."""

    own: list
    count = 0

    def capture(self, examples, rows=None):
        self.count += len(examples)
        return super().capture(examples, rows)

    def release(self, total, step):
        self.own.append(self.count)
        self.count = 0
        return super().release(total, step)


def run(job: dict, folder: Path, rank: str) -> None:
    own = []
    layers = []
    shard = train.shard_base

    def shard_and_count(model, device):
        shard(model, device)
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert not any(p.requires_grad for p in sharded)
        layers[:] = [sum(p.to_local().numel() for p in sharded), sum(p.numel() for p in sharded)]

    changes = [OwnShare, PublicSteps] if job.get("public_steps") else [OwnShare]
    file = folder / f"{job['name']}-{rank}"
    try:
        with pytest.MonkeyPatch.context() as context:
            context.setattr(train, "shard_base", shard_and_count)
            if rank in job.get("memory", {}):
                starve(context, "after", job["memory"][rank])
            if rank in job.get("other_adapter", []):
                draw_before_adapter(context)
            argv = job["argv"] + job.get("by_rank", {}).get(rank, [])
            seen = observe(argv, *changes, own=own)
    except UsageError as error:
        file.with_suffix(".json").write_text(json.dumps([2, str(error)]))
    except KeyboardInterrupt:
        file.with_suffix(".json").write_text(json.dumps([1, "not finished"]))
    except SystemExit as ended:
        file.with_suffix(".json").write_text(json.dumps([ended.code, ""]))
    else:
        np.savez(file, clipped_sums=seen.clipped_sums, batches=own, layers=layers)


def main() -> None:
    jobs = Path(sys.argv[1])
    for each in json.loads(jobs.read_text()):
        run(each, jobs.parent, os.environ["RANK"])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
