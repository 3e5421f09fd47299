# ruff: noqa
# Cells that several notebooks have: the same `# %%` line in a notebook's source takes one of them.

# %% [markdown] shared: data settings
# ## Settings: base and data
# `MODEL` is the base, a Hub id or a folder. Without data of your own phantoms are drawn, to see the path. `SOURCES` is the path of your
# [sources file](https://github.com/dentalgemma/dentalgemma#your-annotations-the-sources-file), in Drive or a Kaggle
# input. `UPLOAD` (Colab) asks for a ZIP instead: `sources.yaml` and the files that it names. `PRESET_DATA` is a folder
# with the public sets of the published model, as `dentalgemma build --preset list` names them; look at their licences
# first.
#
# Everything is written to the folder `WORK`. With `DRIVE` (Colab) it lies in your Google Drive and outlasts the session.

# %% shared: data settings
MODEL = "google/medgemma-1.5-4b-it"  # @param {type:"string"}
SOURCES = ""  # @param {type:"string"}
UPLOAD = False  # @param {type:"boolean"}
PRESET_DATA = ""  # @param {type:"string"}
PHANTOMS = 400  # @param {type:"integer"}
WORK = "dental"  # @param {type:"string"}
DRIVE = False  # @param {type:"boolean"}

# %% [markdown] shared: install
# ## Install
# The code of `REVISION`, bitsandbytes for 4 bits, and the versions of all else that it was tested with; this machine's
# torch stays where it is new enough. A tag (`v…`) always gives the same code. `main`, between releases, moves: the line
# below the cell names the commit. Where GitHub has no such revision it stops, and takes no other by itself.

# %% shared: install
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

VERSION = "VERSION"
REVISION = "REVISION"  # a tag, a branch or a whole commit
GITHUB = "https://github.com/dentalgemma/dentalgemma"
RAW = "https://raw.githubusercontent.com/dentalgemma/dentalgemma"


def find_installed():
    """Version of what is here, then revision and commit where pip had it from GitHub; Nones where nothing is here."""
    if importlib.util.find_spec("dentalgemma") is None:
        return None, None, None
    noted = importlib.metadata.distribution("dentalgemma").read_text("direct_url.json") or "{}"
    origin = json.loads(noted).get("vcs_info", {})
    return importlib.import_module("dentalgemma").__version__, origin.get("requested_revision"), origin.get("commit_id")


def is_wanted(version, revision):
    """Whether this is what the notebook wants; a clone, which has no revision, is known by its version."""
    return revision == REVISION if revision else version == VERSION


def read_constraints():
    """The versions that the revision was tested with; stops where GitHub has no such revision."""
    try:
        return urllib.request.urlopen(f"{RAW}/{REVISION}/constraints.txt").read().decode()
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        raise RuntimeError(
            f'{GITHUB} has no {REVISION}: it may not be released yet. REVISION = "main" in this cell takes the newest '
            "code, which may do other things than this notebook says."
        ) from None
    except urllib.error.URLError as error:
        raise RuntimeError(
            f"GitHub cannot be reached ({error.reason}). On Kaggle: Settings, Internet on; then run this cell again."
        ) from None


def choose_pins(constraints, torch_version):
    """The tested versions of everything but torch: this machine's own build fits its driver, and stays if it can."""
    pins = [line for line in constraints.splitlines() if not line.startswith(("torch==", "torchvision=="))]
    if torch_version and tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2]) >= (2, 11):
        return [*pins, f"torch=={torch_version}"]
    return pins


def install():
    """Install the revision, with the versions that it was tested with."""
    found = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    pins = choose_pins(read_constraints(), found.get("torch"))
    Path("constraints.txt").write_text("\n".join(pins) + "\n")
    wanted = [f"dentalgemma[bnb] @ git+{GITHUB}@{REVISION}"]
    if "torchvision" in found and not pins[-1].startswith("torch=="):
        wanted.append("torchvision")  # has to fit the newer torch that is to come
    loaded = [name for name in ("dentalgemma", "numpy", "PIL", "pandas", "pyarrow", "torch") if name in sys.modules]
    pip = [sys.executable, "-m", "pip"]
    if "dentalgemma" in found:  # pip would leave another revision of the same version as it is
        subprocess.run([*pip, "uninstall", "-q", "-y", "dentalgemma"], check=True)
    subprocess.run([*pip, "install", "-q", "-c", "constraints.txt", *wanted], check=True)
    importlib.invalidate_caches()
    if loaded:
        raise RuntimeError("Installed. Now restart the session (Colab: Runtime, Restart session) and run all again.")


if not is_wanted(*find_installed()[:2]):
    install()
version, revision, commit = find_installed()
print(f"DentalGemma {version}" + (f", {revision}, commit {commit}" if commit else ""))

# %% [markdown] shared: run
# ## Helpers
# Nothing to change here: `run` runs a command and shows what it prints, `show_table` shows a table.

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


# %% [markdown] shared: sample
# ## Look
# Three rows, with the annotations behind each answer. Do the answers say what you see? `gallery.html` in the dataset
# folder shows more.

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

# %% [markdown] shared: log in
# ## Log in
# The token comes from this platform's secrets and is never shown. Where there is none, a login form appears: fill it in
# before you go on.

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

# %% [markdown] shared: work
# ## The folder
# Where everything is written, and found again when you run all a second time.

# %% shared: work
if DRIVE:
    if "google.colab" not in sys.modules:
        raise RuntimeError("DRIVE is for Colab; Kaggle keeps what lies in /kaggle/working. Set DRIVE = False.")
    from google.colab import drive

    drive.mount("/content/drive")
    WORK = Path("/content/drive/MyDrive") / WORK
WORK = Path(WORK)
WORK.mkdir(parents=True, exist_ok=True)
VQA, INSTRUCT, PROBE = WORK / "data" / "vqa", WORK / "data" / "instruct", WORK / "probe.jsonl"
print(f"Everything is written to {WORK.resolve()}")

# %% [markdown] shared: data
# ## The data
# What was chosen above. A ZIP that was uploaded is kept in `upload` in that folder, and asked for once.

# %% shared: data
import zipfile


def find_uploaded(name):
    """The uploaded file of this name, or None."""
    found = sorted((WORK / "upload").rglob(name))
    if len(found) > 1:
        raise RuntimeError(f"{WORK / 'upload'} holds {name} {len(found)} times: remove all but one, and run again.")
    return found[0] if found else None


def upload_sources():
    """Ask for a ZIP where none was unpacked yet, and return its sources file."""
    if "google.colab" not in sys.modules:
        raise RuntimeError(
            "UPLOAD is for Colab. On Kaggle: Add Input, Upload, then put the path of your sources file below "
            "/kaggle/input into SOURCES, and set UPLOAD = False."
        )
    if find_uploaded("sources.yaml"):
        print(f"As uploaded before: {WORK / 'upload'}; delete that folder to upload anew.")
        return find_uploaded("sources.yaml")
    from google.colab import files

    for name in files.upload():
        if not zipfile.is_zipfile(name):
            raise RuntimeError(f"{name} is no ZIP: pack sources.yaml and the files that it names into one.")
        with zipfile.ZipFile(name) as archive:
            archive.extractall(WORK / "upload")
    if not find_uploaded("sources.yaml"):
        raise RuntimeError("No sources.yaml was uploaded: pack it, with the files that it names, into a ZIP.")
    return find_uploaded("sources.yaml")


if SOURCES and UPLOAD:
    raise RuntimeError('SOURCES and UPLOAD both name data: set SOURCES = "" or UPLOAD = False.')
if SOURCES or UPLOAD:
    chosen, told = [SOURCES or upload_sources()], "your sources"
elif PRESET_DATA:
    chosen, told = ["--preset", "dentalgemma_vqa", "--data", PRESET_DATA], "the public sets"
else:
    told = "phantoms (drawn radiographs)"
    print("No data named: phantoms are drawn. The model will learn phantoms, and nothing about patients.")
    if not (WORK / "phantoms" / "sources.yaml").is_file():
        run("dentalgemma phantom", WORK / "phantoms", "--images", PHANTOMS)
    chosen = [WORK / "phantoms" / "sources.yaml"]

# %% [markdown] shared: audit
# ## Audit
# What is in the annotation files and what is wrong with it, with file and line; `audit.html` has pictures. It changes
# nothing.

# %% shared: audit
run("dentalgemma audit", *chosen, "--html", WORK / "audit.html")

# %% [markdown] shared: build
# ## Build
# Questions and answers, each statement carried by an annotation, split so that no patient, image or copy lies in two
# splits.

# %% shared: build
run("dentalgemma build", *chosen, "--out", VQA)

# %% [markdown] shared: probe
# ## Closed questions
# With four options, so chance is a quarter; from the held-out split, which training never sees.

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

# %% [markdown] shared: table
# ### The table
# Whether the difference could be luck says an exact McNemar test on pairs of answers.

# %% shared: table
pair = json.loads((WORK / "comparison.json").read_text())["closed"]
show_table(
    ["model", f"right of {pair['n']}", "accuracy", "95 % interval (Wilson)"],
    [
        (name, side["correct"], f"{side['accuracy']:.1%}", f"{side['wilson'][0]:.1%} to {side['wilson'][1]:.1%}")
        for name, side in (("base", pair["a"]), ("tuned", pair["b"]))
    ],
)
print(f"Difference {100 * pair['difference']:+.1f} points, exact McNemar p = {pair['mcnemar_p']:.2g}")

# %% [markdown] shared: next
# ## Next
# `dentalgemma ask` puts one question to the model, `dentalgemma demo` opens a page, `dentalgemma quantize` makes a 4-bit
# copy. What the model says must be checked by a dental professional.
