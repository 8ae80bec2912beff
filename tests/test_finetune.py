"""Demonstrations → SFT checkpoint: what is learned, that packing changes nothing, and how the checkpoint is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tether import sft_fit
from tether.data import Demonstrations, read_demonstrations
from tether.demonstrations import Example, bins, encode_demonstrations, lay_out, packs
from tether.errors import InputError, ModelError
from tether.finetune import _held_out, finetune
from tether.loading import load_causal_lm, probe
from tether.models import load_policy
from tether.prompts import encode
from tether.sft_checkpoint import MANIFEST_FILE, SFTManifest, require_sft, whole_folder
from tether.sft_fit import Finetuning, Student
from tiny_models import ARCHITECTURES, EOS, MORE_ARCHITECTURES, VOCAB, build, build_tokenizer
from tolerances import ROUND_OFF, Tolerance, assert_close

GRADIENTS = Tolerance(relative=1e-4, absolute=1e-5)
TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}{{ m.content }}{{ ' </s> w89 ' }}{% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)
"""A turn ends with the stop token and one token more, like the line end of ChatML."""
FORGETFUL = (
    "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}"
    "{{ 'w80 ' if m.role == 'assistant' and loop.last }}{{ m.content }}{{ ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)
"""Writes w80 before the last answer only, as templates do that leave out earlier thoughts."""
STORY = (
    {"role": "user", "content": "w5 w6"},
    {"role": "assistant", "content": "w20 w21"},
    {"role": "user", "content": "w7"},
    {"role": "assistant", "content": "w22"},
)


def words(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[tuple[str, bool]]:
    return list(zip(tokenizer.convert_ids_to_tokens(list(example.ids)), example.learned, strict=True))


def marked(text: str) -> list[tuple[str, bool]]:
    """`w1 [w2 w3]`: what stands in brackets is learned."""
    inside, found = False, []
    for word in text.split():
        inside = inside or word.startswith("[")
        found.append((word.strip("[]"), inside))
        inside = inside and not word.endswith("]")
    return found


def ragged_examples(seed: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in (9, 4, 12, 2, 6, 3):
        ids = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        learned = [False, *(torch.rand(length - 1, generator=draw) < 0.6).tolist()]
        found.append(Example(tuple(ids), tuple(learned)))
    return found


def demonstrations(count: int) -> Demonstrations:
    """After w10 … w19 comes the word that stands ten places on."""
    rows = [{"prompt": f"w{10 + n % 10}", "completion": f" w{20 + n % 10} w30"} for n in range(count)]
    return read_demonstrations(rows)


# ── what is learned ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_of_a_prompt_and_its_completion_the_completion_and_its_end_are_learned() -> None:
    given = read_demonstrations([{"prompt": "w5 w6", "completion": " w20 w21"}])
    (plain,) = encode_demonstrations(given, words(), [EOS]).examples
    assert shown(words(), plain) == marked("w5 w6 [w20 w21 </s>]")
    (chat,) = encode_demonstrations(given, words(TEMPLATE), [EOS]).examples
    assert shown(words(), chat) == marked("w90 w5 w6 </s> w89 w91 [w20 w21 </s>]")


def test_of_a_conversation_every_answer_is_learned_and_nothing_else() -> None:
    given = read_demonstrations([{"messages": list(STORY)}])
    (example,) = encode_demonstrations(given, words(TEMPLATE), [EOS]).examples
    wanted = "w90 w5 w6 </s> w89 w91 [w20 w21 </s>] w89 w90 w7 </s> w89 w91 [w22 </s>]"
    assert shown(words(), example) == marked(wanted)


def test_of_a_conversational_prompt_with_its_completion_the_completion_alone_is_learned() -> None:
    given = read_demonstrations([{"prompt": list(STORY[:3]), "completion": [STORY[3]]}])
    (example,) = encode_demonstrations(given, words(TEMPLATE), [EOS]).examples
    wanted = "w90 w5 w6 </s> w89 w91 w20 w21 </s> w89 w90 w7 </s> w89 w91 [w22 </s>]"
    assert shown(words(), example) == marked(wanted)


def test_a_template_that_rewrites_earlier_turns_gives_one_example_an_answer() -> None:
    given = read_demonstrations([{"messages": list(STORY)}])
    examples = encode_demonstrations(given, words(FORGETFUL), [EOS]).examples
    assert [shown(words(), example) for example in examples] == [
        marked("w90 w5 w6 </s> w91 [w80 w20 w21 </s>]"),
        marked("w90 w5 w6 </s> w91 w20 w21 </s> w90 w7 </s> w91 [w80 w22 </s>]"),
    ]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_prompt_is_written_as_the_policy_will_read_it(template: str | None) -> None:
    given = demonstrations(5)
    asked = encode(given.prompts, words(template))
    for ids, example in zip(asked, encode_demonstrations(given, words(template), [EOS]).examples, strict=True):
        assert example.ids[: len(ids)] == ids
        assert example.learned == (False,) * len(ids) + (True,) * (len(example) - len(ids))


def test_an_answer_that_a_tokenizer_would_melt_into_the_prompt_stays_apart() -> None:
    vocab = {"=": 0, "4": 1, "=4": 2, "</s>": 3}
    backend = Tokenizer(models.BPE(vocab, [("=", "4")]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer("=4")["input_ids"] == [2]
    given = read_demonstrations([{"prompt": "=", "completion": "4"}])
    (example,) = encode_demonstrations(given, tokenizer, [3]).examples
    assert (example.ids, example.learned) == ((0, 1, 3), (False, True, True))


def test_a_long_demonstration_is_refused_left_out_or_loses_the_beginning_of_its_prompt() -> None:
    rows = [{"prompt": "w1", "completion": " w2"}, {"prompt": "w5 w6 w7 w8", "completion": " w20"}]
    given = read_demonstrations(rows)
    with pytest.raises(InputError, match="demonstration 2 has 6 tokens; at most 4 fit"):
        encode_demonstrations(given, words(), [EOS], max_tokens=4)
    dropped = encode_demonstrations(given, words(), [EOS], max_tokens=4, too_long="drop")
    assert (len(dropped.examples), dropped.dropped, dropped.shortened) == (1, 1, 0)
    cut = encode_demonstrations(given, words(), [EOS], max_tokens=4, too_long="truncate_left")
    assert shown(words(), cut.examples[1]) == marked("w7 w8 [w20 </s>]")
    assert (cut.dropped, cut.shortened) == (0, 1)
    with pytest.raises(InputError, match="all 2 demonstrations are longer than 2 tokens"):
        encode_demonstrations(given, words(), [EOS], max_tokens=2, too_long="drop")


def test_a_conversation_without_a_chat_template_is_one_clear_complaint() -> None:
    given = read_demonstrations([{"messages": list(STORY)}])
    with pytest.raises(InputError, match="no chat template to write it with; pass chat_template="):
        encode_demonstrations(given, words(), [EOS])
    made = finetune(build("llama"), given, tokenizer=words(), chat_template=TEMPLATE)
    assert made.tokenizer.chat_template == TEMPLATE


# ── packing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def reference_loss(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """The library's own pass on each example alone, and torch's own loss."""
    total, count = torch.zeros(()), 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0, :-1]
        labels = torch.where(torch.tensor(example.learned), torch.tensor(example.ids), -100)[1:]
        total = total + F.cross_entropy(logits.float(), labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_those_of_each_example_alone(architecture: str, packing: bool) -> None:
    examples, plain = ragged_examples(), build(architecture)
    wanted = reference_loss(plain, examples)
    wanted.backward()
    student = Student(load_causal_lm(plain, "float32", torch.device("cpu")), Finetuning(packing=packing))
    student.parameters()
    assert_close(torch.tensor(student.accumulate(examples, lambda: None)), wanted.detach(), ROUND_OFF)
    own = dict(student.model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert_close(own[name].grad, parameter.grad, GRADIENTS)


def test_which_models_pack_is_seen_on_their_states() -> None:
    able = {
        name: packs(model.base_model, probe(model), 1e-4)
        for name in (*ARCHITECTURES, *MORE_ARCHITECTURES)
        if (model := build(name)) is not None
    }
    assert {name for name, packed in able.items() if packed} >= {"llama", "qwen2", "gpt2", "neox", "gemma2", "phi"}
    assert not able["bloom"]  # distances stand in place of positions, and no mask is made from them


def test_several_passes_add_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for tokens in (4096, 16):
        monkeypatch.setattr(sft_fit, "TOKENS_PER_PASS", tokens)
        student = Student(load_causal_lm(build("llama"), "float32", torch.device("cpu")), Finetuning())
        first = student.parameters()[0]
        student.accumulate(ragged_examples(), lambda: None)
        gradients.append(first.grad)
    assert_close(gradients[1], gradients[0].double(), ROUND_OFF)


def test_bins_hold_every_place_once_and_no_more_than_their_capacity() -> None:
    lengths = [3, 9, 4, 6, 5, 5, 12, 1]
    found = bins(lengths, 10)
    assert sorted(place for chosen in found for place in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in chosen) <= 10 or len(chosen) == 1 for chosen in found)
    assert len(found) == 5  # 12 alone, and 33 tokens in four rows of 10
    assert bins([2, 2], 0) == [[0], [1]]


def test_positions_begin_anew_in_each_example_and_in_the_padding() -> None:
    short, long = Example((7, 8), (False, True)), Example((4, 5, 6), (False, True, True))
    packed = lay_out([[short, long], [long]], torch.device("cpu"))
    assert packed.ids.tolist() == [[7, 8, 4, 5, 6], [4, 5, 6, 0, 0]]
    assert packed.positions is not None
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert packed.learned.tolist() == [[False, True, False, True, True], [False, True, True, False, False]]


def test_packing_changes_nothing_of_what_is_learned() -> None:
    made = [
        finetune(build("llama"), demonstrations(24), Finetuning(packing=packing, batch_size=6), tokenizer=words())
        for packing in (True, False)
    ]
    assert [one.report.packed for one in made] == [True, False]
    for ours, theirs in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert_close(ours, theirs.detach().double(), Tolerance(relative=1e-3, absolute=1e-5))


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_demonstrations_are_learned_and_the_model_given_stays_as_it_was(mode: str, architecture: str) -> None:
    base = build(architecture)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    knobs = Finetuning(mode=mode, lora_rank=8, epochs=8, learning_rate=1e-2, batch_size=8, heldout=0.25)
    made = finetune(base, demonstrations(40), knobs, tokenizer=words())
    report = made.report
    assert (report.demonstrations, report.heldout, report.steps) == (30, 10, 32)
    assert report.heldout_loss_before is not None
    assert report.heldout_loss_after is not None
    assert report.heldout_loss_after < 0.5 < 2.0 < report.heldout_loss_before
    assert report.last_loss < report.first_loss
    (warning,) = report.warnings
    assert "10 of the 10 held-out demonstrations stand among the learned ones too" in warning
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert type(made.model) is type(base)
    assert set(made.model.state_dict()) == set(base.state_dict())  # adapters are folded in


def test_the_held_out_loss_is_that_of_rows_that_were_not_learned() -> None:
    made = finetune(build("llama"), demonstrations(40), Finetuning(heldout=0.2, epochs=2), tokenizer=words())
    examples = encode_demonstrations(demonstrations(40), words(), [EOS]).examples
    aside, learned = _held_out(examples, Finetuning(heldout=0.2))
    assert (len(aside), len(learned)) == (8, 32)
    assert_close(
        torch.tensor(made.report.heldout_loss_before), reference_loss(build("llama"), aside).detach(), ROUND_OFF
    )
    assert_close(torch.tensor(made.report.heldout_loss_after), reference_loss(made.model, aside).detach(), ROUND_OFF)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> Tensor:
        made = finetune(build("llama"), demonstrations(12), Finetuning(seed=seed, batch_size=4), tokenizer=words())
        return next(made.model.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_held_out_demonstrations_that_are_learned_too_are_warned_of() -> None:
    rows = [{"prompt": "w5", "completion": " w7"}] * 8 + [{"prompt": f"w{n}", "completion": " w9"} for n in (20, 21)]
    report = finetune(build("llama"), read_demonstrations(rows), Finetuning(heldout=0.5), tokenizer=words()).report
    assert report.heldout == 5
    assert 3 <= report.learned_too <= 5
    assert f"{report.learned_too} of the 5 held-out demonstrations stand among the learned ones" in report.warnings[-1]
    different = [{"prompt": f"w{n}", "completion": " w9"} for n in range(20, 30)]
    other = finetune(build("llama"), read_demonstrations(different), Finetuning(heldout=0.5), tokenizer=words()).report
    assert (other.learned_too, other.warnings) == (0, ())


def test_one_demonstration_is_enough_and_the_report_says_that_nothing_was_held_out() -> None:
    made = finetune(build("llama"), demonstrations(1), tokenizer=words())
    assert (made.report.demonstrations, made.report.heldout, made.report.steps) == (1, 0, 1)
    assert "nothing was held out" in made.report.warnings[0]


def test_a_rate_that_spoils_the_model_is_reported() -> None:
    made = finetune(
        build("llama"), demonstrations(20), Finetuning(learning_rate=3.0, epochs=3, heldout=0.2), tokenizer=words()
    )
    assert "the held-out loss rose from" in made.report.warnings[0]


def test_weights_in_half_precision_are_learned_through_their_masters() -> None:
    knobs = Finetuning(epochs=8, learning_rate=1e-2, batch_size=8, heldout=0.25)
    made = finetune(build("llama"), demonstrations(40), knobs, tokenizer=words(), dtype="bfloat16")
    assert made.model.dtype == torch.bfloat16
    assert made.report.heldout_loss_after is not None
    assert made.report.heldout_loss_after < 0.5


def test_progress_is_told_after_each_step() -> None:
    seen: list[tuple[int, int]] = []
    finetune(
        build("llama"), demonstrations(10), Finetuning(batch_size=4), tokenizer=words(),
        progress=lambda done, total, _: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("schedule", "done", "wanted"),
    [
        ("cosine", 0.05, 0.5),
        ("cosine", 0.1, 1.0),
        ("cosine", 0.55, 0.5),
        ("cosine", 1.0, 0.0),
        ("linear", 0.4, 2 / 3),
        ("constant", 0.9, 1.0),
    ],
)
def test_the_rate_rises_in_a_line_and_falls_by_its_schedule(schedule: str, done: float, wanted: float) -> None:
    assert math.isclose(Finetuning(schedule=schedule, warmup=0.1).rate_share(done), wanted, abs_tol=1e-12)


@pytest.mark.usefixtures("unchecked_shapes")
def test_all_knobs_out_of_bounds_are_named_together() -> None:
    with pytest.raises(InputError) as caught:
        Finetuning(epochs=0, warmup=1.0, learning_rate=0.0, mode="top", schedule="step")
    for name in ("epochs=0", "warmup=1.0", "learning_rate=0.0", "mode='top'", "schedule='step'"):
        assert name in str(caught.value)


# ── the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_checkpoint_is_an_ordinary_folder_with_its_manifest(tmp_path: Path) -> None:
    made = finetune(build("llama"), demonstrations(12), tokenizer=words(TEMPLATE))
    made.save_pretrained(tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template == TEMPLATE
    manifest = SFTManifest.load(tmp_path / "sft")
    assert manifest is not None
    assert manifest.base == "LlamaForCausalLM"
    assert manifest.data["digest"] == demonstrations(12).digest
    assert manifest.report["heldout_loss_after"] == made.report.heldout_loss_after
    assert manifest.settings["learning_rate"] == 5e-5
    load_policy(tmp_path / "sft", mode="full")
    made.save_pretrained(tmp_path / "sft")  # again: what was there is an SFT checkpoint too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft"]


def test_a_folder_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with (
            pytest.raises(ModelError, match="is there already and holds no thing"),
            whole_folder(tmp_path / name, "mark", "thing"),
        ):
            pass
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def interrupted(target: Path, text: str) -> None:
    with whole_folder(target, "mark", "thing") as aside:
        (aside / "mark").write_text(text)
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "sft"
    with whole_folder(target, "mark", "thing") as aside:
        (aside / "mark").write_text("first")
    with pytest.raises(KeyboardInterrupt):
        interrupted(target, "second")
    assert (target / "mark").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    target.rename(tmp_path / ".sft.old")  # killed between the two renames
    with pytest.raises(KeyboardInterrupt):
        interrupted(target, "third")
    assert (target / "mark").read_text() == "first"


def saved(folder: Path, template: str | None = None, mark: bool = False) -> Path:
    build("llama").save_pretrained(folder)
    words(template).save_pretrained(folder)
    if mark:
        SFTManifest(base="b").save(folder)
    return folder


def test_a_base_model_is_refused_as_reference_unless_asked_for(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    with pytest.raises(ModelError, match=r"looks like a base model: .*make one with `tether sft .* or pass allow_base"):
        require_sft(base)
    require_sft(base, allow_base=True)
    require_sft(saved(tmp_path / "marked", mark=True))
    require_sft(saved(tmp_path / "chat", template=TEMPLATE))
    require_sft(str(tmp_path / "chat"))


def test_a_model_given_as_an_object_goes_by_its_folder_or_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM looks like a base model"):
        require_sft(build("llama"))
    require_sft(build("llama"), words(TEMPLATE))
    with pytest.raises(ModelError, match="looks like a base model"):
        require_sft(build("llama"), words())
    require_sft(AutoModelForCausalLM.from_pretrained(saved(tmp_path / "marked", mark=True)))


def test_the_nano_worlds_base_is_one_though_it_has_the_template(tmp_path: Path) -> None:
    (tmp_path / "tether.json").write_text("{}")
    require_sft(saved(tmp_path / "sft", template=TEMPLATE))
    with pytest.raises(ModelError, match="looks like a base model"):
        require_sft(saved(tmp_path / "base", template=TEMPLATE))


def test_a_manifest_that_is_none_is_one_clear_complaint(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"unknown": 1}))
    with pytest.raises(ModelError, match="is no manifest of an SFT checkpoint"):
        SFTManifest.load(tmp_path)
