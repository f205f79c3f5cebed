"""Bad values of `CFGDistillDiversityConfig`."""

from typing import Any

from bad_world import Bad

NAN, INF = float("nan"), float("inf")


def row(name: str, value: str, remedy: str, error: type[BaseException] = ValueError, **overrides: Any) -> Bad:
    """A configuration with these overrides; the first of them is to blame."""
    argument = f"`{next(iter(overrides))}"
    return Bad(name, lambda world, tmp: world.config(tmp, **overrides), error, argument, value, remedy)


ROWS = [
    row("guidance NaN", "nan", "finite and at least 1 (the paper's is 3)", guidance_scale=NAN),
    row("guidance infinite", "inf", "finite and at least 1", guidance_scale=INF),
    row("guidance below 1", "0.5", "at least 1", guidance_scale=0.5),
    row("guidance as a word", "'three'", "must be a number", TypeError, guidance_scale="three"),
    row("guidance none", "None", "must be a number", TypeError, guidance_scale=None),
    row("steps that are all early", "4", "must be below `max_completion_length=4`", early_steps=4),
    row("early steps without guidance", "2", "a `guidance_scale` other than 1", early_steps=2, guidance_scale=1),
    row(
        "a negative prompt without guidance",
        "bad",
        "a `guidance_scale` other than 1",
        negative_prompt="bad",
        guidance_scale=1,
    ),
    row("early steps below 0", "-1", "at least 0 (0 guides every step", early_steps=-1),
    row("half an early step", "0.5", "must be a whole number", TypeError, early_steps=0.5),
    row("an early scale without early steps", "0.5", "needs `early_steps`", early_guidance_scale=0.5),
    row("an early scale below 0", "-0.5", "at least 0", early_guidance_scale=-0.5, early_steps=2),
    row("temperature zero", "0.0", "above 0 (the paper's is 0.99)", temperature=0.0),
    row("temperature NaN", "nan", "finite and above 0", temperature=NAN),
    row("temperature true", "True", "must be a number", TypeError, temperature=True),
    row("coefficient negative", "-1.0", "finite and at least 0", diversity_coef=-1.0),
    row("coefficient NaN", "nan", "finite and at least 0", diversity_coef=NAN),
    row("warm-up negative", "-1", "at least 0", diversity_warmup_steps=-1),
    row("warm-up of half a step", "2.5", "a whole number of steps, or a share", diversity_warmup_steps=2.5),
    row("warm-up as a word", "'slow'", "must be a number", TypeError, diversity_warmup_steps="slow"),
    row("one generation", "1", "at least 2", num_generations=1),
    row("generations in words", "'four'", "a whole number", TypeError, num_generations="four"),
    row("a batch of parts of groups", "6", "multiple of `num_generations=4`", per_device_train_batch_size=6),
    row("batch of nothing", "0", "at least 1", per_device_train_batch_size=0),
    row("no accumulation", "0", "at least 1", gradient_accumulation_steps=0),
    row("completions without a token", "0", "at least 1", max_completion_length=0),
    row("learning rate NaN", "nan", "finite and at least 0", learning_rate=NAN),
    row("learning rate negative", "-0.1", "finite and at least 0", learning_rate=-0.1),
    row("weights of rewards NaN", "nan", "finite", reward_weights=[NAN]),
    row("truncation to the likeliest", "50", "set `top_k=0`", top_k=50),
    row("truncation to a share", "0.9", "set `top_p=1.0`", top_p=0.9),
    row("penalty for repetition", "1.2", "set `repetition_penalty=1.0`", repetition_penalty=1.2),
    row("sampling behind the back", "['typical_p']", "allowed are", generation_kwargs={"typical_p": 0.5}),
    row("sampling options torn", '{"cache', "a mapping, or one in JSON", generation_kwargs='{"cache'),
    row("sampling options in a list", "[1]", "a mapping, or one in JSON", generation_kwargs=[1]),
    row("keys and values rounded", "quantized", "leave it out", cache_implementation="quantized"),
    row("noise on embeddings", "5.0", "leave it out", neftune_noise_alpha=5.0),
    row("completions of a pattern", "[0-9]", "regex=None`", vllm_structured_outputs_regex="[0-9]+"),
    row("dropout", "False", "set it to True", disable_dropout=False),
    row("TRL's penalty", "0.05", "set `beta=0`", beta=0.05),
    row("sample steps negative", "-1", "at least 0", sample_steps=-1),
    row("sample prompts as one text", "'slow harp'", "a list of texts or none", TypeError, sample_prompts="slow harp"),
    row("sample prompts without a prompt", "[]", "at least one", sample_steps=1, sample_prompts=[]),
    row("an empty sample prompt", "['']", "no empty one", sample_prompts=[""]),
    row("an unpaired surrogate in a sample prompt", "\\ud800", "valid Unicode", sample_prompts=["slow \ud800"]),
    row("an unpaired surrogate in the negative prompt", "\\ud800", "valid Unicode", negative_prompt="bad \ud800"),
    row("negative prompt as a number", "3", "a text or none", TypeError, negative_prompt=3),
]
# What is to blame is the second override where the first only turns the feature on
next(row for row in ROWS if row.name == "sample prompts without a prompt").argument = "`sample_prompts"
