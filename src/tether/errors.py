"""The tree of complaints. Each says what was got, what was wanted and what to do.

    TetherError
    ├── InputError        a value or a text that cannot be used; also a ValueError
    │   ├── ShapeError        tensors that do not fit together
    │   ├── EmptyMaskError    a mean over no token
    │   └── NonFiniteError    NaN or infinity where a number was wanted
    ├── ConfigError       knobs that contradict each other or their bounds; also a ValueError
    ├── ModelError        a model, tokenizer or checkpoint that cannot do what is asked
    ├── RewardError       a reward function or endpoint that failed, hangs or cannot be reached
    ├── AlarmError        a check failed in a run that shall stop at alarms
    ├── StopError         a run that was asked to stop, and did
    ├── WorkerError       a worker or an engine that failed, does not answer in time or cannot be reached
    ├── OutOfMemory       a run that does not fit; also a MemoryError
    ├── RunError          a run folder that is missing, torn or in use
    └── MissingExtraError an optional dependency is not installed; also an ImportError

Knows nothing of torch: the command line and the page import it at no cost.
"""

from __future__ import annotations


class TetherError(Exception):
    """Root of all errors that tether raises on purpose."""


class InputError(TetherError, ValueError):
    """A value or a text that cannot be used."""


class ShapeError(InputError):
    """Tensors whose shapes do not fit together."""


class EmptyMaskError(InputError):
    """A mean, or a reward, over a mask with no true entry."""


class NonFiniteError(InputError):
    """NaN or infinity where a finite number was wanted."""


class ConfigError(TetherError, ValueError):
    """Knobs that contradict each other, or leave their bounds."""


class ModelError(TetherError):
    """A model, tokenizer or checkpoint that cannot do what is asked of it."""


class RewardError(TetherError):
    """A reward function or endpoint that failed, does not answer in time or cannot be reached."""


class AlarmError(TetherError):
    """A check failed in a run that shall stop at alarms."""


class StopError(TetherError):
    """A run that was asked to stop, by the page or `tether steer`, and did."""


class WorkerError(TetherError):
    """A worker or an engine elsewhere that failed, does not answer in time or cannot be reached."""


class OutOfMemory(TetherError, MemoryError):
    """A run that does not fit into memory; the message names the one knob to halve."""


class RunError(TetherError):
    """A run folder that is missing, torn or in use."""


class MissingExtraError(TetherError, ImportError):
    """An optional dependency is not installed; the message holds the install line."""
