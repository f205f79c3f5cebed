"""
Distil classifier-free guidance into a language model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

Without arguments, in the root of the repository after `python recipes/text/get_smollm2.py`: the short run of
recipes/text/text_smollm2.yaml, LoRA on SmolLM2-135M-Instruct with the creative-writing prompts of
recipes/text/prompts. With another YAML file, and one value overridden:

    accelerate launch recipes/text_drcd.py
    accelerate launch recipes/text_drcd.py --config recipes/text/text_smollm2_diversity.yaml --max_steps 300

With any causal LM and any prompts (Hub name, or a JSONL, CSV or Parquet file); the defaults are then the paper's:

    accelerate launch recipes/text_drcd.py --model_name_or_path Qwen/Qwen3-0.6B --dataset prompts.jsonl \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --diversity_coef 10 --diversity_warmup_steps 0.3 \\
        --output_dir outputs/mine

`trl-drcd train text` does the same. To change more than the arguments allow, copy trl_drcd/scripts/train_text.py:
everything that it calls is public.
"""

from pathlib import Path

from trl_drcd.scripts import train_text

# Used if the command line has neither a YAML file nor a model
DEFAULT_CONFIG = Path(__file__).parent / "text" / "text_smollm2.yaml"


def main(argv: list[str] | None = None) -> None:
    """Validate the arguments, train, and save."""
    train_text.main(argv, DEFAULT_CONFIG, "text_drcd.py", __doc__)


if __name__ == "__main__":
    main()
