"""One command many times, as jobs of a cluster with Slurm or as processes here, by submitit (pip install submitit).

    python -m benchmarks.spread --jobs 4 -- main.py --config FILE.yaml --name seed_{n} --seed {n} --resume True
    python -m benchmarks.spread --jobs 8 --slurm '{"gpus_per_node": 1}' -- compare.py --split FILE --part {k}/{jobs}
    python -m benchmarks.spread --jobs 3 -- benchmarks.pareto --measure flops --part {k}/{jobs}
    python -m benchmarks.spread --jobs 2 -- benchmarks.evidence --stage compare --part {k}/{jobs}

{n} is the number of the job from 0, {k} from 1, {jobs} how many there are. What is interrupted goes on with the same
command, as far as the command itself does.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

import options
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

    def __init__(self, words: Sequence[str], threads: int | None) -> None:
        self.words, self.threads = list(words), threads

    def __call__(self) -> int:
        """The exit code."""
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        return subprocess.run(self.words, cwd=ROOT, env={**os.environ, **threads}).returncode

    def checkpoint(self) -> Any:
        """Called by submitit before a job's time is over or it makes way for another."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


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
    executor = submitit.AutoExecutor(
        folder=Path(opt.logs).resolve(), cluster=None if opt.where == "auto" else opt.where
    )
    here = executor.cluster == "local"
    executor.update_parameters(name="snas", **({"timeout_min": 60 * 24 * 365} if here else opt.slurm))
    threads = max(1, (os.cpu_count() or 1) // opt.jobs) if here else None
    jobs = [executor.submit(Command(line, threads)) for line in lines]
    print(f"started  {len(jobs)} jobs ({executor.cluster}); what they print is in {opt.logs}", flush=True)
    codes = [_wait(job, " ".join(line[1:])) for job, line in zip(jobs, lines, strict=True)]
    if any(codes):
        raise UserError(f"{sum(map(bool, codes))} of {len(codes)} jobs failed, see above; the same command goes on")
    return codes


def _wait(job: Any, line: str, sleep: Callable[[float], None] = time.sleep) -> int:
    """The exit code of a job, said in a line."""
    while not job.done():
        sleep(1)
    try:
        code = int(job.result())
    except Exception as error:  # submitit's own kinds: it was killed, or never ran
        print(f"failed   {line}: {str(error).strip().splitlines()[-1]}")
        return 1
    print(
        f"{'ended   ' if code == 0 else 'failed  '} {line}"
        + (f": exit code {code}, {job.paths.stderr}" if code else "")
    )
    return code


if __name__ == "__main__":
    options.entry(main)
