"""Write the notebooks from `source/`: edit there, then run `python notebooks/write_notebooks.py`.

A source is a Python file of cells: `# %%` starts code, `# %% [markdown]` text in comments. `# %% shared: name` and
`# %% [markdown] shared: name` take the cell with that line from `source/shared.py`. `"VERSION"` and `"REVISION"` become
what the notebooks install.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from dentalgemma import __version__
from dentalgemma.publishing.space import name_revision

FOLDER = Path(__file__).resolve().parent
REPOSITORY = "dentalgemma/dentalgemma"
# What Colab and Kaggle are asked for: a GPU by the name that each of them has for it, or none.
GPUS = {
    "quickstart_cpu": None,
    "train_a100": ("A100", "nvidiaTeslaA100"),
    "train_t4_qlora": ("T4", "nvidiaTeslaT4"),
}
CELL = re.compile(r"^# %%(.*)\n", flags=re.MULTILINE)


def read_cells(path: Path) -> list[tuple[str, str]]:
    """The cells of a source, each with what stands behind its `# %%`; what precedes the first is for editors."""
    _, *parts = CELL.split(path.read_text(encoding="utf-8"))
    return [(kind.strip(), text.strip("\n")) for kind, text in zip(parts[::2], parts[1::2], strict=True)]


def write_notebook(name: str) -> str:
    """The notebook of a source, as JSON; the same source always gives the same bytes."""
    shared = dict(read_cells(FOLDER / "source" / "shared.py"))
    cells = [("[markdown]", write_badges(name))]
    for kind, text in read_cells(FOLDER / "source" / f"{name}.py"):
        if "shared: " in kind:
            kind, text = kind.partition("shared: ")[0].strip(), shared[kind]
        text = text.replace('"VERSION"', f'"{__version__}"').replace('"REVISION"', f'"{name_revision(__version__)}"')
        cells.append((kind, text))
    notebook = {
        "cells": [make_cell(kind, text) for kind, text in cells],
        "metadata": make_metadata(name),
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def write_badges(name: str) -> str:
    """Links that open the notebook of the main branch in Colab and in Kaggle, as comments like all text here."""
    path = f"github.com/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    colab = path.replace("github.com", "https://colab.research.google.com/github")
    kaggle = f"https://kaggle.com/kernels/welcome?src=https://{path}"
    return (
        f"# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n"
        f"# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def make_cell(kind: str, text: str) -> dict:
    """A cell of the notebook format; its id follows from its text, so that it stays when others come and go."""
    code = kind == ""
    if not code:
        text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    cell_id = hashlib.sha256(text.encode()).hexdigest()[:8]
    source = text.splitlines(keepends=True)
    if code:
        return {
            "cell_type": "code",
            "execution_count": None,
            "id": cell_id,
            "metadata": {},
            "outputs": [],
            "source": source,
        }
    return {"cell_type": "markdown", "id": cell_id, "metadata": {}, "source": source}


def make_metadata(name: str) -> dict:
    """What Colab and Kaggle read before they start a machine."""
    gpu = GPUS[name]
    metadata = {
        "colab": {"name": f"{name}.ipynb", "provenance": [], "toc_visible": True},
        "kaggle": {
            "accelerator": gpu[1] if gpu else "none",
            "isGpuEnabled": gpu is not None,
            "isInternetEnabled": True,
            "language": "python",
            "sourceType": "notebook",
        },
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if gpu:
        metadata["accelerator"] = "GPU"
        metadata["colab"]["gpuType"] = gpu[0]
    return metadata


def main() -> None:
    for name in GPUS:
        path = FOLDER / f"{name}.ipynb"
        path.write_text(write_notebook(name), encoding="utf-8")
        print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
