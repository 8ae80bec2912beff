"""Sequence classifiers with one label, as `transformers` has them: read, checked, made from a causal LM, cut in two.

A reward model is such a classifier. What is checked is behaviour: a head that reads the last token gives each prefix
the score of its own last token, whatever the class is called. Read next: `reward_model.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from tether.errors import ModelError
from tether.loading import Precision, Source, load_causal_lm, probe, read_config
from tether.trunk import SplitBackbone, decoder_layers, run_backbone

SAME_HEAD = 0.1  # relative; wide, since what it tells apart (another token, another pooling) differs altogether


def new_classifier(base: Source, precision: Precision, device: torch.device, seed: int) -> PreTrainedModel:
    """A classifier with one label on the body of a causal LM, which is copied or read from its folder.

    Head: W ~ N(0, 1/(d + 1)), that is a standard deviation of 1/√(d + 1), d the width; no bias where the architecture
    has none, else 0. Stiennon et al. 2020, appendix B.1 (code of Ziegler et al. 2019).

    Raises ModelError where `base` is no causal LM, or its architecture has no classifier.
    """
    language_model = load_causal_lm(base, precision, device)
    fields = {k: v for k, v in language_model.config.to_dict().items() if k not in ("id2label", "label2id")}
    config = type(language_model.config).from_dict({**fields, "num_labels": 1})
    try:
        with torch.device("meta"):  # no weights: the body is taken over, the head is drawn below
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except ValueError as fault:
        name = type(language_model).__name__
        raise ModelError(f"transformers has no sequence classifier for a {name}; choose another base model") from fault
    setattr(model, model.base_model_prefix, language_model.base_model)
    head = getattr(model, "score", None)
    if type(head) is not nn.Linear:
        raise ModelError(f"{type(model).__name__} has no plain linear head named `score`; choose another base model")
    model.score = _drawn(head, language_model.dtype, device, seed)
    return model.eval()


def _drawn(shape: nn.Linear, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, shape.in_features, generator=generator) / (shape.in_features + 1) ** 0.5
    head = nn.Linear(shape.in_features, 1, bias=shape.bias is not None, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
    return head


def checked(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it is a classifier with one label."""
    name, labels = type(model).__name__, model.config.num_labels
    if "ForSequenceClassification" not in name:
        raise ModelError(_no_classifier(name))
    if labels != 1:
        raise ModelError(_labels(name, labels))
    return model


def read_classifier(source: str | Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(str(source))
        names = config.architectures or ["a model without a named architecture"]
        if not any("ForSequenceClassification" in name for name in names):
            raise ModelError(_no_classifier(names[0]))
        if config.num_labels != 1:
            raise ModelError(_labels(names[0], config.num_labels))
        model, report = AutoModelForSequenceClassification.from_pretrained(str(source), output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError) as fault:
        raise ModelError(
            f"cannot read a reward model from {str(source)!r}: {str(fault).strip().splitlines()[0]} Wanted a folder "
            "written by save_pretrained or the name of a model on the hub"
        ) from fault
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"the checkpoint {str(source)!r} lacks weights of its classifier ({missing}); save it again")
    return model


def classifier_parameters(source: Source) -> int:
    """Weights of a classifier, from its configuration alone. Raises ModelError where the source is none."""
    config = read_config(source)
    try:
        with torch.device("meta"):
            return int(AutoModelForSequenceClassification.from_config(config).num_parameters())
    except ValueError as fault:
        raise ModelError(_no_classifier((config.architectures or [type(config).__name__])[0])) from fault


def _no_classifier(name: str) -> str:
    return (
        f"the reward model is {name}, which gives no score; wanted a sequence classifier with one label "
        "(`tether reward` trains one)"
    )


def _labels(name: str, labels: int) -> str:
    return (
        f"the reward model {name} has {labels} labels; wanted one with num_labels=1, whose only logit is the score. "
        "Train one (`tether reward`), or give a function that makes one number of its logits, such as "
        "logits[:, 1] - logits[:, 0]"
    )


@torch.no_grad()
def last_token_head(model: PreTrainedModel) -> nn.Linear | None:
    """The linear head on the last token's state, if that is what the model is: then each prefix scores its last token.

    None where the states depend on later tokens or the head reads something else.
    """
    head = getattr(model, "score", None)
    if type(head) is not nn.Linear:
        return None
    ids = probe(model)
    pad = model.config.get_text_config().pad_token_id  # the library's classifiers skip it wherever it stands
    if pad is not None:
        ids = torch.where(ids == pad, (ids + 1) % model.get_input_embeddings().weight.shape[0], ids)
    own = head(run_backbone(model.base_model, ids))[0, :, 0].float()
    theirs = torch.cat([model(input_ids=ids[:, : end + 1]).logits[0] for end in range(ids.shape[1])]).float()
    same = bool((own - theirs).abs().mean() <= SAME_HEAD * theirs.abs().max())
    return head if same else None


def cut(model: PreTrainedModel, head: nn.Linear | None, top_layers: int) -> SplitBackbone:
    """The trunk and the `top_layers` layers above it."""
    count = model.config.get_text_config().num_hidden_layers
    if head is None:
        raise ModelError(
            f"{type(model).__name__} does not score the last token alone, so it cannot be cut; train it whole"
        )
    if not 1 <= top_layers <= count:
        raise ModelError(f"top_layers is {top_layers} and the reward model has {count} layers; wanted 1 … {count}")
    return SplitBackbone(model.base_model, decoder_layers(model.base_model, count), top_layers, probe(model))
