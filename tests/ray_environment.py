"""Variables of every Ray that tests start."""

import os
import secrets

# Ray's processes would have a thirtieth of the time of a test beside them: theirs is 15.
SAME_NICENESS = {"RAY_worker_niceness": "0"}


def set_ray_environment() -> None:
    """Set what Ray reads once, when it is imported: to be called before that."""
    if os.environ.get("RAY_AUTH_MODE") == "token" and "RAY_AUTH_TOKEN" in os.environ:
        return
    # Without a token Ray would write one into the user's home.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ.update(SAME_NICENESS)
    # Milliseconds between what processes tell of themselves, ten seconds by default.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112
