"""A Slurm cluster of three nodes on this machine: munged, slurmctld and a slurmd for each node, no systemd.

Each slurmd lives in a UTS and mount namespace of its own, so that it has a hostname, node1 to node3, which its jobs
resolve to 127.0.1.1 to 127.0.1.3. Everything lies in one folder with a short path (sockets) and is ended by its
process id.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv", "taskset")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge (or tools/setup.sh --with-slurm)"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = 3
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# A credential's lifetime delays every requeue; two minutes by default.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
# No cgroups, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# Scheduled anew every second, so that a requeued job starts again soon.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A preempted job gets its own signal (USR2) at the start of the partition's GraceTime.
SlurmctldParameters=preempt_send_user_signal
# The nodes are as below, whatever this machine has.
SlurmdParameters=config_overrides
ReturnToService=2
PropagateResourceLimits=NONE
KillWait=10
SlurmdTimeout=5
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PreemptMode=OFF
PartitionName=low  Nodes=ALL MaxTime=60 PriorityTier=1  PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Start it, use the `environment`, stop it. Raises RuntimeError with the daemons' logs where it does not start."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": PATH}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        self._configure()
        socket = self.root / "munge.socket"
        files = {
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        files = [f"--{option}={self.root / name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", f"--socket={socket}", *files])
        self.wait_for(socket.exists, 10, "for munged")
        self.start_controller()
        self.start_nodes()
        self.wait_for(lambda: self.ask("sinfo", "-hN", "-p", "main", "-o", "%t").split() == ["idle"] * NODES, 30)

    def start_controller(self) -> None:
        """Start slurmctld, which goes on from what it had saved."""
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.root / "slurm.conf")])

    def stop_controller(self) -> None:
        """As for an update: jobs run on, but nobody answers questions about them."""
        self.daemons["slurmctld"].terminate()
        self.daemons["slurmctld"].wait(30)

    def start_nodes(self) -> None:
        """Start every node that is not there, or not any more."""
        for number in range(1, NODES + 1):
            daemon = self.daemons.get(f"node{number}")
            if daemon is None or daemon.poll() is not None:
                self._start_node(number)

    def _start_node(self, number: int) -> None:
        """Start its slurmd, on one of this machine's cores: the ranks of two nodes are not to fight over them."""
        cores = sorted(os.sched_getaffinity(0))
        node, core = f"node{number}", cores[number % len(cores)]
        enter = f"mount --bind {self.root}/hosts /etc/hosts && hostname {node}"
        slurmd = f"exec taskset -c {core} slurmd -D -f {self.root}/slurm.conf -N {node}"
        self._start(node, ["unshare", "--uts", "--mount", "sh", "-c", f"{enter} && {slurmd}"])

    def lose_node(self, node: str) -> None:
        """As by a power cut: its slurmd and all processes of its jobs end at once."""
        namespace = os.readlink(f"/proc/{self.daemons[node].pid}/ns/uts")
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns" / "uts") == namespace:
                    os.kill(int(process.name), signal.SIGKILL)
        self.daemons[node].wait(10)

    def ranks(self, job: str) -> dict[int, int]:
        """The processes of the ranks that a job has just now: their ids by the rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                text = (process / "environ").read_bytes().decode(errors="replace")
                variables = dict(line.partition("=")[::2] for line in text.split("\0"))
                is_task = variables.get("SLURM_TASK_PID") == process.name and "SLURM_STEP_ID" in variables
                if is_task and variables["SLURM_JOB_ID"] == job:
                    found[int(variables["SLURM_PROCID"])] = int(process.name)
        return found

    def ask(self, *command: object) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str = "") -> None:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(RuntimeError):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds} s in vain {what}\n{self.logs()}")
            time.sleep(0.1)

    def stop(self) -> None:
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            self.ask("scancel", "--user=root")
            self.wait_for(lambda: not self.ask("squeue", "-h"), 30)
        for name in reversed(self.daemons):  # munged last
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(10)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
                self.daemons[name].wait()

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(
            f"{path.name}: {line}" for path in self.root.glob("*.log") for line in path.read_text().splitlines()[-8:]
        )

    def _configure(self) -> None:
        host, port = socket.gethostname().partition(".")[0], _free_ports()
        address = {number: f"127.0.1.{number}" for number in range(1, NODES + 1)}
        nodes = "\n".join(
            f"NodeName=node{number} NodeAddr={address[number]} Port={port + number} CPUs=4 RealMemory=8000 Gres=gpu:2"
            for number in address
        )
        hosts = Path("/etc/hosts").read_text() + "".join(f"{a} node{n}\n" for n, a in address.items())
        for folder in ("state", "spool", "gpu"):
            (self.root / folder).mkdir()
        for number in range(2):  # slurmd wants a device file for each GPU, and only looks whether it is there
            os.mknod(self.root / "gpu" / str(number), 0o600 | 0o020000, os.makedev(1, 3))
        version = subprocess.run(["slurmd", "-V"], env={"PATH": PATH}, capture_output=True, text=True).stdout
        old = version.split()[-1] < "23.11"  # which knows no "disabled"
        files = {
            "slurm.conf": CONFIGURATION.format(root=self.root, host=host, port=port, nodes=nodes),
            "gres.conf": f"AutoDetect=off\nNodeName=node[1-{NODES}] Name=gpu File={self.root}/gpu/[0-1]\n",
            "cgroup.conf": f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n",  # else cgroups must be mounted
            "hosts": hosts,
        }
        for name, text in files.items():
            (self.root / name).write_text(text)
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)

    def _start(self, name: str, command: list[str]) -> None:
        """Start a daemon in the foreground; it ends with this process, however that may end."""
        with (self.root / f"{name}.log").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"Slurm is not installed (missing: {', '.join(absent)}): {INSTALL}"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], env={"PATH": PATH}, capture_output=True, text=True)
    return probe.stderr and f"nodes on one machine take namespaces, and these take root: {probe.stderr.strip()}"


def _free_ports() -> int:
    """The first of NODES + 1 ports that nobody listens on, below those that the kernel gives out."""
    while True:
        first = random.randrange(20000, 32000)
        with suppress(OSError):
            for port in range(first, first + NODES + 1):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
