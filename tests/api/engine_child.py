"""An engine process without a model, whose vocabulary is the test tokenizer's: `engine_child.py SOCKET SECONDS`."""

from __future__ import annotations

import asyncio
import importlib
import sys
from dataclasses import replace
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "wire"), str(TESTS / "engine")]

scripted_server = importlib.import_module("scripted_server")
scripted_server.LIMITS = replace(scripted_server.LIMITS, vocab_size=270)

if __name__ == "__main__":
    asyncio.run(scripted_server.main(Path(sys.argv[1]), float(sys.argv[2])))
