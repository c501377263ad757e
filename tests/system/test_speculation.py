"""A server that guesses: several tokens at once reach clients as they would one by one."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from textmill.kernels.dispatch import native_available

TEXT = "The grey heron waits by the weir at noon, and the miller counts seven sacks of barley beside the green door."
PROMPT = f"<|im_start|>user\nRepeat the following text word for word.\n\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"


def streamed(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        url + "/generate_stream", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return [json.loads(line[5:]) for line in response if line.startswith(b"data:")]


@pytest.mark.skipif(not native_available(), reason="the native kernels are not built")
def test_streams_stops_and_metrics(launch: Callable[..., Any]) -> None:
    server = launch("--speculate", "6")
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 40, "details": True, "top_n_tokens": 2}}
    status, _, whole = server.post("/generate", body)
    assert status == 200
    accepted = server.metric('textmill_speculated_tokens{outcome="accepted"}')
    assert accepted > 5
    events = streamed(server.url, body)
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert [event["top_tokens"] for event in events] == whole["details"]["top_tokens"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert server.metric('textmill_speculated_tokens{outcome="accepted"}') == 2 * accepted
    stop = whole["generated_text"][50:58]
    body["parameters"]["stop"] = [stop]
    status, _, stopped = server.post("/generate", body)
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == whole["generated_text"][: whole["generated_text"].index(stop) + len(stop)]
