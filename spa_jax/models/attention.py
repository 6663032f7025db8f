"""Kernels of scaled dot-product attention with grouped keys and values. All compute the same, at different speeds.

- `xla`: scores of all queries and keys at once.
- `blockwise`: exact attention for one row and some queries at a time (Rabe & Staats 2021), so that scores stay in a
  processor's cache.
- `splash`: a fused kernel for TPUs (Dao et al. 2022, in Pallas) that skips what causality hides.
- `cudnn`: NVIDIA's fused kernel, for half precision.

One token, or tokens that see a cache with others in it, always take `xla` or `blockwise`. Shape letters: B batch, T
queries, S keys, N query heads, K key/value heads, H head width; L blocks of a cache.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spa_jax.errors import UserError
from spa_jax.models.compute import Kernel
from spa_jax.models.partitioner import Partitioner

BLOCK_SCORES = 2**20
"""Attention scores in one block of `blockwise`: 4 MiB of float32."""
MIN_BLOCKWISE_SCORES = 2**16
"""Attention scores of a row below which `xla` is as fast as `blockwise` on a processor."""
MAX_COPY = 2**22
"""Bytes of keys above which a processor takes those that single queries see one row after another."""
CAUSAL_PARTS = 4
"""Parts into which `blockwise` divides causal queries; each part reads the keys up to its own end."""
LANES = 128
"""Splash attention works on multiples of this many tokens."""


def attend(
    kernel: Kernel,
    partitioner: Partitioner,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"],
    not_padding: Bool[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v over the keys that each query sees; one that sees none gets anything finite.

    Args:
        kernel: the kernel to use; `auto` is the best one of the platform.
        partitioner: where the arrays lie on devices.
        q, k, v: queries, keys and values, after the rotary embedding.
        mask: the keys that each query sees.
        not_padding: the tokens that are no padding, where the keys are those of the queries' own tokens and a query
            sees all of these up to its own. None where the mask hides keys in any other way.

    Raises:
        UserError: the kernel cannot run here.
    """
    scores = q.shape[1] * q.shape[2] * k.shape[1] if q.shape[1] > 1 else 0
    chosen = select_kernel(kernel, partitioner, q.dtype, q.shape[3], scores, causal=not_padding is not None)
    if chosen == "splash" and not_padding is not None:
        return _splash(partitioner, q, k, v, not_padding)
    if chosen == "blockwise":
        return _blockwise(q, k, v, mask, causal=not_padding is not None)
    if chosen == "cudnn":
        return _on_each_device(partitioner, _cudnn_part, q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def attend_shared(
    partitioner: Partitioner,
    q: Float[Array, "B T N H"],
    k: Float[Array, "L S K H"],
    v: Float[Array, "L S K H"],
    layer: int | Int[Array, ""],
    begins: Int[Array, " B"],
    mask: Bool[Array, "B 1 T C"],
) -> Float[Array, "B T N H"]:
    """Computes `attend` over a cache whose slots all rows share: each row sees C of them, from where it begins.

    A processor copies what all rows see at once, with all its cores, unless for single queries that is too much for its
    cache. A TPU takes one row after another, whose keys and values then fit its fast memory: of all rows at once, it
    writes copies to its main memory first. GPUs take all at once.
    """
    _, _, heads, width = k.shape
    count = len(begins) * mask.shape[-1]
    if partitioner.platform == "cpu" and (q.shape[1] > 1 or count * heads * width * q.dtype.itemsize <= MAX_COPY):
        slots = begins[:, None] + jnp.arange(mask.shape[-1], dtype=begins.dtype)[None, :]
        keys, values = (each.at[layer, slots].get(mode="promise_in_bounds").astype(q.dtype) for each in (k, v))
        return attend("auto", partitioner, q, keys, values, mask, None)

    def attend_row(q: jax.Array, begin: jax.Array, mask: jax.Array) -> jax.Array:
        size = (1, mask.shape[-1], heads, width)
        keys, values = (jax.lax.dynamic_slice(each, (layer, begin, 0, 0), size)[0].astype(q.dtype) for each in (k, v))
        q = q.reshape(len(q), heads, -1, width)
        scores = jnp.einsum("tkgh,skh->kgts", q, keys, preferred_element_type=jnp.float32) * width**-0.5
        scores = jnp.where(mask[None], scores, -0.7 * jnp.finfo(jnp.float32).max)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        return jnp.einsum("kgts,skh->tkgh", weights, values).reshape(len(q), -1, width)

    if partitioner.platform in ("cpu", "tpu"):
        return jax.lax.map(lambda row: attend_row(*row), (q, begins, mask))
    return jax.vmap(attend_row)(q, begins, mask)


def select_kernel(
    kernel: Kernel, partitioner: Partitioner, dtype: jnp.dtype, width: int, scores: int, causal: bool
) -> Kernel:
    """Selects the kernel to use.

    Args:
        kernel: the kernel that was asked for.
        partitioner: where the arrays lie, and on which platform.
        dtype: dtype of queries, keys and values.
        width: H.
        scores: attention scores of one row, 0 for a single query.
        causal: whether padding and causality alone hide keys.

    Raises:
        UserError: one was asked for that cannot run on this platform or in this dtype.
    """
    fused = dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    best: dict[str, Kernel] = {"cpu": "blockwise", "tpu": "splash", "gpu": "cudnn" if fused else "xla"}
    if kernel == "auto":
        kernel = best.get(partitioner.platform, "xla")
        if kernel == "blockwise" and (partitioner.num_devices > 1 or scores < MIN_BLOCKWISE_SCORES):
            kernel = "xla"  # a loop over rows would leave all but one device idle
    elif kernel == "splash" and partitioner.platform != "tpu":
        raise UserError(f"compute.attention=splash needs a TPU, and this is a {partitioner.platform}: leave it at auto")
    elif kernel == "cudnn" and not (partitioner.platform == "gpu" and fused):
        raise UserError(
            "compute.attention=cudnn needs a GPU, bfloat16 and heads of a width up to 128 that 8 divides, and this is "
            f"a {partitioner.platform}, {dtype.name} and {width}: leave it at auto, or set dtype=bfloat16"
        )
    if not scores or (kernel in ("splash", "cudnn") and not causal):
        return "xla"
    return kernel


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
    """Reads few of the keys that causality hides; a gradient computes scores again and stores none."""
    rows, length, heads, width = q.shape
    keys, groups = k.shape[1:3]
    shared = heads // groups  # G query heads that share a key head
    q = (q * width**-0.5).reshape(rows, length, groups, shared, width)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    mask = jnp.broadcast_to(mask[:, 0], (rows, length, keys))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(k: jax.Array, v: jax.Array, q: jax.Array, seen: jax.Array) -> jax.Array:
        size = len(q)
        q = q.transpose(1, 2, 0, 3).reshape(groups, shared * size, width)
        scores = jnp.einsum("kth,khs->kts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.tile(seen, (shared, 1)), scores, -0.7 * jnp.finfo(jnp.float32).max)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        mixed = jnp.einsum("kts,ksh->kth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
        return mixed.reshape(groups, shared, size, width).transpose(2, 0, 1, 3)

    def part(k: jax.Array, v: jax.Array, *queries: jax.Array) -> jax.Array:
        count = len(queries[0])
        blocks = -(-heads * count * k.shape[-1] // BLOCK_SCORES)
        size = -(-count // blocks)
        padded = (jnp.pad(x, ((0, blocks * size - count), *[(0, 0)] * (x.ndim - 1))) for x in queries)
        in_blocks = tuple(x.reshape(blocks, size, *x.shape[1:]) for x in padded)
        mixed = jax.lax.map(lambda some: block(k, v, *some), in_blocks)
        return mixed.reshape(blocks * size, heads, width)[:count]

    def row(each: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, mask = each
        if not causal:
            return part(k, v, q, mask)
        step = -(-length // CAUSAL_PARTS)
        bounds = [(at, min(at + step, length)) for at in range(0, length, step)]
        return jnp.concatenate([part(k[..., :end], v[:, :end], q[at:end], mask[at:end, :end]) for at, end in bounds])

    return jax.lax.map(row, (q, k, v, mask))


def _on_each_device(
    partitioner: Partitioner,
    part: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """Runs a kernel that the compiler cannot split, on every device for its own rows and heads; `rows` is an array with
    the batch first that says what they see."""
    if k.shape[2] % partitioner.axis_size("K"):  # copied to all devices, each of which has some of the query heads
        k, v = (jnp.repeat(each, q.shape[2] // k.shape[2], axis=2) for each in (k, v))
    return partitioner.shard_map(part, ("BTNH", "BTKH", "BTKH", "B"))(q, k, v, rows)


def _cudnn_part(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _splash(partitioner: Partitioner, q: jax.Array, k: jax.Array, v: jax.Array, not_padding: jax.Array) -> jax.Array:
    """Pads to whole `LANES`; padding is a segment of its own, which no other token sees."""
    length, width = q.shape[1], q.shape[3]
    ((q, k, v), segments) = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, -length % LANES), *[(0, 0)] * (x.ndim - 2))),
        ((q * width**-0.5, k, v), not_padding.astype(jnp.int32)),
    )
    return _on_each_device(partitioner, _splash_part, q, k, v, segments)[:, :length]


def _splash_part(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool = False) -> jax.Array:
    """Runs splash attention on one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # half a second
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    block = max(size for size in (512, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(block, block, block, block, block, block, block, block)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        interpret=interpret,
    )
    q, k, v = (each.swapaxes(1, 2) for each in (q, k, v))
    each_row = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))
    return each_row(q, k, v, segments).swapaxes(1, 2)


splash_on_cpu = functools.partial(_splash_part, interpret=True)
"""`splash` without a TPU, slow, for tests: the scaled queries, keys and values `[B,T,N,H]`, T a multiple of `LANES`."""
