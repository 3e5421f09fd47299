"""What the doctor found, as a page for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

STYLES = {"prompt": "dim", "image": "cyan", "trained": "bold green"}
BAR = 40  # characters
LONGEST_PROMPT = 700  # characters of a prompt that are printed
MEMORY_ROWS = {
    "weights": "frozen weights",
    "adapters": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations of the step",
    "head": "fused head",
    "context": "CUDA context",
}
GIB, MIB = 2**30, 2**20


def print_page(report: dict, console: Console) -> None:
    """Print a diagnosis: what was found first, the verdict last, where the eye rests."""
    for part in (_rows, _lengths, _parts, _memory, _cost, _rehearsal):
        part(report, console)
    _verdict(report, console)


def _head(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _rows(report: dict, console: Console) -> None:
    if shown := report.get("shown"):
        _head(console, "What the model sees, and [green]what it is trained on[/]")
    for pieces in shown or ():
        text = Text()
        for kind, piece in pieces:
            text.append(_shorten(piece) if kind == "prompt" else piece, style=STYLES[kind])
        console.print(text, soft_wrap=True)
        console.print()
    if labels := report.get("labels"):
        tokens = labels["trained_tokens_per_row"]
        count = labels["rows_looked_at"]
        _line(console, f"{count} rows looked at: {tokens:.0f} tokens of each are trained, the answer and its turn end")


def _shorten(text: str) -> str:
    if len(text) <= LONGEST_PROMPT:
        return text
    return f"{text[: LONGEST_PROMPT // 2]} [… {len(text) - LONGEST_PROMPT} characters …] {text[-LONGEST_PROMPT // 2 :]}"


def _lengths(report: dict, console: Console) -> None:
    for split, facts in report.get("lengths", {}).items():
        _head(console, f"Tokens of a row, {split}")
        _line(
            console,
            f"{report['dataset']['rows'][split]:,} rows: {facts['shortest']:,} to {facts['longest']:,}, "
            f"median {facts['median']:,}, {facts['left_out']:,} left out",
        )
        most = max(count for _, count in facts["histogram"])
        for end, count in facts["histogram"]:
            console.print(f"{f'below {end:,}':>14} {'█' * round(BAR * count / most)} {count:,}", highlight=False)


def _parts(report: dict, console: Console) -> None:
    if not (parts := report.get("parts")):
        return
    _head(console, "What trains")
    table = Table("part", *(_right(name) for name in ("parameters", "trained", "share")), box=None)
    for part, counts in parts.items():
        share = counts["trainable"] / max(counts["parameters"], 1)
        table.add_row(part, f"{counts['parameters']:,}", f"{counts['trainable']:,}", f"{share:.2%}")
    console.print(table)


def _right(name: str):
    return Column(name, justify="right")


def _memory(report: dict, console: Console) -> None:
    if not (memory := report.get("memory")):
        return
    gpu, batch = report["gpu"], memory["batch"]
    images = f", {batch['images']} image{'s' * (batch['images'] > 1)}" if batch["images"] else ""
    images += f", features {memory['vision']}" if memory["vision"] else ""
    each = f", each of {gpu['gpus']} GPUs ({gpu['sharing']})" if gpu["gpus"] > 1 else ""
    _head(console, f"Memory on {gpu['name'].upper() if gpu['named'] else gpu['name']}{each} (estimate)")
    _line(console, f"A batch of {_batch(batch)}, each as long as the longest: {batch['tokens']:,} tokens{images}")
    if memory["chosen"]:
        switch = "gradient checkpointing" if memory["checkpointing"] else "no gradient checkpointing"
        sizes = (memory["per_device_train_batch_size"], memory["gradient_accumulation_steps"])
        _line(console, f"Chosen (memory: auto): batch {sizes[0]} × accumulation {sizes[1]}, {switch}")
    number, unit = (GIB, "GiB") if memory["bytes"]["total"] > 2 * GIB else (MIB, "MiB")
    table = Table("", _right(unit), box=None)
    for key, label in MEMORY_ROWS.items():
        table.add_row(label, f"{memory['bytes'][key] / number:,.2f}")
    table.add_row("in all", f"{memory['bytes']['total'] / number:,.2f}", style="bold")
    table.add_row("available", f"{memory['available'] / number:,.2f}")
    console.print(table)
    with_, without = (memory[f"activations_{word}_checkpointing"] / number for word in ("with", "without"))
    switch = "on" if memory["checkpointing"] else "off"
    _line(
        console,
        f"Activations: {with_:,.2f} {unit} with gradient checkpointing, {without:,.2f} without (it is {switch}). All "
        f"logits at once would take {memory['all_logits'] / number:,.2f}; TRL's fused head never holds them.",
    )


def _batch(batch: dict) -> str:
    sequences = batch["rows"]
    if batch["questions"] == 1:
        return "1 row" if sequences == 1 else f"{sequences} rows"
    packed = f"{batch['questions'] * sequences:.0f} rows packed into"
    return f"{packed} 1 sequence" if sequences == 1 else f"{packed} {sequences} sequences"


def _cost(report: dict, console: Console) -> None:
    if steps := report.get("steps"):
        _head(console, "Steps, time, space")
        _line(
            console,
            f"{steps['in_all']:,} steps of {steps['rows_per_step']} rows, {steps['per_epoch']:,} an epoch, "
            f"{steps['epochs']:g} epochs",
        )
    time = report.get("time") or {}
    if time:
        origin = "as stated"
        if time["origin"] == "estimated":
            work = f"{time['tflop_per_row']:.2g} TFLOP a row"
            origin = f"an estimate: {work} at {time['utilisation']:.0%} of the GPU's peak"
        _line(
            console,
            f"{_hours(time['hours_in_all'])} in all, {_hours(time['hours_per_epoch'])} an epoch, validation aside, at "
            f"{time['rows_per_second']:.2f} rows per second ({origin})",
        )
        if time.get("rows_per_sequence", 1) > 1:
            _line(console, f"Packed: {time['rows_per_sequence']:.1f} questions share the tokens of their image")
    if features := report.get("features"):
        once = f", encoded once in {_hours(time['encoding_hours'])} (in the total)" if "encoding_hours" in time else ""
        _line(console, f"Features: {features['pictures']:,} pictures, {_size(features['bytes'])}{once}")
    if disk := report.get("disk"):
        needs = ", ".join(f"{what} {size / GIB:,.2f} GiB" for what, size in disk["needs"].items())
        _line(console, f"Disk: {needs}; free {min(disk['free'].values()) / GIB:,.0f} GiB")
    if "access" in report:
        _line(console, f"Access to the model on the Hub: {report['access']}")
    if "first_loss" in report:
        _line(console, f"Loss before training, on validation rows: {report['first_loss']:.3f}")


def _size(number: float) -> str:
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / MIB:,.2f} MiB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _rehearsal(report: dict, console: Console) -> None:
    if not (rehearsal := report.get("rehearsal")):
        return
    _head(console, "Rehearsal: the recipe itself, on the small model of the same family, on the CPU")
    if not rehearsal["passed"]:
        _line(console, "failed")
        return
    losses = ", ".join(f"{loss:.2f}" for loss in rehearsal["losses"])
    proof = rehearsal.get("proof") or {}
    changed = f"; {proof['trained_tensors']} tensors had a gradient and changed" if proof else ""
    _line(console, f"{rehearsal['steps']} steps in {rehearsal['seconds']:.0f} s, losses {losses}{changed}")


def _verdict(report: dict, console: Console) -> None:
    console.print()
    for name, style in (("refusals", "red"), ("warnings", "yellow"), ("unchecked", "cyan")):
        word = {"refusals": "refused", "warnings": "warning", "unchecked": "not checked"}[name]
        for sentence in report[name]:
            _line(console, f"{word}: {sentence}", style)
    if report["sound"]:
        console.print("Nothing found that would waste this run.", style="bold green")
    else:
        count = len(report["refusals"])
        console.print(f"This run would be wasted: {count} thing{'s' * (count > 1)} to mend.", style="bold red")
