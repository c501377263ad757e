"""Our exceptions, each with its HTTP status and TGI `error_type`; the message is what the client reads."""

from __future__ import annotations


class TextmillError(Exception):
    """Base of every error we raise on purpose. `status` and `error_type` follow TGI's contract (tgi.md 3.9)."""

    status = 500
    error_type = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(TextmillError):
    """The settings cannot work; the launcher prints the message as its last line and exits non-zero."""

    error_type = "invalid_argument"


class ModelError(TextmillError):
    """A model file is missing, broken, or asks for something that is not built; names the file and the field."""

    error_type = "model"


class InvalidRequest(TextmillError):
    """A request broke a rule; `message` is the rule, without TGI's `Input validation error: ` prefix."""

    status = 422
    error_type = "validation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Input validation error: {message}")


class Overloaded(TextmillError):
    status = 429
    error_type = "overloaded"

    def __init__(self, message: str = "Model is overloaded") -> None:
        super().__init__(message)


class GenerationFailed(TextmillError):
    """The engine failed this request (or died with it); nothing else was touched."""

    status = 424
    error_type = "generation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Request failed during generation: {message}")


class IncompleteGeneration(TextmillError):
    status = 500
    error_type = "incomplete_generation"

    def __init__(self, message: str = "Incomplete generation") -> None:
        super().__init__(message)


class TemplateFailed(TextmillError):
    status = 422
    error_type = "template_error"

    def __init__(self, message: str) -> None:
        super().__init__(f"Template error: {message}")


class ToolFailed(TextmillError):
    status = 422
    error_type = "tool_error"

    def __init__(self, message: str) -> None:
        super().__init__(f"Tool error: {message}")


class Unhealthy(TextmillError):
    """The engine is not able to serve (starting, restarting, hung)."""

    status = 503
    error_type = "healthcheck"

    def __init__(self, message: str = "unhealthy") -> None:
        super().__init__(message)


class Draining(TextmillError):
    """The server is shutting down and takes no new requests."""

    status = 503
    error_type = "draining"

    def __init__(self, message: str = "The server is shutting down") -> None:
        super().__init__(message)
