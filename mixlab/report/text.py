"""What a report says of its runs."""

from mixlab.report import records, tables

LEGEND = """\
Accuracies are on the test set, in percent. *merged*: right after the last merge; *local*: after the
last local training; mean and worst over agents. *consensus*: the average of all agents after each
was aligned to agent 0, BatchNorm statistics re-estimated; *plain average*: the same without
aligning (agents aligned only pairwise live in different bases, where it is near chance).
*distance*: root mean square distance of the agents to that consensus, as a fraction of their norm;
*plain distance*: to the plain average. *MB sent*: by an agent, on average, in the whole run.
*seconds*: training, matching and merging, without compilation and evaluation.
Agents that average within each step, before they train in it, are shown under *merged* as the
average they would form next.
"""

LEGEND_OF_ONE = """\
Accuracy is on the test set after the last epoch, in percent. *seconds*: training, without
compilation and evaluation.
"""

LEGEND_OF_ECE = """\
*confidence*: the mean of the largest probability; above the accuracy where a model is too sure of
itself, below where it is not sure enough. *ECE*: expected calibration error, how far the two lie
apart: the mean over examples of the gap in their bin of confidence (15 bins of equal width).
"""

LEGEND_OF_SUMMARY = """\
Test accuracy in percent, the mean of the agents, right after the last merge; of agents that never
merge, at the same time.
"""

LEGEND_OF_COMMUNICATION = """\
An agent's share on average, in the whole run. *messages*: sent; *sent* and *received*: megabytes
(10^6 bytes) by kind (activations are not sent: who has a neighbour's model can compute them);
*most sent*: by the agent that sends most; *local*, *match*, *merge*: seconds of all agents
together, without compilation; of what mixes within steps *merge* is by how much a step takes longer
than one of agents that do not communicate, timed once a run. Runs that were made at the same time
(`mixlab sweep --jobs`) have slowed one another.
"""


def notes(runs: list[records.Run]) -> list[str]:
    """What a reader of this table has to know besides."""
    notes = []
    if "augment" in records.differing(runs) and (base := records.base(runs)):
        notes.append(f"Each augmentation follows the base `{base}`.")
    for field in records.determined(runs):
        used: dict[str, list[str]] = {}
        for run in runs:
            config = run.setup["config"]
            used.setdefault(str(config[field]), []).append(config["strategy"])
        each = (f"`{value}` of {', '.join(dict.fromkeys(s))}" for value, s in used.items())
        notes.append(f"The {field}: {'; '.join(each)}.")
    if seeds := records.seeds(runs):
        notes.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
    return notes


def about_failures(failures: list[records.Failure]) -> list[str]:
    """The lines on runs that failed."""
    if not failures:
        return []
    cells = [["run", "after step", "reason"]]
    for failure in failures:
        step = "-" if failure.step is None else str(failure.step)
        cells.append([failure.name, step, " ".join(failure.reason.split())])
    return ["## Runs that failed", "", tables.markdown(cells, left=3), ""]


def about_unfinished(unfinished: list[records.Unfinished], runs: list[records.Run]) -> list[str]:
    """The lines on runs that have not come to their end; see `shown_unfinished`."""
    if not unfinished:
        return []
    lines = [f"- {run.name}: {run}" for run in unfinished]
    return ["## Runs that are not finished", "", shown_unfinished(unfinished, runs), "", *lines, ""]


def shown_unfinished(unfinished: list[records.Unfinished], runs: list[records.Run]) -> str:
    """A sentence on whether `runs`, which the tables show, are those that are not finished."""
    if {run.name for run in unfinished} & {run.name for run in runs}:
        return "No run is finished: what is shown is what they have reached."
    return "They are in no table and no figure; the same command goes on with them."


def about_faults(runs: list[records.Run]) -> list[str]:
    """What happened to the agents, told once for the runs to which the same happened."""
    told: dict[str, records.Run] = {}
    for run in runs:
        if run.setup["faults"]:
            told.setdefault(run.setup["faults"], run)
    if not told:
        return []
    several = bool(records.seeds(runs))
    lines = []
    for text, run in told.items():
        config = run.setup["config"]
        seed = f", seed {config['seed']}" if several else ""
        lines.append(f"- `{config['faults']}`{seed}: {'; '.join(text.splitlines())}")
    if any(run.setup["byzantine"] for run in runs):
        lines += ["", "Accuracies are those of the agents that are not Byzantine."]
    if any(" absent" in text for text in told):
        lines += ["", "Agents that are absent count, in means and worst, with what they had."]
    lines += ["", "Rounds are counted from 0 here, as in plans of faults."]
    return ["## Faults", "", *lines, ""]


def count(number: int, what: str) -> str:
    """So many of them, in the plural unless it is one."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def about_communication(runs: list[records.Run]) -> list[str]:
    """The lines on what communication cost."""
    return ["## Communication", "", tables.communication(runs), "", LEGEND_OF_COMMUNICATION]


def about(runs: list[records.Run]) -> str:
    """The set-up in a sentence."""
    setup = runs[0].setup
    config = setup["config"]
    compared = "augment" in records.differing(runs)
    augmentation = "" if compared else f"; augmentation `{config['augment']}`"
    splits = config["train_split"], config["test_split"]
    some = "" if splits == ("train", "test") else " ({}, {})".format(*splits)
    model = f"{config['model']} ({setup['parameters']:,} parameters) on {config['data']}{some}"
    common = (
        "" if "optimizer" in records.differing(runs) else f"optimizer `{config['optimizer']}`, "
    )
    optimizer = f"{common}batch {config['batch_size']}"
    if records.alone(runs):
        epochs = config["pretrain_epochs"] + config["rounds"] * config["epochs_per_round"]
        return (
            f"{model}{augmentation}; {optimizer}; {epochs} epochs of {setup['steps_per_epoch']} "
            f"steps. Ran as {setup['parallel']}."
        )
    differing = records.differing(runs)
    topology = "" if {"agents", "topology"} & {*differing} else f"{setup['topology']}; "
    ran = "" if "agents" in differing else f" Ran as {setup['parallel']}."
    if config.get("start_from") and "start_from" not in differing:
        ran = f" Began with the agents of `{config['start_from']}`.{ran}"
    return (
        f"{topology}{model}{augmentation}; {optimizer} an agent; "
        f"{count(config['pretrain_epochs'], 'epoch')} apart, then "
        f"{count(config['rounds'], 'round')} of "
        f"{count(config['epochs_per_round'], 'epoch')}.{ran}"
    )
