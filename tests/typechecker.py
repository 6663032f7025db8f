"""Checks annotations of spa_jax at run time, for jaxtyping: beartype, for which an int is a float too, as PEP 484 says."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
