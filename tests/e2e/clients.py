"""Try clients that others wrote against a server of the demo model, and say what each could do.

    python tests/e2e/clients.py
    python tests/e2e/clients.py --only openai langchain --json out.json
    python tests/e2e/clients.py --url http://127.0.0.1:8000/v1 --model NAME --tokenizer DIRECTORY

Each client gets an environment of its own, made with pip from the versions below and kept for the
next time, and runs its program in tests/e2e/client_programs/ there. docs/clients.md says what came
of it.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from own_ray import own_ray  # before Ray, whose environment it sets
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

import serve_app
from cluster.addresses import free_port
from scripts.demo_model import demo_model_directory, ensure_demo_model

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
PROGRAMS = Path(__file__).with_name("client_programs")
INSTALL_TIMEOUT_S = 1800
RUN_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Client:
    """A client and what it takes to run it.

    Attributes:
        requirements: What pip installs.
    """

    name: str
    requirements: Sequence[str]

    @property
    def program(self) -> Path:
        return PROGRAMS / f"try_{self.name.replace('-', '_')}.py"


CLIENTS = (
    Client("openai", ["openai==3.57.0"]),
    Client("langchain", ["langchain==1.5.2", "langchain-openai==1.7.4"]),
    Client("litellm", ["litellm==1.110.2"]),
    Client("instructor", ["instructor==1.17.0"]),
    # Which imports the last four and does not ask for them.
    Client("qwen-agent", ["qwen-agent==0.0.34", "numpy", "tqdm", "soundfile", "python-dateutil"]),
    Client("lm-eval", ["lm-eval[api]==0.4.13", "transformers==5.23.0"]),
    Client("evalscope", ["evalscope[perf]==1.14.1"]),
    # The last whose --eval-type has the guide's word, service.
    Client("evalscope-service", ["evalscope==0.17.1"]),
    Client("aiperf", ["aiperf==0.13.0"]),
    Client("guidellm", ["guidellm==0.8.1"]),
)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    model: str
    tokenizer: str


@dataclass(slots=True)
class Outcome:
    """What came of one client.

    Attributes:
        checks: Each with its error, null where it passed, and its note.
        error: Why it could not be installed or did not run to its end.
    """

    name: str
    requirements: Sequence[str]
    checks: list[dict[str, str | None]] = field(default_factory=list)
    error: str | None = None

    @property
    def failed(self) -> list[dict[str, str | None]]:
        return [check for check in self.checks if check["error"] is not None]

    @property
    def is_good(self) -> bool:
        return bool(self.checks) and not self.failed and self.error is None


def main() -> int:
    """Returns 0, or 1 if anything failed."""
    arguments = parse_arguments()
    clients = [client for client in CLIENTS if client.name in arguments.only]
    with contextlib.ExitStack() as stack:
        if arguments.url is not None:
            server = Server(arguments.url, arguments.model, str(arguments.tokenizer))
        else:
            server = stack.enter_context(serving())
        outcomes = []
        for client in clients:
            outcome = try_client(client, server, arguments.environments / client.name)
            outcomes.append(outcome)
            print_outcome(outcome)
    num_good = sum(outcome.is_good for outcome in outcomes)
    print(f"\n{num_good} of {len(outcomes)} clients passed.")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    return 0 if num_good == len(outcomes) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [client.name for client in CLIENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--environments",
        type=Path,
        default=demo_model_directory().parent / "clients",
        metavar="DIRECTORY",
        help="where the clients' environments are; default: in the user's cache",
    )
    parser.add_argument("--url", help="of a server that runs already, ending in /v1")
    parser.add_argument("--model", help="what that server calls it")
    parser.add_argument(
        "--tokenizer", type=Path, default=demo_model_directory(), help="directory of that model"
    )
    parser.add_argument("--json", type=Path, help="file for what every check said")
    arguments = parser.parse_args()
    if (arguments.url is None) != (arguments.model is None):
        parser.error("--url and --model go together.")
    return arguments


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Serve the demo model with a Ray of our own, as configs/demo-cpu.yaml does, and with tools."""
    directory = ensure_demo_model()
    config = yaml.safe_load((ROOT / "configs" / "demo-cpu.yaml").read_text())
    (application,) = config["applications"]
    with own_ray(num_cpus=3):
        port = free_port(HOST)
        serve.start(
            http_options=HTTPOptions(host=HOST, port=port),
            logging_config=LoggingConfig(**config["logging_config"]),
        )
        args = {"model_path": str(directory), "chat_template": str(PROGRAMS / "tools.jinja")}
        target = serve_app.build(application["args"] | args)
        serve.run(target, name=application["name"], route_prefix=application["route_prefix"])
        yield Server(
            f"http://{HOST}:{port}/v1", application["args"]["served_model_name"], str(directory)
        )


def try_client(client: Client, server: Server, environment: Path) -> Outcome:
    """Install a client where it is not yet, and run its program."""
    outcome = Outcome(client.name, client.requirements)
    try:
        python = install(client, environment)
    except subprocess.CalledProcessError as error:
        outcome.error = f"it could not be installed: {error.stderr[-1000:]}"
        return outcome
    except subprocess.TimeoutExpired:
        outcome.error = f"its installation took more than {INSTALL_TIMEOUT_S} s"
        return outcome
    with tempfile.TemporaryDirectory(prefix=f"client-{client.name}-") as folder:
        try:
            done = subprocess.run(
                [python, client.program, server.url, server.model, server.tokenizer],
                cwd=folder,
                env=client_environment(Path(folder)),
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            outcome.error = f"its program took more than {RUN_TIMEOUT_S} s"
            return outcome
    outcome.checks = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"check"')]
    if done.returncode and not outcome.failed:
        outcome.error = f"its program ended with {done.returncode}: {done.stderr[-1000:]}"
    return outcome


def client_environment(folder: Path) -> dict[str, str]:
    """Variables for a client: nothing of ours, no telemetry, no hub, files below the folder."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "EMPTY",
        "NO_PROXY": HOST,
    }


def install(client: Client, environment: Path) -> Path:
    """Make a client's environment unless it is there with these very requirements.

    Raises:
        CalledProcessError: pip failed.
        TimeoutExpired: It took too long.
    """
    python = environment / "bin" / "python"
    stamp = environment / "requirements.txt"
    wanted = "\n".join(client.requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"Installing {', '.join(client.requirements)}", flush=True)
    venv.create(environment, clear=True, with_pip=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-input", *client.requirements],
        check=True,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
    )
    stamp.write_text(wanted)
    return python


def print_outcome(outcome: Outcome) -> None:
    num_good = len(outcome.checks) - len(outcome.failed)
    print(f"{outcome.name:<17} {num_good} of {len(outcome.checks)} checks", flush=True)
    if outcome.error:
        print(f"  {outcome.error}")
    for check in outcome.failed:
        print(f"  failed: {check['check']}\n{check['error']}")


if __name__ == "__main__":
    sys.exit(main())
