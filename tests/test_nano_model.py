"""The nano model: a real tokenizer, two ordinary checkpoints, built once, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tether.errors import ModelError
from tether.worlds import nano, nano_build
from tether.worlds.nano import Recipe, load
from tether.worlds.nano_build import IGNORED, build_tokenizer, chat_batches, new_model, story_batches, train
from tether.worlds.nano_corpus import demonstrate
from tether.worlds.nano_grammar import text, words
from tether.worlds.nano_prompts import split, table

TINY = Recipe(hidden=16, layers=1, heads=2, pretrain_steps=3, sft_steps=3, rows=4)
ASKED = "what colour is the fox?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    load(cache, progress=False, recipe=TINY)
    return cache


# ── the tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tokenizer_survives_saving_and_gives_every_text_back(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rng = Random(1)
    texts = [*split()[0], *(text(demonstrate(ASKED, rng)) for _ in range(200)), "yes, it is red.~~ ^^."]
    for line in texts:
        ids = loaded(line)["input_ids"]
        assert ids == tokenizer(line)["input_ids"]
        assert loaded.unk_token_id not in ids
        assert words(loaded.decode(ids)) == words(line)
    assert [loaded.decode(loaded(prompt)["input_ids"]) for prompt in table()] == list(table())
    assert loaded("fox quark").input_ids[1] == loaded.unk_token_id
    assert loaded("The FOX is red .").input_ids == loaded("the fox is red.").input_ids


def test_padding_end_start_and_unknown_are_four_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert len(set(special)) == 4
    assert None not in special


def test_the_chat_template_writes_turns_and_refuses_other_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "i feel sad."}, {"role": "assistant", "content": "take care."}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == "<bos><user>i feel sad.<assistant>take care.<eos>"
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(asked) == ["<bos>", "<user>", "i", "feel", "sad", ".", "<assistant>"]
    with pytest.raises(Exception, match="the nano world knows the roles user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


# ── the training data and the checkpoints ───────────────────────────────────────────────────────────────────────────


def test_instruction_tuning_learns_replies_only_and_never_meets_a_heldout_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    heldout, batches = set(split()[1]), chat_batches(Recipe(rows=64), tokenizer, Random(0))
    for ids, labels in (next(batches) for _ in range(20)):
        for row, labelled in zip(ids.tolist(), labels.tolist(), strict=True):
            start, end = row.index(tokenizer.convert_tokens_to_ids("<assistant>")), row.index(tokenizer.eos_token_id)
            assert [i for i, label in enumerate(labelled) if label != IGNORED] == list(range(start + 1, end + 1))
            assert labelled[start + 1 : end + 1] == row[start + 1 : end + 1]
            assert tokenizer.decode(row[2:start]) not in heldout


def test_pretraining_rows_are_full_and_end_in_talk(tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = Recipe(rows=8, pretrain_steps=10)
    batches = [next(stream) for stream in [story_batches(recipe, tokenizer, Random(0))] for _ in range(10)]
    assert all(ids.shape == (8, 48) and torch.equal(ids, labels) for ids, labels in batches)
    assert tokenizer.pad_token_id not in torch.cat([ids for ids, _ in batches])
    comma = tokenizer.convert_tokens_to_ids(",")  # cards have none
    assert comma not in batches[0][0]
    assert comma in batches[-1][0]


def test_training_lowers_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    losses: list[float] = []
    model = new_model(TINY, tokenizer)
    stream = story_batches(TINY, tokenizer, Random(0))
    train(model, stream, 30, 1e-2, TINY, lambda step, steps, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 1


def test_a_world_is_built_once_and_both_checkpoints_are_ordinary_folders(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano, "build", lambda *_: pytest.fail("built a second time"))
    world = load(tiny_cache, recipe=TINY)
    policy, base = (AutoModelForCausalLM.from_pretrained(path) for path in (world.policy_path, world.base_path))
    assert policy.dtype is torch.float32
    assert not torch.equal(policy.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert (policy.config.eos_token_id, policy.config.pad_token_id) == (
        world.tokenizer.eos_token_id,
        world.tokenizer.pad_token_id,
    )
    assert (len(world.train_prompts), len(world.heldout_prompts)) == (512, 128)
    assert world.gold([ASKED], ["the fox is red."]) == [2.5]


def test_equal_recipes_give_equal_weights_and_touch_no_global_randomness(tiny_cache: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again, other = load(tmp_path, progress=False, recipe=TINY), load(tmp_path, 1, progress=False, recipe=TINY)
    assert torch.equal(before, torch.get_rng_state())
    first = load(tiny_cache, recipe=TINY)
    for name in ("sft", "base"):
        made = [world.policy_path.parent / name / "model.safetensors" for world in (first, again, other)]
        assert made[0].read_bytes() == made[1].read_bytes() != made[2].read_bytes()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nano_build, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, progress=False, recipe=TINY)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builders_the_slower_takes_what_the_faster_made(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(recipe: Recipe, folder: Path, progress: nano_build.Progress) -> None:
        nano_build.build(recipe, folder, progress)
        finished = next(tiny_cache.iterdir())
        shutil.copytree(finished, tmp_path / finished.name)

    monkeypatch.setattr(nano, "build", overtaken)
    world = load(tmp_path, progress=False, recipe=TINY)
    assert [path.name for path in tmp_path.iterdir()] == [world.policy_path.parent.name]


def test_a_damaged_or_unwritable_cache_is_one_clear_error(tiny_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_cache, tmp_path / "cache")
    weights = next((tmp_path / "cache").glob("*/sft/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"has 100 bytes, wanted .*delete"):
        load(tmp_path / "cache", recipe=TINY)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ModelError, match=r"could not be written .*TETHER_CACHE"):
        load(tmp_path / "file", recipe=TINY)


def test_progress_is_plain_lines_where_no_terminal_is_and_silence_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tmp_path / "a", progress=False, recipe=TINY)
    assert capsys.readouterr() == ("", "")
    load(tmp_path / "b", recipe=TINY)
    said = capsys.readouterr()
    assert said.out == ""
    assert "nano world, instructing: step 3 of 3, loss" in said.err


@pytest.mark.slow
def test_the_real_model_is_prompt_dependent_finishes_and_leaves_headroom(tmp_path: Path) -> None:
    world = load(tmp_path, progress=False)
    model = AutoModelForCausalLM.from_pretrained(world.policy_path)
    prompts = [prompt for prompt in world.heldout_prompts for _ in range(16)]
    turns = [
        world.tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False
        )
        for p in prompts
    ]
    asked = world.tokenizer(turns, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = model.generate(**asked, max_new_tokens=24)[:, asked.input_ids.shape[1] :]
    replies = world.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    points = torch.tensor(world.gold(prompts, replies)).view(-1, 16)
    assert (drawn == world.tokenizer.eos_token_id).any(dim=1).double().mean() > 0.95
    assert 0.8 < points.std() < 1.4
    assert points.amax(dim=1).mean() - points.mean() > 1.4 * points.std()
