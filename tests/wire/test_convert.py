"""What goes into a message comes out of it; the committed message classes are those of engine.proto."""

from __future__ import annotations

import math
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto

from textmill.core import Emission, Finish, Image, Request, Sampling, TokenChoice
from textmill.wire import engine_pb2 as pb
from textmill.wire.convert import (
    batch_from_emissions,
    emissions_from_batch,
    request_from_submit,
    submit_from_request,
)
from textmill.wire.generate import generate


def through_the_wire(emissions: list[Emission]) -> list[Emission]:
    message = batch_from_emissions(7, emissions).SerializeToString()
    return emissions_from_batch(pb.StepBatch.FromString(message))


def test_requests_survive() -> None:
    request = Request(
        id=2**63,
        tokens=(0, 5, 2**31),
        max_new_tokens=9,
        sampling=Sampling(0.5, 40, 0.75, 0.25, 1.5, -0.5, True, 2**64 - 1),
        stop_tokens=(2, 3),
        prompt_logprobs=True,
        top_n_tokens=5,
        cache_salt=b"\x00salt",
        encoder_tokens=(8, 2**31),
        images=(Image(1, 2, bytes(12), (1, 3, 2, 2), (20, 30), (0.48145466, 0.5, 0.4), (0.3, 0.2, 0.1), b"name", 9),),
    )
    message = submit_from_request(request).SerializeToString()
    assert request_from_submit(pb.Submit.FromString(message)) == request


def test_submit_without_sampling_is_neutral() -> None:
    assert request_from_submit(pb.Submit(id=1, tokens=[1], max_new_tokens=1)).sampling == Sampling()


def test_emissions_survive_with_and_without_extras() -> None:
    emissions = [
        Emission(3, (TokenChoice(5, -0.5),)),
        Emission(4, (TokenChoice(6, -1.5, ((6, -1.5), (7, -2.0))),), Finish.EOS),
        Emission(5, finish=Finish.CANCELLED),
        Emission(6, finish=Finish.FAILED, error="boom"),
        Emission(7, (TokenChoice(0, 0.0),), queue_ns=2**40, cached_tokens=32),
    ]
    assert through_the_wire(emissions) == emissions


def test_prompt_logprobs_survive_even_when_empty() -> None:
    first, empty = through_the_wire(
        [
            Emission(1, (TokenChoice(5, -0.5),), prompt_logprobs=(float("nan"), -1.0, -math.inf)),
            Emission(2, (TokenChoice(5, -0.5),), prompt_logprobs=()),
        ]
    )
    assert first.prompt_logprobs is not None
    assert math.isnan(first.prompt_logprobs[0])
    assert first.prompt_logprobs[1:] == (-1.0, -math.inf)
    assert empty.prompt_logprobs == ()


def test_several_tokens_and_several_steps_of_one_request_become_one_emission() -> None:
    choices = [TokenChoice(i, -float(i), ((i, -float(i)),)) for i in range(4)]
    merged = through_the_wire(
        [
            Emission(1, tuple(choices[:3]), queue_ns=5, prompt_logprobs=(-1.0,)),
            Emission(2, (choices[0],)),
            Emission(1, (choices[3],)),
            Emission(1, finish=Finish.FAILED, error="late"),
        ]
    )
    assert merged[0] == Emission(1, tuple(choices), Finish.FAILED, (-1.0,), 5, 0, "late")
    assert merged[1] == Emission(2, (choices[0],))
    assert len(merged) == 2


def test_committed_classes_are_those_of_the_proto(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh: dict[str, object] = {}
    source = (tmp_path / "engine_pb2.py").read_text()
    exec(compile(source, "engine_pb2.py", "exec"), fresh)  # the pool refuses a different file under the same name
    committed, made = FileDescriptorProto(), FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    fresh["DESCRIPTOR"].CopyToProto(made)  # type: ignore[attr-defined]
    assert made == committed
    assert (tmp_path / "engine_pb2.pyi").read_text() == Path(pb.__file__).with_suffix(".pyi").read_text()
