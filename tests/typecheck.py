"""The type checker behind jaxtyping's import hook: beartype, with an int accepted where a float is annotated."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
