"""An encoder-decoder checkpoint over HTTP: inputs are encoded, the answer is transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.models.cases.state import t5

if TYPE_CHECKING:
    from conftest import Server

END = 1


def write_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Words of one letter and a number, with T5's ends and spaces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁w{number}", -1.0) for number in range(157))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    ending = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    backend.post_processor = ending
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    return backend


def test_an_encoder_decoder_is_served(launch: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)(folder)
    tokenizer = write_tokenizer(folder)
    server = launch("--model-id", str(folder), "--max-total-tokens", "128", "--speculate", "2")
    texts = [" ".join(f"w{number * place % 157}" for number in range(3, 8 + 5 * place)) for place in range(1, 9)]

    def ask(text: str) -> Any:
        parameters = {"max_new_tokens": 24, "details": True, "decoder_input_details": True}
        status, headers, answer = server.post("/generate", {"inputs": text, "parameters": parameters})
        assert status == 200, answer
        assert headers["x-prompt-tokens"] == str(len(tokenizer.encode(text).ids))
        return answer

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, texts))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text, answer in zip(texts, answers, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([tokenizer.encode(text).ids])
            expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0, 1:].tolist()
        details = answer["details"]
        assert [token["id"] for token in details["tokens"]] == expected
        assert answer["generated_text"] == tokenizer.decode(expected)
        assert details["finish_reason"] == ("eos_token" if expected[-1] == END else "length")
        assert details["prefill"] == [{"id": 0, "text": "<pad>", "logprob": None}]
    assert "this model runs with the torch kernels" in server.log.read_text()
