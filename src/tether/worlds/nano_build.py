"""How the nano model is made: tokenizer, pre-training on stories, instruction tuning on demonstrations.

    stories ──AdamW──▶ base ──demonstrations, loss on the reply only──▶ sft

Both are ordinary Hugging Face folders of a small `LlamaForCausalLM` with its tokenizer. Everything random comes from
the recipe's seed; no global random state is touched. Where the folders are kept is `nano`'s business.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tether.worlds import nano_grammar as grammar
from tether.worlds import nano_prompts as prompts
from tether.worlds.nano_corpus import card, demonstrate, hearsay, story

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
CONTEXT: Final = 128
"""Positions the model is configured for; its own prompts and replies need 51."""
IGNORED: Final = -100
"""The label that Hugging Face losses leave out."""
CARDS_UNTIL: Final = 0.7
"""Share of pre-training after which no cards are shown."""
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<assistant>{{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the nano world knows the roles user and assistant, not ' + message.role) }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

Progress = Callable[[str, int, int, float], None]
"""Called after each step with the stage's name, steps done, steps in all, and the loss in nats per token."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the two checkpoints depend on; equal recipes give equal weights on one machine."""

    seed: int = 0
    """Of weights, texts and their order."""
    hidden: int = 96
    """Width; the feed-forward layers are 2⅔ times as wide."""
    layers: int = 3
    heads: int = 4
    initial_std: float = 0.08
    """Of all weight matrices; at the usual 0.02 the facts are learned several times more slowly."""
    pretrain_steps: int = 200
    sft_steps: int = 600
    rows: int = 32
    """Sequences in one step."""
    pretrain_tokens: int = 48
    """Tokens in one row of stories."""
    learning_rate: float = 6e-3
    """Peak of pre-training."""
    sft_learning_rate: float = 4e-3
    """Peak of instruction tuning."""
    warmup: float = 0.3
    """Share of each stage over which the learning rate rises; then it falls to nothing; both on half a cosine."""
    version: int = 1
    """Raised with every change of the training loop. What is read is in the digest of itself."""

    @property
    def digest(self) -> str:
        """Names recipe, tokenizer and texts: the first of them, which any change of the language moves."""
        tokenizer = build_tokenizer()
        rng = random.Random("nano digest")
        batches = [next(story_batches(self, tokenizer, rng)), next(chat_batches(self, tokenizer, rng))]
        known = [asdict(self), tokenizer.get_vocab(), CHAT_TEMPLATE, CARDS_UNTIL]
        known += [tensor.tolist() for batch in batches for tensor in batch]
        known += [story(rng) + hearsay(rng) for _ in range(100)]
        return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the whole language: one token a word or mark, text in lower case.

    Padding, start, end and unknown are four different tokens, and nothing is added to a plain text: the chat template
    alone writes `<bos><user>…<assistant>…<eos>`. `decode(encode(text)) == text` for every text of the language.
    """
    vocabulary = {word: i for i, word in enumerate((*SPECIALS, *vocabulary_words()))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[.,?]|[^\w\s.,?]+"), "isolated")]
    )
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def vocabulary_words() -> tuple[str, ...]:
    """Every word and mark of rules, prompts and junk, sorted."""
    rules = {word for options in grammar.RULES.values() for option in options for word in option.split()}
    asked = {word for prompt in prompts.table() for word in grammar.words(prompt)}
    return tuple(sorted({word for word in rules if "{" not in word} | asked | set(grammar.JUNK)))


def build(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Trains both checkpoints and saves them as `folder/base` and `folder/sft`."""
    tokenizer = build_tokenizer()
    model = new_model(recipe, tokenizer)
    rng = random.Random(f"nano {recipe.seed}")
    steps, rate = recipe.pretrain_steps, recipe.learning_rate
    train(
        model, story_batches(recipe, tokenizer, rng), steps, rate, recipe, lambda *now: progress("pre-training", *now)
    )
    save(model, tokenizer, folder / "base")
    steps, rate = recipe.sft_steps, recipe.sft_learning_rate
    train(model, chat_batches(recipe, tokenizer, rng), steps, rate, recipe, lambda *now: progress("instructing", *now))
    save(model, tokenizer, folder / "sft")


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model in float32, input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=recipe.initial_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,  # pure sampling: what the policy says is what is drawn
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


Batch = tuple[Int[Tensor, "batch total"], Int[Tensor, "batch total"]]
"""Token ids, and labels that are the same ids or `IGNORED`."""


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    steps: int,
    learning_rate: float,
    recipe: Recipe,
    progress: Callable[[int, int, float], None],
) -> None:
    """`steps` steps of AdamW on next-token cross-entropy (mean over labelled tokens, nats)."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    model.train()
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress(step, steps, float(loss.detach()))
    model.eval()


def story_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Batch]:
    """Cards at first, then more and more talk, end to end between BOS and EOS, in rows of one length without padding.

    The share of cards falls from 1 to 0 over the first `CARDS_UNTIL` of pre-training: bare facts are learned within a
    hundred steps, and hardly ever when they come wrapped in talk from the start.
    """
    ids = tokenizer.get_vocab()
    stream: list[int] = []
    size = recipe.rows * recipe.pretrain_tokens
    for step in count():
        cards = 1 - step / (CARDS_UNTIL * recipe.pretrain_steps)
        while len(stream) < size:
            document = card(rng) if rng.random() < cards else rng.choice((story, hearsay))(rng)
            stream += [ids[BOS], *(ids[word] for word in document), ids[EOS]]
        batch = torch.tensor(stream[:size]).view(recipe.rows, recipe.pretrain_tokens)
        stream = stream[size:]
        yield batch, batch


def chat_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Batch]:
    """Prompts with a demonstrated reply each; labels on the reply and its EOS only. Held-out prompts never occur."""
    ids, asked = tokenizer.get_vocab(), instructive_prompts()
    kinds, shares = list(asked), [CHAT_SHARES[kind] for kind in asked]
    while True:
        rows = []
        for kind in rng.choices(kinds, shares, k=recipe.rows):
            prompt = rng.choice(asked[kind])
            question = [BOS, USER, *grammar.words(prompt), ASSISTANT]
            reply = [*demonstrate(prompt, rng), EOS]
            rows.append(([ids[word] for word in question], [ids[word] for word in reply]))
        yield _pad(rows, ids[PAD])


CHAT_SHARES: Final = {"ask": 0.4, "true opinion": 0.18, "false opinion": 0.18, "tell": 0.14, "mood": 0.1}
"""How often a kind of prompt is demonstrated."""


def instructive_prompts() -> dict[str, list[str]]:
    """All prompts of the world by stratum, without those held out."""
    heldout = set(prompts.split()[1])
    strata: dict[str, list[str]] = {name: [] for name in CHAT_SHARES}
    for prompt, question in prompts.table().items():
        if prompt not in heldout:
            strata[prompts.stratum(question)].append(prompt)
    return strata


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    width = max(len(question) + len(reply) for question, reply in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (question, reply) in enumerate(rows):
        end = len(question) + len(reply)
        ids[i, :end] = torch.tensor(question + reply)
        labels[i, len(question) : end] = torch.tensor(reply)
    return ids, labels


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face folder."""
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own bars off the terminal: a megabyte is written in no time."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
