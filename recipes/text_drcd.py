"""
Distil classifier-free guidance into a language model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

From the root of the repository, after `python recipes/text/get_smollm2.py` and without arguments, the short run of
recipes/text/text_smollm2.yaml: LoRA on SmolLM2-135M-Instruct and the creative-writing prompts of recipes/text/prompts.
With another YAML file, and a value of it overridden:

    accelerate launch recipes/text_drcd.py
    accelerate launch recipes/text_drcd.py --config recipes/text/text_smollm2_diversity.yaml --max_steps 300

Any causal LM and any prompts (Hub name, or a JSONL, CSV or Parquet file); then the defaults are the paper's:

    accelerate launch recipes/text_drcd.py --model_name_or_path Qwen/Qwen3-0.6B --dataset prompts.jsonl \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --diversity_coef 5 --output_dir outputs/mine

`trl-drcd train text` is the same. For more than its arguments can say, copy trl_drcd/scripts/train_text.py: all that
it calls is public.
"""

from pathlib import Path

from trl_drcd.scripts import train_text

# What runs where the command line names neither a YAML file nor a model
DEFAULT_CONFIG = Path(__file__).parent / "text" / "text_smollm2.yaml"


def main(argv: list[str] | None = None) -> None:
    """Checks, trains, saves."""
    train_text.main(argv, DEFAULT_CONFIG, "text_drcd.py", __doc__)


if __name__ == "__main__":
    main()
