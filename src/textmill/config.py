"""Every setting once: a frozen dataclass from which flags, environment names, help and `/info` are made.

Flags are the field's name with dashes, environment names the field's name in upper case (TGI's rule; tgi.md 2.1).
A launcher reads the environment once, through `textmill.cli.options`; nothing else ever does.
"""

from __future__ import annotations

import json
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

from textmill.errors import ConfigError

ESSENTIALS = "Essentials"
LIMITS = "Limits on a request"
BATCHING = "Batching"
MODEL = "Model files"
COMPUTE = "Compute and memory"
WEB = "Web"
PROCESSES = "Processes"
LOGS = "Logs"
NO_EFFECT = "Accepted for TGI's sake, without effect"
NOT_BUILT = "Not built yet (using one stops the start)"
GROUPS = (ESSENTIALS, LIMITS, BATCHING, MODEL, COMPUTE, WEB, PROCESSES, LOGS, NO_EFFECT, NOT_BUILT)

QUANTIZE = (
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
)
CUDA_GRAPHS = (1, 2, 4, 8, 16, 32)


def setting(
    default: object,
    group: str,
    text: str,
    *,
    built: bool | str = True,
    works: tuple[object, ...] = (),
    choices: tuple[str, ...] = (),
    minimum: float | None = 0,
    maximum: float | None = None,
    short: str = "",
    secret: bool = False,
    default_help: str = "",
) -> Any:
    """A field of `Settings`; `text` is its help, `minimum` and `maximum` are inclusive. `built` is True or what is
    missing; then only the default and the values in `works` are let through."""
    metadata = {
        "group": group,
        "text": text,
        "built": built,
        "works": works,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "short": short,
        "secret": secret,
        "default_help": default_help,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one server. `None` means: decided by the model, the machine or warm-up."""

    model_id: str | None = setting(
        None,
        ESSENTIALS,
        "A local folder, a .gguf file, or a hub id.",
        default_help="the embedded SmolLM2-135M-Instruct",
    )
    revision: str | None = setting(None, ESSENTIALS, "Branch, tag or commit of a hub id.")
    port: int = setting(3000, ESSENTIALS, "HTTP port.", short="-p", maximum=65535)
    hostname: str = setting("0.0.0.0", ESSENTIALS, "Address to listen on.")
    max_concurrent_requests: int = setting(
        128,
        ESSENTIALS,
        "Requests in the house at once, over all routers; beyond them clients get 429.",
        maximum=1_000_000,
    )
    max_input_tokens: int | None = setting(
        None, ESSENTIALS, "Longest prompt, in tokens.", default_help="max-total-tokens minus 1"
    )
    max_total_tokens: int | None = setting(
        None, ESSENTIALS, "Prompt plus output of one request, in tokens.", default_help="what model and memory allow"
    )
    max_batch_prefill_tokens: int | None = setting(
        None,
        ESSENTIALS,
        "Prompt tokens computed in one step; longer prompts are cut into such chunks.",
        minimum=1,
        default_help="chosen for the machine",
    )
    api_key: str | None = setting(None, ESSENTIALS, "Bearer key that clients must send.", secret=True)
    router_workers: int = setting(1, ESSENTIALS, "Web processes sharing the port.", minimum=1, maximum=256)
    dtype: str | None = setting(
        None,
        ESSENTIALS,
        "Arithmetic of float checkpoints.",
        choices=("float16", "bfloat16", "float32"),
        built="on the CPU float checkpoints are computed in float32",
        works=("float32",),
        default_help="float32 on the CPU; packed files keep their own",
    )
    quantize: str | None = setting(
        None,
        ESSENTIALS,
        "Scheme of a quantized checkpoint. GGUF files carry their own and need no flag.",
        choices=QUANTIZE,
        built="only GGUF's own quantization can be read so far",
    )

    max_input_length: int | None = setting(None, LIMITS, "Old name of max-input-tokens.")
    max_best_of: int = setting(2, LIMITS, "Largest `best_of`.")
    max_stop_sequences: int = setting(4, LIMITS, "Most stop sequences.")
    max_top_n_tokens: int = setting(5, LIMITS, "Largest `top_n_tokens` or `top_logprobs`.")
    max_client_batch_size: int = setting(4, LIMITS, "Most prompts in one call of /v1/completions.")
    payload_limit: int = setting(2_000_000, LIMITS, "Largest request body, in bytes.")

    max_batch_total_tokens: int | None = setting(
        None, BATCHING, "Tokens that the KV cache may hold.", minimum=1, default_help="what fits in free memory"
    )
    max_batch_size: int | None = setting(
        None, BATCHING, "Sequences that run at once.", minimum=1, default_help="chosen for the machine"
    )
    prefix_caching: bool = setting(True, BATCHING, "Reuse the KV cache of shared prefixes.")
    prefill_pacing: bool = setting(
        True, BATCHING, "Compute prompts in small chunks beside running streams, so that these hardly pause."
    )
    speculate: int | None = setting(
        None,
        BATCHING,
        "Most tokens guessed ahead, from what the sequence itself repeats, and verified exactly; 0: none.",
        maximum=64,
    )

    huggingface_hub_cache: str | None = setting(
        None, MODEL, "Folder of the hub's cache.", default_help="huggingface_hub's own"
    )
    trust_remote_code: bool = setting(
        False, MODEL, "Run code from the model's repository, where neither textmill nor transformers have any."
    )
    tokenizer_config_path: str | None = setting(
        None, MODEL, "Use this tokenizer_config.json (chat template) in place of the model's."
    )
    rope_scaling: str | None = setting(
        None,
        MODEL,
        "Stretch rotary positions, in place of what the config says, for prompts longer than it was trained on.",
        choices=("linear", "dynamic"),
    )
    rope_factor: float | None = setting(
        None, MODEL, "How far --rope-scaling stretches (alone: linearly).", minimum=1, default_help="1"
    )

    cpu_threads: int = setting(0, COMPUTE, "Threads of the CPU kernels.", default_help="one per core we may use")
    kv_cache_memory: int | None = setting(
        None,
        COMPUTE,
        "Memory of the KV cache, in MiB.",
        minimum=1,
        default_help="768, or two contexts; at most half of what is free",
    )
    kernels: str = setting(
        "auto", COMPUTE, "Native kernels, or plain torch (the slow reference).", choices=("auto", "native", "torch")
    )
    num_shard: int | None = setting(
        None, COMPUTE, "Ranks (processes) over which the model is split.", default_help="1: no splitting"
    )
    sharded: bool | None = setting(None, COMPUTE, "True insists on more than one rank.")
    disable_custom_kernels: bool = setting(False, COMPUTE, "The same as --kernels torch.")

    allow_remote_images: tuple[str, ...] = setting(
        (),
        WEB,
        "Hosts (HOST[:PORT][,HOST...]) that images in prompts may be fetched from; only for models that see.",
        default_help="none: images come as data URLs",
    )
    max_image_fetch_size: int = setting(20_971_520, WEB, "Largest image that is fetched, in bytes.", maximum=1 << 30)
    validation_workers: int = setting(2, WEB, "Threads of each router that tokenize long prompts.")
    cors_allow_origin: tuple[str, ...] = setting(
        (), WEB, "Origin that browsers may call from; may be repeated.", default_help="any"
    )

    graceful_termination_timeout: int = setting(
        90, PROCESSES, "Seconds that running requests get to finish after SIGTERM.", short="-g"
    )
    engine_restarts: int = setting(
        3, PROCESSES, "Times that a dead engine is started again within 10 minutes; 0: exit non-zero instead."
    )
    engine_hang_timeout: float = setting(
        30.0, PROCESSES, "Seconds without a finished step, while there is work, after which an engine is killed."
    )

    log_level: str = setting(
        "info", LOGS, "Least level that is logged: error, warn, info, debug or trace (a filter's first level counts)."
    )
    json_output: bool = setting(False, LOGS, "One JSON object per line in place of plain lines.")
    log_colorize: bool | None = setting(
        None, LOGS, "Colours in plain lines (true or false).", default_help="on a terminal only"
    )
    profile: bool = setting(
        False, LOGS, "Log every 10 seconds what each kernel took, and how near it came to the machine's limits."
    )

    waiting_served_ratio: float = setting(0.3, NO_EFFECT, "Prompts are cut into chunks; nothing waits for a ratio.")
    max_waiting_tokens: int = setting(20, NO_EFFECT, "Prompts are cut into chunks; nothing waits for decode steps.")
    prometheus_port: int = setting(
        9000, NO_EFFECT, "Metrics are at /metrics of the HTTP port; no second port is opened.", maximum=65535
    )
    shard_uds_path: str = setting(
        "/tmp/text-generation-server", NO_EFFECT, "The engine's socket lies in a private folder, removed at exit."
    )
    enable_prefill_logprobs: bool = setting(
        False, NO_EFFECT, "Prompt log-probabilities are always to be had (`decoder_input_details`)."
    )
    disable_grammar_support: bool = setting(False, NO_EFFECT, "Grammars are refused as long as they are not built.")
    master_addr: str = setting("localhost", NO_EFFECT, "The ranks meet in a private folder, not over the network.")
    master_port: int = setting(29500, NO_EFFECT, "The ranks meet in a private folder, not over the network.")
    usage_stats: str = setting("on", NO_EFFECT, "Nothing is ever sent anywhere.", choices=("on", "off", "no-stack"))

    kv_cache_dtype: str | None = setting(
        None, NOT_BUILT, "Narrow KV cache.", choices=("fp8_e4m3fn", "fp8_e5m2"), built="8-bit KV caches"
    )
    weights_cache_override: str | None = setting(
        None,
        NOT_BUILT,
        "Folder looked into first for weights.",
        built="a second folder of weights; name it by --model-id",
    )
    cuda_graphs: tuple[int, ...] = setting(
        CUDA_GRAPHS, NOT_BUILT, "Batch sizes to capture; 0: none.", built="the GPU path", works=((0,), ())
    )
    cuda_memory_fraction: float = setting(1.0, NOT_BUILT, "Share of GPU memory to use.", built="the GPU path")
    lora_adapters: str | None = setting(None, NOT_BUILT, "Adapters, separated by commas.", built="LoRA adapters")
    otlp_endpoint: str | None = setting(None, NOT_BUILT, "OpenTelemetry collector.", built="OpenTelemetry export")
    otlp_service_name: str = setting(
        "text-generation-inference.router", NOT_BUILT, "Service name in traces.", built="OpenTelemetry export"
    )
    watermark_gamma: float | None = setting(None, NOT_BUILT, "Green-list share.", built="watermarking")
    watermark_delta: float | None = setting(None, NOT_BUILT, "Green-list bias.", built="watermarking", minimum=None)
    ngrok: bool = setting(False, NOT_BUILT, "Open a tunnel.", built="ngrok tunnels")
    ngrok_authtoken: str | None = setting(None, NOT_BUILT, "Token of the tunnel.", built="ngrok tunnels", secret=True)
    ngrok_edge: str | None = setting(None, NOT_BUILT, "Edge of the tunnel.", built="ngrok tunnels")

    def to_json(self) -> str:
        """The settings as JSON text, for handing to child processes (contains secrets: keep the file private)."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """The inverse of `to_json`; an unknown key is an error."""
        values: dict[str, Any] = json.loads(text)
        frozen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return Settings(**frozen)


def flag_name(one: Field[Any]) -> str:
    return "--" + one.name.replace("_", "-")


def env_name(one: Field[Any]) -> str:
    return one.name.upper()


def check(settings: Settings) -> None:
    """Raise `ConfigError` for the first rule that the settings break: TGI's cross-checks, then what is not built."""
    for problem in _problems(settings):
        raise ConfigError(problem)
    for one in fields(settings):
        raise_if_not_built(one, getattr(settings, one.name))


def _problems(s: Settings) -> list[str]:
    """TGI's cross-checks, in its order and words."""
    found: list[str] = []
    top, total = s.max_input_tokens, s.max_total_tokens
    if top is not None and s.max_input_length is not None:
        found.append(
            f"Both `max_input_tokens` ({top}) and `max_input_length` ({s.max_input_length}) are set. "
            "Please define only `max_input_tokens` as `max_input_length` is deprecated for naming consistency."
        )
    top = s.max_input_length if top is None else top
    if top is not None and total is not None and top >= total:
        found.append(f"`max_input_tokens`({top}) must be < `max_total_tokens`({total})")
    found += _batch_problems(s)
    if s.validation_workers == 0:
        found.append("`validation_workers` must be > 0")
    found += _shard_problems(s)
    if s.ngrok and s.ngrok_authtoken is None:
        found.append("`ngrok-authtoken` must be set when using ngrok tunneling")
    if s.ngrok and s.ngrok_edge is None:
        found.append("`ngrok-edge` must be set when using ngrok tunneling")
    found += [f"Invalid LoRA adapter format: {e}" for e in (s.lora_adapters or "").split(",") if e.count("@") > 1]
    return found


def _batch_problems(s: Settings) -> list[str]:
    """Limits of one step or request against what the whole cache may hold."""
    whole = s.max_batch_total_tokens
    return [
        f"`{name}` must be <= `max_batch_total_tokens`. Given: {value} and {whole}"
        for name, value in (
            ("max_batch_prefill_tokens", s.max_batch_prefill_tokens),
            ("max_total_tokens", s.max_total_tokens),
        )
        if value is not None and whole is not None and value > whole
    ]


def _shard_problems(s: Settings) -> list[str]:
    if s.num_shard == 0:
        return ["`num_shard` cannot be < 1"]
    if s.sharded and (s.num_shard or 1) <= 1:
        return ["`sharded` is true but `num_shard` <= 1"]
    if s.quantize == "exl2" and (s.num_shard or 1) > 1:
        return ["Sharding is currently not supported with `exl2` quantization"]
    return []


def raise_if_not_built(one: Field[Any], value: object) -> None:
    """Raise `ConfigError` naming the flag and the value if what it asks for does not exist yet."""
    built = one.metadata["built"]
    if built is True or value == one.default or value in one.metadata["works"]:
        return
    words = [flag_name(one)]
    if value is not True and not one.metadata["secret"]:
        words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    raise ConfigError(f"`{' '.join(words)}` is not built yet: {built}")


def settle(settings: Settings) -> Settings:
    """The settings as the parts read them: old names and synonyms folded into the names that count."""
    top = settings.max_input_length if settings.max_input_tokens is None else settings.max_input_tokens
    kernels = "torch" if settings.disable_custom_kernels else settings.kernels
    return replace(settings, max_input_tokens=top, max_input_length=None, kernels=kernels)
