"""Settings from flags and environment: TGI's whole table, its cross-checks in its words, and what is not built."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import click
import pytest

from textmill.cli.options import default_text, listen_host, parse_settings
from textmill.config import Settings, check, env_name, flag_name, settle
from textmill.errors import ConfigError

# TGI's launcher: field, its default, a text to give, what the text means. Switches are given by True.
TGI: list[tuple[str, object, str | bool, object]] = [
    ("model_id", None, "some/model", "some/model"),
    ("revision", None, "main", "main"),
    ("validation_workers", 2, "4", 4),
    ("sharded", None, "true", True),
    ("num_shard", None, "2", 2),
    ("quantize", None, "bitsandbytes-nf4", "bitsandbytes-nf4"),
    ("speculate", None, "3", 3),
    ("dtype", None, "bfloat16", "bfloat16"),
    ("kv_cache_dtype", None, "fp8_e5m2", "fp8_e5m2"),
    ("trust_remote_code", False, True, True),
    ("max_concurrent_requests", 128, "7", 7),
    ("max_best_of", 2, "5", 5),
    ("max_stop_sequences", 4, "9", 9),
    ("max_top_n_tokens", 5, "6", 6),
    ("max_input_tokens", None, "1000", 1000),
    ("max_input_length", None, "1000", 1000),
    ("max_total_tokens", None, "2000", 2000),
    ("waiting_served_ratio", 0.3, "1.2", 1.2),
    ("max_batch_prefill_tokens", None, "512", 512),
    ("max_batch_total_tokens", None, "9000", 9000),
    ("max_waiting_tokens", 20, "8", 8),
    ("max_batch_size", None, "16", 16),
    ("cuda_graphs", (1, 2, 4, 8, 16, 32), "1,2,64", (1, 2, 64)),
    ("hostname", "0.0.0.0", "::1", "::1"),
    ("port", 3000, "80", 80),
    ("prometheus_port", 9000, "9001", 9001),
    ("shard_uds_path", "/tmp/text-generation-server", "/run/x", "/run/x"),
    ("master_addr", "localhost", "h", "h"),
    ("master_port", 29500, "29501", 29501),
    ("huggingface_hub_cache", None, "/data", "/data"),
    ("weights_cache_override", None, "/weights", "/weights"),
    ("disable_custom_kernels", False, True, True),
    ("cuda_memory_fraction", 1.0, "0.5", 0.5),
    ("rope_scaling", None, "dynamic", "dynamic"),
    ("rope_factor", None, "2.0", 2.0),
    ("json_output", False, True, True),
    ("otlp_endpoint", None, "localhost:4317", "localhost:4317"),
    ("otlp_service_name", "text-generation-inference.router", "mine", "mine"),
    ("cors_allow_origin", (), "localhost", ("localhost",)),
    ("api_key", None, "secret", "secret"),
    ("watermark_gamma", None, "0.5", 0.5),
    ("watermark_delta", None, "-2.0", -2.0),
    ("ngrok", False, True, True),
    ("ngrok_authtoken", None, "t", "t"),
    ("ngrok_edge", None, "e", "e"),
    ("tokenizer_config_path", None, "/c.json", "/c.json"),
    ("disable_grammar_support", False, True, True),
    ("max_client_batch_size", 4, "5", 5),
    ("lora_adapters", None, "a,b", "a,b"),
    ("usage_stats", "on", "no-stack", "no-stack"),
    ("payload_limit", 2_000_000, "100", 100),
    ("enable_prefill_logprobs", False, True, True),
    ("graceful_termination_timeout", 90, "5", 5),
]
NAMES = [row[0] for row in TGI]

# What nobody can use yet, with the values that must be let through all the same.
NOT_BUILT = {
    "--quantize gptq": {"quantize": "gptq"},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--kv-cache-dtype fp8_e5m2": {"kv_cache_dtype": "fp8_e5m2"},
    "--cuda-graphs 1,2": {"cuda_graphs": (1, 2)},
    "--cuda-memory-fraction 0.5": {"cuda_memory_fraction": 0.5},
    "--lora-adapters a": {"lora_adapters": "a"},
    "--otlp-endpoint x": {"otlp_endpoint": "x"},
    "--watermark-gamma 0.5": {"watermark_gamma": 0.5},
    "--watermark-delta -1.0": {"watermark_delta": -1.0},
    "--ngrok": {"ngrok": True, "ngrok_authtoken": "t", "ngrok_edge": "e"},
    "--ngrok-authtoken": {"ngrok_authtoken": "t"},
}
STILL_WORKS = [
    {"sharded": False},
    {"num_shard": 1},
    {"sharded": True, "num_shard": 2},
    {"master_port": 1234},
    {"speculate": 0},
    {"speculate": 6},
    {"cuda_graphs": (0,)},
    {"dtype": "float32"},
    {"prometheus_port": 9001},
    {"waiting_served_ratio": 1.2},
]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in fields(Settings):
        monkeypatch.delenv(env_name(one), raising=False)


def flags(name: str, text: str | bool) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if text is True else [f"{flag}={text}"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "textmill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("name", "default", "text", "value"), TGI, ids=NAMES)
def test_flag_environment_and_default_are_tgis(
    monkeypatch: pytest.MonkeyPatch, name: str, default: object, text: str | bool, value: object
) -> None:
    assert getattr(parse_settings([]), name) == default
    assert getattr(parse_settings(flags(name, text)), name) == value
    monkeypatch.setenv(name.upper(), "true" if text is True else str(text))
    assert getattr(parse_settings([]), name) == value


def test_short_names() -> None:
    settings = parse_settings(["-p", "81", "-g", "3"])
    assert (settings.port, settings.graceful_termination_timeout) == (81, 3)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8080")
    assert parse_settings([]).port == 8080
    assert parse_settings(["--port", "81"]).port == 81


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False), ("", True)])
def test_switches_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    """An empty variable counts as unset, as in `docker run -e NAME=`."""
    monkeypatch.setenv("PREFIX_CACHING", text)
    monkeypatch.setenv("JSON_OUTPUT", text)
    settings = parse_settings([])
    assert settings.prefix_caching is value
    assert settings.json_output is (value and text != "")


def test_a_switch_can_be_turned_off() -> None:
    assert parse_settings(["--no-prefix-caching"]).prefix_caching is False


def test_repeated_origins() -> None:
    assert parse_settings(["--cors-allow-origin", "a", "--cors-allow-origin", "b"]).cors_allow_origin == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "65536"], "--port (or PORT in the environment): 65536 is more than 65535"),
        (["--max-best-of", "-1"], "-1 is less than 0"),
        (["--max-best-of", "1.5"], "'1.5' is not a whole number"),
        (["--rope-factor", "nan"], "nan is less than 1"),
        (["--dtype", "int8"], "'int8' is not one of float16, bfloat16, float32"),
        (["--sharded", "perhaps"], "'perhaps' is neither true nor false"),
        (["--max-concurrent-requests", "1000001"], "1000001 is more than 1000000"),
        (["--max-input-tokns", "1"], "--max-input-tokens"),
        (["stray"], "unexpected extra argument"),
    ],
)
def test_wrong_values_are_refused_with_what_is_allowed(arguments: list[str], words: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse_settings(arguments)
    assert words in caught.value.format_message()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_input_tokens": 9, "max_total_tokens": 9}, "`max_input_tokens`(9) must be < `max_total_tokens`(9)"),
        ({"max_input_length": 9, "max_total_tokens": 8}, "`max_input_tokens`(9) must be < `max_total_tokens`(8)"),
        (
            {"max_total_tokens": 9, "max_batch_total_tokens": 8},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        (
            {"max_batch_prefill_tokens": 9, "max_batch_total_tokens": 8},
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        ({"validation_workers": 0}, "`validation_workers` must be > 0"),
        ({"num_shard": 0}, "`num_shard` cannot be < 1"),
        ({"sharded": True}, "`sharded` is true but `num_shard` <= 1"),
        ({"sharded": True, "num_shard": 1}, "`sharded` is true but `num_shard` <= 1"),
        ({"quantize": "exl2", "num_shard": 2}, "Sharding is currently not supported with `exl2` quantization"),
        ({"ngrok": True}, "`ngrok-authtoken` must be set when using ngrok tunneling"),
        ({"ngrok": True, "ngrok_authtoken": "t"}, "`ngrok-edge` must be set when using ngrok tunneling"),
        ({"lora_adapters": "a,b@c@d"}, "Invalid LoRA adapter format: b@c@d"),
    ],
)
def test_cross_checks_in_tgis_words(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Settings(**values))  # type: ignore[arg-type]
    assert caught.value.message == message


def test_both_names_of_the_input_limit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Both `max_input_tokens` \(3\) and `max_input_length` \(4\) are set\."):
        check(Settings(max_input_tokens=3, max_input_length=4))


@pytest.mark.parametrize("words", NOT_BUILT)
def test_what_is_not_built_stops_the_start(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Settings(**NOT_BUILT[words]))  # type: ignore[arg-type]
    assert caught.value.message.startswith(f"`{words}` is not built yet: ")


@pytest.mark.parametrize("values", STILL_WORKS, ids=str)
def test_values_that_ask_for_nothing_missing_pass(values: dict[str, object]) -> None:
    check(Settings(**values))  # type: ignore[arg-type]


def test_the_default_settings_pass() -> None:
    check(Settings())


def test_old_names_are_folded() -> None:
    settled = settle(Settings(max_input_length=7, disable_custom_kernels=True))
    assert (settled.max_input_tokens, settled.max_input_length, settled.kernels) == (7, None, "torch")


def test_settings_cross_to_children_unchanged() -> None:
    settings = parse_settings(
        ["--cors-allow-origin", "a", "--api-key", "ü", "--rope-factor", "2", "--sharded", "false"]
    )
    assert Settings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("hostname", "host", "warned"),
    [
        ("0.0.0.0", "0.0.0.0", False),
        ("::", "::", False),
        ("[::1]", "::1", False),
        ("localhost", "127.0.0.1", False),
        ("3f1c7a9d2b4e", "0.0.0.0", True),
    ],
)
def test_a_containers_name_as_hostname_falls_back(hostname: str, host: str, warned: bool) -> None:
    address, warning = listen_host(hostname)
    assert (address, bool(warning)) == (host, warned)


def test_launch_stops_with_one_line_and_code_1() -> None:
    done = run("launch", "--quantize", "gptq")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Error: Invalid argument: `--quantize gptq` is not built yet: only GGUF's own quantization can be read so far"
    ]


def test_a_typo_gets_a_suggestion_and_code_2() -> None:
    done = run("launch", "--prot", "3000")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "--port" in done.stderr
    assert len(done.stderr.splitlines()) <= 4


def test_help_shows_what_matters_first_with_names_and_defaults() -> None:
    done = run("launch", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for one in fields(Settings):
        assert flag_name(one) in text
        assert f"env: {env_name(one)}" in text
        shown = one.metadata["default_help"] or default_text(one.default)
        assert not shown or f"default: {shown}"[:24] in text
    first = done.stdout.split("Limits on a request:")[0]
    assert "Essentials:" in first
    assert 10 <= first.count("\n  --") <= 14
    assert done.stdout.index("Not built yet") > done.stdout.index("Processes:")


@pytest.mark.parametrize("arguments", [["--version"], ["launch", "--version"]])
def test_version(arguments: list[str]) -> None:
    from textmill import __version__

    done = run(*arguments)
    assert (done.returncode, done.stdout) == (0, f"textmill, version {__version__}\n")


def test_env_prints_what_it_runs_on() -> None:
    done = run("launch", "--env")
    assert done.returncode == 0
    assert {line.split(":")[0] for line in done.stdout.splitlines()} >= {"textmill", "python", "cpu", "torch"}
