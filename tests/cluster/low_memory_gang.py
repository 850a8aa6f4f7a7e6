"""A gang on a node that Ray finds out of memory from the beginning; prints how the start fails.

Argument: a folder for the null program.
"""

import asyncio
import os
import sys
from pathlib import Path

# Read when Ray is imported and started: every worker is one too many.
os.environ["RAY_memory_usage_threshold"] = "0.001"  # noqa: SIM112
os.environ["RAY_memory_monitor_refresh_ms"] = "100"  # noqa: SIM112

from own_ray import own_ray
from test_host_group import gang, ignore

from engine.errors import EngineError


async def main(folder: Path) -> None:
    async with gang(folder, num_hosts=1, program="start_forever") as group:
        try:
            await group.start(ignore)
        except EngineError as error:
            print(error, flush=True)


if __name__ == "__main__":
    with own_ray():
        asyncio.run(main(Path(sys.argv[1])))
