"""Padded lengths form a short series and waste little."""

from hypothesis import given
from hypothesis import strategies as st

from spa_jax.data.padding import padded_length


@given(length=st.integers(0, 5000), least=st.integers(1, 100).map(lambda half: 2 * half))
def test_a_padded_length_is_the_least_of_its_series_that_holds_the_length(length, least):
    series = sorted(factor * least * 2**k for factor in (1, 1.5) for k in range(14))
    assert padded_length(length, least) == next(size for size in series if size >= length)


@given(length=st.integers(1, 5000), least=st.integers(2, 64).map(lambda half: 2 * half))
def test_a_padded_length_is_its_own_and_wastes_less_than_half(length, least):
    size = padded_length(length, least)
    assert padded_length(size, least) == size
    assert size == least or size < 1.5 * length
