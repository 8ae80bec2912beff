"""The reward model: an ordinary classifier whose score is the head at the last real token, whatever the padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tether.batch import Rollout, Sequences
from tether.classifiers import new_classifier
from tether.config import SamplingSettings
from tether.errors import InputError, ModelError
from tether.models import LanguagePolicy, load_policy
from tether.prompts import encode
from tether.reward_model import MANIFEST_FILE, RewardManifest, RewardModel, known_states, length_groups
from tether.rollouts import sample
from tether.streams import uniforms
from tether.trunk import SplitBackbone
from tiny_models import build, build_tokenizer, prompts_of
from tolerances import ROUND_OFF, Tolerance, assert_close

TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}{{ m.content }}{{ ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)
PADDED = Tolerance(relative=0.0, absolute=1e-4)
HALF = Tolerance(relative=0.0, absolute=5e-2)

_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": 1,
}  # fmt: skip
CLASSIFIERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**_SIZES)),
    "neox": lambda: GPTNeoXForSequenceClassification(GPTNeoXConfig(**_SIZES)),
}
PROMPTS = ("w5 w6", "w7", "w8 w9 w10 w11 w12 w13", "w5 w6")
RESPONSES = (" w20 w21 w22", " w23 w24 w25 w26 w27 w28 w29", " </s> </s>", " w30 </s> w31")


def classifier(architecture: str, labels: int = 1) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLASSIFIERS[architecture]()
        if labels != 1:
            model = type(model)(type(model.config)(**(_SIZES | {"num_labels": labels})))
    return model.eval()


def tokenizer_with(pad: str | None = None, side: str = "right", template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = pad, side, template
    return tokenizer


@torch.no_grad()
def logit_of(model: PreTrainedModel, text: str) -> float:
    """The library's own logit of one text alone: a row without padding, whose last token is the last one there is."""
    ids = [[build_tokenizer().get_vocab()[word] for word in text.split()]]
    return float(AutoLast(model)(torch.tensor(ids)))


class AutoLast:
    """A classifier told that no token is a pad token, and so scoring the last one of a single row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, ids: Tensor) -> Tensor:
        before, self.model.config.pad_token_id = self.model.config.pad_token_id, None
        logits: Tensor = self.model(input_ids=ids).logits[0, 0]
        self.model.config.pad_token_id = before
        return logits


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [None, "</s>", "w0", "w22"])
def test_the_score_is_the_librarys_logit_at_the_last_real_token(architecture: str, side: str, pad: str | None) -> None:
    model = classifier(architecture)
    if pad is not None:
        model.config.pad_token_id = build_tokenizer().get_vocab()[pad]
    reward = RewardModel.load(model, tokenizer_with(pad, side))
    wanted = [logit_of(model, prompt + response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert_close(reward.raw_scores(PROMPTS, RESPONSES), wanted, PADDED)
    for prompt, response, alone in zip(PROMPTS, RESPONSES, wanted, strict=True):
        assert_close(reward.raw_scores([prompt], [response]), [alone], PADDED)


def test_the_models_given_stay_as_they_were() -> None:
    model = classifier("llama").train()
    RewardModel.load(model, tokenizer_with())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_encoder_is_run_as_it_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertForSequenceClassification(BertConfig(**_SIZES)).eval()
    reward = RewardModel.load(model, tokenizer_with("w0"))
    with torch.no_grad():
        rows = [
            [int(word[1:]) for word in (p + r).replace("</s>", "w2").split()]
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
        wanted = [float(model(input_ids=torch.tensor([row])).logits) for row in rows]
    assert_close(reward.raw_scores(PROMPTS, RESPONSES), wanted, PADDED)


def test_a_foreign_model_reads_whole_turns_and_an_own_one_reads_to_the_end_of_the_response() -> None:
    model, words = classifier("llama"), tokenizer_with(template=TEMPLATE)
    foreign = RewardModel.load(model, words)
    own = RewardModel(foreign.model, words, RewardManifest(closed=False))
    whole, open_ended = "w90 w5 w6 </s> w91 w7 w8 </s>", "w90 w5 w6 </s> w91 w7 w8"
    assert_close(foreign.raw_scores(["w5 w6"], ["w7 w8"]), [logit_of(model, whole)], PADDED)
    assert_close(own.raw_scores(["w5 w6"], ["w7 w8"]), [logit_of(model, open_ended)], PADDED)
    assert own.encode(["w5"], [""]) == [[90, 5, 2, 91]]


def test_a_conversation_is_a_prompt_too() -> None:
    reward = RewardModel.load(classifier("llama"), tokenizer_with(template=TEMPLATE))
    turns = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    assert reward.encode([turns], ["w8"]) == [[90, 5, 2, 91, 6, 2, 90, 7, 2, 91, 8, 2]]
    assert reward.encode([turns[:1]], ["w8"]) == reward.encode(["w5"], ["w8"])
    plain = RewardModel.load(classifier("llama"), tokenizer_with())
    with pytest.raises(InputError, match=r"conversation of 3 messages .* no chat template"):
        plain([turns], ["w8"])


def test_scores_are_normalised_to_mean_0_and_std_1_on_the_reference_samples() -> None:
    reward = RewardModel.load(classifier("llama"), tokenizer_with())
    raw = reward.raw_scores(PROMPTS, RESPONSES)
    normalised = reward.normalised_on(raw)
    mean = sum(raw.tolist()) / 4
    sigma = (sum((number - mean) ** 2 for number in raw.tolist()) / 4) ** 0.5
    assert normalised.manifest.gain == pytest.approx(1 / sigma)
    assert normalised.manifest.bias == pytest.approx(-mean / sigma)
    scores = torch.tensor(normalised(PROMPTS, RESPONSES, label=["x"] * 4))
    assert_close(scores, [(number - mean) / sigma for number in raw.tolist()], ROUND_OFF)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(scores.std(correction=0)) == pytest.approx(1.0)
    assert reward.manifest == RewardManifest()  # the model it came from stays as it was


@pytest.mark.parametrize("raw", [[], [1.0], [2.0, 2.0, 2.0], [1.0, float("nan")]])
def test_reference_samples_that_all_score_alike_are_refused(raw: list[float]) -> None:
    with pytest.raises(InputError, match="reference samples"):
        RewardModel.load(classifier("llama"), tokenizer_with()).normalised_on(torch.tensor(raw))


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_saved_model_scores_the_same_and_is_an_ordinary_classifier(tmp_path: Path) -> None:
    model = new_classifier(build("llama"), "float32", torch.device("cpu"), seed=3)
    model.config.pad_token_id = 2
    reward = RewardModel(model, tokenizer_with("</s>", template=TEMPLATE), RewardManifest(top_layers=2, closed=False))
    reward = reward.normalised_on(reward.raw_scores(PROMPTS, RESPONSES)).described(noise=0.5)
    reward.save_pretrained(tmp_path / "reward")
    back = RewardModel.load(tmp_path / "reward")
    assert back(PROMPTS, RESPONSES) == reward(PROMPTS, RESPONSES)
    assert back.manifest == reward.manifest
    assert back.manifest.details["noise"] == 0.5
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    texts = [f"w90 {prompt} </s> w91 {response}" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert_close(reward.raw_scores(PROMPTS, RESPONSES), [logit_of(plain, text) for text in texts], PADDED)
    assert plain.config.num_labels == 1


def test_saving_again_replaces_the_model_and_a_failed_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = RewardModel.load(classifier("llama"), tokenizer_with())
    reward.save_pretrained(tmp_path / "reward")
    reward.described(version=2).save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(RewardManifest, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reward.described(version=3).save_pretrained(tmp_path / "reward")
    assert RewardModel.load(tmp_path / "reward").manifest.details["version"] == 2
    monkeypatch.undo()
    reward.save_pretrained(tmp_path / "reward")
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds no reward model"):
        RewardModel.load(classifier("llama"), tokenizer_with()).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_with_two_labels_is_refused(tmp_path: Path) -> None:
    model = classifier("llama", labels=2)
    with pytest.raises(ModelError, match="has 2 labels; wanted one with num_labels=1"):
        RewardModel.load(model, tokenizer_with())
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 2 labels; wanted one with num_labels=1"):
        RewardModel.load(tmp_path)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM, which gives no score"):
        RewardModel.load(build("llama"), tokenizer_with())
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaForCausalLM, which gives no score"):
        RewardModel.load(tmp_path)


def test_a_checkpoint_that_lacks_its_head_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}, "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks weights of its classifier \(score.weight\)"):
        RewardModel.load(tmp_path)


def test_what_cannot_be_read_is_one_clear_complaint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read a reward model"):
        RewardModel.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="without a tokenizer"):
        RewardModel.load(classifier("llama"))
    RewardModel.load(classifier("llama"), tokenizer_with()).save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / MANIFEST_FILE).write_text('{"gain": 1, "colour": "red"}')
    with pytest.raises(ModelError, match="is no manifest"):
        RewardModel.load(tmp_path / "reward")


def test_texts_must_fit_the_context_and_each_other() -> None:
    reward = RewardModel.load(classifier("llama"), tokenizer_with())
    with pytest.raises(
        InputError, match="prompt and response 1 have 66 tokens together; the reward model reads 1 to 64"
    ):
        reward(["w5", "w5 w6"], [" w7", " w7" * 64])
    with pytest.raises(InputError, match="1 entries for 2 responses"):
        reward(["w5"], ["w6", "w7"])
    with pytest.raises(InputError, match="have 0 tokens"):
        reward([""], [""])
    assert reward([], []) == []


def test_the_head_starts_with_a_spread_of_one_over_root_of_width_plus_one() -> None:
    base, place = build("llama"), torch.device("cpu")
    heads = [new_classifier(base, "float32", place, seed).score.weight.detach() for seed in range(8)]
    weights = torch.cat(heads).flatten()
    wanted = 33**-0.5
    assert abs(float(weights.std()) - wanted) < 4 * wanted / (2 * len(weights)) ** 0.5
    assert abs(float(weights.mean())) < 4 * wanted / len(weights) ** 0.5


def test_groups_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 5]
    groups = list(length_groups(lengths, 30))
    assert sorted(row for group in groups for row in group) == list(range(7))
    assert all(len(group) == 1 or max(lengths[row] for row in group) * len(group) <= 30 for group in groups)
    assert groups[0] == [1]


# ── the fast path ───────────────────────────────────────────────────────────────────────────────────────────────────
def policy_and_reward(
    dtype: str, top_layers: int = 2, seed: int = 0, eos: bool = False
) -> tuple[LanguagePolicy, RewardModel]:
    base, words = build("llama", seed), tokenizer_with(template=TEMPLATE)
    policy = load_policy(build("llama"), words, mode="top", top_layers=2, dtype=dtype)
    model = new_classifier(base, dtype, torch.device("cpu"), seed=5)
    manifest = RewardManifest(gain=2.0, bias=-1.0, top_layers=top_layers, closed=False, eos=eos)
    reward = RewardModel(model, words, manifest)
    for parameter in reward.trainable():  # as if trained: another top than the policy's
        parameter.data *= 1.25
    return policy, reward


def rollout_of(policy: LanguagePolicy, copies: int = 1, temperature: float = 1.0) -> Rollout:
    texts = ("w5 w6", "w7", "w8 w9 w10", "w11 w12") * copies
    ids = encode(texts, policy.tokenizer)
    prompts = replace(prompts_of(*map(list, ids)), texts=texts)
    settings = SamplingSettings(max_new_tokens=6, temperature=temperature)
    return sample(policy, prompts, uniforms(0, "response", 0, prompts.keys, 6), settings)


@pytest.fixture
def trunk_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of all batches that pass any trunk."""
    seen: list[tuple[int, int]] = []
    whole = SplitBackbone.states

    def states(self: SplitBackbone, ids: Tensor) -> Tensor:
        seen.append(tuple(ids.shape))
        return whole(self, ids)

    monkeypatch.setattr(SplitBackbone, "states", states)
    return seen


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", ROUND_OFF), ("bfloat16", HALF)])
def test_a_rollout_scores_as_its_texts_do_without_passing_the_trunk(
    dtype: str, tolerance: Tolerance, eos: bool, trunk_rows: list[tuple[int, int]]
) -> None:
    policy, reward = policy_and_reward(dtype, eos=eos)
    rollout = rollout_of(policy)
    by_texts = reward(rollout.prompts.texts, rollout.texts)
    trunk_rows.clear()
    assert_close(torch.tensor(reward.score_rollout(rollout)), by_texts, tolerance)
    assert all(rows == 1 and width <= 8 for rows, width in trunk_rows)  # the look at whose states they are
    assert torch.tensor(by_texts).std() > 0.1


def test_responses_that_end_by_themselves_and_those_that_are_cut_are_read_to_the_same_eos(
    trunk_rows: list[tuple[int, int]],
) -> None:
    policy, reward = policy_and_reward("float32", eos=True)
    eos = policy.tokenizer.eos_token_id
    rollout = rollout_of(policy, copies=40, temperature=100.0)  # nearly uniform: one token in a hundred is an EOS
    ends = rollout.sequences.responses.gather(1, rollout.sequences.response_lengths[:, None] - 1)[:, 0]
    rows = reward.encode(rollout.prompts.texts, rollout.texts)
    assert {row[-1] for row in rows} == {eos}
    known = [known_states(rollout.sequences, index, row) is not None for index, row in enumerate(rows)]
    assert {bool(end == eos) for end, here in zip(ends, known, strict=True) if here} == {True, False}
    assert sum(known) > 0.8 * len(rows)  # a few hold special tokens, which their text leaves out
    by_texts = reward(rollout.prompts.texts, rollout.texts)
    trunk_rows.clear()
    assert_close(torch.tensor(reward.score_rollout(rollout)), by_texts, ROUND_OFF)
    assert sum(rows for rows, _ in trunk_rows) <= known.count(False) + 1  # the look at whose states they are


def test_a_context_that_is_full_leaves_no_room_for_an_eos() -> None:
    policy, reward = policy_and_reward("float32", eos=True)
    policy._context = 6 + 6  # the longest prompt under the template, and the response
    rollout = rollout_of(policy)
    assert rollout.sequences.closing is None
    assert_close(torch.tensor(reward.score_rollout(rollout)), reward(rollout.prompts.texts, rollout.texts), ROUND_OFF)


def test_a_row_whose_tokens_no_tokenizer_would_write_is_scored_by_its_text(trunk_rows: list[tuple[int, int]]) -> None:
    policy, reward = policy_and_reward("float32")
    rollout = rollout_of(policy)
    ids = rollout.sequences.ids.clone()
    ids[1, int(rollout.sequences.prompt_lengths[1])] = 2  # a special token, which its text leaves out
    sequences = policy.prepare(Sequences(ids, rollout.sequences.prompt_lengths, rollout.sequences.response_lengths))
    texts = tuple(policy.decode(sequences.responses, sequences.response_mask))
    odd = replace(rollout, sequences=sequences, texts=texts)
    trunk_rows.clear()
    assert_close(torch.tensor(reward.score_rollout(odd)), reward(odd.prompts.texts, texts), ROUND_OFF)
    assert (1, len(reward.encode([odd.prompts.texts[1]], [texts[1]])[0])) in trunk_rows


@pytest.mark.parametrize("foreign", ["no states", "another trunk", "another depth", "another precision"])
def test_states_of_another_trunk_are_never_used(foreign: str) -> None:
    policy, reward = policy_and_reward(
        "bfloat16" if foreign == "another precision" else "float32",
        top_layers=1 if foreign == "another depth" else 2,
        seed=1 if foreign == "another trunk" else 0,
    )
    if foreign == "another precision":
        policy = policy_and_reward("float32")[0]
    rollout = rollout_of(policy)
    if foreign == "no states":
        rollout = replace(rollout, sequences=replace(rollout.sequences, states=None))
    wanted = reward(rollout.prompts.texts, rollout.texts)
    assert_close(torch.tensor(reward.score_rollout(rollout)), wanted, ROUND_OFF)


def test_a_row_whose_last_token_never_passed_the_trunk_is_scored_by_its_text() -> None:
    policy, reward = policy_and_reward("float32")
    rollout = rollout_of(policy)
    states = rollout.sequences.states.clone()
    states[0, int(rollout.sequences.lengths[0]) - 1] = 0.0
    unheard = replace(rollout, sequences=rollout.sequences.with_states(states))
    assert_close(torch.tensor(reward.score_rollout(unheard)), reward(rollout.prompts.texts, rollout.texts), ROUND_OFF)


def test_a_whole_model_scores_a_rollout_by_its_texts() -> None:
    policy, _ = policy_and_reward("float32")
    reward = RewardModel.load(classifier("gpt2"), policy.tokenizer)
    rollout = rollout_of(policy)
    assert reward.score_rollout(rollout) == reward(rollout.prompts.texts, rollout.texts)


@pytest.mark.parametrize("top_layers", [0, 4])
def test_a_cut_outside_the_model_is_refused(top_layers: int) -> None:
    with pytest.raises(ModelError, match=f"top_layers is {top_layers} and the reward model has 3 layers"):
        RewardModel(classifier("llama"), tokenizer_with(), RewardManifest(top_layers=top_layers))
