"""A router process: `router_child.py MODEL SOCKET LISTEN_FD PERMITS_FD INDEX WORKERS GRACE`; says "ready"."""

from __future__ import annotations

import sys
from pathlib import Path

from textmill.api.router import Place, main
from textmill.config import Settings

if __name__ == "__main__":
    model, socket, *numbers = sys.argv[1:]
    listen_fd, permits_fd, index, workers, grace = map(int, numbers)
    settings = Settings(
        max_concurrent_requests=16, max_best_of=4, router_workers=workers, graceful_termination_timeout=grace
    )
    main(settings, Place(listen_fd, socket, permits_fd, index), Path(model), lambda: print("ready", flush=True))
    print("torch" in sys.modules, flush=True)
