"""Gemma 3 with a tower for pictures: the text model inside is served, and sees none. Kamath et al. 2025."""

from __future__ import annotations

from textmill.models import gemma3_text
from textmill.weights.config import ModelConfig
from textmill.weights.part import Part, text_config
from textmill.weights.view import View


class Model(gemma3_text.Model):
    def __init__(self, c: ModelConfig, w: View) -> None:
        for blind in ("vision_tower", "multi_modal_projector"):
            w.leave_out(blind)
        inner = text_config(c)
        part = Part(w.checkpoint, inner, {name: f"language_model.{name}" for name in ("model", "lm_head")})
        super().__init__(inner, View(part, group=w.group))
