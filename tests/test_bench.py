"""The benchmark's arithmetic on made-up numbers; nothing here measures time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from floor import Floor, Rates, Shape, Work, floor_of, shape_of
from ppo_speed import floors_of, jobs_of, parse
from summary import median_rates, page, summarise, table, verdicts
from tolerances import EXACT
from workload import Job, Measured, random_prompts, text_of, words

SHAPE = Shape(body=100, head=10, layers=4, lora_per_rank=3)
WORK = Work(rows=2, prompt=3, response=2, epochs=4, minibatches=4)
RATES = Rates(bf16_flops=1000.0, fp32_flops=500.0, read_bytes=100.0)


def exactly(number: float) -> object:
    return pytest.approx(number, rel=EXACT.relative, abs=EXACT.absolute)


def update(seconds: float, *, peak: int = 100, device_peak: int = 0, cpu: float = 1.0, **split: float) -> Measured:
    return Measured(seconds, cpu, split, tokens=512, peak_bytes=peak, device_peak_bytes=device_peak)


def floor(mode: str, rates: Rates = RATES) -> Floor:
    return floor_of(mode, SHAPE, WORK, rates, top_layers=1, lora_rank=2)


ROUNDS = [
    {"trl": update(40.0, peak=900, generate=10.0, update=25.0), "top": update(2.0, peak=250, generate=1.0, update=0.5)},
    {"trl": update(80.0, peak=800, generate=12.0, update=60.0), "top": update(8.0, peak=290, generate=5.0, update=2.0)},
    {"trl": update(60.0, peak=850, generate=11.0, update=40.0), "top": update(4.0, peak=300, generate=1.5, update=2.0)},
]


def test_seconds_phases_and_tokens_are_medians_over_the_rounds() -> None:
    trl, top = summarise(ROUNDS, {})
    assert (trl.seconds, top.seconds) == (60.0, 4.0)
    assert (trl.split["generate"], trl.split["update"], trl.split["score"]) == (11.0, 40.0, 0.0)
    assert trl.split["other"] == 8.0  # of 5, 8 and 9
    assert top.tokens_per_second == 128.0


def test_speed_compares_within_a_round_not_between_rounds() -> None:
    top = summarise(ROUNDS, {})[1]
    assert top.speed == 15.0  # of 20, 10 and 15; a machine twice as slow in the second round changes nothing
    assert top.speed_range == (10.0, 20.0)
    slowed = [ROUNDS[0], {name: update(one.seconds * 7) for name, one in ROUNDS[1].items()}, ROUNDS[2]]
    assert summarise(slowed, {})[1].speed == top.speed


def test_memory_is_the_share_of_the_peers_highest_peak() -> None:
    assert summarise(ROUNDS, {})[1].memory == exactly(300 / 900)


def test_on_an_accelerator_memory_is_that_of_its_tensors() -> None:
    rounds = [{"trl": update(4.0, peak=100, device_peak=80), "top": update(1.0, peak=100, device_peak=20)}]
    assert summarise(rounds, {})[1].memory == 0.25


def test_without_the_peer_there_is_no_ratio_and_the_table_still_stands() -> None:
    rounds = [{"top": one["top"]} for one in ROUNDS]
    (top,) = summarise(rounds, {"top": Floor(0.5, 0.25, 0.25)})
    assert (top.speed, top.speed_range, top.memory) == (None, None, None)
    assert top.floor_share == 0.25
    assert "25%" in table([top])
    assert verdicts([top]) == []


def test_the_floor_of_full_counts_every_pass_over_body_head_and_optimiser() -> None:
    found = floor("full")
    assert found.products == exactly((2 * 100 * 10 * (3 + 12) + 2 * 10 * 4 * (2 + 12)) / 1000)
    assert found.decoding == exactly(2 * 100 * 6 / 1000 + 110 * 2 / 100)
    assert found.optimiser == exactly(16 * 110 * 28 / 100)
    assert found.total == exactly(31.12 + 3.4 + 492.8)


def test_the_floor_of_lora_takes_no_weight_gradient_of_the_body() -> None:
    found = floor("lora")
    assert found.products == exactly((2 * 100 * 10 * (3 + 8) + 2 * 10 * 4 * (2 + 8)) / 1000)
    assert found.optimiser == exactly(16 * 6 * 28 / 100)


def test_the_floor_of_top_runs_the_top_layers_alone_but_decodes_with_all() -> None:
    found = floor("top")
    assert found.products == exactly((2 * 25 * 10 * 15 + 2 * 10 * 4 * 10) / 1000)
    assert found.optimiser == exactly(16 * 25 * 28 / 100)
    assert found.decoding == floor("full").decoding


def test_a_decoding_step_takes_the_slower_of_reading_and_multiplying() -> None:
    quick_memory = Rates(bf16_flops=1000.0, fp32_flops=500.0, read_bytes=1e9)
    assert floor("full", quick_memory).decoding == exactly(1.2 + 2 * 110 * 2 / 1000)


def test_the_floor_stands_on_the_faster_precision() -> None:
    assert floor("full", Rates(500.0, 1000.0, 100.0)) == floor("full")


def test_rates_are_medians_each_on_its_own() -> None:
    assert median_rates([Rates(1, 9, 5), Rates(3, 8, 4), Rates(2, 7, 6)]) == Rates(2, 8, 5)


def test_weights_are_counted_by_what_they_cost(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12 + 2 * 8  # q, o · k, v · the three of the MLP · two norms
    adapters = 2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 12)
    assert shape_of(str(tmp_path)) == Shape(3 * layer + 8, 50 * 8, 3, 3 * adapters)


def test_every_line_of_the_table_has_as_many_cells_as_its_head() -> None:
    lines = table(summarise(ROUNDS, {"top": Floor(0.5, 0.3, 0.2)})).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "**15.0** (10.0–20.0)" in lines[3]
    assert "25%" in lines[3]


def test_targets_are_judged_as_they_stand() -> None:
    missed = [{"trl": update(10.0, peak=100), "full": update(2.1), "top": update(0.5, peak=34)}]
    assert [line.rsplit(": ", 1)[1] for line in verdicts(summarise(missed, {}))] == [
        "not reached", "reached", "not reached"
    ]  # fmt: skip
    met = [{"trl": update(10.0, peak=100), "full": update(2.0), "top": update(0.9, peak=33)}]
    assert [line.rsplit(": ", 1)[1] for line in verdicts(summarise(met, {}))] == ["reached", "not reached", "reached"]


def test_the_page_says_where_and_how_it_was_measured() -> None:
    facts = {
        "command": "python bench/ppo_speed.py", "date": "2000-01-02", "commit": "abc123", "load_averages": [1.0, 2.5],
        "machine": {"processor": "Abacus", "accelerator": None, "cores": 2, "memory_gib": 23.5},
        "workload": {"threads": 2},
        "rates": {"bf16_flops": 1.5e12, "fp32_flops": 4e11, "read_bytes": 26e9},
    }  # fmt: skip
    text = page(summarise(ROUNDS, {}), facts)
    assert all(
        part in text
        for part in ("Abacus", "python bench/ppo_speed.py", "2000-01-02", "abc123", "1.0, 2.5", "26.0 GB/s")
    )


def test_prompts_never_hold_the_padding_token_and_repeat_with_their_seed() -> None:
    prompts = random_prompts(64, 36, 8, seed=3)
    assert {len(row) for row in prompts} == {36}
    assert {index for row in prompts for index in row} == set(range(7))
    assert prompts == random_prompts(64, 36, 8, seed=3) != random_prompts(64, 36, 8, seed=4)


def test_texts_are_read_back_as_the_tokens_they_came_from() -> None:
    tokenizer = words(40)
    ids = [0, 7, 39, 7, 12]
    assert tokenizer(text_of(ids))["input_ids"] == ids
    assert tokenizer.decode(ids[:2]) == "w0 w7"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 39


def test_all_systems_get_the_same_job(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=50).save_pretrained(tmp_path)
    jobs = jobs_of(parse(["--peers", "--modes", "full", "top"]), str(tmp_path))
    assert [job.system for job in jobs] == ["full", "top"]
    assert jobs[0].prompts == jobs[1].prompts
    assert (len(jobs[0].prompts), len(jobs[0].prompts[0]), jobs[0].response) == (16, 36, 32)
    jobs[0].save(tmp_path / "job.json")
    assert Job.load(str(tmp_path / "job.json")) == jobs[0]


def test_a_floor_is_drawn_for_each_mode_that_runs() -> None:
    knobs = parse(["--peers", "--modes", "top", "--rows", "2", "--prompt", "3", "--response", "2", "--top-layers", "1"])
    assert floors_of(knobs, SHAPE, RATES) == {"top": floor("top")}
