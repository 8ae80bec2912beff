"""One side of the comparison: runs cases with `trl` or `tether.trl` and keeps every number.

python tests/compat/side.py trl OUT.pt          in an environment with TRL 0.11.4
python tests/compat/side.py tether.trl OUT.pt   in ours
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from compat.cases import BATCH, CASES, EOS, MENDED, VOCAB, Case, Fed, batches, build, fill


def tokenizer(padding_side: str) -> Any:
    """Whole words; the EOS is the pad."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", padding_side=padding_side)
    assert made.eos_token_id == EOS
    return made


def trainer(library: Any, case: Case) -> Any:
    """The case's trainer, with weights that do not depend on the library."""
    model = _model(library, case, 7 + case.seed, case.peft)
    other = None
    if case.distinct_reference:
        other = _model(library, case, 7 + case.seed, False)
        with torch.no_grad():
            for weight in other.pretrained_model.parameters():
                weight.mul_(0.9)
    settings = {"batch_size": BATCH, "mini_batch_size": 4, "learning_rate": case.lr, "seed": case.seed} | case.config
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=case.lr) if case.optimizer == "sgd" else None
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9) if case.schedule else None
    return library.PPOTrainer(
        library.PPOConfig(**settings), model, other, tokenizer(case.padding_side), optimizer=optimizer,
        lr_scheduler=schedule, num_shared_layers=case.shared_layers,
    )  # fmt: skip


def _model(library: Any, case: Case, seed: int, peft: bool) -> Any:
    base = build(case, seed)
    if peft:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        base = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
        draw = np.random.RandomState(seed)
        with torch.no_grad():
            for name, weight in sorted(base.named_parameters()):
                if "lora_" in name:
                    weight.copy_(torch.tensor(0.2 * draw.randn(*weight.shape).astype(np.float32)))
    model = library.AutoModelForCausalLMWithValueHead.from_pretrained(base)
    fill(model.v_head, seed + 1)
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def run(library: Any, case: Case, steps: int | None = None) -> dict[str, Any]:
    """Statistics, β and weights after each step."""
    subject = trainer(library, case)
    kept: dict[str, Any] = {"stats": [], "weights": [], "beta": []}
    for fed in batches(case)[:steps]:
        kept["stats"].append(_numbers(subject, fed))
        kept["weights"].append(weights(subject.model))
        kept["beta"].append(float(subject.kl_ctl.value))
    return kept


def _numbers(subject: Any, fed: Fed) -> dict[str, torch.Tensor]:
    stats = subject.step(fed.queries, fed.responses, fed.scores, fed.masks)
    timeless = {name: value for name, value in stats.items() if not name.startswith("time/")}
    return {name: torch.as_tensor(np.asarray(value, dtype=np.float64)) for name, value in timeless.items()} | {
        "keys": torch.tensor(len(stats), dtype=torch.float64)
    }


def main(name: str, out: str) -> None:
    """Every case; one that raises is kept as its error's first line."""
    warnings.simplefilter("ignore")
    library = importlib.import_module(name)
    results: dict[str, Any] = {}
    for case in (*CASES, *MENDED):
        try:
            results[case.name] = run(library, case)
        except Exception as error:
            if not case.mended:
                raise
            results[case.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    torch.save(results, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
