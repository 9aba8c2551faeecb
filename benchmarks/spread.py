"""One command many times, as jobs of a cluster with Slurm or as processes here, by submitit (pip install submitit).

    python -m benchmarks.spread --jobs 4 -- main.py --config FILE.yaml --name seed_{n} --seed {n} --resume True
    python -m benchmarks.spread --jobs 8 --slurm '{"gpus_per_node": 1}' -- compare.py --split FILE --part {k}/{jobs}
    python -m benchmarks.spread --jobs 3 -- benchmarks.pareto --measure flops --part {k}/{jobs}
    python -m benchmarks.spread --jobs 2 -- benchmarks.evidence --stage compare --part {k}/{jobs}

{n} is the number of the job from 0, {k} from 1, {jobs} how many there are. What is interrupted goes on with the same
command, as far as the command itself does.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt

import options
import utils
from benchmarks.record import ROOT
from options import UserError


@dataclass(frozen=True)
class SpreadOptions:
    """Where and how often."""

    jobs: PositiveInt = 2
    """How often the command runs, each time with its own {n} and {k}."""
    where: Literal["auto", "slurm", "local"] = "auto"
    """auto is slurm where there is one, else local: processes of this machine, which share its cores."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """What Slurm is asked for, as submitit calls it, e.g. '{"timeout_min": 240, "gpus_per_node": 1}'."""
    logs: str = "experiments/jobs"
    """Where what the jobs print goes, as JOB_0_log.out and .err."""


class Command:
    """Runs a command line; what submitit takes to its job. Stopped by the cluster, it asks for the job again."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.words, self.environment = list(words), dict(environment)

    def __call__(self) -> int:
        """The exit code."""
        ignore = partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)  # by which submitit is told, for all of the job
        environment = {**os.environ, **self.environment}
        self.process = subprocess.Popen(self.words, cwd=ROOT, env=environment, preexec_fn=ignore)
        return self.process.wait()

    def checkpoint(self) -> Any:
        """Called by submitit before a job's time is over or it makes way for another: the run saves and ends first."""
        import submitit

        self.process.terminate()
        self.process.wait()
        return submitit.helpers.DelayedSubmission(Command(self.words, self.environment))


def commands(words: Sequence[str], jobs: int) -> list[list[str]]:
    """The command line of every job; a first word that is a module's name is run with -m.

    Raises:
        UserError: it has nothing that differs between jobs, or an unknown place.
    """
    if not words:
        raise UserError("what is to be run is lacking: put it after --, as in -- main.py --seed {n} --name seed_{n}")
    script = [words[0]] if words[0].endswith(".py") else ["-m", words[0]]
    found = []
    for number in range(jobs):
        try:
            filled = [word.format(n=number, k=number + 1, jobs=jobs) if "{" in word else word for word in words[1:]]
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"{error} is none of {{n}}, {{k}}, {{jobs}}; write other braces twice") from None
        found.append([sys.executable, *script, *filled])
    twice = [line for line, count in Counter(map(tuple, found)).items() if count > 1]
    if twice:
        raise UserError(f"the jobs would all be the same: {' '.join(twice[0][1:])}; use {{n}} or {{k}}")
    return found


def main(argv: Sequence[str] | None = None) -> list[int]:
    """Start all jobs and wait for them; their exit codes."""
    given = sys.argv[1:] if argv is None else list(argv)
    place = given.index("--") if "--" in given else len(given)
    opt = options.parse(SpreadOptions, given[:place], "python -m benchmarks.spread", __doc__)
    lines = commands(given[place + 1 :], opt.jobs)
    try:
        import submitit
    except ImportError:
        raise UserError("jobs are spread by submitit: pip install submitit") from None
    try:
        cluster = None if opt.where == "auto" else opt.where
        executor = submitit.AutoExecutor(folder=Path(opt.logs).resolve(), cluster=cluster, slurm_max_num_timeout=1000)
        here = executor.cluster == "local"
        executor.update_parameters(**({"timeout_min": 60 * 24 * 365} if here else {"name": "snas", **opt.slurm}))
    except (RuntimeError, NameError, TypeError, ValueError) as error:  # submitit's own
        raise UserError(f"submitit refuses --where {opt.where} --slurm {opt.slurm}: {error}") from None
    if here and opt.slurm:
        raise UserError("--slurm is for a cluster, and there is no Slurm here")
    jobs = [
        executor.submit(Command(line, _share(number, opt.jobs) if here else {})) for number, line in enumerate(lines)
    ]
    print(f"started  {len(jobs)} jobs ({executor.cluster}); what they print is in {opt.logs}", flush=True)
    codes = [_wait(job, " ".join(line[1:])) for job, line in zip(jobs, lines, strict=True)]
    if any(codes):
        raise UserError(f"{sum(map(bool, codes))} of {len(codes)} jobs failed, see above; the same command goes on")
    return codes


def _share(number: int, jobs: int) -> dict[str, str]:
    """The environment of a local job: its share of the cores, and a GPU of its own, or one in turn."""
    threads = {"OMP_NUM_THREADS": str(max(1, utils.cores() // jobs))}
    gpus = torch.cuda.device_count()  # submitit hides them
    return threads | ({"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {})


def _wait(job: Any, line: str) -> int:
    """The exit code of a job, said in a line."""
    while not job.done():
        time.sleep(1)
    try:
        code = int(job.result())
    except Exception as error:  # submitit's own kinds: it was killed, or never ran
        print(f"failed   {line}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}")
        return 1
    print(
        f"{'ended   ' if code == 0 else 'failed  '} {line}"
        + (f": exit code {code}, {job.paths.stderr}" if code else "")
    )
    return code


if __name__ == "__main__":
    options.entry(main)
