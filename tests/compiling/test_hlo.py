"""Costs read from compiled programs, against what the programs are known to do."""

import jax
import jax.numpy as jnp
import pytest

from spa_jax.compiling.hlo import cost, parse

ROWS, WIDTH, TIMES = 8, 64, 5


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def repeated(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_products_in_a_loop_count_as_often_as_it_runs():
    text = compiled(repeated, (ROWS, WIDTH), (TIMES, WIDTH, WIDTH))
    found = cost(text)
    assert found.flops == TIMES * 2 * ROWS * WIDTH * WIDTH
    assert found.unknown_loops == 0
    kernels = TIMES * WIDTH * WIDTH * 4
    assert kernels < found.bytes < 2 * kernels + 100 * TIMES * ROWS * WIDTH * 4


def test_loops_in_loops_multiply():
    def program(x, kernels):
        return jax.lax.fori_loop(0, 3, lambda _, x: repeated(x, kernels), x)

    text = compiled(program, (ROWS, WIDTH), (TIMES, WIDTH, WIDTH))
    assert cost(text).flops == 3 * TIMES * 2 * ROWS * WIDTH * WIDTH


def test_a_batched_product_counts_every_product():
    text = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, ROWS, WIDTH), (3, WIDTH, 7))
    assert cost(text).flops == 3 * 2 * ROWS * WIDTH * 7


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    def program(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ kernel, x)

    found = cost(compiled(program, (ROWS, WIDTH), (WIDTH, WIDTH)))
    assert (found.flops, found.unknown_loops) == (2 * ROWS * WIDTH * WIDTH, 1)


def test_a_loop_of_unknown_length_within_another_one_runs_as_often_as_is_said():
    def program(x, kernel, times):
        def turn(x):
            return jax.lax.fori_loop(0, jnp.where(x[0, 0] > 0, 5, 0), lambda _, x: x @ kernel, x)

        return jax.lax.while_loop(lambda x: jnp.sum(x) < times, turn, x)

    text = compiled(program, (ROWS, WIDTH), (WIDTH, WIDTH), ())
    once, told = cost(text), cost(text, inner_trips=5)
    assert (once.flops, once.unknown_loops) == (2 * ROWS * WIDTH * WIDTH, 2)
    assert (told.flops, told.unknown_loops) == (5 * 2 * ROWS * WIDTH * WIDTH, 1)


LOOP = """HloModule loop

%body (p: (s32[], f32[8,64], f32[64,64])) -> (s32[], f32[8,64], f32[64,64]) {
  %p = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, /*index=2*/f32[64,64]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,64]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %w = f32[64,64]{1,0:T(8,128)} get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %gathered = (f32[8,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %whole = f32[64,64]{1,0} all-gather-done(%gathered)
  %y = f32[8,64]{1,0:T(8,128)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %r = (s32[], f32[8,64], f32[64,64]) tuple(%next, %y, %w)
}

%condition (p: (s32[], f32[8,64], f32[64,64])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, /*index=2*/f32[64,64]{1,0:T(8,128)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: f32[8,64], b: f32[64,64]) -> f32[8,64] {
  %a = f32[8,64]{1,0:T(8,128)S(1)} parameter(0)
  %b = f32[64,64]{1,0:T(8,128)} parameter(1)
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %begin = (s32[], f32[8,64], f32[64,64]) tuple(%start, %a, %b)
  %loop = (s32[], f32[8,64], f32[64,64]) while(%begin), condition=%condition, body=%body
  %out = f32[8,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = f32[8,64]{1,0} all-reduce(%out), channel_id=2, to_apply=%add
}
"""
"""A module as the TPU compiler writes it: no trip count, products as convolutions, exchanges in two halves."""


@pytest.mark.parametrize(
    "text",
    [
        LOOP,
        LOOP.replace("tuple(%next,", "tuple(%kept,").replace("  %gathered", "  %kept = s32[] copy(%next)\n  %gathered"),
    ],
    ids=["counted", "counted and copied"],
)
def test_a_loop_without_a_trip_count_is_counted_by_its_counter(text):
    found = cost(text)
    assert found.flops == 3 * 2 * 8 * 64 * 64  # 1, 3, 5
    assert found.collectives == {"all-gather": 3 * 64 * 64 * 4, "all-reduce": 8 * 64 * 4}
    assert found.largest_outside == {"all-reduce": 8 * 64 * 4}
    assert found.unknown_loops == 0


def test_what_stays_in_fast_memory_is_not_moved():
    _, computations = parse(LOOP)
    assert [array.in_fast_memory for array in computations["body"]["p"].arrays] == [False, True, False]
    assert cost(LOOP).bytes == cost(LOOP.replace("S(1)", "")).bytes - 3 * 3 * 8 * 64 * 4


@pytest.mark.parametrize(
    ("window", "labels", "left", "right", "out", "products"),
    [
        ("", "bf_io->bf", (8, 64), (64, 32), (8, 32), 8 * 64 * 32),
        ("window={size=3 pad=1_1}, ", "b0f_0io->b0f", (2, 10, 4), (3, 4, 5), (2, 10, 5), 2 * 4 * 5 * (3 * 10 - 2)),
        ("window={size=3 stride=2}, ", "b0f_0io->b0f", (2, 9, 4), (3, 4, 5), (2, 4, 5), 2 * 4 * 5 * 3 * 4),
        # a product of three pairs as one convolution: each window meets its own partner and padding
        (
            "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, ", "0bf_0io->0bf", (3, 8, 64), (3, 64, 32), (3, 8, 32),
            3 * 8 * 64 * 32,
        ),
    ],
)  # fmt: skip
def test_a_convolution_counts_what_does_not_lie_in_padding(window, labels, left, right, out, products):
    def array(shape):
        return f"f32[{','.join(map(str, shape))}]"

    text = f"""HloModule one

ENTRY %main (a: {array(left)}, b: {array(right)}) -> {array(out)} {{
  %a = {array(left)} parameter(0)
  %b = {array(right)} parameter(1)
  ROOT %c = {array(out)} convolution(%a, %b), {window}dim_labels={labels}
}}
"""
    assert cost(text).flops == 2 * products


TILED = """HloModule tiled

%reordered (q: s8[4,32,64]) -> s8[4,32,64] {
  %q = s8[4,32,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[4,32,64]{2,1,0:T(8,128)(4,1)} copy(%q)
}

%product (x: bf16[8,32], w: s8[4,32,64], i: s32[]) -> bf16[8,64] {
  %x = bf16[8,32]{1,0} parameter(0)
  %w = s8[4,32,64]{2,1,0:T(32,128)(4,1)} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %again = s8[4,32,64]{2,1,0:T(8,128)(4,1)} fusion(%w), kind=kLoop, calls=%reordered
  %one = s8[1,32,64]{2,1,0} dynamic-slice(%again, %i, %zero, %zero), dynamic_slice_sizes={1,32,64}
  %float = bf16[1,32,64]{2,1,0} convert(%one)
  %matrix = bf16[32,64]{1,0} bitcast(%float)
  ROOT %dot = bf16[8,64]{1,0} dot(%x, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[8,32], w: s8[4,32,64], i: s32[]) -> bf16[8,64] {
  %x = bf16[8,32]{1,0} parameter(0)
  %w = s8[4,32,64]{2,1,0:T(32,128)(4,1)} parameter(1)
  %i = s32[] parameter(2)
  %mixed = bf16[8,32]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block":"256"
}}, metadata={op_name="attention"}
  ROOT %out = bf16[8,64]{1,0} fusion(%mixed, %w, %i), kind=kOutput, calls=%product
}
"""


def test_a_stack_in_other_tiles_is_read_by_the_slice():
    """And a kernel's metadata over several lines ends no computation."""
    found = cost(TILED)
    assert found.flops == 2 * 8 * 32 * 64
    rows, matrix, out = 2 * 8 * 32, 32 * 64, 2 * 8 * 64
    kernel = 2 * rows
    assert found.bytes == kernel + rows + matrix + out + 4  # the last for the index
