"""A model's config in our names, from `config.json` (hub style or transformers 5) or from GGUF metadata.

Every number is checked, since the file comes from outside: a missing or impossible field is a ModelError naming it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from textmill.errors import ModelError
from textmill.weights.families import in_known_names
from textmill.weights.gguf import GgufFile

_LARGEST_JSON = 64 << 20
_LARGEST_NUMBER = 1 << 31
_LONGEST_ENDLESS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What layers may ask about a model; whatever else its config says is in `raw`.

    `rope_scaling` is None for plain rotary positions, else a dict with at least `rope_type`. `rotary_dim` is the part
    of each head that is rotated. `rope_local_theta`: for layers with a window, where these turn by another base.
    `layer_types`: "full_attention" or "sliding_attention" per layer, empty where the config has no list.
    `tie_word_embeddings` is None where the config does not say. `max_total_tokens`: what the server allows a sequence.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_local_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None
    rotary_dim: int
    max_position_embeddings: int
    vocab_size: int
    tie_word_embeddings: bool | None
    hidden_act: str
    sliding_window: int | None
    layer_types: tuple[str, ...] = ()
    attention_bias: bool
    experts: int = 0
    experts_per_token: int = 0
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    torch_dtype: str
    max_total_tokens: int | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that will be served: positions that tables must hold."""
        return self.max_total_tokens or self.max_position_embeddings

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the model can be served with: more than it says where its rope stretches,
        or where nothing in it counts positions.

        It says what yarn was trained on, and up to where a dynamic rope is not stretched.
        """
        if self.switch("endless", False):
            return _LONGEST_ENDLESS
        scaling = self.rope_scaling or {}
        reach = {
            "dynamic": self.max_position_embeddings,
            "yarn": scaling.get("original_max_position_embeddings", self.max_position_embeddings),
        }.get(str(scaling.get("rope_type")))
        factor = scaling.get("factor")
        if not isinstance(reach, int) or not isinstance(factor, int | float) or not 1 <= factor < 1e4:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(reach * factor))

    def stretched(self, kind: str | None, factor: float | None) -> ModelConfig:
        """The same model with a rope that flags ask for; a factor alone is linear, a kind alone has factor 1 (TGI).

        A linear rope stretches all that the model was trained on over `factor` times the length.
        """
        if kind is None and factor is None:
            return self
        kind, factor = kind or "linear", factor or 1.0
        length = self.max_position_embeddings * (factor if kind == "linear" else 1)
        return replace(self, rope_scaling={"rope_type": kind, "factor": factor}, max_position_embeddings=int(length))

    def switch(self, name: str, default: bool) -> bool:
        """A yes-or-no field of `raw`; ModelError if it is something else."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"config.json: {name}: {value!r} is not true or false")
        return default if value is None else value

    def real(self, name: str) -> float | None:
        """A positive number of `raw`, or None; ModelError if it is something else."""
        value = self.raw.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30
        ):
            raise ModelError(f"config.json: {name}: {value!r} is not a positive number")
        return None if value is None else float(value)

    def number(self, name: str, default: int) -> int:
        """A whole number of `raw`, 0 or more; ModelError if it is something else."""
        value = self.raw.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < _LARGEST_NUMBER):
            raise ModelError(f"config.json: {name}: {value!r} is not a whole number")
        return default if value is None else int(value)


def read_config(path: str | Path) -> ModelConfig:
    """The config of a model folder (config.json, generation_config.json) or of a .gguf file."""
    path = Path(path)
    if path.suffix == ".gguf":
        from textmill.weights.gguf_config import config_from_gguf

        return config_from_gguf(GgufFile(path))
    return config_from_folder(path)


def config_from_folder(folder: Path) -> ModelConfig:
    """Reads `config.json` of hub files and of transformers 5, and the end tokens of `generation_config.json`."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return config_of(in_known_names(read_json(path)), path, eos)


def config_of(raw: dict[str, Any], path: Path, eos: Any = None) -> ModelConfig:
    """The fields of a config.json, of `path` as errors call it; `eos`: end tokens that go before its own."""
    fields = Fields(raw, path)
    heads = fields.number("num_attention_heads", "n_head", "n_heads")
    hidden = fields.number("hidden_size", "n_embd", "d_model")
    head_dim = fields.number("head_dim", default=hidden // heads)
    rope = _rope_parameters(raw, fields)
    partial = fields.real("partial_rotary_factor", "rotary_pct", default=rope.get("partial_rotary_factor", 1.0))
    return ModelConfig(
        model_type=fields.text("model_type"),
        hidden_size=hidden,
        num_layers=fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        heads=heads,
        kv_heads=fields.number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads),
        head_dim=head_dim,
        intermediate_size=fields.number("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        norm_eps=fields.real("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", default=1e-6),
        rope_theta=fields.real("rope_theta", "rotary_emb_base", default=rope.get("rope_theta", 10000.0)),
        rope_local_theta=fields.real("rope_local_base_freq", default=rope.get("rope_local_theta", 10000.0)),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        rotary_dim=int(head_dim * partial),
        max_position_embeddings=fields.number("max_position_embeddings", "n_positions", "n_ctx", default=2048),
        vocab_size=fields.number("vocab_size"),
        tie_word_embeddings=fields.switch("tie_word_embeddings"),
        hidden_act=fields.text("hidden_act", "hidden_activation", "activation_function", default="silu"),
        sliding_window=_sliding_window(raw, fields),
        layer_types=_layer_types(raw, fields),
        attention_bias=bool(fields.switch("attention_bias", "use_bias")),
        experts=fields.optional_number("num_local_experts", "num_experts") or 0,
        experts_per_token=fields.optional_number("num_experts_per_tok") or 0,
        bos_token_id=fields.optional_number("bos_token_id"),
        eos_token_ids=token_ids(raw.get("eos_token_id") if eos is None else eos, fields.path, "eos_token_id"),
        torch_dtype=fields.text("torch_dtype", "dtype", default="float32"),
        raw=raw,
    )


def token_ids(value: Any, path: Path, name: str) -> tuple[int, ...]:
    """A field that holds one id, a list of ids, or nothing."""
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(type(number) is int and 0 <= number < _LARGEST_NUMBER for number in values):
        raise ModelError(f"{path}: {name}: {value!r} is not a token id or a list of them")
    return tuple(dict.fromkeys(values))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size; ModelError otherwise."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ModelError(f"{path}: larger than {_LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return value


class Fields:
    """Typed look-ups under alternative names; null counts as missing."""

    def __init__(self, raw: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.raw = raw
        self.path = path
        self.prefix = prefix

    def find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            value = self.raw.get(self.prefix + name)
            if value is not None:
                return self.prefix + name, value
        return self.prefix + names[0], None

    def fail(self, name: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"{self.path}: {name}: {value!r} is not {wanted}")

    def optional_number(self, *names: str) -> int | None:
        name, value = self.find(names)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < _LARGEST_NUMBER:
            raise self.fail(name, value, "a whole number")
        return value

    def number(self, *names: str, default: int | None = None) -> int:
        value = self.optional_number(*names)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.path}: {self.prefix + names[0]} is missing")
        if value < 1:
            raise self.fail(self.find(names)[0], value, "a positive number")
        return value

    def real(self, *names: str, default: float) -> float:
        name, value = self.find(names)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(name, value, "a positive number")
        return float(value)

    def text(self, *names: str, default: str | None = None) -> str:
        name, value = self.find(names)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.path}: {name} is missing")
        if not isinstance(value, str):
            raise self.fail(name, value, "a string")
        return value

    def switch(self, *names: str) -> bool | None:
        name, value = self.find(names)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, value, "true or false")
        return value


def _rope_parameters(raw: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The rotary settings of either style as one dict; `rope_type` is always there ("default" for plain)."""
    _, value = fields.find(("rope_parameters", "rope_scaling"))
    if value is None:
        return {"rope_type": "default"}
    if not isinstance(value, dict):
        raise fields.fail("rope_scaling", value, "an object")
    if isinstance(value.get("full_attention"), dict):  # one object per kind of layer
        local = value.get("sliding_attention")
        theta = local.get("rope_theta", 10000.0) if isinstance(local, dict) else 10000.0
        value = value["full_attention"] | {"rope_local_theta": theta}
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str):
        raise fields.fail("rope_scaling.rope_type", kind, "a string")
    found = {key: item for key, item in value.items() if key != "type"} | {"rope_type": kind}
    original = raw.get("original_max_position_embeddings")
    if original is not None:  # Phi-3 keeps it beside, not inside
        found.setdefault("original_max_position_embeddings", original)
    return found


def _layer_types(raw: dict[str, Any], fields: Fields) -> tuple[str, ...]:
    """A kind per layer ("full_attention", "sliding_attention", …), or nothing where the config has no such list."""
    value = raw.get("layer_types")
    if value is None:
        return ()
    layers = fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if not isinstance(value, list) or len(value) != layers or not all(isinstance(kind, str) for kind in value):
        raise fields.fail("layer_types", value, f"a list of {layers} strings")
    return tuple(value)


def _sliding_window(raw: dict[str, Any], fields: Fields) -> int | None:
    if raw.get("use_sliding_window") is False:
        return None
    return fields.optional_number("sliding_window") or None
