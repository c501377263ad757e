"""Turns, budgets, admission and preemption, each in a small case that can be read."""

from __future__ import annotations

from driver import Driver
from scripted import limits

from textmill.core import Finish, Step
from textmill.engine.scheduler import EngineSettings


def rows(step: Step) -> list[tuple[int, int, bool]]:
    return [(work.start, work.count, work.samples) for work in step.work]


def test_prompt_is_chunked_and_only_its_end_samples() -> None:
    driver = Driver(limits(max_step_tokens=4))
    driver.arrive(range(10), 2)
    driver.finish()
    assert [rows(step) for step in driver.runner.steps] == [
        [(0, 4, False)],
        [(4, 4, False)],
        [(8, 2, True)],
        [(10, 1, True)],
    ]


def test_decodes_come_first_and_prompts_fill_the_rest() -> None:
    driver = Driver(limits(max_step_tokens=8))
    driver.arrive([1], 10)
    driver.arrive([2], 10)
    driver.turn()
    driver.arrive(range(20), 5)
    driver.turn()
    assert rows(driver.runner.steps[-1]) == [(1, 1, True), (1, 1, True), (0, 6, False)]
    driver.finish()


def test_prompt_tokens_beside_decodes_are_bounded() -> None:
    driver = Driver(limits(max_step_tokens=16), EngineSettings(prefill_tokens_beside_decode=3))
    driver.arrive(range(9), 10)
    driver.turn()
    assert rows(driver.runner.steps[-1]) == [(0, 9, True)]
    driver.arrive(range(20, 29), 5)
    driver.turn()
    assert rows(driver.runner.steps[-1]) == [(9, 1, True), (0, 3, False)]
    driver.finish()


def test_prompts_get_on_even_beside_more_decodes_than_the_budget() -> None:
    driver = Driver(limits(max_step_tokens=16), EngineSettings(max_batch_prefill_tokens=2, prefix_caching=False))
    for token in range(4):
        driver.arrive([token], 20)
    for _ in range(4):
        driver.turn()
    late = driver.arrive(range(5), 3)
    for _ in range(9):
        driver.turn()
    assert late is not None
    assert late.finish is Finish.LENGTH
    assert not any(other.finish for other in driver.watched[:4])
    driver.finish()
    assert all(sum(work.count for work in step.work) <= 5 for step in driver.runner.steps)


def test_short_prompt_shares_the_step_that_ends_a_long_one() -> None:
    driver = Driver(limits(max_step_tokens=8))
    driver.arrive(range(12), 3)
    driver.arrive([40, 41], 3)
    driver.turn()
    driver.turn()
    assert rows(driver.runner.steps[-1]) == [(8, 4, True), (0, 2, True)]
    driver.finish()


def test_preempted_is_the_youngest_and_its_output_is_unchanged() -> None:
    driver = Driver(limits(num_blocks=8, max_total_tokens=40), EngineSettings(prefix_caching=False))
    old = driver.arrive([1, 2, 3], 26)
    young = driver.arrive([4, 5, 6], 26)
    driver.finish()  # compares with the outputs alone
    assert old is not None
    assert young is not None
    assert old.sequence.residency == 1
    assert young.sequence.residency > 1
    assert driver.counters.preemptions == young.sequence.residency - 1


def test_preempted_finds_its_own_blocks_again() -> None:
    driver = Driver(limits(num_blocks=10, max_total_tokens=40))
    driver.arrive([1, 2, 3], 30)
    driver.arrive([4, 5, 6], 20)
    driver.finish()
    assert driver.counters.preemptions
    assert driver.counters.prefix_hit_tokens


def test_a_conversation_hits_what_it_generated() -> None:
    driver = Driver(limits())
    first = driver.arrive(range(6), 11)
    driver.finish()
    assert first is not None
    second = driver.arrive([*range(6), *first.tokens, 1, 2], 5)
    driver.finish()
    assert second is not None
    assert second.first is not None
    assert second.first.cached_tokens == 16


def test_simultaneous_equal_prompts_share_once_computed() -> None:
    driver = Driver(limits(max_slots=1))
    for _ in range(3):
        driver.arrive(range(13), 2)
    driver.finish()
    assert driver.counters.prefix_hit_tokens == 2 * 12


def test_ending_token_found_late_voids_the_row_planned_ahead() -> None:
    alone = Driver(limits())
    whole = alone.arrive([1, 2, 3], 12)
    alone.finish()
    assert whole is not None
    stop = whole.tokens[4]
    driver = Driver(limits())
    ended = driver.arrive([1, 2, 3], 12, (stop,))
    driver.finish()
    assert ended is not None
    assert ended.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert ended.finish is Finish.EOS
    assert driver.counters.void_rows == 1


def test_last_allowed_token_that_would_end_it_anyway_is_length() -> None:
    alone = Driver(limits())
    whole = alone.arrive([1, 2, 3], 5)
    alone.finish()
    assert whole is not None
    first = whole.tokens.index(whole.tokens[-1]) + 1
    driver = Driver(limits())
    ended = driver.arrive([1, 2, 3], first, (whole.tokens[-1],))
    driver.finish()
    assert ended is not None
    assert ended.finish is Finish.LENGTH


def test_total_length_is_bounded() -> None:
    driver = Driver(limits(max_total_tokens=256, num_blocks=5, block_size=4))
    one = driver.arrive(range(10), 100)
    driver.finish()
    assert one is not None
    assert len(one.tokens) == 10
    assert driver.arrive(range(20), 1) is None
    assert driver.arrive(range(19), 1) is not None
    driver.finish()


def test_batch_size_setting_bounds_the_running() -> None:
    driver = Driver(limits(), EngineSettings(max_batch_size=2))
    for token in range(5):
        driver.arrive([token], 4)
    driver.finish()
    assert max(len(step.work) for step in driver.runner.steps) == 2


def test_failed_row_is_alone_and_its_blocks_are_forgotten() -> None:
    driver = Driver(limits())
    bad, good = driver.arrive(range(9), 8), driver.arrive(range(20, 29), 8)
    driver.turn()
    driver.turn()
    driver.break_step({0})
    driver.finish()
    assert bad is not None
    assert good is not None
    assert (bad.finish, good.finish) == (Finish.FAILED, Finish.LENGTH)
    again = driver.arrive(range(9), 3)
    driver.finish()
    assert again is not None
    assert again.first is not None
    assert again.first.cached_tokens == 0


def test_prompts_and_decodes_are_counted_apart() -> None:
    driver = Driver(limits())
    driver.arrive(range(9), 5)
    driver.finish()
    counted = driver.counters
    assert (counted.batch_inference_count_prefill, counted.batch_inference_count_decode) == (1, 4)
    assert (counted.prompt_tokens, counted.computed_tokens, counted.generated_tokens) == (9, 13, 5)
