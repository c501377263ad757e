"""Chat messages to one prompt by the model's own template: text in, text out, no model and no tokenizer needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jinja2 import TemplateError

from textmill.errors import TemplateFailed
from textmill.text.sandbox import Sandbox

Message = Mapping[str, Any]
PARTS = re.compile(r"""\[['"]type['"]\]|\.type\b|selectattr\(\s*['"]type['"]""")
Result = TypeVar("Result")


class ChatTemplate:
    """A model's chat template, compiled once. A missing one is refused when it is used, as TGI does.

    Raises TemplateFailed, at construction for a template that does not compile, at `render` for one that fails,
    calls `raise_exception`, or does too much.
    """

    def __init__(self, source: str | None, bos_token: str | None = None, eos_token: str | None = None) -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._sandbox = Sandbox()
        self._template = None if source is None else _guard(lambda: self._sandbox.compile_bounded(source))

    @property
    def uses_tools(self) -> bool:
        """True if the template itself shows tools to the model."""
        return self.source is not None and "tools" in self.source

    @property
    def uses_parts(self) -> bool:
        """True if the template goes through the parts of a message, and so shows nothing of a plain text."""
        return self.source is not None and PARTS.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        parts: bool = False,
    ) -> str:
        """The prompt. If the last message is the assistant's, it ends right after it: the model continues that.

        `parts`: the template sees contents as lists of parts, images without their addresses.
        """
        template = self._template
        if template is None:
            raise TemplateFailed("template not found")
        flat = [flatten(message) for message in messages]
        variables = {
            **self._tokens,
            "messages": [in_parts(message) for message in messages] if parts else flat,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = _guard(lambda: self._sandbox.render_bounded(template, variables))
        if flat and flat[-1]["role"] == "assistant":
            return _continue(prompt, flat[-1]["content"])
        return prompt


def flatten(message: Message) -> dict[str, str]:
    """A message as templates see it: role and one text. Images become `![](url)`, tool calls their JSON (TGI's way)."""
    content = message.get("content")
    if content is None:
        calls = message.get("tool_calls")
        content = "" if calls is None else json.dumps(calls, ensure_ascii=False, separators=(",", ":"))
    if not isinstance(content, str):
        content = "".join(_part(part) for part in content)
    return {"role": message["role"], "content": content}


def in_parts(message: Message) -> dict[str, Any]:
    """A message as templates of models that see want it: every content a list of parts."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {"role": message["role"], "content": [{"type": "text", "text": flatten(message)["content"]}]}
    shown = [{"type": "image"} if one.get("type") == "image_url" else dict(one) for one in content]
    return {"role": message["role"], "content": shown}


def _part(part: Mapping[str, Any]) -> str:
    if part.get("type") == "image_url":
        return image_markdown(part["image_url"]["url"])
    return str(part["text"])


def image_markdown(url: str) -> str:
    """A bracket in the address would end it."""
    return f"![]({url.replace(')', '%29')})"


def _continue(prompt: str, content: str) -> str:
    """Cuts after the last occurrence of the assistant's text (as written, or stripped by the template)."""
    for text in (content, content.strip()):
        at = prompt.rfind(text) if text else -1
        if at >= 0:
            return prompt[: at + len(text)].rstrip()
    return prompt


def _guard(action: Callable[[], Result]) -> Result:
    """Everything that a template raises is its own failure."""
    try:
        return action()
    except TemplateError as error:
        raise TemplateFailed(error.message or type(error).__name__) from error
    except Exception as error:  # fault boundary: a template is a stranger's program and can raise anything
        raise TemplateFailed(f"{type(error).__name__}: {error}"[:500]) from error
