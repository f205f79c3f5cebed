"""
Distil classifier-free guidance into a text-to-music model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

Without arguments, in the root of the repository: the short run of recipes/music/musiclm_quality.yaml on the shipped
model of recipes/tiny_music. With another YAML file, and one value overridden:

    accelerate launch recipes/musiclm_drcd.py
    accelerate launch recipes/musiclm_drcd.py --config recipes/music/musiclm_diversity.yaml --max_steps 300

With any causal LM over words and audio tokens, and any prompts (Hub name, or a JSONL, CSV or Parquet file, with a
column `prompt` and optionally `negative_prompt`); the defaults are then the paper's:

    accelerate launch recipes/musiclm_drcd.py --model_name_or_path my/musiclm --codec my/codec \\
        --embedder my/embedder --dataset prompts.jsonl --diversity_coef 10 --diversity_warmup_steps 0.3 \\
        --output_dir outputs/mine

With LoRA (the teacher is then the same weights with the adapter off); resumed after an interruption:

    accelerate launch recipes/musiclm_drcd.py --use_peft --lora_target_modules all-linear --lora_dropout 0
    accelerate launch recipes/musiclm_drcd.py --resume_from_checkpoint auto

`trl-drcd train music` does the same. To change more than the arguments allow, copy trl_drcd/scripts/train_music.py:
everything that it calls is public.
"""

from pathlib import Path

from trl_drcd.scripts import train_music

# Used if the command line has neither a YAML file nor a model
DEFAULT_CONFIG = Path(__file__).parent / "music" / "musiclm_quality.yaml"


def main(argv: list[str] | None = None) -> None:
    """Validate the arguments, train, and save."""
    train_music.main(argv, DEFAULT_CONFIG, "musiclm_drcd.py", __doc__)


if __name__ == "__main__":
    main()
