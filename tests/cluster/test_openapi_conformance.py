"""Every route does what /openapi.json says of it, whatever it is called with: schemathesis asks.

FUZZ_EXAMPLES=2000 in the environment makes a long run of it.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TOOLS_AND_THOUGHTS

from cluster.router import create_app
from cluster.service import OpenAIService

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
# A schema does not say all that a body must be: an `input` that ends in a call without its output
# fits it. What fits and is refused in OpenAI's way is right.
ALLOWED_REFUSALS = "positive_data_acceptance"


@pytest.fixture
def service_fields() -> dict[str, Any]:
    return {"chat_template_text": TOOLS_AND_THOUGHTS}


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_every_route_does_what_its_description_says(
    url: str, service: OpenAIService, tmp_path: Path
) -> None:
    arguments = {
        "--url": url,
        "--phases": "coverage,fuzzing",
        "--max-examples": str(NUM_EXAMPLES),
        "--checks": "all",
        "--exclude-checks": ALLOWED_REFUSALS,
        # What takes longer hangs, and fails.
        "--request-timeout": "20",
        "--seed": "1",
    }
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
    words = [word for pair in arguments.items() for word in pair]
    process = await asyncio.create_subprocess_exec(
        *command,
        *words,
        "--continue-on-failure",
        "--no-color",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    report = output.decode()
    assert process.returncode == 0, report
    num_operations = sum(map(len, create_app(service).openapi()["paths"].values()))
    assert f"Tested: {num_operations}\n" in report, report
