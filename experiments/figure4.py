"""Figure 4: ROUGE-L of the parallel side network (S1, f + g) and the sequential one (S3, g alone) over epochs.

    python -m experiments.figure4 --scale=mini --data=DIR

Each point is a whole run of that many epochs, with its own schedule.
"""

from experiments.cells import Bench, Cell, Training
from experiments.report import Entry, main_of, plt, score, write
from experiments.scales import TITLES, Scale

EPOCHS = (1, 2, 4, 8, 15)
SETTINGS = {"parallel (S1)": ("s1", "spa"), "sequential (S3)": ("s3", "s2")}
TASKS = ("xsum", "sciq")


def cell(task: str, name: str, epochs: int) -> Cell:
    setting, trained = SETTINGS[name]
    return Cell(task, setting, Training(task, setting=trained, epochs=epochs))


def cells(scale: Scale) -> list[Cell]:
    return [cell(task, name, epochs) for task in TASKS for name in SETTINGS for epochs in EPOCHS]


def report(bench: Bench) -> None:
    rows: dict[str, dict[str, Entry]] = {}
    figure, panels = plt.subplots(1, len(TASKS), figsize=(4.5 * len(TASKS), 3.4), layout="constrained", squeeze=False)
    for task, axes in zip(TASKS, panels[0]):
        for name in SETTINGS:
            row = {str(epochs): score(bench.result(cell(task, name, epochs))) for epochs in EPOCHS}
            rows[f"{TITLES[task]}, {name}"] = row
            known = [(int(epochs), entry) for epochs, entry in row.items() if entry.interval is not None]
            line = axes.plot([x for x, _ in known], [entry.ours for _, entry in known], "o-", label=name)
            low, high = ([entry.interval[end] for _, entry in known if entry.interval is not None] for end in (0, 1))
            axes.fill_between([x for x, _ in known], low, high, color=line[0].get_color(), alpha=0.15, linewidth=0)
        axes.set(title=TITLES[task], xlabel="epochs", ylabel="ROUGE-L")
        axes.legend()
    write(bench, "figure4", "Figure 4: ROUGE-L after so many epochs, parallel and sequential", rows, plot=False)
    figure.savefig(bench.results / "figure4.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main_of(report)
