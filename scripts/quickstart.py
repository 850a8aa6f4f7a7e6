"""Serves the demo model on this machine, asks it one question, and serves on until Ctrl-C.

Starts a Ray of its own, beside any that runs already, and leaves no process of it behind. What Ray
and Serve print goes to a file, so that the terminal holds this script's words alone.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import httpx
import psutil
import ray
import yaml
from demo_model import DemoModelError, demo_model_directory, ensure_demo_model
from terminal import StepLines, WrappedText

from cluster.ray_node import proxy_environment, raise_file_limit
from cluster.status import read_all, reason_of

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo-cpu.yaml"
PROMPT = "Why is the sky blue? Answer in two sentences."
HOST = "127.0.0.1"
POLL_S = 0.2
STOP_TIMEOUT_S = 20.0
RAY_START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 128 * 2**20
"""Arrays never pass through Ray's object store, whose default is a third of the memory."""

FEW_PROGRAMS = {"max_running_requests": 4, "chunked_prefill_size": 64}
"""For several processes, each of which compiles every program on this machine's cores."""

STEP_NAMES = {
    "placement": "placement",
    "rendezvous": "hosts",
    "weights": "weights",
    "compile": "compilation",
    "warmup": "warm-up",
}
UNITS = {
    "placement": ("host process", "host processes"),
    "rendezvous": ("host process", "host processes"),
    "weights": ("MB", "MB"),
    "compile": ("program", "programs"),
}


class QuickstartError(Exception):
    """Something that the user should read instead of a traceback."""


def main() -> int:
    arguments = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    terminal = sys.stdout
    lines = StepLines(terminal)
    has_answer = False
    folder = Path(tempfile.mkdtemp(prefix="qwen-on-ray-"))
    # Unix sockets lie in it, whose paths end at 107 characters.
    proxy_folder = Path(tempfile.mkdtemp(prefix="qor-", dir="/tmp"))
    os.environ.update(proxy_environment(proxy_folder))
    raise_file_limit()
    failure = ""
    print(file=terminal)
    with (folder / "quickstart.log").open("w") as log:
        try:
            config = prepare(arguments, lines)
            with redirect_output(log):
                base_url = start(config, folder, lines)
                print(file=terminal)
                ask(base_url, model_name(config), arguments, terminal)
            has_answer = True
            if not arguments.exit:
                print_addresses(base_url, terminal)
                wait_for_interrupt(log)
        except KeyboardInterrupt:
            failure = "" if has_answer else "interrupted before the answer came"
        except (QuickstartError, DemoModelError, httpx.HTTPError) as error:
            failure = str(error)
        finally:
            if failure:
                lines.failed()
            with redirect_output(log):
                stop()
    shutil.rmtree(proxy_folder, ignore_errors=True)
    print("\nStopped; no process is left.")
    if not failure:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    print(f"\n{failure}\nLogs are in {folder}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def redirect_output(log: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def wait_for_interrupt(log: TextIO) -> None:
    with redirect_output(log):
        while not _interrupted.wait(1.0):
            pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT, help="the question to ask")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest answer, in tokens; default: 256",
    )
    parser.add_argument(
        "--port", type=int, help="HTTP port; default: 8000, or a free one where that is taken"
    )
    parser.add_argument(
        "--hosts",
        type=int,
        default=1,
        metavar="N",
        help="share the model between N processes, as between N hosts, for few requests at a time; "
        "default: 1",
    )
    parser.add_argument("--exit", action="store_true", help="stop after the answer")
    arguments = parser.parse_args()
    if not 1 <= arguments.hosts <= 16:
        parser.error(f"--hosts={arguments.hosts} is out of range: 1 to 16 share a machine.")
    if arguments.max_tokens < 1:
        parser.error(f"--max-tokens={arguments.max_tokens} is too small: an answer has at least 1.")
    return arguments


def prepare(arguments: argparse.Namespace, lines: StepLines) -> dict[str, Any]:
    """Read the configuration, apply the arguments to it, and see that the model is there."""
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": HOST, "port": choose_port(arguments.port)}
    (application,) = config["applications"]
    application["args"] |= {"model_path": str(demo_model_directory())}
    if arguments.hosts > 1:
        hosts = {"nnodes": arguments.hosts, "tp_size": arguments.hosts}
        application["args"] |= hosts | FEW_PROGRAMS
    if not demo_model_directory().is_dir():
        ensure_demo_model(report=lambda line: print(f"  {line}"))
    lines.show("model", model_name(config))
    lines.done()
    return config


def start(config: Mapping[str, Any], folder: Path, lines: StepLines) -> str:
    """Start Ray and Serve with a configuration; return the base URL once the model is ready.

    Raises:
        QuickstartError: The application failed to start, with its own reason.
    """
    (application,) = config["applications"]
    args = application["args"]
    # What processes that are killed in the end leave lying goes away with the folder.
    os.environ["TMPDIR"] = str(folder)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it Ray prints advice about accelerators, which is not this script's reader's concern.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    lines.show("Ray", "starting")
    # Ray's start is mostly waiting, and what serves takes seconds to import.
    importing = threading.Thread(target=importlib.import_module, args=("serve_app",), daemon=True)
    importing.start()
    start_ray(folder, num_cpus=max(os.cpu_count() or 1, 2 + args.get("nnodes", 1)))
    importing.join()
    from ray import serve

    import serve_app

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    lines.show("Ray", f"dashboard on {dashboard_url()}")
    lines.show("Serve", "starting", end_note=f"on port {config['http_options']['port']}")
    serve.start(http_options=config["http_options"], logging_config=config["logging_config"])
    name = application["name"]
    target = serve.RunTarget(
        target=serve_app.build(args), name=name, route_prefix=application["route_prefix"]
    )
    serve.run_many([target], wait_for_applications_running=False)
    base_url = f"http://{HOST}:{config['http_options']['port']}"
    wait_until_ready(name, base_url, lines)
    return base_url


def start_ray(folder: Path, num_cpus: int) -> None:
    """Start a Ray of its own, which asks for the token that scripts/quickstart made.

    Args:
        folder: Where it keeps its files.
        num_cpus: Logical: router, leader and each host process must find a place on any machine.

    Raises:
        QuickstartError: It did not start.
    """
    for attempt in range(1, RAY_START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=True,
                dashboard_host=HOST,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
            return
        except Exception as error:  # Ray has no narrower class for a node that did not start.
            # A busy machine can be too slow for the 30 s that Ray gives its own processes.
            end_processes()
            if attempt == RAY_START_ATTEMPTS:
                raise QuickstartError(f"Ray did not start: {error}") from error


def wait_until_ready(name: str, base_url: str, lines: StepLines) -> None:
    """Show each phase of the engine's start until it is ready.

    Raises:
        QuickstartError: The application failed to start, with its own reason.
    """
    from ray import serve

    with httpx.Client(base_url=base_url, timeout=5.0) as client:
        while not is_ready(client):
            for status in read_all(name).values():
                if status["phase"] == "failed":
                    raise QuickstartError(f"The model could not be served: {status['note']}")
                if step := STEP_NAMES.get(status["phase"]):
                    finished = dict(status, done=status["total"], note="")
                    lines.show(step, describe(status), end_note=describe(finished))
            application = serve.status().applications.get(name)
            if application is not None and application.status == "DEPLOY_FAILED":
                raise QuickstartError(f"The model could not be served: {reason_of(application)}")
            time.sleep(POLL_S)
    lines.done()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def describe(status: Mapping[str, Any]) -> str:
    """Put how far a phase has come in words, as in "7 of 12 programs"."""
    done, total = status["done"], status["total"]
    if status["phase"] not in UNITS or not total:
        return status["note"]
    if status["phase"] == "weights":
        done, total = done // 10**6, total // 10**6
    amount = f"{total}" if done == total else f"{done} of {total}"
    words = f"{amount} {UNITS[status['phase']][total != 1]}"
    return f"{words}, {status['note']}" if status["note"] else words


def ask(base_url: str, model: str, arguments: argparse.Namespace, terminal: TextIO) -> None:
    """Stream one chat answer to the terminal.

    Raises:
        QuickstartError: The server refused, or the answer is empty.
    """
    prompt = arguments.prompt
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": arguments.max_tokens,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bold = "\033[1m{}\033[0m" if terminal.isatty() else "{}"
    heading = f"  {bold.format('You')}    {prompt}\n  {bold.format('Model')}  "
    print(heading, end="", file=terminal, flush=True)
    wrapped = WrappedText(terminal, indent=9)
    start_s = time.monotonic()
    first_s, answer, num_tokens = 0.0, "", 0
    with (
        httpx.Client(base_url=base_url, timeout=120.0) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise QuickstartError(f"The server answered {response.status_code}: {response.read()}")
        for event in read_events(response):
            if "error" in event:
                raise QuickstartError(f"The answer broke off: {event['error']['message']}")
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                if text and not answer:
                    first_s = time.monotonic() - start_s
                answer += text
                wrapped.write(text)
    wrapped.close()
    print(file=terminal)
    if not answer.strip():
        raise QuickstartError("The answer was empty.")
    seconds = time.monotonic() - start_s
    rate = (num_tokens - 1) / max(seconds - first_s, 1e-6)
    figures = f"{num_tokens} tokens, the first after {first_s * 1000:.0f} ms, then {rate:.0f}/s"
    print(f"  {figures}", file=terminal)


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Read the server-sent events of an OpenAI stream."""
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data and data != line and data != "[DONE]":
            yield json.loads(data)


def print_addresses(base_url: str, terminal: TextIO) -> None:
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    token = token and f"  token {token}"
    bold = "\033[1m{}\033[0m" if terminal.isatty() else "{}"
    print(
        f"""
  {bold.format("OpenAI API")}     {base_url}/v1
  {bold.format("API docs")}       {base_url}/docs
  {bold.format("Ray dashboard")}  {dashboard_url()}{token}

  from openai import OpenAI
  client = OpenAI(base_url="{base_url}/v1", api_key="none")

  Serving until Ctrl-C.""",
        file=terminal,
        flush=True,
    )


def dashboard_url() -> str:
    return f"http://{ray.get_runtime_context().worker.node.webui_url}"


def model_name(config: Mapping[str, Any]) -> str:
    return config["applications"][0]["args"]["served_model_name"]


def choose_port(wanted: int | None) -> int:
    """Take the wanted port, or 8000, or whichever is free.

    Raises:
        QuickstartError: The wanted port is taken.
    """
    reason = None
    for port in (wanted,) if wanted is not None else (8000, 0):
        with socket.socket() as probe:
            # As the server will bind it: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                reason = error.strerror
                continue
            return probe.getsockname()[1]
    raise QuickstartError(f"--port={wanted} cannot be used: {reason}. Choose another one.")


def stop() -> None:
    """End Ray, Serve with it, and every process that they started, politely first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_processes()


def end_processes() -> None:
    family = psutil.Process().children(recursive=True)
    polite = threading.Thread(target=ray.shutdown, daemon=True)
    polite.start()
    polite.join(STOP_TIMEOUT_S)
    family += [child for child in psutil.Process().children(recursive=True) if child not in family]
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=3)


# The exception alone would be lost where it strikes a finalizer, which swallows it.
_interrupted = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
