"""Compares this server with others on this machine: the same model, prompts and client.

    python benchmarks/compare_peers.py --peers vllm
    python benchmarks/compare_peers.py --peers vllm sglang-jax transformers --plot peers.png

Installs each peer into a virtual environment of its own (gigabytes, once), writes one random
checkpoint of Qwen3-0.6B's shape, starts all servers, and runs each workload against one after the
other, round by round, so that whatever else the machine does falls on all of them. While one is
measured the others are stopped by SIGSTOP. Prompts are token ids, new in every round, and the same
for all. Prints each figure with its ratio to ours (ours better: above 1).
"""

import argparse
import datetime
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.peers import OURS, PEERS, Launch, Peer, install, start, version_of
from benchmarks.random_checkpoint import write_checkpoint

FIRST_PORT = 31900
POLL_S = 1.0
FIGURES = {
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
}
HIGHER_IS_BETTER = {"output_throughput"}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of equal lengths, so many at a time."""

    concurrency: int
    input_len: int
    output_len: int
    num_prompts: int

    def __str__(self) -> str:
        return f"c={self.concurrency}, {self.input_len} → {self.output_len}"


WORKLOADS = (
    Workload(concurrency=1, input_len=256, output_len=64, num_prompts=2),
    Workload(concurrency=8, input_len=256, output_len=64, num_prompts=16),
    Workload(concurrency=32, input_len=64, output_len=64, num_prompts=64),
)


class Server:
    """A running server and all processes that it has started."""

    def __init__(self, peer: Peer, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = peer.name
        self.url = f"http://127.0.0.1:{port}"
        self.takes_text_only = peer.takes_text_only
        self._ready_path = peer.ready_path
        self._process = process
        self._log = log

    def wait_until_ready(self, timeout_s: float) -> float:
        """Seconds until it answers.

        Raises:
            RuntimeError: It ended, or did not answer in time.
        """
        started_s = time.monotonic()
        with tqdm(desc=f"{self.name} starts", unit=" s", bar_format="{desc}: {n:.0f}{unit}") as bar:
            while time.monotonic() - started_s < timeout_s:
                if self._process.poll() is not None:
                    raise RuntimeError(f"{self.name} ended; its output is in {self._log}")
                if _answers(self.url + self._ready_path) and _answers(f"{self.url}/v1/models"):
                    return time.monotonic() - started_s
                time.sleep(POLL_S)
                bar.update(POLL_S)
        raise RuntimeError(f"{self.name} was not ready after {timeout_s:.0f} s; see {self._log}")

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the server and to all that it has started."""
        for process in [*self._descendants(), psutil.Process(self._process.pid)]:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> None:
        """End it as a user would; what has not ended after a minute is killed."""
        if self._process.poll() is not None:
            return
        self.signal_all(signal.SIGCONT)
        started = self._descendants()
        self._process.send_signal(signal.SIGTERM)
        _, living = psutil.wait_procs([psutil.Process(self._process.pid), *started], timeout=60)
        for process in living:
            process.kill()
        self._process.wait()

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in PEERS if name != OURS]
    parser.add_argument("--peers", nargs="+", choices=names, default=["vllm"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        choices=[workload.concurrency for workload in WORKLOADS],
        default=[workload.concurrency for workload in WORKLOADS],
        help="which workloads; all by default",
    )
    parser.add_argument("--prefix-caching", action="store_true", help="on, for all servers")
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--max-len", type=int, default=1024, help="prompt plus output")
    parser.add_argument("--start-timeout-s", type=float, default=1200.0)
    parser.add_argument(
        "--run-timeout-s", type=float, default=900.0, help="of one workload on one server"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--folder", type=Path, default=cache / "qwen-on-ray" / "peers")
    parser.add_argument(
        "--source",
        nargs="+",
        type=_source,
        action="extend",
        default=[],
        metavar="PEER=PACKAGE",
        help="what pip is to install for a peer, in place of its release; once for each package",
    )
    parser.add_argument("--output", type=Path, help="write all results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw output tokens/s")
    arguments = parser.parse_args(argv)
    results = compare(arguments)
    print(format_table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(results, arguments.plot)
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start all, measure them in turn, stop all."""
    folder: Path = arguments.folder
    checkpoint = write_checkpoint(folder / "random-qwen3-0.6b")
    peers = [PEERS[name] for name in (OURS, *arguments.peers)]
    environments = {
        peer.name: install(
            peer, folder, [package for name, package in arguments.source if name == peer.name]
        )
        for peer in peers
    }
    for peer in peers:
        peer.convert(environments[peer.name], checkpoint)
    workloads = [each for each in WORKLOADS if each.concurrency in arguments.concurrency]
    timeout_s = arguments.run_timeout_s
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    ready_s = {}
    with ExitStack() as stack:
        servers = []
        for index, peer in enumerate(peers):
            launch = Launch(
                environment=environments[peer.name],
                checkpoint=checkpoint,
                port=FIRST_PORT + 10 * index,
                max_running=arguments.max_running,
                max_len=arguments.max_len,
                prefix_caching=arguments.prefix_caching,
            )
            server = stack.enter_context(running(peer, launch, folder / f"{peer.name}.log"))
            ready_s[peer.name] = server.wait_until_ready(arguments.start_timeout_s)
            server.signal_all(signal.SIGSTOP)
            servers.append(server)
        for number in range(arguments.rounds):
            for workload in workloads:
                # Whoever is first in one round is last in the next.
                for server in servers if number % 2 == 0 else reversed(servers):
                    try:
                        figures = measure(
                            server, workload, checkpoint, folder, seed=number, timeout_s=timeout_s
                        )
                    except (RuntimeError, subprocess.TimeoutExpired) as error:
                        # What was measured before must not be lost with it.
                        print(f"round {number + 1} failed: {error}", file=sys.stderr)
                        continue
                    runs.setdefault(str(workload), {}).setdefault(server.name, []).append(figures)
                    rate = figures["output_throughput"]
                    print(f"round {number + 1}, {workload}: {server.name} {rate:.1f} tokens/s")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "prefix_caching": arguments.prefix_caching,
        "versions": {peer.name: version_of(peer, environments[peer.name]) for peer in peers},
        "ready_s": ready_s,
        "workloads": [asdict(workload) for workload in workloads],
        "runs": runs,
    }


@contextmanager
def running(peer: Peer, launch: Launch, log: Path) -> Iterator[Server]:
    process = start(peer, launch, log)
    server = Server(peer, launch.port, process, log)
    try:
        yield server
    finally:
        server.stop()


def measure(
    server: Server,
    workload: Workload,
    checkpoint: Path,
    folder: Path,
    *,
    seed: int,
    timeout_s: float,
) -> dict[str, float]:
    """Run `bench_serving.py` against a server that is let go for that time.

    Raises:
        RuntimeError: It failed, and said why.
        subprocess.TimeoutExpired: The server is slower than that.
    """
    output = folder / "last-run.jsonl"
    output.unlink(missing_ok=True)
    command = [
        *(sys.executable, str(Path(__file__).with_name("bench_serving.py"))),
        *("--backend", "openai", "--base-url", server.url, "--random-range-ratio", "1"),
        *("--seed", str(seed), *prompt_flags(server, checkpoint)),
        *("--random-input-len", str(workload.input_len)),
        *("--random-output-len", str(workload.output_len)),
        *("--num-prompts", str(workload.num_prompts)),
        *("--max-concurrency", str(workload.concurrency)),
        *("--warmup-requests", "1", "--output-file", str(output), "--disable-tqdm"),
    ]
    server.signal_all(signal.SIGCONT)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    finally:
        server.signal_all(signal.SIGSTOP)
    if done.returncode:
        raise RuntimeError(f"{server.name}, {workload}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    line = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
    return {figure: float(line[figure]) for figure in FIGURES}


def prompt_flags(server: Server, checkpoint: Path) -> list[str]:
    """Token ids, or as many tokens of text; random weights do not end a text by themselves."""
    if server.takes_text_only:
        flags = ["--dataset-name", "random", "--disable-ignore-eos"]
        return [*flags, "--model", str(checkpoint), "--tokenizer", str(checkpoint)]
    return ["--dataset-name", "random-ids", "--vocab-size", "151643"]


def median_of(results: dict[str, Any], workload: str, name: str, figure: str) -> float:
    runs = results["runs"][workload].get(name, [])
    return statistics.median(run[figure] for run in runs) if runs else math.nan


def format_table(results: dict[str, Any]) -> str:
    """Markdown: medians over the rounds, and in brackets how many times better ours is."""
    names = list(results["versions"])
    lines = [
        "| workload | figure | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for workload in results["runs"]:
        for figure, title in FIGURES.items():
            ours = median_of(results, workload, OURS, figure)
            cells = [f"{ours:.1f}"]
            for name in names[1:]:
                theirs = median_of(results, workload, name, figure)
                ratio = ours / theirs if figure in HIGHER_IS_BETTER else theirs / ours
                cells.append(f"{theirs:.1f} ({ratio:.2f}×)")
            lines.append(f"| {workload} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw output tokens/s of each workload, a bar per server, every round as a dot."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = list(results["versions"])
    width = 0.8 / len(names)
    for place, workload in enumerate(results["runs"]):
        for index, name in enumerate(names):
            runs = results["runs"][workload].get(name, [])
            rates = [run["output_throughput"] for run in runs]
            left = place + (index - (len(names) - 1) / 2) * width
            label = name if place == 0 else None
            height = median_of(results, workload, name, "output_throughput")
            axes.bar(left, height, width, color=f"C{index}", label=label)
            axes.plot([left] * len(rates), rates, "k.", markersize=3)
    axes.set_xticks(range(len(results["runs"])), list(results["runs"]))
    axes.set(ylabel="output tokens/s", title="Qwen3-0.6B's shape, bfloat16")
    axes.legend()
    figure.savefig(path, dpi=150)


def _source(text: str) -> tuple[str, str]:
    name, _, package = text.partition("=")
    if name not in PEERS or not package:
        raise argparse.ArgumentTypeError(f"{text} is not PEER=PACKAGE; peers: {', '.join(PEERS)}")
    return name, package


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
