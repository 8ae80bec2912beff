"""`tether chat`: talk to a run's policy in the terminal, with the reference that it started from beside it.

Both answer each line with the same random numbers, so what differs in their replies is what training did. Each goes on
from its own replies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tether.batch import Message
from tether.config import SamplingSettings
from tether.errors import ConfigError, InputError
from tether.models import LanguagePolicy
from tether.prompts import PromptSource, encode
from tether.resume import find_point, open_trained
from tether.rollouts import sample
from tether.runs import ROOT
from tether.session import prepare_process
from tether.streams import uniforms
from tether.terminal import console_for_output, short

COMMANDS = {"/reset": "forget the conversation", "/quit": "leave", "/help": "this list"}


def main(
    run: str,
    /,
    temperature: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
    model: str | None = None,
    root: Path = ROOT,
) -> None:
    """Talk to a run's policy beside its reference. Reads lines; /reset, /help and /quit are commands.

    Args:
        run: RUN or RUN@STEP: name or path of the run, and the update; by default its last checkpoint.
        temperature: Of both; by default the run's.
        tokens: The longest reply; by default the run's.
        seed: Of the replies.
        model: The SFT checkpoint, where it no longer lies where the run found it.
        root: The folder that holds the run folders.
    """
    prepare_process()
    console = console_for_output()
    folder, step = find_point(run, root)
    trained = open_trained(folder, step, model)
    knobs = trained.settings.ppo.sampling
    sampling = _sampling(knobs, temperature, tokens)
    voices = [
        Voice("reference", trained.reference()),
        Voice(f"update {trained.checkpoint.step}", trained.policy),
    ]
    console.print(f"{folder.name}: the policy beside its reference; /quit leaves, /help tells more", soft_wrap=True)
    converse(voices, _lines(console), console, sampling, seed)


def _sampling(knobs: SamplingSettings, temperature: float | None, tokens: int | None) -> SamplingSettings:
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; wanted a number above 0: try 0.1 for nearly greedy replies")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens is {tokens}; wanted 1 or more")
    return SamplingSettings(
        temperature=knobs.temperature if temperature is None else temperature,
        max_new_tokens=knobs.max_new_tokens if tokens is None else tokens,
    )


@dataclass
class Voice:
    """One of those that answer, with the conversation as it went with them."""

    name: str
    policy: LanguagePolicy
    history: list[Message] = field(default_factory=list)

    def answer(self, line: str, sampling: SamplingSettings, seed: int, turn: int) -> Reply:
        """The reply to a line; both are added to the history.

        Raises InputError, and forgets the line, where it is too long or the chat template refuses it.
        """
        self.history.append({"role": "user", "content": line})
        try:
            forgotten, ids = self._fitted(sampling.max_new_tokens)
            source = PromptSource((tuple(self.history),), (ids,), 1, pad=self.policy.pad)
            draws = uniforms(seed, "chat", turn, (0,), sampling.max_new_tokens)
            rollout = sample(self.policy, source.batch(0), draws, sampling)
        except InputError:
            self.history.pop()
            raise
        self.history.append({"role": "assistant", "content": rollout.texts[0]})
        return Reply(rollout.texts[0], float(rollout.kl[0]), forgotten)

    def _fitted(self, room: int) -> tuple[int, tuple[int, ...]]:
        """Token ids of the conversation, and how many of its oldest messages had to go for a reply to fit.

        Without a chat template there is no way to write a conversation: the last line stands alone.
        """
        if self.policy.tokenizer.chat_template is None:
            del self.history[:-1]
            return 0, encode([str(self.history[-1]["content"])], self.policy.tokenizer)[0]
        forgotten = 0
        while True:
            ids = encode([tuple(self.history)], self.policy.tokenizer)[0]
            if len(ids) + room <= self.policy.context or len(self.history) <= 2:
                return forgotten, ids
            del self.history[:2]
            forgotten += 2


@dataclass(frozen=True)
class Reply:
    """What a voice said."""

    text: str
    kl: float
    """Σ_t log π − log π_ref of the reply, nats."""
    forgotten: int
    """Messages at the beginning that no longer fitted into the model's context."""


def converse(
    voices: list[Voice], lines: Iterable[str], console: Console, sampling: SamplingSettings, seed: int
) -> None:
    """Answer each line with every voice, until `/quit` or the last line."""
    turn = 0
    for line in (raw.strip() for raw in lines):
        if line == "/quit":
            return
        if line == "/reset":
            for voice in voices:
                voice.history.clear()
            turn = 0
            console.print("the conversation is forgotten")
        elif line.startswith("/"):
            if line not in COMMANDS:
                console.print(f"there is no command {escape(line)}")
            console.print("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()))
        elif line:
            _answer(voices, line, console, sampling, seed, turn)
            turn += 1


def _answer(voices: list[Voice], line: str, console: Console, sampling: SamplingSettings, seed: int, turn: int) -> None:
    width = max(len(voice.name) for voice in voices)
    for voice in voices:
        try:
            reply = voice.answer(line, sampling, seed, turn)
        except InputError as error:
            console.print(f"{voice.name:<{width}} │ {error}", soft_wrap=True, markup=False)
            continue
        if reply.forgotten:
            gone = f"the first {reply.forgotten} messages no longer fit and are forgotten"
            console.print(f"[dim]{voice.name}: {gone}[/dim]", soft_wrap=True)
        strayed = f" [dim](K {short(reply.kl)} nats)[/dim]" if voice is not voices[0] else ""
        console.print(f"[bold]{voice.name:<{width}}[/bold] │ {escape(reply.text.strip())}{strayed}", soft_wrap=True)


def _lines(console: Console) -> Iterator[str]:
    """Lines of the standard input, with a prompt where somebody types them."""
    while True:
        if sys.stdin.isatty():
            console.print("[bold]you[/bold] │ ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        yield line
