"""What Ray reads when it is loaded, here and in the processes of a cluster. Packages that test with it import this."""

from __future__ import annotations

import os
import secrets

# It tells its makers nothing, and keeps no token in the user's home.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_AUTH_MODE"] = "token"  # a second process joins the cluster
# A replica that is slow to say how many requests it has is passed over after 0.1 s: on a busy machine, by chance.
os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "600"
os.environ["RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "600"
# Ray Serve gives a proxy up that has not begun after some seconds.
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "50"
os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "600"
