# ruff: noqa
# %% [markdown]
# # DentalGemma quickstart, on a CPU
#
# From annotated radiographs to a trained, merged and evaluated vision-language model, in about ten minutes, without a
# GPU, without a token and without data: the radiographs are drawn, so that the truth about every one of them is known,
# and the model is a small random Gemma 3. It rehearses the path of a real run; it says nothing about real patients.
#
# **Research and education only.** This is no medical device and gives no diagnosis.

# %% [markdown]
# ## Settings
# The figures of the README come from these. Smaller numbers run faster and learn less.

# %%
IMAGES = 2400  # @param {type:"integer"}
CASES = 800  # @param {type:"integer"}
TOWER_STEPS = 300  # @param {type:"integer"}
STAGE1_STEPS = 600  # @param {type:"integer"}
STAGE2_STEPS = 150  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
WORK = "quickstart"  # @param {type:"string"}

# %% [markdown] shared: install

# %% shared: install

# %% [markdown] shared: run

# %% shared: run

# %% [markdown]
# ## Radiographs and their annotations
# Synthetic panoramic radiographs with YOLO boxes, and clinical cases as text. `audit` says what is there and what is
# wrong with it, and changes nothing.

# %%
from data_builders.phantom_formats import write_phantoms
from dentalgemma import quickstart

WORK = Path(WORK)
write_phantoms(WORK / "phantoms", count=IMAGES, cases=CASES, seed=SEED, formats=["yolo"], families=quickstart.FAMILIES)
run("dentalgemma audit", WORK / "phantoms" / "sources.yaml")

# %% [markdown]
# ## Questions and answers
# Every statement of every answer is carried by an annotation. No patient, image or copy lies in two splits. The closed
# questions come from the held-out split.

# %%
VQA, INSTRUCT, PROBE = WORK / "data" / "vqa", WORK / "data" / "instruct", WORK / "probe.jsonl"
run("dentalgemma build", WORK / "phantoms" / "sources.yaml", "--out", VQA)
run("dentalgemma build-instruct", WORK / "phantoms" / "cases.yaml", "--out", INSTRUCT)
run(
    "dentalgemma build-probe", VQA, "--split", "test", "--out", PROBE, "--seed", SEED,
    "--question-type", "diagnosis", "--question-type", "location",
)  # fmt: skip

# %% [markdown] shared: sample

# %% shared: sample

# %% [markdown]
# ## A small model
# A random Gemma 3 whose vision tower is taught for half a minute to tell marks apart, without words, on radiographs
# that no dataset holds. A real run starts from MedGemma instead.

# %%
from dentalgemma.models.rehearsal import teach_tower
from dentalgemma.models.tiny import make_tiny_model

BASE = WORK / "models" / "base"
make_tiny_model(BASE, seed=SEED)
sight = teach_tower(BASE, seed=quickstart.BASE_SEED + SEED, phantoms=5 * TOWER_STEPS, steps=TOWER_STEPS)
print(f"The tower finds {sight['recall']:.0%} of the marks; {sight['precision']:.0%} of its claims are right.")

# %% [markdown]
# ## Before training
# The base answers the held-out questions: the option that it finds most likely counts. Four options, so chance is a
# quarter.

# %%
from dentalgemma.evaluation.generation import evaluate_questions
from dentalgemma.evaluation.questions import load_questions
from dentalgemma.evaluation.scoring import compare_predictions, score_predictions
from dentalgemma.models.loading import load_pretrained


def evaluate(arm, folder, images="true"):
    """What `dentalgemma evaluate --mode loglikelihood` does, in this process."""
    model, processor = load_pretrained(folder)
    evaluate_questions(
        model, processor, load_questions(PROBE), mode="loglikelihood", images=images, batch_size=32,
        out=WORK / f"{arm}.jsonl", model_name=arm,
    )  # fmt: skip
    closed = score_predictions(WORK / f"{arm}.jsonl", PROBE)["closed"]
    print(f"{arm}: {closed['accuracy']:.1%} of {closed['n']} questions right")


evaluate("base", BASE)

# %% [markdown]
# ## Train
# The recipes of a real run, launched as on a GPU, with the small numbers of the quickstart. Each ends with a proof that
# what was meant to train did, and nothing else. Stage 1: questions about images.

# %%
RECIPES = quickstart.recipes_folder()


def train(recipe, start, dataset, options):
    """Launch a recipe with `accelerate`; every setting of its YAML can be given like this."""
    settings = {
        "--model_name_or_path": start,
        "--dataset_name": dataset,
        "--output_dir": WORK / "runs" / recipe,
        "--feature_cache": WORK / "features",
        "--seed": SEED,
        **quickstart.COMMON,
        **options,
    }
    run(
        "accelerate launch --config_file", RECIPES / "accelerate" / "cpu.yaml", RECIPES / f"{recipe}.py",
        *(part for setting in settings.items() for part in setting),
    )  # fmt: skip
    display(Image(WORK / "runs" / recipe / "curves.png", width=800))


train("stage1_vqa", BASE, VQA, {**quickstart.STAGE1, "--max_steps": STAGE1_STEPS})

# %% [markdown]
# Stage 2: clinical cases, text only, starting from the adapter of stage 1.

# %%
train("stage2_instruct", WORK / "runs" / "stage1_vqa", INSTRUCT, {**quickstart.STAGE2, "--max_steps": STAGE2_STEPS})

# %% [markdown]
# ## Merge
# The adapters of both stages are folded into the base at once. The certificate compares every tensor, and the answers of
# adapter and merged model on real rows.

# %%
from dentalgemma.merging import merge_adapter

TUNED = WORK / "models" / "dentalgemma"
certificate = merge_adapter(WORK / "runs" / "stage2_instruct", TUNED, dtype="float32", rows=str(VQA))
print(f"{certificate['changed_tensors']} tensors changed; passed: {certificate['passed']}")

# %% [markdown]
# ## After training
# The same questions again, also with blank images: a model that looks at the image falls back to chance there.

# %%
evaluate("tuned", TUNED)
evaluate("tuned_blank", TUNED, images="blank")

# %% [markdown]
# ### The table
# Whether a difference could be luck says an exact McNemar test on pairs of answers.

# %%
comparisons = {
    arm: compare_predictions(WORK / f"{arm}.jsonl", WORK / "tuned.jsonl", PROBE) for arm in ("base", "tuned_blank")
}
tuned = comparisons["base"]["closed"]["b"]
rows = [("tuned", f"{tuned['accuracy']:.1%}", f"{tuned['wilson'][0]:.1%} to {tuned['wilson'][1]:.1%}", "")]
for arm, comparison in comparisons.items():
    pair = comparison["closed"]
    low, high = pair["a"]["wilson"]
    rows.append((arm, f"{pair['a']['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{pair['mcnemar_p']:.2g}"))
show_table(["model", "accuracy", "95 % interval (Wilson)", "against tuned, exact McNemar p"], rows)

# %% [markdown]
# ## The card
# Rendered from what was recorded: data, licences, training, certificate, results. Nothing is typed by hand.

# %%
from dentalgemma.evaluation.files import write_json
from dentalgemma.publishing.cards import write_model_card

write_json(WORK / "comparison.json", comparisons["base"])
print(write_model_card(TUNED, WORK / "comparison.json", benchmark="Synthetic panoramic radiographs").read_text()[:2000])

# %% [markdown]
# ## Next
# - Your own annotations: [the sources file](https://github.com/dentalgemma/dentalgemma#your-annotations-the-sources-file).
# - A real model: `train_t4_qlora.ipynb` on a free T4, `train_a100.ipynb` on an A100, beside this notebook.
# - `dentalgemma demo` opens a page to try a model on, `dentalgemma push` publishes it.
