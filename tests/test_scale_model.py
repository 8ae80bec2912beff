"""The arithmetic of many GPUs against cases worked out by hand; nothing here measures time."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import scale_page
from scale_layouts import (
    apart,
    compare,
    kept_whole,
    learning,
    opening_bytes,
    peers,
    pieces_bytes,
    replicate,
    training_bytes,
)
from scale_model import (
    H100,
    MODELS,
    Device,
    Model,
    Work,
    Writer,
    cache_bytes,
    decode_step_seconds,
    forward_operations,
    gather_seconds,
    generate_seconds,
    link,
    measuring_operations,
    rollout_bytes,
    scoring_operations,
    sum_seconds,
    trained,
    training_operations,
)
from tolerances import EXACT

TINY = Model("tiny", parameters=120.0, layers=2, width=2, cache_width=3, vocab=10)
"""Body 120 − 2·20 = 80, head 20."""
WORK = Work(rows=8, prompt=3, response=2, epochs=4, minibatches=2, recompute=False, checkpoint_every=1)
DEVICE = Device(
    name="", train_flops=100.0, forward_flops=200.0, memory_rate=50.0, memory=1e6, near=10.0, far=0.5, per_node=4,
    latency=0.25, dispatch=0.5, engine_dispatch=0.125, disk=7.0, objects=1.0,
    files=4.0,
)  # fmt: skip


def exactly(number: float) -> object:
    return pytest.approx(number, rel=EXACT.relative, abs=EXACT.absolute)


def test_embeddings_are_no_arithmetic() -> None:
    assert (TINY.body, TINY.head) == (80.0, 20.0)
    assert replace(TINY, tied=True).body == 100.0


def test_a_forward_pass_is_two_operations_a_weight_and_token_and_attention() -> None:
    """2·80·(8·5) + 2·20·(8·2) + 2·2·2·8·25."""
    assert forward_operations(TINY, 8, 5, 2) == exactly(6400 + 640 + 1600)


def test_training_is_three_passes_two_with_adapters_and_one_more_with_recomputation() -> None:
    body, head = 8000.0, 640.0
    assert training_operations(TINY, WORK, 8) == exactly(3 * body + 3 * head)
    assert training_operations(TINY, replace(WORK, mode="lora"), 8) == exactly(2 * body + 2 * head)
    assert training_operations(TINY, replace(WORK, mode="top"), 8) == exactly(3 * 0.25 * body + 2 * head)
    assert training_operations(TINY, replace(WORK, recompute=True), 8) == exactly(4 * body + 3 * head)


def test_top_shares_its_trunk_between_policy_and_reference() -> None:
    assert measuring_operations(TINY, WORK, 8) == exactly(2 * 8000 + 2 * 640)
    assert measuring_operations(TINY, replace(WORK, mode="top"), 8) == exactly(1.25 * 8000 + 2 * 640)
    assert scoring_operations(TINY, replace(WORK, reward_share=0.5), 8) == exactly(4000)


def test_what_is_trained_and_kept() -> None:
    assert trained(TINY, WORK) == 120.0
    assert trained(TINY, replace(WORK, mode="top")) == 20.0
    assert training_bytes(TINY, WORK) == 18 * 120
    assert cache_bytes(TINY, 5) == 2 * 2 * 3 * 5
    assert rollout_bytes(WORK) == 8 * (8 * 5 + 4 * 8 * 2)


def test_pieces_leave_embeddings_head_and_reward_model_whole() -> None:
    """Policy 18·120, reference 2·120, of which 1/3 is no layer; reward model 2·120."""
    assert pieces_bytes(TINY, WORK, 1) == exactly(20 * 120 + 240)
    assert pieces_bytes(TINY, WORK, 4) == exactly(2400 / 3 + 2400 * 2 / 3 / 4 + 240)
    assert opening_bytes(TINY, WORK) == exactly(2 * 240)


def test_a_sum_passes_everything_on_twice_but_for_ones_own() -> None:
    """Four devices: 2·(3/4·80/10 + 2 hops of 0.25)."""
    assert sum_seconds(DEVICE, 4, 80.0) == exactly(13.0)
    assert sum_seconds(DEVICE, 1, 80.0) == 0.0
    assert gather_seconds(DEVICE, 2, 80.0) == exactly(4.25)
    assert gather_seconds(DEVICE, 4, 80.0, calls=3) == exactly(7.5)


def test_between_machines_all_links_of_a_machine_carry_one_ring() -> None:
    assert link(DEVICE, 4) == 10.0
    assert link(DEVICE, 5) == 2.0
    assert link(replace(DEVICE, far=100.0), 5) == 10.0


def test_a_decoded_token_reads_the_weights_or_multiplies_them() -> None:
    """Few rows: (2·100 + 1·2·2·3·4)/50 + 2·0.5. Many: 2·100·1000/200 + 1."""
    assert decode_step_seconds(TINY, DEVICE, 1, 4, Writer()) == exactly(4.96 + 1.0)
    assert decode_step_seconds(TINY, DEVICE, 1000, 0, Writer()) == exactly(1001.0)
    assert decode_step_seconds(TINY, DEVICE, 1, 4, Writer(graphs=True)) == exactly(4.96 + 0.25)


def test_devices_that_share_weights_divide_the_reading_and_pay_two_sums_a_layer() -> None:
    alone = decode_step_seconds(TINY, DEVICE, 1, 4, Writer()) - 1.0
    shared = decode_step_seconds(TINY, DEVICE, 1, 4, Writer(parallel=2))
    assert shared == exactly(alone / 2 + 1.0 + 4 * sum_seconds(DEVICE, 2, 2 * 1 * 2))


def test_caches_that_do_not_fit_cost_waves() -> None:
    """A row's cache is 60 bytes: 4 at once take two waves of 8 rows."""
    step = decode_step_seconds(TINY, DEVICE, 4, 4, Writer())
    prefill = forward_operations(TINY, 8, 3, 0) / 200
    assert generate_seconds(TINY, WORK, DEVICE, 8, room=240.0) == exactly(prefill + 2 * 2 * step)
    assert generate_seconds(TINY, WORK, DEVICE, 8, room=59.0) == math.inf


def test_replicas_divide_rows_and_sum_gradients_once_a_step() -> None:
    big = replace(DEVICE, memory=1e9)
    one, two = (replicate(TINY, WORK, big, count).rooms for count in (1, 2))
    assert two["update"] == exactly(one["update"] / 2)
    assert two["optimiser"] == exactly(one["optimiser"])
    assert one["sums"] == 0.0
    assert two["sums"] == exactly(8 * 2 * (0.5 * 4 * 120 / 10 + 0.25))
    assert one["checkpoint"] == exactly(14 * 120 / 7)


def test_embeddings_and_head_are_stepped_by_every_gpu_and_their_gradients_summed_after_the_pass() -> None:
    """40 of 120 weights: on two GPUs 40 + 80/2 each step, and all-reduces of 4·40 bytes, 8 steps."""
    slow = replace(DEVICE, train_flops=1e-3, forward_flops=1e-3)  # all other traffic runs beside the arithmetic
    rooms = learning(TINY, WORK, slow, 2, 4.0, kept_whole(TINY, WORK))
    assert rooms["optimiser"] == exactly(8 * (40 + 40) * 28 / 50)
    assert rooms["sums"] == exactly(8 * 2 * (0.5 * 160 / 10 + 0.25))
    cut = learning(TINY, WORK, slow, 2, 4.0)
    assert (cut["optimiser"], cut["sums"]) == (exactly(8 * 60 * 28 / 50), 0.0)
    assert kept_whole(TINY, replace(WORK, mode="top")) == 0.0


def test_writers_get_their_weights_as_files_or_objects_and_the_learner_waits() -> None:
    """2·120 bytes given and taken at 4 or 1 a second; adapters are folded into the 80 weights of the layers."""
    lora, big = replace(WORK, mode="lora"), replace(DEVICE, memory=1e9)
    for layout in ("vllm", "overlap"):
        assert apart(TINY, WORK, big, 4, layout).rooms["weights"] == exactly(2 * 240 / 4)
        assert apart(TINY, lora, big, 4, layout).rooms["weights"] == exactly(2 * 160 / 4)
    assert apart(TINY, WORK, big, 4, "ray").rooms["weights"] == exactly(2 * 240 / 1)
    assert apart(TINY, lora, big, 4, "ray").rooms["weights"] == exactly(2 * 0.01 * 240 / 1)


def test_learners_beside_writers_hold_the_whole_model_as_the_program_wants_it() -> None:
    """It refuses weights in shares beside vLLM or Ray's workers."""
    for layout in ("ray", "vllm", "overlap"):
        assert apart(MODELS["8B"], Work(), H100, 64, layout).refused.startswith("wants 1")
        assert not apart(MODELS["8B"], Work(mode="lora"), H100, 64, layout).refused


def test_a_layout_that_does_not_fit_says_what_it_wants() -> None:
    found = replicate(MODELS["8B"], Work(), H100, 8)
    assert re.fullmatch(r"wants \d+ GB a GPU", found.refused)
    assert found.total == math.inf
    assert found.memory > 18 * 8.03e9


def test_more_learners_than_responses_of_a_minibatch_are_refused_as_the_program_refuses_them() -> None:
    assert replicate(MODELS["1B"], Work(), H100, 512).refused == "512 processes, 256 responses a minibatch"
    assert not replicate(MODELS["1B"], Work(), H100, 256).refused


@pytest.mark.parametrize("name", MODELS)
def test_more_gpus_are_never_slower_and_overlap_never_loses(name: str) -> None:
    rows = [compare(MODELS[name], Work(), H100, count) for count in scale_page.GPUS]
    for layout in ("ray", "vllm", "overlap", "peers"):
        totals = [by[layout].total for by in rows if not by[layout].refused]
        assert all(later <= 1.02 * sooner for sooner, later in pairwise(totals)), layout
    assert all(by["overlap"].total <= by["vllm"].total for by in rows)


def test_seventy_billion_weights_are_for_others() -> None:
    by = compare(MODELS["70B"], Work(), H100, 256)
    assert all(by[name].refused for name in scale_page.OURS)
    assert not peers(MODELS["70B"], Work(), H100, 256).refused


def test_the_page_holds_what_the_program_writes() -> None:
    found = scale_page.estimates()
    blocks = {f"totals {name}": scale_page.totals(rows) for name, rows in found.items()}
    blocks |= {f"rooms {name}": scale_page.rooms(found[name][gpus]) for name, gpus in scale_page.ROOMS_AT.items()}
    blocks |= {
        "saturation": scale_page.saturation(found),
        "traffic": scale_page.traffic(),
        "modes": scale_page.modes(),
        "long": scale_page.long(),
    }
    text = scale_page.PAGE.read_text("utf-8")
    assert scale_page.filled(text, blocks) == text, "run: python bench/scale_model.py --write"
