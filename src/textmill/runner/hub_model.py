"""Loads a model for which textmill has no file of its own through transformers, an optional dependency (`fallback`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textmill.errors import ConfigError, ModelError
from textmill.models.registry import has_family
from textmill.weights.config import ModelConfig, read_json, token_ids
from textmill.weights.families import in_known_names

INSTALL = "pip install 'textmill[fallback]'"
CONTEXT = 2048  # tokens, for models whose config names no longest sequence


def needs_hub_model(folder: Path) -> bool:
    """True if textmill has no file for the checkpoint's `model_type`."""
    return not has_family(str(in_known_names(read_json(folder / "config.json")).get("model_type")))


def load_hub_model(folder: Path, *, trust_remote_code: bool, threads: int = 0) -> tuple[Any, ModelConfig]:
    """transformers' own model on the CPU, in float32, with its config in our names; `threads` 0: as torch likes.

    Code that lies in the folder runs only with `trust_remote_code`; nothing that weights pickle is run. Raises
    ConfigError or ModelError.
    """
    raw = read_json(folder / "config.json")
    model_type = str(raw.get("model_type"))
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model_type {model_type!r} has no file in textmill; transformers may know it: {INSTALL}"
        ) from error
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}) and not trust_remote_code:
        raise ConfigError(
            f"model_type {model_type!r} is served by code from the model's repository: read it, and then allow it "
            "with --trust-remote-code"
        )
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{folder}: model_type {model_type!r}: an encoder-decoder model that textmill has no file for")
    if threads:
        torch.set_num_threads(threads)
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        model: Any = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, weights_only=True, **options
        )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: transformers cannot load model_type {model_type!r}: {first_line(error)}"
        ) from error
    return model.eval(), config_of(model, folder, raw)


def config_of(model: Any, folder: Path, raw: dict[str, Any]) -> ModelConfig:
    """transformers' config in our names; sizes that the model does not have are those of its nearest relative."""
    c = model.config.get_text_config()
    hidden = whole(c, ("hidden_size", "d_model", "n_embd"), 1)
    heads = whole(c, ("num_attention_heads", "num_heads", "n_head"), 1)
    output = model.get_output_embeddings()
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = getattr(c, "eos_token_id", None) if eos is None else eos
    return ModelConfig(
        model_type=str(raw.get("model_type")),
        hidden_size=hidden,
        num_layers=whole(c, ("num_hidden_layers", "num_layers", "n_layer"), 1),
        heads=heads,
        kv_heads=whole(c, ("num_key_value_heads",), heads),
        head_dim=whole(c, ("head_dim",), max(1, hidden // heads)),
        intermediate_size=whole(c, ("intermediate_size",), 4 * hidden),
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        rotary_dim=0,
        max_position_embeddings=whole(c, ("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
        vocab_size=int(output.weight.shape[0]) if output is not None else whole(c, ("vocab_size",), 1),
        tie_word_embeddings=None,
        hidden_act="",
        sliding_window=None,
        attention_bias=False,
        bos_token_id=getattr(c, "bos_token_id", None),
        eos_token_ids=token_ids(eos, folder / "config.json", "eos_token_id"),
        torch_dtype="float32",
        raw=raw,
    )


def whole(config: Any, names: tuple[str, ...], default: int) -> int:
    """The first of the fields that holds a positive whole number."""
    values = [getattr(config, name, None) for name in names]
    return next((value for value in values if type(value) is int and value > 0), default)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
