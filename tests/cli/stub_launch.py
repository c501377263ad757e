"""Runs the real launcher over stand-in children. Usage: stub_launch.py JOURNAL ENGINE_MODE ROUTER_MODE [FLAG]..."""

from __future__ import annotations

import sys
from pathlib import Path

from textmill.cli.launch import bind
from textmill.cli.launcher import Commands, Launcher
from textmill.cli.options import parse_settings
from textmill.observe import logs

journal, engine_mode, router_mode, *flags = sys.argv[1:]
settings = parse_settings(flags)
logs.configure("launcher", "debug")
stub = (sys.executable, "-P", str(Path(__file__).with_name("stub_child.py")))
commands = Commands((*stub, "engine", journal, engine_mode), (*stub, "router", journal, router_mode))
with bind(settings) as listener:
    launcher = Launcher(settings, {"model_id": "stub"}, listener, commands)
    code = launcher.run()
print(f"failure: {launcher.failure}" if launcher.failure else "no failure", flush=True)
sys.exit(code)
