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

# %% [markdown] shared: data settings

# %% shared: data settings

# %% [markdown]
# ## Settings: the training
# The values of the recipes. `MORE` takes any other of their settings, such as `--lora_r 32`. Before and after training
# the model answers `PROBE_QUESTIONS` closed questions: it writes its answer (`generate`, as users see it), or the most
# likely option counts (`loglikelihood`, faster). `ALLOW_CPU` is for rehearsals with a small model.

# %%
EPOCHS_1 = 5  # @param {type:"number"}
LEARNING_RATE_1 = 5e-5  # @param {type:"number"}
MORE = ""  # @param {type:"string"}
PROBE_QUESTIONS = 300  # @param {type:"integer"}
ANSWERS = "generate"  # @param ["generate", "loglikelihood"]
ALLOW_CPU = False  # @param {type:"boolean"}

# %% [markdown]
# ## Settings: stage 2
# `CASES` is the path of a sources file with clinical cases. Empty, it is the `cases.yaml` of an uploaded ZIP, or the
# cases of preset or phantoms; where there are none stage 2 is left out.

# %%
CASES = ""  # @param {type:"string"}
EPOCHS_2 = 5  # @param {type:"number"}
LEARNING_RATE_2 = 5e-5  # @param {type:"number"}

# %% [markdown]
# ## Settings: the merged model
# `DTYPE` is what its weights are stored in. `PUSH` publishes it as a private repository `REPO`.

# %%
DTYPE = "bfloat16"  # @param ["bfloat16", "float32"]
PUSH = False  # @param {type:"boolean"}
REPO = "your-name/dentalgemma"  # @param {type:"string"}

# %% [markdown] shared: install

# %% shared: install

# %% [markdown] shared: run

# %% shared: run

# %% [markdown]
# ## The machine
# The GPU of this session, and what launches training on it.

# %% shared: gpu

# %% [markdown]
# This notebook needs bf16, which Ampere GPUs and newer ones have.

# %%
if gpus and not has_bf16:
    raise RuntimeError(f"{name} has no bf16: choose an A100 or L4, or take train_t4_qlora.ipynb")

# %% [markdown] shared: log in

# %% shared: log in

# %% [markdown] shared: work

# %% shared: work

# %% [markdown] shared: data

# %% shared: data

# %% [markdown] shared: audit

# %% shared: audit

# %% [markdown] shared: build

# %% shared: build

# %% [markdown]
# ### Clinical cases
# For stage 2, text only.

# %%
if CASES:
    cases = [CASES]
elif UPLOAD and find_uploaded("cases.yaml"):
    cases = [find_uploaded("cases.yaml")]
elif SOURCES or UPLOAD:
    cases = []
    print("No cases: stage 2 will be left out. CASES, or a cases.yaml in the ZIP, would name some.")
elif PRESET_DATA:
    cases = ["--preset", "dentalgemma_instruct", "--data", PRESET_DATA]
else:
    cases = [WORK / "phantoms" / "cases.yaml"]
if cases:
    run("dentalgemma build-instruct", *cases, "--out", INSTRUCT)

# %% [markdown] shared: sample

# %% shared: sample

# %% [markdown]
# ## Check before it costs money
# Rows, labels, memory, hours and disk; it stops here if the run would be wasted.

# %%
run(
    "dentalgemma doctor", RECIPES / "stage1_vqa.yaml", "--model_name_or_path", MODEL, "--dataset_name", VQA,
    "--num_train_epochs", EPOCHS_1, "--learning_rate", LEARNING_RATE_1, *shlex.split(MORE),
)  # fmt: skip

# %% [markdown] shared: probe

# %% shared: probe

# %% [markdown]
# ## Before training
# The base answers them.

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
# The same questions again.

# %%
run("dentalgemma evaluate", PROBE, "--model", TUNED, "--out", WORK / "tuned.jsonl", "--mode", ANSWERS)

# %% [markdown]
# ### Base and tuned model compared
# Difference, intervals and test: also what the card shows.

# %%
run(
    "dentalgemma compare", WORK / "base.jsonl", WORK / "tuned.jsonl", "--questions", PROBE,
    "--out", WORK / "comparison.json",
)  # fmt: skip

# %% [markdown] shared: table

# %% shared: table

# %% [markdown]
# ### Scores
# Accuracy with its intervals, and figures per finding: for the card, and for the `model-index` that the Hub reads in it.

# %%
run("dentalgemma score", WORK / "tuned.jsonl", "--questions", PROBE, "--out", WORK / "scores.json")

# %% [markdown]
# ### Contamination
# Does the training data hold one of these questions or its image, re-encoded, cropped or mirrored?

# %%
trained_on = [VQA, INSTRUCT] if cases else [VQA]
run("dentalgemma contamination", PROBE, *trained_on, "--out", WORK / "contamination.json")

# %% [markdown]
# ## Card
# Rendered from run facts, certificate, comparison, scores and contamination. The licence follows from the base and from
# every source. It says `OWNER/NAME` where it names its repository; `push` puts yours there.

# %%
run(
    "dentalgemma card", TUNED, "--comparison", WORK / "comparison.json", "--scores", WORK / "scores.json",
    "--benchmark", f"Closed questions, held-out split of {told}", "--contamination", WORK / "contamination.json",
)  # fmt: skip
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

# %% [markdown] shared: next
