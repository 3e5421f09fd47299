# ruff: noqa
# %% [markdown]
# # DentalGemma on an A100: both stages
#
# Adapt MedGemma 1.5 4B to dental radiographs: audit, build, look, check, stage 1 (questions about images), stage 2
# (clinical cases), merge, evaluate before and after, card, and a push behind a flag.
#
# - **GPU**: an A100, or another GPU with bf16 and 16 GB or more (L4, H100). Colab: Runtime, Change runtime type. On a T4
#   use `train_t4_qlora.ipynb`.
# - **Terms**: accept those of [MedGemma](https://huggingface.co/google/medgemma-1.5-4b-it) with the account of your token.
# - **Token**: Colab: the key symbol on the left, a secret `HF_TOKEN` with access for this notebook. Kaggle: Add-ons,
#   Secrets, a secret `HF_TOKEN`.
# - **Time**: 2,529 questions take about 20 minutes per stage on an A100, estimated; `doctor` estimates yours below.
#
# **Research and education only.** This is no medical device and gives no diagnosis.

# %% [markdown]
# ## Settings
# Without data of your own phantoms are drawn, to see the path. `SOURCES` is your
# [sources file](https://github.com/dentalgemma/dentalgemma#your-annotations-the-sources-file), in Drive, a Kaggle input,
# or a ZIP that `UPLOAD` asks for; `CASES` one with clinical cases. `PRESET_DATA` is a folder with the public sets of the
# published model, as `dentalgemma build --preset list` names them; look at their licences first.

# %%
MODEL = "google/medgemma-1.5-4b-it"  # @param {type:"string"}
SOURCES = ""  # @param {type:"string"}
CASES = ""  # @param {type:"string"}
PRESET_DATA = ""  # @param {type:"string"}
UPLOAD = False  # @param {type:"boolean"}
PHANTOMS = 400  # @param {type:"integer"}
DRIVE = False  # @param {type:"boolean"}
WORK = "dental"  # @param {type:"string"}

# %% [markdown]
# How it trains: the values of the recipes. `MORE` takes any other of their settings, such as `--lora_r 32`.
# `DTYPE` is what the merged model is stored in. `PUSH` publishes it as a private repository `REPO`.

# %%
EPOCHS_1 = 5  # @param {type:"number"}
LEARNING_RATE_1 = 5e-5  # @param {type:"number"}
EPOCHS_2 = 5  # @param {type:"number"}
LEARNING_RATE_2 = 5e-5  # @param {type:"number"}
MORE = ""  # @param {type:"string"}
PROBE_QUESTIONS = 300  # @param {type:"integer"}
ANSWERS = "generate"  # @param ["generate", "loglikelihood"]
DTYPE = "bfloat16"  # @param ["bfloat16", "float32"]
PUSH = False  # @param {type:"boolean"}
REPO = "your-name/dentalgemma"  # @param {type:"string"}
ALLOW_CPU = False  # @param {type:"boolean"}

# %% [markdown]
# ## Install
# The release and the versions that it was tested with; this machine's torch stays.

# %% shared: install

# %% shared: run

# %% [markdown]
# ## The machine
# bf16 needs an Ampere GPU or newer. `ALLOW_CPU` is for rehearsals with a small model.

# %% shared: gpu

# %%
if gpus and not has_bf16:
    raise RuntimeError(f"{name} has no bf16: choose an A100 or L4, or take train_t4_qlora.ipynb")

# %% [markdown]
# ## Log in
# The token comes from this platform's secrets and is never shown. Where there is none, a login form appears: fill it in
# before you go on.

# %% shared: log in

# %% [markdown]
# ## The data
# `audit` says what is in the annotation files and what is wrong with it, with file and line; `audit.html` has pictures.
# It changes nothing. With `DRIVE` everything is kept in your Google Drive.

# %% shared: data

# %% [markdown]
# ## Build
# Questions and answers, each statement carried by an annotation, split so that no patient, image or copy lies in two
# splits. Stage 2 needs clinical cases; without any it is left out.

# %% shared: build

# %%
if CASES:
    cases = [CASES]
elif PRESET_DATA and not SOURCES:
    cases = ["--preset", "dentalgemma_instruct", "--data", PRESET_DATA]
elif not SOURCES:
    cases = [WORK / "phantoms" / "cases.yaml"]
else:
    cases = []
    print("No cases: stage 2 will be left out.")
if cases:
    run("dentalgemma build-instruct", *cases, "--out", INSTRUCT)

# %% [markdown]
# ## Look
# Do the answers say what you see? `gallery.html` in the dataset folder shows more.

# %% shared: sample

# %% [markdown]
# ## Check before it costs money
# Rows, labels, memory, hours and disk; it stops here if the run would be wasted.

# %%
run(
    "dentalgemma doctor", RECIPES / "stage1_vqa.yaml", "--model_name_or_path", MODEL, "--dataset_name", VQA,
    "--num_train_epochs", EPOCHS_1, "--learning_rate", LEARNING_RATE_1, *shlex.split(MORE),
)  # fmt: skip

# %% [markdown]
# ## Before training
# The base answers closed questions from the held-out split, which training never sees.

# %% shared: probe

# %%
run("dentalgemma evaluate", PROBE, "--model", MODEL, "--out", WORK / "base.jsonl", "--mode", ANSWERS)

# %% [markdown]
# ## Stage 1: questions about images
# LoRA on the language model. When a session ends early, run all again with the same folder: the newest complete
# checkpoint is taken up.

# %%
STAGE1 = WORK / "runs" / "stage1_vqa"
run(
    LAUNCH, RECIPES / "stage1_vqa.py", "--model_name_or_path", MODEL, "--dataset_name", VQA, "--output_dir", STAGE1,
    "--num_train_epochs", EPOCHS_1, "--learning_rate", LEARNING_RATE_1, *shlex.split(MORE),
    "--resume_from_checkpoint", "auto",
)  # fmt: skip
display(Image(STAGE1 / "curves.png", width=800))

# %% [markdown]
# ## Stage 2: clinical cases
# Text only, starting from the adapter of stage 1.

# %%
LAST = STAGE1
if cases:
    LAST = WORK / "runs" / "stage2_instruct"
    run(
        LAUNCH, RECIPES / "stage2_instruct.py", "--model_name_or_path", STAGE1, "--dataset_name", INSTRUCT,
        "--output_dir", LAST, "--num_train_epochs", EPOCHS_2, "--learning_rate", LEARNING_RATE_2,
        *shlex.split(MORE), "--resume_from_checkpoint", "auto",
    )  # fmt: skip
    display(Image(LAST / "curves.png", width=800))

# %% [markdown]
# ## Merge
# All adapters are folded into the base at once. The certificate compares every tensor, and the answers of adapter and
# merged model on real rows; without one that passed there is no card and no push.

# %%
TUNED = WORK / "models" / "dentalgemma"
if not (TUNED / "merge_certificate.json").is_file():
    run("dentalgemma merge", LAST, "--out", TUNED, "--dtype", DTYPE, "--rows", VQA)

# %% [markdown]
# ## After training
# The same questions, and whether the difference could be luck: an exact McNemar test on pairs of answers.

# %%
run("dentalgemma evaluate", PROBE, "--model", TUNED, "--out", WORK / "tuned.jsonl", "--mode", ANSWERS)
run(
    "dentalgemma compare", WORK / "base.jsonl", WORK / "tuned.jsonl", "--questions", PROBE,
    "--out", WORK / "comparison.json",
)  # fmt: skip

# %% shared: table

# %% [markdown]
# ## Card
# Rendered from run facts, certificate and comparison. The licence follows from the base and from every source.

# %%
run("dentalgemma card", TUNED, "--comparison", WORK / "comparison.json")
print(f"Read {TUNED / 'README.md'} before you publish.")

# %% [markdown]
# ## Publish
# Private, in one commit, after checks for licences, secrets and metadata. `--public` is yours to add, once the card is
# read.

# %%
if PUSH:
    run("dentalgemma push", TUNED, REPO)
else:
    print("PUSH is off: nothing was uploaded.")

# %% [markdown]
# ## Next
# `dentalgemma ask` puts one question to the model, `dentalgemma demo` opens a page, `dentalgemma quantize` makes a 4-bit
# copy. What the model says must be checked by a dental professional.
