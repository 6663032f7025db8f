"""The tables that show cells in rows and columns, as data: Tables 1 and 3 to 7, Figure 4, and those that the paper does
not have: all metrics by training size, repetition, entries, and ablations on SciQ and CoQA.

    python -m experiments.paper.tables [table1 figure4 ...] --scale=mini --data=DIR

Table 2, whose times are measured, is `experiments.paper.table2`.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import flags

from experiments.paper import ablations
from experiments.paper import report as reporting
from experiments.paper.cells import (
    Cell,
    cell_of,
    inner_training,
    lst_cell,
    one_shot,
    plugin_training,
    short_training,
    size_training,
    spa_cell,
    transformer_training,
)
from experiments.paper.grid import Column, Grid, Table, by_task, paper_by_task, rouge_l
from experiments.paper.report import Rows, open_store, plot_bars, plt
from experiments.paper.scales import BUDGET, CLOSED_BOOK, EPOCHS, SIZES, TASKS, TITLES, Scale
from experiments.paper.store import CellStore
from spa_jax import command
from spa_jax.data.tasks import TASKS as DATA_SETS
from spa_jax.errors import UserError

flags.adopt_module_key_flags(reporting)  # --help shows them


def methods(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the cells of Table 1: token-wise side networks, and on some tasks the transformer that LST has."""
    found = {"one-shot": one_shot(task), "LST": lst_cell(scale, task), "SPA": spa_cell(scale, task)}
    if task in scale.transformer:
        found["LST, transformer"] = cell_of(transformer_training(scale, task, "s2"), "s3")
        found["SPA, transformer"] = cell_of(transformer_training(scale, task))
    return found


def settings(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the cells of Table 3, and SPA at the paper's share of tokens, without and with `router.offset`."""
    added, replaced = plugin_training(scale, task), plugin_training(scale, task, "s2")
    return {
        "S1": cell_of(added, "s1"),
        "S2": cell_of(replaced),
        "S3": lst_cell(scale, task),
        "SPA": spa_cell(scale, task),
        f"SPA at {BUDGET}": cell_of(added, budget=BUDGET),
        f"SPA with offset at {BUDGET}": cell_of(plugin_training(scale, task, offset=True), budget=BUDGET),
    }


def sizes(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the cells of Tables 5 to 7: of the best plugin, but on the closed book."""
    if task not in scale.by_size:
        return head_sizes(scale, task)
    return {f"SPA {size}": cell_of(size_training(scale, task, size)) for size in SIZES}


def head_sizes(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the same cells of corrections in front of the LM head, on the rows of the other tables."""
    return {f"SPA {size}": spa_cell(scale, task, size) for size in SIZES}


def entries(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the cells that compare corrections in front of the LM head, those before an inner block, and LoRA.

    All are trained on the same rows, lengths and epochs; SPA before the inner block on SciQ with two more seeds, and
    with each label of its router as what asking gains after the router's own earlier decisions.
    """
    head, added = short_training(scale, task, "spa"), inner_training(scale, task, "spa")
    found = {"one-shot": one_shot(task), "SPA, head": cell_of(head), AT_HEAD: cell_of(head, budget=BUDGET)}
    if task in scale.replacing:
        replaced = inner_training(scale, task, "s2")
        found |= {"LST (S3), inner": cell_of(replaced, "s3"), "S2, inner": cell_of(replaced)}
    found |= {"S1, inner": cell_of(added, "s1"), INNER: cell_of(added), AT_INNER: cell_of(added, budget=BUDGET)}
    for seed in range(1, SEEDS if task == "sciq" else 1):
        again = inner_training(scale, task, "spa", seed)
        found[f"{AT_INNER}, seed {seed}"] = cell_of(again, budget=BUDGET)
    if task == "sciq" and "router.labels" in scale.plugin:  # what it has instead of the default
        taught = inner_training(scale, task, "spa", labels="router")
        taught_by = "SPA with router.labels=router"
        found |= {
            f"{taught_by}, inner": cell_of(taught),
            f"{taught_by} at {BUDGET}, inner": cell_of(taught, budget=BUDGET),
        }
    if task in scale.beside_lora:
        found["LoRA"] = cell_of(short_training(scale, task, "lora"))
    return found


def texts(scale: Scale, task: str) -> dict[str, Cell]:
    """Returns the cells of Tables 1, 3 and 6 whose texts are compared."""
    smaller = {f"SPA {size}": spa_cell(scale, task, size) for size in SIZES[:-1]}
    return {"one-shot": one_shot(task), **smaller, **settings(scale, task)}


AT_HEAD, INNER, AT_INNER = f"SPA at {BUDGET}, head", "SPA, inner", f"SPA at {BUDGET}, inner"
SEEDS = 3
FIGURE4_TASKS, FIGURE4_EPOCHS = ("xsum", "sciq"), (1, 2, 4, 8, EPOCHS)
PARALLEL, SEQUENTIAL = "parallel (S1)", "sequential (S3)"


def epochs(scale: Scale, task: str, setting: str) -> dict[int, Cell]:
    """Returns the cells of a line of Figure 4: whole runs of so many epochs, each with its own schedule."""
    trained, evaluated = {PARALLEL: ("spa", "s1"), SEQUENTIAL: ("s2", "s3")}[setting]
    return {count: cell_of(plugin_training(scale, task, trained, epochs=count), evaluated) for count in FIGURE4_EPOCHS}


def _figure4(scale: Scale) -> Grid:
    return {
        f"{TITLES[task]}, {setting}": {str(count): cell for count, cell in epochs(scale, task, setting).items()}
        for task in FIGURE4_TASKS
        for setting in (PARALLEL, SEQUENTIAL)
    }


def _table4(scale: Scale) -> Grid:
    return {PAPER_ROW: {"": None}, **{TITLES[task]: {"": spa_cell(scale, task)} for task in TASKS}}


def _entries(task: str, scale: Scale) -> Grid:
    return {row: {"": cell} for row, cell in entries(scale, task).items()}


def _in_rows(cells: Callable[[Scale, str], Mapping[str, Cell]], scale: Scale) -> Grid:
    found = {TITLES[task]: cells(scale, task) for task in EVERY_TASK if task in scale.sizes}
    return {f"{title}, {row}": {"": cell} for title, rows in found.items() for row, cell in rows.items()}


def _ablation(task: str, scale: Scale) -> Grid:
    return {row: {"": cell} for row, cell in ablations.cells(scale, task).items()}


def plot_epochs(path: Path, title: str, rows: Rows) -> None:
    """Draws Figure 4: a panel for each task, a line with its interval for each setting."""
    figure, panels = plt.subplots(1, len(FIGURE4_TASKS), figsize=(9, 3.4), layout="constrained", squeeze=False)
    for task, axes in zip(FIGURE4_TASKS, panels[0]):
        for setting in (PARALLEL, SEQUENTIAL):
            row = rows[f"{TITLES[task]}, {setting}"]
            found = [(int(count), entry) for count, entry in row.items() if entry.interval is not None]
            line = axes.plot([x for x, _ in found], [entry.ours for _, entry in found], "o-", label=setting)
            low, high = ([entry.interval[end] for _, entry in found if entry.interval is not None] for end in (0, 1))
            axes.fill_between([x for x, _ in found], low, high, color=line[0].get_color(), alpha=0.15, linewidth=0)
        axes.set(title=TITLES[task], xlabel="epochs", ylabel="ROUGE-L")
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


by_size_caption = operator.attrgetter("by_size_caption")
PAPER_ROW = "paper (LLaMA-7B)"
EVERY_TASK = (*TASKS, CLOSED_BOOK)
LOSSES = ("loss/base", "loss/plugin", "router/usage", f"loss/at {BUDGET}", "loss/always", "loss/oracle", "oracle/usage")
ABLATION = (
    Column("params/trainable", "parameters", of_training=True, digits=0),
    *(Column(metric, metric, digits=3) for metric in LOSSES),
)
PROTOCOL = (
    "SmolLM2-135M-Instruct, 8 epochs at a learning rate of 0.001, {}. Losses are in nats per answer token of the test "
    "rows, teacher-forced; nothing is generated. Tables 1 to 4 have another protocol, {}, and cannot be compared."
)
ENTRIES = (
    Column("loss/{setting}", "nats", digits=3),
    Column("score/rougeL", "ROUGE-L"),
    Column("score/f1", "F1"),
    Column("consulted_share", "share"),
)
BY_SIZE = (
    Column("data/train_questions", "rows", of_training=True, digits=0),
    Column("epochs", "epochs", of_training=True, digits=0),
    Column("loss/base", "nats of the backbone alone", digits=3),
    Column("nats", "nats", digits=3),
    Column("score/rougeL", "ROUGE-L"),
    Column("score/f1", "F1"),
    Column("share", "share"),
)
SIZES_NOTE = (
    "Nats are of the test split's target tokens, teacher-forced; shares are in per cent of generated tokens, EOS "
    "included, by beam search, at the router's own threshold. F1 is of short answers."
)
HEAD_NOTE = "The closed book is of corrections in front of the LM head, after 15 epochs."
PAPER_SIZES = {
    f"SPA {size}": [DATA_SETS[task].sizes.get(size, DATA_SETS[task].paper_full) for task in TASKS] for size in SIZES
}

TABLES = {
    "table1": Table(
        "Table 1: ROUGE-L of one-shot prompting, LST and SPA",
        by_task(methods),
        rouge_l(
            {
                "one-shot": (17.32, 22.36, 15.32, 17.21),
                "LST": (28.18, 32.15, 31.24, 23.24),
                "SPA": (35.52, 39.22, 37.30, 25.38),
            }
        ),
        plot=plot_bars,
    ),
    "table3": Table(
        "Table 3: ROUGE-L of S1, S2, S3 and SPA",
        by_task(settings),
        rouge_l(
            {
                "S1": (36.24, 40.55, 38.81, 25.91),
                "S2": (30.29, 34.19, 32.11, 23.71),
                "S3": (28.18, 32.15, 31.24, 23.24),
                "SPA": (35.52, 39.22, 37.30, 25.38),
            }
        ),
        Column(
            "consulted_share", "share", mean="mean share", paper_means={"S1": 1.0, "S2": 0.68, "S3": 1.0, "SPA": 0.62}
        ),
        note="Shares are of generated tokens, EOS included, by beam search.",
        plot=plot_bars,
    ),
    "table4": Table(
        "Table 4: the effect of the side network",
        _table4,
        Column("params/trainable_percent", "% param", of_training=True, paper={PAPER_ROW: {"": 0.21}}),
        Column("effect/M", "M", paper={PAPER_ROW: {"": 0.62}}),
        Column("effect/diff_rate", "diff rate", paper={PAPER_ROW: {"": 78.2}}),
        Column("effect/diff_pick_rate", "diff pick rate", paper={PAPER_ROW: {"": 56.8}}),
        note="Along the greedy generations of the first 128 test questions. The paper does not say on which data.",
    ),
    "table5": Table(
        "Table 5: training sizes",
        by_task(sizes, EVERY_TASK),
        Column("data/train_questions", of_training=True, digits=0, paper=paper_by_task(PAPER_SIZES)),
        Column("epochs", "epochs", of_training=True, digits=0),
        note="Rows of the training split; of CoQA questions. Each size is the first part of one shuffle, so a smaller "
        f"one is part of every larger one. {HEAD_NOTE}",
        caption=by_size_caption,
    ),
    "table6": Table(
        "Table 6: ROUGE-L of SPA by training size",
        by_task(sizes, EVERY_TASK),
        rouge_l(
            {
                "SPA small": (31.5, 36.2, 34.7, 22.1),
                "SPA medium": (33.8, 38.4, 36.2, 23.8),
                "SPA full": (35.5, 39.2, 37.3, 25.4),
            }
        ),
        note=HEAD_NOTE,
        plot=plot_bars,
        caption=by_size_caption,
    ),
    "table7": Table(
        "Table 7: share of tokens the device is asked for, by training size",
        by_task(sizes, EVERY_TASK),
        Column(
            "share",
            mean="mean of the four",
            paper_means={"SPA small": 82.3, "SPA medium": 71.5, "SPA full": 61.8},
        ),
        note="In per cent of generated tokens, EOS included, by beam search. The mean leaves the closed book out. No "
        f"budget is set: the threshold is the paper's argmax. {HEAD_NOTE}",
        plot=plot_bars,
        caption=by_size_caption,
    ),
    "sizes": Table(
        "All metrics by training size",
        functools.partial(_in_rows, sizes),
        *BY_SIZE,
        note=f"{SIZES_NOTE} {HEAD_NOTE}",
        caption=by_size_caption,
    ),
    "sizes_head": Table(
        "All metrics by training size, corrections in front of the LM head",
        functools.partial(_in_rows, head_sizes),
        *BY_SIZE,
        note=SIZES_NOTE,
    ),
    "figure4": Table(
        "Figure 4: ROUGE-L after so many epochs, parallel and sequential", _figure4, rouge_l({}), plot=plot_epochs
    ),
    "repetition": Table(
        "Repetition",
        by_task(texts),
        Column("repetition"),
        note="In per cent of each text's runs of four words, those that it has had before (Welleck et al. 2020).",
        plot=plot_bars,
    ),
    **{
        f"entries_{task}": Table(
            f"{TITLES[task]}: corrections in front of the LM head and before an inner block, beside LoRA",
            functools.partial(_entries, task),
            *ENTRIES,
            note="Head is in front of the LM head, inner where the best plugin of `experiments.paper.search` enters. "
            "Nats are of the test split's target tokens, teacher-forced; shares are of generated tokens.",
        )
        for task in TASKS
    },
    "ablation_sciq": Table(
        "Choices of training on SciQ, teacher-forced: rows of 320 tokens, 8 epochs",
        functools.partial(_ablation, "sciq"),
        *ABLATION,
        folder=ablations.FOLDER,
        caption=lambda _: PROTOCOL.format(
            "930 rows of at most 320 tokens", "384 tokens, 15 epochs and a learning rate chosen on validation"
        ),
    ),
    "ablation_coqa": Table(
        "Choices of training on CoQA, teacher-forced: rows of 512 tokens, 8 epochs",
        functools.partial(_ablation, "coqa"),
        *ABLATION,
        folder=ablations.FOLDER,
        caption=lambda _: PROTOCOL.format(
            "795 rows of at most 512 tokens, three questions of each story as rows of their own",
            "whole conversations of at most 1024 tokens, 15 epochs and a learning rate chosen on validation",
        ),
    ),
}


def cells(scale: Scale) -> list[Cell]:
    """Returns the cells of all tables."""
    grids = [table.grid(scale) for table in TABLES.values()]
    return [cell for grid in grids for groups in grid.values() for cell in groups.values() if cell is not None]


def report(store: CellStore) -> None:
    """Writes all tables."""
    for name, table in TABLES.items():
        table.write(store, name)


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise UserError(f"there is no table '{unknown[0]}'; tables are {', '.join(TABLES)}")
    store = open_store()
    for name in names or TABLES:
        TABLES[name].write(store, name)


if __name__ == "__main__":
    command.run(main, positional=True)
