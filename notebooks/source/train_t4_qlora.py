# ruff: noqa
# %% [markdown]
# # DentalGemma on a T4: QLoRA
#
# Adapt MedGemma 1.5 4B to dental radiographs on the free GPU of Colab or Kaggle: the base in 4 bits (NF4), adapters and
# arithmetic in float32, since a T4 only emulates bf16 and Gemma 3 overflows float16. Audit, build, look, check, train
# with a before/after table, merge onto the 16-bit base, card, and a push of the adapter behind a flag.
#
# - **GPU**: a T4. Colab: Runtime, Change runtime type. Kaggle: Settings, Accelerator, GPU T4 x2 (one of them is used).
# - **Terms**: accept those of [MedGemma](https://huggingface.co/google/medgemma-1.5-4b-it) with the account of your token.
# - **Token**: Colab: the key symbol on the left, a secret `HF_TOKEN` with access for this notebook. Kaggle: Add-ons,
#   Secrets, a secret `HF_TOKEN`.
# - **Time**: one epoch over 2,529 questions takes about 3 hours, estimated; for a trial of one hour set
#   `MORE = "--max_steps 200"`.
#
# **Research and education only.** This is no medical device and gives no diagnosis.

# %% [markdown]
# ## Settings
# Without data of your own phantoms are drawn, to see the path. `SOURCES` is your
# [sources file](https://github.com/dentalgemma/dentalgemma#your-annotations-the-sources-file), in Drive, a Kaggle input,
# or a ZIP that `UPLOAD` asks for. `PRESET_DATA` is a folder with the public sets of the published model, as
# `dentalgemma build --preset list` names them; look at their licences first.

# %%
MODEL = "google/medgemma-1.5-4b-it"  # @param {type:"string"}
SOURCES = ""  # @param {type:"string"}
PRESET_DATA = ""  # @param {type:"string"}
UPLOAD = False  # @param {type:"boolean"}
PHANTOMS = 400  # @param {type:"integer"}
DRIVE = False  # @param {type:"boolean"}
WORK = "dental"  # @param {type:"string"}

# %% [markdown]
# How it trains: the values of the T4 recipe. `MORE` takes any other of its settings, such as `--max_steps 200`.
# `DTYPE` is what the merged model is stored in. `PUSH` publishes the adapter as a private repository `REPO`.

# %%
EPOCHS = 1  # @param {type:"number"}
LEARNING_RATE = 5e-5  # @param {type:"number"}
MORE = ""  # @param {type:"string"}
PROBE_QUESTIONS = 120  # @param {type:"integer"}
DTYPE = "bfloat16"  # @param ["bfloat16", "float32"]
PUSH = False  # @param {type:"boolean"}
REPO = "your-name/dentalgemma-adapter"  # @param {type:"string"}
ALLOW_CPU = False  # @param {type:"boolean"}

# %% [markdown]
# ## Install
# The release and the versions that it was tested with, and bitsandbytes for 4 bits; this machine's torch stays.

# %% shared: install

# %% shared: run

# %% [markdown]
# ## The machine
# This notebook needs no bf16. `ALLOW_CPU` is for rehearsals with a small model.

# %% shared: gpu

# %%
if gpus and has_bf16:
    print(f"{name} has bf16: train_a100.ipynb trains faster on it, and both stages.")

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
# splits. The closed questions come from the held-out split, which training never sees.

# %% shared: build

# %% shared: probe

# %% [markdown]
# ## Look
# Do the answers say what you see? `gallery.html` in the dataset folder shows more.

# %% shared: sample

# %% [markdown]
# ## Check before it costs hours
# Rows, labels, memory, time and disk; it stops here if the run would be wasted.

# %%
CONFIG = RECIPES / "stage1_vqa_t4.yaml"
run(
    "dentalgemma doctor", CONFIG, "--model_name_or_path", MODEL, "--dataset_name", VQA,
    "--num_train_epochs", EPOCHS, "--learning_rate", LEARNING_RATE, *shlex.split(MORE),
)  # fmt: skip

# %% [markdown]
# ## Train
# LoRA on the language model of the 4-bit base. At the end the base, its adapter switched off, and the trained model
# answer the closed questions; it ends with an error if the model got significantly worse. When a session ends early, run
# all again with the same folder (`DRIVE`): the newest complete checkpoint is taken up.

# %%
RUN = WORK / "runs" / "stage1_vqa_t4"
run(
    LAUNCH, RECIPES / "stage1_vqa.py", "--config", CONFIG, "--model_name_or_path", MODEL, "--dataset_name", VQA,
    "--output_dir", RUN, "--num_train_epochs", EPOCHS, "--learning_rate", LEARNING_RATE,
    "--gate_questions", PROBE, *shlex.split(MORE), "--resume_from_checkpoint", "auto",
)  # fmt: skip
display(Image(RUN / "curves.png", width=800))

# %% [markdown]
# ## Before and after
# Four options, so chance is a quarter. Whether the difference could be luck says an exact McNemar test on pairs of
# answers.

# %%
run(
    "dentalgemma compare", RUN / "gate" / "start.jsonl", RUN / "gate" / "end.jsonl", "--questions", PROBE,
    "--name", "base", "--name", "tuned", "--out", WORK / "comparison.json",
)  # fmt: skip

# %% shared: table

# %% [markdown]
# ## Merge
# The adapter is folded into the 16-bit base, once and in fp32. The certificate compares every tensor, and the answers of
# adapter and merged model on real rows; without one that passed there is no card and no push.

# %%
TUNED = WORK / "models" / "dentalgemma"
if not (TUNED / "merge_certificate.json").is_file():
    run("dentalgemma merge", RUN, "--out", TUNED, "--dtype", DTYPE, "--rows", VQA)

# %% [markdown]
# ## Card
# Rendered from run facts and certificate. The figures above are those of the 4-bit model with its adapter: the merged
# weights are others, so the card does not show them.

# %%
run("dentalgemma card", TUNED)
print(f"Read {TUNED / 'README.md'} before you publish.")

# %% [markdown]
# ## Publish
# The adapter alone, private, in one commit, after checks for licences, secrets and metadata.

# %%
if PUSH:
    run("dentalgemma push", TUNED, REPO, "--adapter-only")
else:
    print("PUSH is off: nothing was uploaded.")

# %% [markdown]
# ## Next
# `dentalgemma ask` puts one question to the model, `dentalgemma demo` opens a page, `dentalgemma quantize` makes a 4-bit
# copy. What the model says must be checked by a dental professional.
