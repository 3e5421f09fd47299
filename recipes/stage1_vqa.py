"""Stage 1: teach the base model to answer questions about dental images.

accelerate launch recipes/stage1_vqa.py --dataset_name data/vqa
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/stage1_vqa.py --learning_rate 2e-5
"""

from pathlib import Path

from dentalgemma.models.loading import load_model
from dentalgemma.training.config import parse_stage, plain_errors
from dentalgemma.training.data import load_splits
from dentalgemma.training.gate import run_gate
from dentalgemma.training.run_facts import write_run_facts
from dentalgemma.training.trainer import StageTrainer


def main() -> None:
    stage, training, model_config = parse_stage(Path(__file__).with_suffix(".yaml"))
    dataset = load_splits(stage)
    model, processor = load_model(model_config)
    trainer = StageTrainer(
        model=model,
        processor=processor,
        stage=stage,
        training=training,
        model_config=model_config,
        dataset=dataset,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    write_run_facts(trainer, stage, model_config, dataset)
    run_gate(trainer)


if __name__ == "__main__":
    with plain_errors():
        main()
