"""The command line: `tether COMMAND …`.

Each command is a function; its flags are the function's parameters, or where they are many the fields of a class, read
by tyro. Nothing heavy is imported before a command is chosen, so that `tether --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches

from tether import __version__
from tether.errors import TetherError

EXIT_FAILED = 1
EXIT_MISUSED = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """Where a command's function stands, and the line that `--help` says of it."""

    module: str
    function: str
    summary: str
    complains_in: type[Exception] = TetherError
    """The error that carries its complaints to the user; the standard-library rungs know only ValueError."""
    flags: str | None = None
    """The class of its flags, where they are many: its function gets these as one."""
    knobs: bool = False
    """Whether it takes knobs of a run, too: its function gets its flags and the knobs. The help shows all, or those of
    the sections in its module's `KNOBS`."""


COMMANDS: dict[str, Command] = {
    "demo": Command("tether.demo", "main", "the lesson's exercise end to end: with the string, and without"),
    "train": Command(
        "tether.training",
        "main",
        "one PPO run: your model, reward and prompts, or a world's",
        flags="Flags",
        knobs=True,
    ),
    "sweep": Command("tether.sweep", "main", "a run for each β: frontier, chord law, the text at each"),
    "sft": Command(
        "tether.sft_command", "main", "demonstrations → SFT checkpoint: start and reference of PPO", flags="Flags"
    ),
    "reward": Command(
        "tether.reward_command", "main", "preferences → reward model, and what it is worth", flags="Flags"
    ),
    "ladder bandit": Command(
        "tether.ladder.bandit", "main", "rung 1: the clip alone, two actions, pure Python", ValueError
    ),
    "ladder plain": Command("tether.ladder.plain", "main", "the whole of RLHF-PPO in the standard library", ValueError),
    "ladder skeleton": Command("tether.ladder.skeleton", "main", "rung 2: the four-model loop in torch, one file"),
    "ladder library": Command("tether.ladder.library", "main", "rung 3: the lesson's listing with TRL's classic names"),
    "ladder exact": Command("tether.ladder.exact", "main", "PPO against an optimum that is known exactly"),
    "eval": Command(
        "tether.evaluate_run", "main", "a run on held-out prompts: every judge, KL, win rate, best-of-n", flags="Flags"
    ),
    "recipes ls": Command("tether.recipe_files", "main_list", "the recipes that come with the program"),
    "recipes cp": Command("tether.recipe_files", "main_copy", "copy a recipe into a file of your own"),
    "recipes to": Command("tether.moving_out", "main", "a recipe as OpenRLHF's command line or verl's overrides"),
    "doctor": Command("tether.doctor", "main", "what this machine has; with --run, whether a run fits into it"),
    "resume": Command(
        "tether.resume",
        "main",
        "go on with a run that was stopped or killed, as if it never had been",
        flags="Flags",
        knobs=True,
    ),
    "fork": Command("tether.resume", "main_fork", "another run from a checkpoint of this one: fork RUN@STEP --name N"),
    "export": Command("tether.export", "main", "a run's policy as a Hugging Face folder with its card; onto the hub"),
    "chat": Command("tether.chat", "main", "talk to a run's policy, its reference beside it"),
    "steer": Command("tether.steering", "main", "turn β and other knobs of a run while it trains; pause, step, stop"),
    "replay": Command("tether.replay", "main", "what was steered; --verify: the same run once more, bit by bit"),
    "ui": Command("tether.page.server", "main", "the page of a folder of runs, live, with the slider that pulls"),
    "report": Command("tether.page.report", "main", "the page of a run as one file that works offline"),
    "runs": Command("tether.runs_command", "main_runs", "list the runs of a folder"),
    "check": Command("tether.checking", "main", "is the string attached? the verdict on a run, with its evidence"),
    "show": Command("tether.runs_command", "main_show", "one run as a table with sparklines"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0 = done, 1 = failed with one clear error, 2 = misused, 130 = interrupted."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"tether {__version__}")
        return 0
    name = _command_name(arguments)
    if name is None:
        return _unknown(arguments)
    return _call(name, COMMANDS[name], arguments[len(name.split()) :])


def overview(prefix: str = "") -> str:
    """All commands, one line each; with a prefix, those that begin with it."""
    chosen = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, chosen))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in chosen.items()]
    return "\n".join(
        [
            "tether: RLHF with PPO, on the string of a KL penalty to the frozen SFT checkpoint",
            "",
            "usage: tether COMMAND [flags]        tether COMMAND --help explains its flags",
            "",
            *lines,
        ]
    )


def _command_name(arguments: list[str]) -> str | None:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name
    return None


def _unknown(arguments: list[str]) -> int:
    first = arguments[0]
    if any(name.startswith(first + " ") for name in COMMANDS):
        rest = arguments[1] if len(arguments) > 1 else ""
        if rest and rest not in ("-h", "--help"):
            print(f"tether: there is no command {first!r} {rest!r}\n", file=sys.stderr)
        print(overview(first + " "), file=sys.stderr if rest not in ("-h", "--help") else sys.stdout)
        return 0 if rest in ("-h", "--help") else EXIT_MISUSED
    near = get_close_matches(first, {name.split()[0] for name in COMMANDS}, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    print(f"tether: there is no command {first!r}{hint}\nsee: tether --help", file=sys.stderr)
    return EXIT_MISUSED


def _call(name: str, command: Command, arguments: list[str]) -> int:
    try:
        outcome = _run_with_knobs(name, command, arguments) if command.knobs else _run_plain(name, command, arguments)
        return outcome if isinstance(outcome, int) else 0
    except (TetherError, command.complains_in) as error:
        _complain(f"tether {name}: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt as stop:
        _complain("; ".join([f"tether {name}: stopped by Ctrl-C", *map(str, stop.args)]))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0


def _complain(text: str) -> None:
    """Say what is wrong, once a machine: of the processes that share a run all meet it, and one of them speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def _run_plain(name: str, command: Command, arguments: list[str]) -> object:
    import tyro

    module = importlib.import_module(command.module)
    function = getattr(module, command.function)
    if command.flags is None:
        return tyro.cli(function, prog=f"tether {name}", args=arguments)
    flags = getattr(module, command.flags)
    return function(tyro.cli(flags, prog=f"tether {name}", args=arguments, description=function.__doc__))


def _run_with_knobs(name: str, command: Command, arguments: list[str]) -> object:
    import tyro

    from tether.flags import knobs_help, split_flags

    module = importlib.import_module(command.module)
    flags = getattr(module, command.flags or "")
    switches = {field.name for field in fields(flags) if field.type == "bool"}
    own, overrides = split_flags(arguments, {field.name for field in fields(flags)} - switches, switches)
    if {"-h", "--help"} & set(own):
        with suppress(SystemExit):
            tyro.cli(flags, prog=f"tether {name}", args=["--help"], description=command.summary)
        print(f"\n{knobs_help(getattr(module, 'KNOBS', None))}")
        return 0
    return getattr(module, command.function)(tyro.cli(flags, prog=f"tether {name}", args=own), overrides)


if __name__ == "__main__":
    main()
