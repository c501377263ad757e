"""Between core's nouns and the wire's messages, both ways; the only file that knows both.

A StepBatch holds its tokens as columns: one row per token, and one for a finish without a token. What few rows have
(alternatives, prompt log-probabilities, waiting time, errors) travels in sparse extras.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from textmill.core import Emission, EngineInfo, Finish, Image, Request, Sampling, TokenChoice
from textmill.engine.stats import Health
from textmill.wire import engine_pb2 as pb

NO_TOKEN = -1
FINISHES = tuple(Finish)  # by number: faster than calling the enumeration


def submit_from_request(request: Request) -> pb.Submit:
    sampling = request.sampling
    return pb.Submit(
        id=request.id,
        tokens=request.tokens,
        max_new_tokens=request.max_new_tokens,
        sampling=pb.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            do_sample=sampling.do_sample,
            seed=sampling.seed,
        ),
        stop_tokens=request.stop_tokens,
        prompt_logprobs=request.prompt_logprobs,
        top_n_tokens=request.top_n_tokens,
        cache_salt=request.cache_salt,
        encoder_tokens=request.encoder_tokens,
        images=[pb.Image(**asdict(image)) for image in request.images],
    )


def request_from_submit(submit: pb.Submit) -> Request:
    """The numbers as they are: the engine judges them. A Submit without sampling asks for the neutral one."""
    sampling = submit.sampling
    return Request(
        id=submit.id,
        tokens=tuple(submit.tokens),
        max_new_tokens=submit.max_new_tokens,
        sampling=Sampling()
        if not submit.HasField("sampling")
        else Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            do_sample=sampling.do_sample,
            seed=sampling.seed,
        ),
        stop_tokens=tuple(submit.stop_tokens),
        prompt_logprobs=submit.prompt_logprobs,
        top_n_tokens=submit.top_n_tokens,
        cache_salt=submit.cache_salt,
        encoder_tokens=tuple(submit.encoder_tokens),
        images=tuple([_image(one) for one in submit.images]),
    )


def _image(image: pb.Image) -> Image:
    """The fields as they are, of whatever length: the engine judges them."""
    shape, size, mean, std = (tuple(one) for one in (image.shape, image.size, image.mean, image.std))
    scale = (shape, size, mean, std)
    return Image(image.start, image.count, image.pixels, *scale, image.digest, image.until)  # type: ignore[arg-type]


def batch_from_emissions(step: int, emissions: Iterable[Emission]) -> pb.StepBatch:
    """Emissions of one or more steps, in order, as one message."""
    ids: list[int] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    finishes: list[int] = []
    extras: list[pb.Extra] = []
    for emission in emissions:
        extra = _extra_of_emission(emission, len(ids))
        for choice in emission.tokens or (None,):
            if choice is not None and choice.top:
                extra = extra or pb.Extra(row=len(ids))
                extra.top_ids.extend([id_ for id_, _ in choice.top])
                extra.top_logprobs.extend([logprob for _, logprob in choice.top])
            if extra is not None:
                extras.append(extra)
                extra = None
            ids.append(emission.request_id)
            tokens.append(NO_TOKEN if choice is None else choice.id)
            logprobs.append(0.0 if choice is None else choice.logprob)
            finishes.append(0)
        finishes[-1] = int(emission.finish)
    return pb.StepBatch(step=step, ids=ids, tokens=tokens, logprobs=logprobs, finish=finishes, extras=extras)


def emissions_from_batch(batch: pb.StepBatch) -> list[Emission]:
    """One emission per request in the batch, in the order of first mention; its rows in their order."""
    ids = batch.ids[:]
    if not batch.extras and len(set(ids)) == len(ids):
        rows = zip(ids, batch.tokens, batch.logprobs, batch.finish, strict=True)
        return [_emission_of_row(*row, None) for row in rows]
    extras = {extra.row: extra for extra in batch.extras}
    merged: dict[int, Emission] = {}
    columns = zip(ids, batch.tokens, batch.logprobs, batch.finish, strict=True)
    for row, (id_, token, logprob, finish) in enumerate(columns):
        emission = _emission_of_row(id_, token, logprob, finish, extras.get(row))
        earlier = merged.get(id_)
        merged[id_] = emission if earlier is None else _join(earlier, emission)
    return list(merged.values())


def _extra_of_emission(emission: Emission, row: int) -> pb.Extra | None:
    """What belongs to the emission as a whole goes with its first row; None if there is nothing."""
    if emission.prompt_logprobs is None and not (emission.queue_ns or emission.cached_tokens or emission.error):
        return None
    return pb.Extra(
        row=row,
        has_prompt_logprobs=emission.prompt_logprobs is not None,
        prompt_logprobs=emission.prompt_logprobs or (),
        queue_ns=emission.queue_ns,
        cached_tokens=emission.cached_tokens,
        error=emission.error,
    )


def _emission_of_row(id_: int, token: int, logprob: float, finish: int, extra: pb.Extra | None) -> Emission:
    if extra is None:
        choice = TokenChoice(token, logprob)
        return Emission(id_, () if token == NO_TOKEN else (choice,), FINISHES[finish])
    choice = TokenChoice(token, logprob, tuple(zip(extra.top_ids, extra.top_logprobs, strict=True)))
    return Emission(
        request_id=id_,
        tokens=() if token == NO_TOKEN else (choice,),
        finish=FINISHES[finish],
        prompt_logprobs=tuple(extra.prompt_logprobs) if extra.has_prompt_logprobs else None,
        queue_ns=extra.queue_ns,
        cached_tokens=extra.cached_tokens,
        error=extra.error,
    )


def _join(first: Emission, second: Emission) -> Emission:
    return replace(
        first,
        tokens=first.tokens + second.tokens,
        finish=second.finish,
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        queue_ns=first.queue_ns or second.queue_ns,
        cached_tokens=first.cached_tokens or second.cached_tokens,
        error=first.error or second.error,
    )


def reply_from_info(info: EngineInfo) -> pb.InfoReply:
    return pb.InfoReply(**asdict(info))


def info_from_reply(reply: pb.InfoReply) -> EngineInfo:
    return EngineInfo(**{name: getattr(reply, name) for name in EngineInfo.__dataclass_fields__})


def reply_from_health(health: Health) -> pb.HealthReply:
    return pb.HealthReply(
        step=health.step, step_age_ns=health.step_age_ns, working=health.working, draining=health.draining
    )


def health_from_reply(reply: pb.HealthReply) -> Health:
    return Health(reply.step, reply.step_age_ns, reply.working, reply.draining)


def reply_from_stats(values: dict[str, float]) -> pb.StatsReply:
    return pb.StatsReply(values=values)


def stats_from_reply(reply: pb.StatsReply) -> dict[str, float]:
    return dict(reply.values)
