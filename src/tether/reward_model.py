"""The reward model: prompt and response as text → one score, by an ordinary sequence classifier with its own tokenizer.

    texts ─ chat template ─ token ids ─┐
                                       ├─ trunk ─ states ─ top layers ─ hidden at the last real token ─ head → raw
    rollout of a policy in mode `top` ─┴─────────────┘
    score = gain·raw + bias        mean 0 and std 1 on the reference samples, so that β has a unit

A folder of it is what `save_pretrained` of `AutoModelForSequenceClassification(num_labels=1)` writes, plus
`tether_reward.json`, the manifest: gain, bias and how the model came about. A folder without one is any other reward
model. Where the model was trained on a frozen trunk, `score_rollout` takes up the states that a policy with the same
trunk has computed already. Knows no preferences and no optimiser. Read next: `reward_training.py`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.batch import Prompt, Rollout, Sequences, check_rows
from tether.chat_templates import write_chat
from tether.classifiers import checked, cut, last_token_head, read_classifier
from tether.errors import InputError, ModelError
from tether.loading import (
    Precision,
    Source,
    choose_attention,
    choose_dtype,
    context_length,
    freeze,
    lacking,
    load_tokenizer,
    require_embedded,
)
from tether.trunk import run_backbone

"""What was asked: a text, or the messages of a conversation as `{"role": …, "content": …}`."""

MANIFEST_FILE = "tether_reward.json"
TOKENS_AT_ONCE = 8192  # padded positions of one forward pass without gradients
KEPT_BYTES = 2 * 2**30  # of trunk states in memory; beyond, they are computed again wherever they are needed
PROBED_TOKENS = 8  # of a rollout's first row: enough to tell one trunk from another, and cheap
SAME_STATES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative round-off of a token's state over a whole trunk


@dataclass(frozen=True)
class RewardManifest:
    """What a reward model needs beside its weights, and what is known of how it was made."""

    gain: float = 1.0
    """g of score = g·raw + b: 1/σ, σ the standard deviation of the raw scores on the reference samples."""
    bias: float = 0.0
    """b: −μ/σ."""
    top_layers: int | None = None
    """How many layers were trained above a frozen trunk; None where all were, or where it is not known."""
    closed: bool = True
    """Whether the assistant's turn is ended, as its chat template ends it, before the score is taken."""
    eos: bool = False
    """Whether, where the turn is not ended so, an EOS follows the response, and the score is taken there."""
    details: Mapping[str, object] = field(default_factory=dict)
    """Noise, seeds, digests, settings, report: read by people, not by the program."""

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> RewardManifest:
        """The folder's manifest; the defaults where it has none. Raises ModelError where it cannot be read."""
        path = folder / MANIFEST_FILE
        if not path.is_file():
            return RewardManifest()
        try:
            return RewardManifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as fault:
            raise ModelError(
                f"{path} is no manifest of a reward model ({fault}); train it again or remove it"
            ) from fault


@dataclass(frozen=True)
class Encoded:
    """Prompts with their responses as a reward model reads them."""

    rows: Sequence[Sequence[int]]
    """Token ids, without padding."""
    states: Sequence[Float[Tensor, "_ dim"]] | None = None
    """The frozen trunk's states of each row, where they are known."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> Encoded:
        """The rows at these places, in this order."""
        states = None if self.states is None else [self.states[place] for place in places]
        return Encoded([self.rows[place] for place in places], states)

    def then(self, other: Encoded) -> Encoded:
        """These rows, then the other's."""
        known = self.states is not None and other.states is not None
        return Encoded([*self.rows, *other.rows], [*(self.states or ()), *(other.states or ())] if known else None)


class RewardModel:
    """A trained scorer; call it like any reward: `(prompts, responses, **columns) -> list[float]`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manifest: RewardManifest | None = None
    ) -> None:
        """Takes the model as its own, frozen and in eval mode. Raises ModelError where it has no single score."""
        self.manifest = manifest or RewardManifest()
        self.model, self.tokenizer = checked(model).requires_grad_(False).eval(), tokenizer
        self._context, self._lacking = context_length(model), lacking(tokenizer, model)
        self._head = last_token_head(model)
        self._split = None if self.manifest.top_layers is None else cut(model, self._head, self.manifest.top_layers)
        self.scorer: Callable[[Sequence[Sequence[int]]], Float[Tensor, "rows"]] | None = None
        """Who gives the raw scores of token ids; None is this process."""

    @staticmethod
    def load(
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: Precision = "auto",
        device: str | torch.device | None = None,
    ) -> RewardModel:
        """The reward model of a folder, a name on the hub, or a model, which is copied and stays as it was.

        Raises ModelError where the source is no classifier, has another number of labels than one, or no tokenizer.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(source, PreTrainedModel):
            model, manifest = copy.deepcopy(checked(source)), RewardManifest()
        else:
            model, manifest = read_classifier(source), RewardManifest.load(Path(source))
        model = freeze(model, choose_dtype(dtype, model.num_parameters(), place), place)
        if hasattr(model, "score"):  # a decoder; encoders keep the library's attention
            choose_attention(model.base_model)
        return RewardModel(model, load_tokenizer(source, tokenizer, model), manifest)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        """One normalised score a response, in units of σ on the reference samples. `columns` are not looked at.

        Raises InputError where there is another number of prompts than responses, or a text is longer than the
        model's context.
        """
        del columns
        return self.normalise(self.raw_scores(prompts, responses))

    @torch.no_grad()
    def raw_scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The classifier's own output, float32: the scale on which its margins are log-odds."""
        return self.score_encoded(Encoded(self.encode(prompts, responses)))

    @torch.no_grad()
    def score_rollout(self, rollout: Rollout) -> list[float]:
        """The scores of a rollout; equal, up to round-off, to those of its texts.

        Rows whose token ids are those of their texts start from the trunk's states that the rollout holds, if these
        are of this model's own trunk; all others go by their texts. (A sampler may draw tokens that no tokenizer would
        write for the same text, and a score is a function of the text.) A row without states is one of zeros.
        """
        rows, sequences = self.encode(rollout.prompts.texts, rollout.texts), rollout.sequences
        if self.scorer is not None or self._split is None or sequences.states is None or not self._knows(sequences):
            return self.normalise(self.score_encoded(Encoded(rows)))
        known = [known_states(sequences, index, row) for index, row in enumerate(rows)]
        shared = [index for index, states in enumerate(known) if states is not None]
        others = [index for index, states in enumerate(known) if states is None]
        raw = torch.empty(len(rows))
        raw[shared] = self.score_encoded(Encoded([rows[i] for i in shared], [s for s in known if s is not None]))
        raw[others] = self.score_encoded(Encoded([rows[i] for i in others]))
        return self.normalise(raw)

    @torch.no_grad()
    def prepare(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Encoded:
        """Token ids and, where there is a frozen trunk and memory allows, its states: computed once, used often."""
        rows = self.encode(prompts, responses)
        width = self.model.get_input_embeddings().weight.shape[1] * self.model.dtype.itemsize
        if self._split is None or sum(map(len, rows)) * width > KEPT_BYTES:
            return Encoded(rows)
        states: dict[int, Tensor] = {}
        for group in length_groups([len(row) for row in rows], TOKENS_AT_ONCE):
            found = self._split.states(pad_right([rows[index] for index in group], self.device)[0])
            states |= {index: found[place, : len(rows[index])].clone() for place, index in enumerate(group)}
        return Encoded(rows, [states[index] for index in range(len(rows))])

    @torch.no_grad()
    def score_encoded(self, encoded: Encoded) -> Float[Tensor, "batch"]:
        """Raw scores, float32, on the CPU; rows of similar length go together."""
        if self.scorer is not None:
            return self.scorer(encoded.rows)
        raw = torch.empty(len(encoded))
        for group in length_groups([len(row) for row in encoded.rows], TOKENS_AT_ONCE):
            raw[group] = self.forward(encoded.take(group)).cpu()
        return raw

    def forward(self, encoded: Encoded) -> Float[Tensor, "rows"]:
        """Raw scores of rows in one pass, float32; carries gradients where they are enabled.

        The score is taken at each row's last token, whatever the padding holds. A model whose head does not read the
        last token (an encoder, say) is run as it is, under its mask.
        """
        ids, lengths = pad_right(encoded.rows, self.device)
        if self._head is None:
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
            return logits[:, 0].float()
        if self._split is None:
            hidden = run_backbone(self.model.base_model, ids)
        elif encoded.states is None:
            hidden = self._split.top(ids, self._split.states(ids))
        else:
            hidden = self._split.top(ids, pad_sequence(list(encoded.states), batch_first=True).to(self.device))
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
        bias = None if self._head.bias is None else self._head.bias.float()
        return F.linear(last, self._head.weight.float(), bias)[:, 0]

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt with its response, as turns of user and assistant or, without a template, joined.

        Raises InputError where the two differ in number, a row is empty or too long, or the chat template refuses it.
        """
        check_rows("the list of prompts", len(prompts), len(responses))
        if not prompts:
            return []
        templated = self.tokenizer.chat_template is not None
        texts = [self._text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=not templated)["input_ids"]
        if self.manifest.eos and not (templated and self.manifest.closed):
            rows = [[*row, self.tokenizer.eos_token_id] for row in rows]
        require_embedded(rows, self._lacking, "prompt and response")
        for row, ids in enumerate(rows):
            if not 0 < len(ids) <= (self._context or len(ids)):
                raise InputError(
                    f"prompt and response {row} have {len(ids)} tokens together; the reward model reads 1 to "
                    f"{self._context}: shorten the prompt or lower max_new_tokens"
                )
        return rows

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training moves: the head and the layers above the trunk, or everything."""
        if self._split is None:
            return list(self.model.parameters())
        assert self._head is not None
        return [parameter for module in (*self._split.trained, self._head) for parameter in module.parameters()]

    def normalise(self, raw: Float[Tensor, "batch"]) -> list[float]:
        """g·raw + b."""
        return [self.manifest.gain * number + self.manifest.bias for number in raw.tolist()]

    def normalised_on(self, raw: Float[Tensor, "samples"]) -> RewardModel:
        """The same model, shared not copied, with g = 1/σ and b = −μ/σ of these raw scores of reference samples.

        Raises InputError where fewer than two samples are given or all score the same.
        """
        spread = float(raw.double().std(correction=0)) if len(raw) > 1 else 0.0
        if not spread > 0.0:
            raise InputError(
                f"got {len(raw)} reference samples with a standard deviation of {spread}; wanted several responses "
                "that the reward model tells apart: was it trained, and do the samples differ?"
            )
        mean = float(raw.double().mean())
        reference = {"samples": len(raw), "mean": mean, "std": spread}
        return self._with(gain=1.0 / spread, bias=-mean / spread, reference=reference)

    def described(self, **details: object) -> RewardModel:
        """The same model, shared not copied, with these details in its manifest."""
        return self._with(self.manifest.gain, self.manifest.bias, **details)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary sequence-classification folder with the tokenizer and the manifest, whole or not at all.

        Raises ModelError where something that is no reward model of tether stands there.
        """
        target = Path(folder)
        if target.exists() and not (target / MANIFEST_FILE).is_file() and any(target.iterdir()):
            raise ModelError(f"{target} is there already and holds no reward model of tether; choose another folder")
        aside, old = (target.with_name(f".{target.name}.{part}") for part in ("part", "old"))
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        self.model.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        self.manifest.save(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _with(self, gain: float, bias: float, **details: object) -> RewardModel:
        twin = copy.copy(self)
        twin.manifest = replace(self.manifest, gain=gain, bias=bias, details={**self.manifest.details, **details})
        return twin

    def _text(self, prompt: Prompt, response: str) -> str:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        if self.tokenizer.chat_template is None:
            if len(turns) != 1:
                raise InputError(
                    f"a prompt is a conversation of {len(turns)} messages and the reward model's tokenizer has no chat "
                    "template; set tokenizer.chat_template or give plain prompts"
                )
            return turns[0]["content"] + response
        if self.manifest.closed:
            turns.append({"role": "assistant", "content": response})
            return write_chat(turns, self.tokenizer)
        return f"{write_chat(turns, self.tokenizer, ask=True)}{response}"

    def _knows(self, sequences: Sequences) -> bool:
        """Whether the rollout's states are what this model's own trunk computes, seen on the first row."""
        given, split = sequences.states, self._split
        if given is None or split is None or given.dtype != self.model.dtype:
            return False
        count = min(PROBED_TOKENS, int(sequences.lengths[0]))
        ids = sequences.ids[:1, :count].to(self.device)
        if int(ids.max()) >= self.model.get_input_embeddings().weight.shape[0]:
            return False
        own, theirs = split.states(ids)[0].float(), given[0, :count].to(self.device).float()
        if own.shape != theirs.shape:
            return False
        distance = (own - theirs).norm(dim=-1) / own.norm(dim=-1)
        return bool((distance <= SAME_STATES[self.model.dtype]).all())


def known_states(sequences: Sequences, index: int, row: Sequence[int]) -> Float[Tensor, "tokens dim"] | None:
    """The trunk's states of these tokens, where the rollout's row is the same and the trunk has read the last one.

    The row may be a prefix of the rollout's, or all of it and the closing token.
    """
    assert sequences.states is not None
    ids, closing = sequences.ids[index, : int(sequences.lengths[index])].tolist(), sequences.closing
    if ids[: len(row)] == row:
        states = sequences.states[index, : len(row)]
    elif closing is not None and [*ids, closing.token] == row:
        states = torch.cat([sequences.states[index, : len(ids)], closing.states[index][None]])
    else:
        return None
    return states if bool(states[-1].any()) else None


def length_groups(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows of similar length together, longest first, each group within `tokens` padded positions.

    A single row longer than that stands alone.

    >>> list(length_groups([3, 9, 4, 8], 18))
    [[1, 3], [2, 0]]
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if group and lengths[group[0]] * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def pad_right(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "rows total"], Int[Tensor, "rows"]]:
    """Token ids padded with 0 on the right, and the rows' lengths."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, lengths
