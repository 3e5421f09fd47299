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

# %% [markdown] shared: data settings

# %% shared: data settings

# %% [markdown]
# ## Settings: the training
# The values of the T4 recipe. `MORE` takes any other of its settings, such as `--max_steps 200`. Before and after
# training the model answers `PROBE_QUESTIONS` closed questions. `ALLOW_CPU` is for rehearsals with a small model.

# %%
EPOCHS = 1  # @param {type:"number"}
LEARNING_RATE = 5e-5  # @param {type:"number"}
MORE = ""  # @param {type:"string"}
PROBE_QUESTIONS = 120  # @param {type:"integer"}
ALLOW_CPU = False  # @param {type:"boolean"}

# %% [markdown]
# ## Settings: the merged model
# `DTYPE` is what its weights are stored in. `PUSH` publishes the adapter as a private repository `REPO`.

# %%
DTYPE = "bfloat16"  # @param ["bfloat16", "float32"]
PUSH = False  # @param {type:"boolean"}
REPO = "your-name/dentalgemma-adapter"  # @param {type:"string"}

# %% [markdown] shared: install

# %% shared: install

# %% [markdown] shared: run

# %% shared: run

# %% [markdown]
# ## The machine
# The GPU of this session, and what launches training on it.

# %% shared: gpu

# %% [markdown]
# This notebook needs no bf16; a GPU that has it is better used by the other one.

# %%
if gpus and has_bf16:
    print(f"{name} has bf16: train_a100.ipynb trains faster on it, and both stages.")

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

# %% [markdown] shared: probe

# %% shared: probe

# %% [markdown] shared: sample

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
# The answers that training left in `gate` of the run folder, compared.

# %%
run(
    "dentalgemma compare", RUN / "gate" / "start.jsonl", RUN / "gate" / "end.jsonl", "--questions", PROBE,
    "--name", "base", "--name", "tuned", "--out", WORK / "comparison.json",
)  # fmt: skip

# %% [markdown] shared: table

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
# weights are others, so the card does not show them. It says `OWNER/NAME` where it names its repository; `push` puts
# yours there.

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

# %% [markdown] shared: next
