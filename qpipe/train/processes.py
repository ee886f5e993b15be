"""Several processes that train one run together, each on its own device: who does what.

The global batch stays what the run says; each process takes its slice of it, gradients are averaged (Lightning's DDP),
and the running means are averaged whenever a row of the curve ends. So a run's losses do not depend on the number of
processes, up to the order in which floats are added. The main process (rank 0) alone claims the attempt, chooses the
checkpoint, writes heartbeat and results, and talks to W&B.

On one machine (QPIPE_DEVICES) the main process starts the others with the command it was started with, and what they
have to know goes along in the environment. On a cluster (QPIPE_NODES as well) srun has started all of them at once, on
one node or several: their ranks are Slurm's, and the main process tells the others over the network, at the address
and port at which they will meet to train: MASTER_ADDR, by default the first node, and MASTER_PORT, by default one made
of the job's number.
"""

import datetime
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from qpipe.errors import QpipeError
from qpipe.resources import DEVICES, NODES, SHARD
from qpipe.runs import Run
from qpipe.train.checkpoint import newest_checkpoint
from qpipe.train.scratch import Scratch, scratch_folder

_ATTEMPT, _CHECKPOINT = "QPIPE_MAIN_ATTEMPT", "QPIPE_MAIN_CHECKPOINT"
_MEETING = datetime.timedelta(minutes=10)
"""How long processes wait for each other at the start: nodes load a cold environment at very different speeds."""


@dataclass(frozen=True)
class Processes:
    """The processes that train a run.

    Attributes
    ----------
    nodes
        Machines.
    per_node
        Processes on each, one per device.
    rank
        Number of this one among all, from 0.
    sharded
        Whether each holds a part of the model instead of all of it.
    """

    nodes: int
    per_node: int
    rank: int
    sharded: bool = False

    @classmethod
    def from_environment(cls, run: Run) -> "Processes":
        """Read QPIPE_DEVICES and QPIPE_NODES, 1 by default, and QPIPE_SHARD, 0 by default.

        Raises
        ------
        QpipeError
            No counts, a batch that cannot be shared equally, nothing to shard, or srun started another number of
            processes.
        """
        per_node, nodes = _count(DEVICES), _count(NODES)
        batch = run.training.batch_sequences
        if batch % (nodes * per_node):
            raise QpipeError(
                f"{DEVICES}={per_node} on {nodes} nodes: run {run.id} has {batch} sequences per step, "
                f"not a multiple of {nodes * per_node}"
            )
        sharded = _shards(run, nodes * per_node)
        if NODES in os.environ:
            return cls(nodes, per_node, _join_srun(nodes, per_node), sharded)
        return cls(1, per_node, int(os.environ.get("LOCAL_RANK", "0")) if per_node > 1 else 0, sharded)

    @property
    def count(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.per_node

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def claim(self, run: Run, out: Path) -> tuple[Scratch, Path | None]:
        """Begin an attempt and choose its checkpoint, or join the attempt that the main process has begun."""
        if not self.main:
            self._meet()
            name = os.environ[_CHECKPOINT]
            return Scratch(scratch_folder(run.id, out), int(os.environ[_ATTEMPT])), Path(name) if name else None
        scratch = Scratch.claim(run.id, out)
        checkpoint = newest_checkpoint(scratch, run.id)
        os.environ[_ATTEMPT], os.environ[_CHECKPOINT] = str(scratch.attempt), str(checkpoint or "")
        self._meet()
        return scratch, checkpoint

    def _meet(self) -> None:
        """Take over the main process's attempt and checkpoint where srun, and not the main process, started us."""
        if NODES not in os.environ or self.count == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
        try:
            store = torch.distributed.TCPStore(address, port, self.count, self.main, _MEETING)
            for name in (_ATTEMPT, _CHECKPOINT):
                if self.main:
                    store.set(name, os.environ[name])
                os.environ[name] = store.get(name).decode()
            if store.add("read", 1) == self.count:
                store.set("all read", "")
            if self.main:
                store.wait(["all read"], _MEETING)  # the store ends with the main process's hold on it
        except (RuntimeError, torch.distributed.DistError) as error:
            raise QpipeError(
                f"process {self.rank} of {self.count} cannot meet the others at {address}:{port} ({error}); "
                "set MASTER_ADDR and MASTER_PORT to an address and a port that all nodes reach"
            ) from error


def _count(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdigit() or int(text) < 1:
        raise QpipeError(f"{name}={text}: give a number of {name.removeprefix('QPIPE_').lower()} for one run, from 1")
    return int(text)


def _shards(run: Run, count: int) -> bool:
    word = os.environ.get(SHARD, "0")
    if word not in ("0", "1"):
        raise QpipeError(f"{SHARD}={word}: use 0 or 1, or leave it out")
    if word == "1" and count == 1:
        raise QpipeError(f"{SHARD}=1: run {run.id} trains on one device, which has to hold all of it; name more")
    if word == "1" and run.training.parameters == "bf16":
        raise QpipeError(f"{SHARD}=1: run {run.id} keeps bfloat16 weights beside float32 scales, which is not sharded")
    return word == "1"


def _join_srun(nodes: int, per_node: int) -> int:
    """Return this process's rank as srun gave it and say the rest in the words that Lightning and torch understand."""
    slurm = {name: os.environ.get(f"SLURM_{name}", "") for name in ("PROCID", "LOCALID", "NODEID", "NTASKS")}
    if slurm["NTASKS"] != str(nodes * per_node):
        raise QpipeError(
            f"{NODES}={nodes} and {DEVICES}={per_node} ask for {nodes * per_node} processes, srun has started "
            f"{slurm['NTASKS'] or 'none'}; use srun --nodes={nodes} --ntasks-per-node={per_node}, or unset {NODES}"
        )
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    defaults = {"MASTER_ADDR": _first_node, "MASTER_PORT": lambda: str(15000 + 2 * (job % 7500))}
    os.environ.update({name: default() for name, default in defaults.items() if not os.environ.get(name)})
    os.environ.update(LOCAL_RANK=slurm["LOCALID"], NODE_RANK=slurm["NODEID"])
    return int(slurm["PROCID"])


def _first_node() -> str:
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    shown = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, timeout=60)
    if shown.returncode or not shown.stdout.split():
        raise QpipeError(f"no first node in '{names}' ({shown.stderr.strip()}); set MASTER_ADDR to its name")
    return shown.stdout.split()[0]
