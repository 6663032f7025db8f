"""Promises of all commands to users, seen in processes; other tests see refusals in their own, by `command_here`."""

import pytest

CASES = {
    "spa_jax.train": "both --config=FILE and --workdir=DIR are needed",
    "spa_jax.evaluate": "both --task=NAME and --output=DIR are needed",
    "spa_jax.generate": "give either --prompt='...' or --interactive",
    "spa_jax.serve": "say which half this is",
    "spa_jax.aot": "--config=FILE is needed",
}


@pytest.mark.parametrize("module", CASES)
def test_a_refusal_is_one_line_and_status_2(module, command, command_here):
    result = command(module)
    result.assert_refused(CASES[module])
    assert result == command_here(module)


@pytest.mark.parametrize("module", CASES)
def test_an_unknown_flag_is_refused_so_too(module, command, command_here):
    result = command(module, "--flg=1")
    result.assert_refused("Unknown command line flag 'flg'")
    assert result == command_here(module, "--flg=1")
