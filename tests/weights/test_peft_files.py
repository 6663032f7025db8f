"""LoRA against PEFT in PyTorch: forward, trained, saved and loaded; Adapter against PyTorch; and what is neither."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spa_jax.data.pipeline import Batch
from spa_jax.errors import UserError
from spa_jax.models.llama import Llama
from spa_jax.models.peft import TARGETS, Peft, PeftConfig, init_peft
from spa_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from spa_jax.training.peft_recipe import PeftRecipe
from spa_jax.training.step import init_state, train_step
from spa_jax.weights.huggingface import load_directory
from spa_jax.weights.peft import PeftPlugin, load_lora, load_trained
from spa_jax.weights.plugin import Plugin, load_plugin

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 13)).astype(np.int32)
LORA = PeftConfig("lora", 4, 6.0, ("q", "v"))
ADAPTER = PeftConfig("adapter", 5)


@pytest.fixture
def judged(save_model):
    """The same tiny LLaMA in PyTorch and here."""
    model, directory = save_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, load_directory(directory)


def their_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def our_logits(backbone, plugin, tokens=TOKENS):
    @jax.jit
    def forward(variables, peft):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        hidden = llama.apply(variables, jnp.asarray(tokens), positions, peft=peft).hidden
        return llama.apply(variables, hidden, method="logits")

    llama = Llama(backbone.config)
    return forward({"params": backbone.params}, Peft(plugin.config, plugin.params))


def random_plugin(config, backbone, seed=1):
    rng = np.random.default_rng(seed)
    shapes = init_peft(config, backbone.config, abstract=True)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.2 * rng.standard_normal(leaf.shape))), shapes)
    return PeftPlugin(config, params, backbone.name, backbone.fingerprint, "plain")


def their_lora(model, targets, **options):
    """A LoRA of PEFT's with random numbers in place of zeros."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return adapted.eval()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], MODULES], ids=["q and v", "everywhere"])
def test_a_lora_of_peft_says_here_what_it_says_there(targets, judged, tmp_path):
    model, backbone = judged
    base, adapted = their_logits(model), their_lora(model, targets)
    adapted.save_pretrained(tmp_path)
    plugin = load_trained(tmp_path)
    plugin.check(backbone)
    assert set(plugin.config.targets) == {name.removesuffix("_proj") for name in targets}
    expected = their_logits(adapted)
    assert np.abs(expected - base).max() > 0.5
    np.testing.assert_allclose(our_logits(backbone, plugin), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [("q", "v"), TARGETS], ids=["q and v", "everywhere"])
def test_peft_loads_what_is_saved_here(targets, judged, tmp_path):
    model, backbone = judged
    plugin = random_plugin(PeftConfig("lora", 4, 6.0, targets), backbone)
    plugin.save(tmp_path / "plugin")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "plugin")
    expected = our_logits(backbone, plugin)
    np.testing.assert_allclose(their_logits(adapted), expected, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        assert np.abs(their_logits(adapted) - expected).max() > 0.5


def test_a_lora_in_bfloat16_is_read_as_float32(judged, tmp_path):
    model, _ = judged
    adapted = their_lora(model, ["q_proj"]).to(torch.bfloat16)
    adapted.save_pretrained(tmp_path)
    params = load_lora(tmp_path).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    theirs = adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight
    np.testing.assert_array_equal(params["q"]["b"][1].T, theirs.float().detach().numpy())


def test_training_goes_where_peft_goes(judged, tmp_path):
    """Eight AdamW steps on padded rows, through clipping, warm-up and decay, from PEFT's start."""
    model, backbone = judged
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config).train()
    adapted.save_pretrained(tmp_path / "before")
    start = load_lora(tmp_path / "before")
    rng, rows, length, width, steps = np.random.default_rng(3), 4, 12, 6, 8
    lengths = np.array([12, 9, 7, 10], np.int32)
    tokens = rng.integers(1, 300, (rows, length)).astype(np.int32)
    weights = (np.arange(width) < np.array([[6], [2], [3], [5]])).astype(np.float32)
    predict = np.where(weights > 0, (lengths[:, None] - 1) - np.arange(width), 0).astype(np.int32)
    targets = rng.integers(0, 300, (rows, width)).astype(np.int32)
    batch = Batch(tokens, lengths, predict, targets, weights)

    settings = OptimizerConfig(
        learning_rate=0.02, warmup_fraction=0.2, final_fraction=0.1, weight_decay=0.1, clip_norm=1.0, beta1=0.9,
        beta2=0.99,
    )  # fmt: skip
    tx, llama = make_optimizer(settings, steps), Llama(backbone.config, remat="full")
    recipe = PeftRecipe(start.config)
    state, ours = init_state(jax.tree.map(jnp.copy, start.params), tx), []
    for _ in range(steps):
        state, sums = train_step(recipe, llama, tx, 2, state, backbone.params, batch)
        ours.append(float(sums["consulted"] / sums["tokens"]))

    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    theirs, adam = [], torch.optim.AdamW(trainable, betas=(0.9, 0.99), weight_decay=0.1)
    mask = torch.from_numpy(np.arange(length) < lengths[:, None])
    for number in range(steps):
        adam.param_groups[0]["lr"] = float(schedule(settings, steps)(number))
        adam.zero_grad()
        logits = adapted(input_ids=torch.from_numpy(tokens).long(), attention_mask=mask.long()).logits
        chosen = logits[torch.arange(rows)[:, None], torch.from_numpy(predict).long()]
        losses = torch.nn.functional.cross_entropy(
            chosen.reshape(-1, 300), torch.from_numpy(targets).long().reshape(-1), reduction="none"
        )
        loss = (losses * torch.from_numpy(weights).reshape(-1)).sum() / weights.sum()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(trainable, 1.0) > 1, "clipping would not be tested"
        adam.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert theirs[-1] < theirs[0] - 1

    adapted.eval().save_pretrained(tmp_path / "after")
    trained = load_lora(tmp_path / "after").params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, start.params)
    assert min(jax.tree.leaves(moved)) > 0.02
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, trained)
    found = our_logits(backbone, dataclasses.replace(start, params=state.params))
    np.testing.assert_allclose(found, their_logits(adapted), atol=1e-4, rtol=1e-4)


def test_an_adapter_says_what_pytorch_says_with_two_bottlenecks_a_block(judged):
    model, backbone = judged
    plugin = random_plugin(ADAPTER, backbone)

    def bottleneck(name, layer):
        a, b, a_bias, b_bias = (
            torch.from_numpy(np.array(plugin.params[name][key][layer])) for key in ("a", "b", "a_bias", "b_bias")
        )

        def hook(module, inputs, output):
            y = output[0] if isinstance(output, tuple) else output
            y = y + torch.relu(y @ a + a_bias) @ b + b_bias
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    base = their_logits(model)
    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(bottleneck("attention", layer))
        block.mlp.register_forward_hook(bottleneck("mlp", layer))
    expected = their_logits(model)
    assert np.abs(expected - base).max() > 0.5
    np.testing.assert_allclose(our_logits(backbone, plugin), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [LORA, PeftConfig("lora", 2, 0.5, TARGETS), ADAPTER])
def test_what_is_loaded_is_what_was_saved_to_the_bit(config, judged, tmp_path):
    plugin = random_plugin(config, judged[1])
    plugin.save(tmp_path / "plugin")
    loaded = load_trained(tmp_path / "plugin")
    assert dataclasses.replace(loaded, params={}) == dataclasses.replace(plugin, params={})
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plugin.params)
    with pytest.raises(UserError, match=f"holds a '{config.setting}', which works within the backbone"):
        load_plugin(tmp_path / "plugin")
    other = dataclasses.replace(judged[1], fingerprint="another")
    with pytest.raises(UserError, match=r"was trained on the backbone .* not on .* another"):
        loaded.check(other)


def rewrite(name, **keys):
    def spoil(directory):
        described = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(described | keys))

    return spoil


def reweigh(change):
    def spoil(directory):
        [path] = directory.glob("*.safetensors")
        arrays = safetensors.numpy.load_file(path)
        change(arrays)
        safetensors.numpy.save_file(arrays, path)

    return spoil


def rename(old, new):
    return reweigh(lambda arrays: arrays.update({new: arrays.pop(old)}))


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
LORA_FILE = "adapter_config.json"
SPOILED = {
    "no config": (LORA, lambda d: (d / LORA_FILE).unlink(), "adapter_config.json' is damaged: FileNotFoundError"),
    "no JSON": (LORA, lambda d: (d / LORA_FILE).write_text("{"), "adapter_config.json' is damaged"),
    "no object": (LORA, lambda d: (d / LORA_FILE).write_text("[]"), "adapter_config.json' is damaged"),
    "kind": (LORA, rewrite(LORA_FILE, peft_type="IA3"), "is of kind 'IA3' and rank 4"),
    "rank": (LORA, rewrite(LORA_FILE, r="4"), "is of kind 'LORA' and rank '4'"),
    "dora": (LORA, rewrite(LORA_FILE, use_dora=True), "asks for use_dora=True, which is not supported"),
    "bias": (LORA, rewrite(LORA_FILE, bias="all"), "asks for bias='all'"),
    "ranks": (LORA, rewrite(LORA_FILE, rank_pattern={"q": 8}), r"asks for rank_pattern=\{'q': 8\}"),
    "start": (LORA, rewrite(LORA_FILE, init_lora_weights="pissa"), "asks for init_lora_weights='pissa'"),
    "new key": (LORA, rewrite(LORA_FILE, use_novelty=2), "asks for use_novelty=2"),
    "alpha": (LORA, rewrite(LORA_FILE, lora_alpha=float("nan")), "lora_alpha is nan, and must be a finite number"),
    "alpha huge": (LORA, rewrite(LORA_FILE, lora_alpha=10**400), "and must be a finite number"),
    "deep": (LORA, lambda d: (d / LORA_FILE).write_text("[" * 100_000), "adapter_config.json' is damaged: .*too deep"),
    "ranks of blocks": (
        LORA,
        reweigh(lambda arrays: arrays.update({KEY: arrays[KEY][:-1]})),
        r"layers\.\{\}\.self_attn\.q_proj\.lora_A\.weight is not of one shape in all blocks",
    ),
    "alpha type": (LORA, rewrite(LORA_FILE, lora_alpha="8"), "lora_alpha is '8'"),
    "NaN": (LORA, reweigh(lambda a: a[KEY].__setitem__((0, 0), np.nan)), f"values of {KEY} are NaN or infinite"),
    "infinite": (ADAPTER, reweigh(lambda a: a["mlp.b_bias"].__setitem__((0, 0), np.inf)), "values of mlp.b_bias are"),
    "no weights": (LORA, lambda d: (d / "adapter_model.safetensors").unlink(), "cannot read '.*adapter_model"),
    "lost": (LORA, reweigh(lambda arrays: arrays.pop(KEY)), f"lacks {KEY}: a LoRA must be on all blocks"),
    "unknown": (LORA, rename(KEY, "lm_head.lora_A.weight"), r"unknown tensors \['lm_head.lora_A.weight'\]"),
    "empty": (LORA, reweigh(lambda arrays: arrays.clear()), "is no LoRA of a LLaMA"),
    "origin": (LORA, rewrite("plugin_config.json", template="alpaca"), "plugin_config.json' is damaged"),
    "width": (ADAPTER, rewrite("plugin_config.json", config={"setting": "adapter"}), "plugin_config.json' is damaged"),
    "format": (ADAPTER, rewrite("plugin_config.json", format_version=1), "has plugin format 1"),
    "no numbers": (ADAPTER, lambda d: (d / "plugin.safetensors").unlink(), "cannot read '.*plugin.safetensors'"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_no_lora_and_no_adapter_is_refused_in_one_line(case, judged, tmp_path):
    config, spoil, message = SPOILED[case]
    random_plugin(config, judged[1]).save(tmp_path / "plugin")
    spoil(tmp_path / "plugin")
    with pytest.raises(UserError, match=message) as refused:
        load_trained(tmp_path / "plugin")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "spoil", "wrong"),
    [
        (LORA, rewrite(LORA_FILE, r=3), r"\['q.a', 'q.b', 'v.a', 'v.b'\]"),
        (ADAPTER, reweigh(lambda a: a.pop("mlp.b_bias")), r"\['mlp.b_bias'\]"),
        (ADAPTER, reweigh(lambda a: a.update({"mlp.c": a["mlp.a"]})), r"\['mlp.c'\]"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(config, spoil, wrong, judged, tmp_path):
    random_plugin(config, judged[1]).save(tmp_path / "plugin")
    spoil(tmp_path / "plugin")
    with pytest.raises(UserError, match=f"does not fit the backbone .* misshapen {wrong}"):
        load_trained(tmp_path / "plugin").check(judged[1])


def test_a_plugin_is_still_a_plugin(tmp_path):
    from test_plugin_files import make_plugin

    make_plugin().save(tmp_path / "plugin")
    assert isinstance(load_trained(tmp_path / "plugin"), Plugin)
    with pytest.raises(UserError, match="no plugin at "):
        load_trained(tmp_path)
