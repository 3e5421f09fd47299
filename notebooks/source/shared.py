# ruff: noqa
# Cells that several notebooks have: `# %% shared: name` in a notebook's source takes one of them.

# %% shared: install
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

VERSION = "VERSION"
GITHUB = "github.com/dentalgemma/dentalgemma"


def choose_pins(constraints, torch_version):
    """The tested versions of everything but torch: this machine's own build fits its driver, and stays if it can."""
    pins = [line for line in constraints.splitlines() if not line.startswith(("torch==", "torchvision=="))]
    if torch_version and tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2]) >= (2, 11):
        return [*pins, f"torch=={torch_version}"]
    return pins


def install(version):
    """Install this release, with the versions that it was tested with."""
    found = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    raw = f"https://raw.githubusercontent.com/dentalgemma/dentalgemma/v{version}/constraints.txt"
    pins = choose_pins(urllib.request.urlopen(raw).read().decode(), found.get("torch"))
    Path("constraints.txt").write_text("\n".join(pins) + "\n")
    wanted = [f"dentalgemma[bnb] @ git+https://{GITHUB}@v{version}"]
    if "torchvision" in found and not pins[-1].startswith("torch=="):
        wanted.append("torchvision")  # has to fit the newer torch that is to come
    loaded = [name for name in ("dentalgemma", "numpy", "PIL", "pandas", "pyarrow", "torch") if name in sys.modules]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", "constraints.txt", *wanted], check=True)
    importlib.invalidate_caches()
    if loaded:
        raise RuntimeError("Installed. Now restart the session (Colab: Runtime, Restart session) and run all again.")


if importlib.util.find_spec("dentalgemma") is None or importlib.import_module("dentalgemma").__version__ != VERSION:
    install(VERSION)
print("DentalGemma", importlib.import_module("dentalgemma").__version__)

# %% shared: run
import html
import io
import re
import shlex
import time

from IPython.display import HTML, Image, display

PROGRAMS = {"dentalgemma": "dentalgemma", "accelerate": "accelerate.commands.accelerate_cli"}
PLAIN = {
    "TTY_COMPATIBLE": "1",
    "NO_COLOR": "1",
    "COLUMNS": "110",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
PROGRESS = re.compile(r"%\||━ +\d|^\{'")  # bars of tqdm and rich, and the losses, of which a run draws curves


def run(command, *arguments):
    """Run a command and show what it prints, progress in one line; stop the notebook where it fails."""
    words = [*shlex.split(command), *map(str, arguments)]
    print("$", shlex.join(words))
    status = display({"text/plain": ""}, raw=True, display_id=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", PROGRAMS[words[0]], *words[1:]],
        env={**os.environ, **PLAIN},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
    try:
        show(output, status)
    except KeyboardInterrupt:
        print("Interrupted; waiting until it has saved what it was doing ...")
        show(output, status)
        raise
    finally:
        status.update({"text/plain": ""}, raw=True)
    if process.wait():
        raise RuntimeError(f"{shlex.join(words[:2])} stopped with exit code {process.returncode}; the reason is above")


def show(output, status):
    """Print lines as they come; progress, with the time left, goes to `status`, every other second."""
    shown = 0.0
    for line in output:
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip()
        if not line.endswith("\r") and not PROGRESS.search(text):
            if text:
                print(text)
        elif text and time.monotonic() - shown > 2:
            shown = time.monotonic()
            status.update({"text/plain": text}, raw=True)


def show_table(header, rows):
    """A table; whatever comes from data is shown as text."""
    lines = [f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    display(HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"))


# %% shared: sample
import base64

from datasets import disable_progress_bars, load_dataset

from data_builders.claims import claims_from_json

disable_progress_bars()


def show_rows(dataset, split, count):
    """The first row of each of some images: picture, question, answer, and the annotations that carry the answer."""
    seen = set()
    for row in load_dataset(str(dataset), split=split):
        if row["image_id"] in seen or len(seen) == count:
            continue
        seen.add(row["image_id"])
        picture = row["images"][0].convert("RGB")
        picture.thumbnail((480, 480))
        file = io.BytesIO()
        picture.save(file, "JPEG")
        display(HTML(f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'))
        carried = [annotation for claim in claims_from_json(row["claims"]) for annotation in claim.annotations]
        show_table(
            ["question", "answer", "annotations behind it"],
            [(row["prompt"][-1]["content"], row["completion"][0]["content"], ", ".join(carried))],
        )


show_rows(VQA, "train", 3)

# %% shared: log in
from huggingface_hub import get_token, notebook_login


def read_secret():
    """The secret HF_TOKEN of this platform, or None where there is none or this notebook may not read it."""
    if "google.colab" in sys.modules:
        from google.colab import userdata

        try:
            return userdata.get("HF_TOKEN")
        except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
            return None
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        from kaggle_secrets import UserSecretsClient

        try:
            return UserSecretsClient().get_secret("HF_TOKEN")
        except Exception:  # of several kinds, all of which mean that the secret is not attached
            return None
    return None


if Path(MODEL).is_dir() and not PUSH:
    print("The model lies here and nothing is pushed: no token is needed.")
else:
    secret = read_secret()
    if secret:
        os.environ["HF_TOKEN"] = secret.strip()  # for the commands below; it is never printed
    del secret
    if get_token():
        print("Logged in.")
    else:
        notebook_login()

# %% shared: data
import zipfile

if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    WORK = "/content/drive/MyDrive/dental"
WORK = Path(WORK)
WORK.mkdir(parents=True, exist_ok=True)
VQA, INSTRUCT, PROBE = WORK / "data" / "vqa", WORK / "data" / "instruct", WORK / "probe.jsonl"

if UPLOAD:
    from google.colab import files

    for name in files.upload():
        zipfile.ZipFile(name).extractall(WORK / "upload")
    SOURCES = next((WORK / "upload").rglob("sources.yaml"))

if SOURCES:
    chosen = [SOURCES]
elif PRESET_DATA:
    chosen = ["--preset", "dentalgemma_vqa", "--data", PRESET_DATA]
else:
    print("No data named: phantoms are drawn. The model will learn phantoms, and nothing about patients.")
    if not (WORK / "phantoms" / "sources.yaml").is_file():
        run("dentalgemma phantom", WORK / "phantoms", "--images", PHANTOMS)
    chosen = [WORK / "phantoms" / "sources.yaml"]

run("dentalgemma audit", *chosen, "--html", WORK / "audit.html")

# %% shared: build
run("dentalgemma build", *chosen, "--out", VQA)

# %% shared: probe
run("dentalgemma build-probe", VQA, "--split", "test", "--out", PROBE, "--limit", PROBE_QUESTIONS)

# %% shared: gpu
from dentalgemma.quickstart import recipes_folder

RECIPES = recipes_folder()


def list_gpus():
    """Name, memory in MiB and compute capability of each GPU."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(", ") for line in listed.splitlines()]


gpus = list_gpus()
if gpus:
    name, memory, capability = gpus[0]
    has_bf16 = float(capability) >= 8.0
    print(f"{name}, {int(memory) / 1024:.0f} GiB, bf16: {'yes' if has_bf16 else 'no'}")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one GPU here; recipes/README.md says how to use several
elif ALLOW_CPU:
    print("No GPU: a rehearsal on the CPU.")
else:
    raise RuntimeError("No GPU here: choose one (Colab: Runtime, Change runtime type; Kaggle: Settings, Accelerator)")
LAUNCH = f"accelerate launch --config_file '{RECIPES}/accelerate/{'single_gpu' if gpus else 'cpu'}.yaml'"

# %% shared: table
import json

pair = json.loads((WORK / "comparison.json").read_text())["closed"]
show_table(
    ["model", f"right of {pair['n']}", "accuracy", "95 % interval (Wilson)"],
    [
        (name, side["correct"], f"{side['accuracy']:.1%}", f"{side['wilson'][0]:.1%} to {side['wilson'][1]:.1%}")
        for name, side in (("base", pair["a"]), ("tuned", pair["b"]))
    ],
)
print(f"Difference {100 * pair['difference']:+.1f} points, exact McNemar p = {pair['mcnemar_p']:.2g}")
