"""Two nodes on one machine: what a run does when a node dies, a link stalls or goes away, or storage is not shared.

    sudo OMP_NUM_THREADS=1 python benchmarks/nodes.py                    # all, some five minutes on two cores
    sudo OMP_NUM_THREADS=1 python benchmarks/nodes.py --only trains apart

Each node is a network namespace of Linux with an address of its own, and one torchrun with one rank; a third one
forwards packets between them. A link stalls or goes away where that one stops to forward: neither node is told, as
with a switch that fails. Nothing leaves the namespaces. It needs root and iproute2. Writes OUT/nodes.json and each
node's output.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORT = 29500  # of the rendezvous: the namespaces have all ports to themselves
STALL = 20  # seconds
# Seconds after which a node that should have ended counts as hanging: the time-outs of the run are below.
LIMIT = 180
# torchrun waits for the store of the rendezvous until the system gives a silent connection up (15 minutes on Linux)
TORCHRUN_LIMIT = 30
TIMEOUT_MINUTES = 0.5  # of a run whose link goes away
SHORT = ("--steps", "60", "--save-every", "10", "--keep", "9")
LONG = ("--steps", "4000", "--save-every", "10", "--keep", "2")
ALL = ("--eval-every", "0", "--eval-prompts", "8", "--batch-size", "8", "--micro-batch-size", "8")


def ip(*words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine makes no namespaces; '' where it does."""
    if not shutil.which("ip"):
        return "iproute2 is not installed (apt-get install iproute2)"
    name = f"nodes-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", "eth1")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()} (they need root)"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


class Network:
    """Two namespaces, `nodes`, and one between them that forwards."""

    def __enter__(self):
        self.wire = f"nodes-{os.getpid()}-wire"
        self.nodes = [f"nodes-{os.getpid()}-{i}" for i in range(2)]
        for name in (self.wire, *self.nodes):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for i, name in enumerate(self.nodes):
            ip(
                "-n",
                name,
                "link",
                "add",
                "name",
                "eth",
                "type",
                "veth",
                "peer",
                "name",
                f"eth{i}",
                "netns",
                self.wire,
            )
            ip("-n", name, "addr", "add", f"10.77.{i}.2/24", "dev", "eth")
            ip("-n", self.wire, "addr", "add", f"10.77.{i}.1/24", "dev", f"eth{i}")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", self.wire, "link", "set", f"eth{i}", "up")
            ip("-n", name, "route", "add", "default", "via", f"10.77.{i}.1")
        self.forward(True)
        return self

    def __exit__(self, *_):
        for node in range(2):
            self.kill(node)
        for name in (self.wire, *self.nodes):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def forward(self, on: bool) -> None:
        """Whether packets get through."""
        words = ["sh", "-c", f"echo {int(on)} > /proc/sys/net/ipv4/ip_forward"]
        ip("netns", "exec", self.wire, *words)

    def kill(self, node: int) -> None:
        """SIGKILL to every process of a node."""
        found = subprocess.run(["ip", "netns", "pids", self.nodes[node]], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


class Job:
    """sft.py on the embedded world, on both nodes; `folders` are theirs to run in."""

    def __init__(self, network: Network, out: Path, name: str, folders: list[Path], flags: tuple[str, ...]):
        self.network = network
        self.logs = [out / f"{name}-node-{node}.log" for node in range(2)]
        self.processes = []
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "eth",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        for node, (namespace, folder, log) in enumerate(zip(network.nodes, folders, self.logs, strict=True)):
            folder.mkdir(parents=True, exist_ok=True)
            words = [
                *("ip", "netns", "exec", namespace, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", name),
                *("--rdzv-endpoint", f"10.77.0.2:{PORT}", "--rdzv-conf", f"is_host={1 - node}"),
                *("--local-addr", f"10.77.{node}.2"),
                *(str(ROOT / "sft.py"), "--run-dir", "run", *ALL, *flags),
            ]
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=file)
                )

    def wait_for_rows(self, run_dir: Path, rows: int) -> None:
        """Until the run has logged so many more steps than 0."""
        end = time.monotonic() + LIMIT
        while rows_of(run_dir) < rows:
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                raise SystemExit(f"error: {self.logs[0]}: it does not train")
            time.sleep(0.02)

    def end(self, node: int, limit: float = LIMIT) -> tuple[int | None, float]:
        """(exit code of a node, None where it had to be killed, seconds until then)."""
        begin = time.monotonic()
        try:
            code = self.processes[node].wait(limit)
        except subprocess.TimeoutExpired:
            self.network.kill(node)
            self.processes[node].wait()
            code = None
        return code, round(time.monotonic() - begin, 1)

    def ends(self) -> list[int | None]:
        """The exit codes of both."""
        return [self.end(node)[0] for node in range(2)]

    def said(self, node: int) -> list[str]:
        """The lines of a node that say an error; torchrun's own table of who failed is not ours."""
        return [line for line in self.logs[node].read_text().splitlines() if line.startswith("error: ")]

    def tracebacks_of_ours(self, node: int) -> int:
        """How often a rank showed where in our code it was."""
        return self.logs[node].read_text().count(f'File "{ROOT}/common/distributed.py"')


def rows_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def numbers_of(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = ("time/", "perf/", "memory/")
    return [{key: value for key, value in row.items() if not key.startswith(times)} for row in rows]


def same_run(a: Path, b: Path) -> bool:
    """Weights byte for byte, and every number of the log."""
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (a, b)]
    return weights[0] == weights[1] and numbers_of(a) == numbers_of(b)


def whole_checkpoints(run_dir: Path) -> bool:
    """Whether there is one, and all that are called so have right checksums."""
    sys.path.insert(0, str(ROOT))
    from common import durable

    found = sorted((run_dir / "checkpoints").glob("step-*"))
    return bool(found) and not any(durable.damage(each, durable.checksums(each)) for each in found)


# --- what happens -------------------------------------------------------------------------------------------


def trains(network: Network, out: Path) -> dict:
    """Nothing happens."""
    job = Job(network, out, "trains", [out / "trains"] * 2, SHORT)
    codes = job.ends()
    return {"codes": codes, "rows": rows_of(out / "trains/run"), "right": codes == [0, 0]}


def apart(network: Network, out: Path) -> dict:
    """Each node has a folder of its own under one name."""
    job = Job(network, out, "apart", [out / "apart-0", out / "apart-1"], SHORT)
    begin = time.monotonic()
    codes = job.ends()
    said = [job.said(node) for node in range(2)]
    # rank 0 speaks first; torchrun may end the other node before it says the same
    lines = [*said[0], *said[1]]
    named = all("on storage that all of them share" in line for line in lines)
    once = lines and max(map(len, said)) == 1
    return {
        "codes": codes,
        "seconds": round(time.monotonic() - begin, 1),
        "said": said,
        "right": codes == [1, 1] and bool(once and named) and not rows_of(out / "apart-0/run"),
    }


def dies(network: Network, out: Path) -> dict:
    """All processes of node 1, then of node 0, are killed in the middle; both start again with --resume."""
    if not (out / "trains/run/model").exists():
        trains(network, out)
    found = {}
    for node in (1, 0):
        folder = out / f"dies-{node}"
        job = Job(network, out, f"dies-{node}", [folder] * 2, SHORT)
        job.wait_for_rows(folder / "run", 25)
        network.kill(node)
        code, seconds = job.end(1 - node)
        lines = job.said(1 - node)
        again = Job(network, out, f"dies-{node}-again", [folder] * 2, (*SHORT, "--resume")).ends()
        same = again == [0, 0] and same_run(folder / "run", out / "trains/run")
        found[f"node {node}"] = {
            "other ended with": code,
            "after seconds": seconds,
            "said": lines,
            "resumed": again,
            "as an unbroken run": same,
            "right": code not in (None, 0) and len(lines) <= 1 and same,
        }
    return found | {"right": all(each["right"] for each in found.values())}


def stalls(network: Network, out: Path) -> dict:
    """No packet gets through for a while."""
    folder = out / "stalls"
    job = Job(network, out, "stalls", [folder] * 2, LONG)
    job.wait_for_rows(folder / "run", 12)
    network.forward(False)
    time.sleep(2)
    before = rows_of(folder / "run")
    time.sleep(STALL - 2)
    during = rows_of(folder / "run") - before
    network.forward(True)
    begin = time.monotonic()
    while rows_of(folder / "run") < before + 5 and time.monotonic() < begin + LIMIT:
        time.sleep(0.1)
    after = round(time.monotonic() - begin, 1)
    went_on = rows_of(folder / "run") >= before + 5
    for process in job.processes:
        process.terminate()
    codes = job.ends()
    return {
        "stall seconds": STALL,
        "rows during it": during,
        "goes on after seconds": after,
        "codes after SIGTERM": codes,
        "right": went_on and during == 0 and None not in codes and whole_checkpoints(folder / "run"),
    }


def goes_away(network: Network, out: Path) -> dict:
    """No packet gets through any more: the run's own time-out ends it."""
    folder = out / "goes-away"
    flags = (*LONG, "--timeout-minutes", str(TIMEOUT_MINUTES))
    job = Job(network, out, "goes-away", [folder] * 2, flags)
    job.wait_for_rows(folder / "run", 25)
    network.forward(False)
    begin = time.monotonic()
    spoken = [None, None]  # seconds until a rank has said that it ends
    while not all(spoken) and time.monotonic() < begin + LIMIT:
        time.sleep(0.2)
        for node in range(2):
            if not spoken[node] and job.said(node):
                spoken[node] = round(time.monotonic() - begin, 1)
    codes = [job.end(node, TORCHRUN_LIMIT)[0] for node in range(2)]
    network.forward(True)
    said = [job.said(node) for node in range(2)]
    tracebacks = [job.tracebacks_of_ours(node) for node in range(2)]
    whole = whole_checkpoints(folder / "run")
    ended = all(spoken) and max(spoken) < 60 * TIMEOUT_MINUTES + 60 and 0 not in codes
    return {
        "timeout seconds": 60 * TIMEOUT_MINUTES,
        "ranks ended after seconds": spoken,
        "codes of torchrun, none where it waits": codes,
        "said": said,
        "tracebacks of ours": tracebacks,
        "checkpoints whole": whole,
        "right": ended and whole and not any(tracebacks) and all(len(lines) == 1 for lines in said),
    }


SCENES = {scene.__name__: scene for scene in (trains, apart, dies, stalls, goes_away)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCENES), default=list(SCENES), help="which of them")
    parser.add_argument("--out", default="runs/nodes", help="folder, which is replaced")
    args = parser.parse_args()
    reason = why_not()
    if reason:
        raise SystemExit(f"error: {reason}")
    out = Path(args.out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    found = {}
    for name in args.only:
        with Network() as network:
            found[name] = SCENES[name](network, out)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        (out / "nodes.json").write_text(json.dumps(found, indent=1))
    wrong = [name for name, each in found.items() if not each["right"]]
    if wrong:
        raise SystemExit(f"error: not as it should be: {', '.join(wrong)}; see {out}")


if __name__ == "__main__":
    main()
