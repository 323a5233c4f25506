#!/usr/bin/env python3
"""Stands in for sbatch, scancel, squeue, scontrol and srun on one machine without SLURM.

Jobs are local processes. Options are checked against the names that SLURM 24.11 knows (`man sbatch`). State
is in the folder SLURM_STANDIN: one folder a job, with its script, what it asked for and its process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

_LONG = """account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint
container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task
deadline delay-boot dependency distribution error exclude exclusive export export-file extra extra-
node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres
gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-
label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist
nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output
overcommit oversubscribe parsable partition prefer priority profile propagate qos quiet reboot
requeue reservation segment signal sockets-per-node spread-job stepmgr switches test-only thread-
spec threads-per-core time time-min tmp tres-bind tres-per-task uid use-min-nodes verbose wait wait-
all-nodes wckey wrap"""
LONG = _LONG.split()
_SHORT = """A=account a=array b=begin C=constraint c=cpus-per-task D=chdir d=dependency
e=error F=nodefile G=gpus H=hold i=input J=job-name k=no-kill
L=licenses M=clusters m=distribution N=nodes n=ntasks O=overcommit o=output
p=partition q=qos s=oversubscribe t=time W=wait w=nodelist x=exclude"""
SHORT = dict(pair.split("=") for pair in _SHORT.split())
FLAGS = {
    "requeue",
    "no-requeue",
    "hold",
    "overcommit",
    "parsable",
    "wait",
    "exclusive",
    "contiguous",
    "no-kill",
}
SRUN = ["ntasks", "cpus-per-task", "kill-on-bad-exit", "nodes", "exact", "overlap", "gpus-per-task", "mem"]
SIGNAL = re.compile(r"^([BR]:|BR:)?(\w+)(@\d{1,5})?$")
TIME = re.compile(r"^(\d+-)?\d+(:\d\d){0,2}$")
MEMORY = re.compile(r"^\d+[KMGT]?$")


def refuse(text: str) -> None:
    sys.exit(f"sbatch: error: {text}")


def options(words: list[str], names: list[str] = LONG) -> tuple[dict[str, str], list[str]]:
    """Return the options before the first word that is none, and the rest."""
    found: dict[str, str] = {}
    words = list(words)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
        else:
            name, given, value = SHORT.get(word[1], word[1]), word[2:], word[2:]
        if name not in names:
            refuse(f"unrecognized option '{word}'")
        if not given and name not in FLAGS:
            value = words.pop(0) if words else refuse(f"option '{word}' requires an argument")
        found[name] = value
    for name, pattern in (("signal", SIGNAL), ("time", TIME), ("mem", MEMORY), ("mem-per-cpu", MEMORY)):
        if name in found and not pattern.match(found[name]):
            refuse(f"Invalid --{name} specification: {found[name]}")
    if found.get("partition") == "nowhere":
        refuse("invalid partition specified: nowhere")
    return found, words


def directives(script: str) -> list[str]:
    """Return the words of the #SBATCH lines before the first command."""
    words = []
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break
    return words


def in_mebibytes(text: str) -> int:
    units = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    return int(int(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


def state() -> Path:
    return Path(os.environ["SLURM_STANDIN"])


def sbatch(words: list[str]) -> None:
    given, rest = options(words)
    script = Path(rest[0]).read_text()
    if not script.startswith("#!"):
        refuse("This does not look like a batch script.")
    from_script, stray = options(directives(script))
    if stray:
        refuse(f"Invalid directive found in batch script: {stray[0]}")
    asked = {**from_script, **given}
    number = 1001
    while True:
        try:
            (job := state() / str(number)).mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    (job / "script").write_text(script)
    (job / "asked.json").write_text(json.dumps({**asked, "arguments": rest[1:], "folder": os.getcwd()}))
    start(job, restart=0)
    print(f"Submitted batch job {number}")


def start(job: Path, restart: int) -> None:
    asked = json.loads((job / "asked.json").read_text())
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {
        "SLURM_STANDIN": str(state()),
        "SLURM_JOB_ID": job.name,
        "SLURM_JOB_NAME": asked.get("job-name", "script"),
        "SLURM_SUBMIT_DIR": asked["folder"],
        "SLURM_RESTART_COUNT": str(restart),
        "SLURM_NTASKS": asked.get("ntasks", "1"),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": asked.get("cpus-per-task", "1"),
    }
    for name, variable in (("mem", "SLURM_MEM_PER_NODE"), ("mem-per-cpu", "SLURM_MEM_PER_CPU")):
        if name in asked:
            env[variable] = str(in_mebibytes(asked[name]))
    pattern = asked.get("output", "slurm-%j.out")
    log = Path(asked["folder"]) / re.sub(
        "%[jJx]", lambda m: env["SLURM_JOB_NAME"] if m[0] == "%x" else job.name, pattern
    )
    with log.open("ab" if asked.get("open-mode") == "append" else "wb") as file:
        process = subprocess.Popen(
            ["bash", str(job / "script"), *asked["arguments"]],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
            cwd=asked["folder"],
        )
    (job / "pid").write_text(str(process.pid))


def scancel(words: list[str]) -> None:
    for number in words:
        (state() / number / "cancelled").touch()
        try:
            os.killpg(int((state() / number / "pid").read_text()), signal.SIGTERM)
        except ProcessLookupError:
            sys.exit(f"scancel: error: Kill job error on job id {number}: Invalid job id specified")


def squeue(words: list[str]) -> None:
    print("JOBID STATE")
    for pid in state().glob("*/pid"):
        if Path(f"/proc/{pid.read_text()}").exists():
            print(pid.parent.name, "RUNNING")


def scontrol(words: list[str]) -> None:
    if words[0] != "requeue" or not (state() / words[1]).is_dir():
        sys.exit("scontrol: error: invalid entity")
    (state() / words[1] / "requeued").touch()


def srun(words: list[str]) -> None:
    given, command = options(words, SRUN)
    tasks = [subprocess.Popen(command) for _ in range(int(given.get("ntasks", 1)))]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    sys.exit(max(task.wait() for task in tasks))


if __name__ == "__main__":
    {"sbatch": sbatch, "scancel": scancel, "squeue": squeue, "scontrol": scontrol, "srun": srun}[
        Path(sys.argv[0]).name
    ](sys.argv[1:])
