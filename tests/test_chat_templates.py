"""Chat templates that refuse a conversation: one InputError with the template's words, wherever it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from test_reward_model import classifier
from tether import cli
from tether.batch import Message
from tether.chat_templates import read_replies
from tether.data import read_demonstrations
from tether.demonstrations import encode_demonstrations
from tether.errors import InputError
from tether.prompts import encode
from tether.reward_model import RewardModel
from tiny_models import EOS, build, build_tokenizer

NO_SYSTEM = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w91 {% endif %}"""
UNDEFINED = "{{ messages[0]['content'].nothing.at_all }}"
NO_TEXT = "{{ messages[0]['content'] + 1 }}"
TORN = "{% for m in messages %}"
ASKED: tuple[Message, ...] = ({"role": "system", "content": "w5"}, {"role": "user", "content": "w6"})


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (NO_SYSTEM, r"conversation of system, user \('w5'\): System role not supported; wanted messages that it takes"),
        (UNDEFINED, "has no attribute 'nothing'"),
        (NO_TEXT, "can only concatenate str"),
        (TORN, "Unexpected end of template"),
    ],
)
def test_a_prompt_that_the_template_refuses_is_one_complaint_in_its_words(template: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        encode([ASKED], tokenizer_of(template))


def test_what_the_template_takes_is_written_by_it() -> None:
    assert encode([ASKED[1:]], tokenizer_of(NO_SYSTEM)) == ((6, EOS, 91),)


def test_a_prompt_is_not_ended_by_the_tokenizer_and_an_answer_is_ended_once() -> None:
    """Some tokenizers are saved with `add_eos_token`, as their training wanted it."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A </s>", special_tokens=[("w1", 1), ("</s>", 2)]
    )
    assert tokenizer("w5 w6")["input_ids"] == [1, 5, 6, EOS]
    assert encode(["w5 w6", "w5 </s>"], tokenizer) == ((1, 5, 6), (1, 5, EOS)), "what the user wrote stays"
    given = read_demonstrations([{"prompt": "w5 w6", "completion": " w7 w8"}] * 2)
    example = encode_demonstrations(given, tokenizer, [EOS]).examples[0]
    assert example.ids == (1, 5, 6, 7, 8, EOS)
    assert example.learned == (False, False, False, True, True, True)


def test_a_reward_model_and_demonstrations_complain_alike() -> None:
    words = tokenizer_of(NO_SYSTEM)
    with pytest.raises(InputError, match="System role not supported"):
        RewardModel.load(classifier("llama"), words)([ASKED], ["w7"])
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "w7"}]}]
    with pytest.raises(InputError, match="System role not supported"):
        encode_demonstrations(read_demonstrations(rows), words, [EOS])


def test_a_run_on_such_prompts_ends_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("sft")
    tokenizer_of(NO_SYSTEM).save_pretrained("sft")
    row = '{"prompt": [{"role": "system", "content": "w5"}, {"role": "user", "content": "w%d"}]}\n'
    Path("prompts.jsonl").write_text("".join(row % place for place in range(3, 9)))
    Path("one.py").write_text("def one(prompts, responses):\n    return [1.0] * len(responses)\n")
    arguments = ["train", "--model", "sft", "--data", "prompts.jsonl", "--reward", "one.py:one"]
    assert cli.run([*arguments, "--max-new-tokens", "4"]) == 1
    assert "tether train: the chat template cannot write" in capsys.readouterr().err


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` before each word, which the decoder leaves out at the beginning of a text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁film", "▁was", "▁great", "s", "▁fine"]
    raw = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["the film was great", "the films", "the film was fine great"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_prompt_and_reply_of_sentencepiece_join_to_the_text_that_was_written(text: str, cut: int) -> None:
    tokenizer = sentencepiece()
    ids = tokenizer(text)["input_ids"]
    prompt = tokenizer.decode(ids[:cut])
    assert prompt + read_replies([[*ids[cut:], EOS]], tokenizer)[0] == text


def test_a_reply_in_a_conversation_begins_without_a_space_and_an_empty_one_is_empty() -> None:
    tokenizer = sentencepiece()
    assert read_replies([[EOS], []], tokenizer) == ["", ""]
    tokenizer.chat_template = NO_SYSTEM
    assert read_replies([tokenizer("great film")["input_ids"]], tokenizer) == ["great film"]
