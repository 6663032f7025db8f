"""Experiments on spa_jax: the paper's tables, benchmarks, and `results/` with what they printed."""
