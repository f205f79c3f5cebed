"""
What a user does with models that were pushed, in a process of its own: `load_and_sample.py FOLDER`.

Everything is named as on the Hub, and next to it as a folder of this machine; printed are the tokens that both give,
and the metrics of an evaluation, as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from trl_drcd.cli import main
from trl_drcd.evaluation.results import read_results
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.merging import load_adapter_model

FULL = ("base", "quality", "diversity")


def drawn(model, tokenizer):
    """With the folder's own generation config, as it was saved."""
    torch.manual_seed(0)
    inputs = tokenizer(["a slow tune"] * 3, return_tensors="pt", return_token_type_ids=False)
    return model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :].tolist()


def of_models(name_of):
    """Tokens of every way to load a model, by names that `name_of` makes of `quality` and the like."""
    tokenizer, tokens = AutoTokenizer.from_pretrained(name_of("quality")), {}
    for name in FULL:
        tokens[name] = drawn(AutoModelForCausalLM.from_pretrained(name_of(name)), tokenizer)
    player = pipeline("text-generation", model=name_of("quality"))
    torch.manual_seed(0)
    tokens["pipeline"] = player("a slow tune", max_new_tokens=8, return_tensors=True)[0]["generated_token_ids"]
    base = AutoModelForCausalLM.from_pretrained(name_of("base"))
    tokens["PeftModel"] = drawn(PeftModel.from_pretrained(base, name_of("lora")), tokenizer)
    tokens["load_adapter_model"] = drawn(load_adapter_model(name_of("lora")), tokenizer)
    return tokens


def merged(name_of, out):
    """Tokens of a merge of models, and of one of adapters, at two weights."""
    tokens = {}
    for weight in (0.0, 0.4):
        for first, second in (("quality", "diversity"), ("lora", "lora2")):
            folder = out / f"{first}_{weight}"
            two = ["--quality", name_of(first), "--diversity", name_of(second)]
            main(["merge", *two, "--interpolation_weight", str(weight), "--out", str(folder)])
            tokenizer = AutoTokenizer.from_pretrained(name_of("quality"))
            model = load_adapter_model(folder) if first == "lora" else AutoModelForCausalLM.from_pretrained(folder)
            ids = sample_prompts(model, tokenizer, ["a slow tune", "harp"], 2, max_new_tokens=6).token_ids
            tokens[folder.name] = ids
    return tokens


def evaluated(name_of, out, prompts):
    """Metrics of the models by name: alone, an adapter, and mixtures of both kinds."""
    rows = [
        {"name": "base"},
        {"name": "CFG", "guidance_scale": 3},
        {"name": "quality", "model": name_of("quality")},
        {"name": "adapter", "model": name_of("lora")},
        {"name": "LERP", "models": [name_of("quality"), name_of("diversity")], "interpolation_weight": [0.5]},
    ]
    config = {
        "model": name_of("base"), "dataset": str(prompts), "strategies": rows, "num_prompts": 2,
        "samples_per_prompt": 2, "max_new_tokens": 6, "output_dir": str(out),
    }  # fmt: skip
    out.mkdir()
    (out / "evaluate.yaml").write_text(json.dumps(config))
    main(["evaluate", "--config", str(out / "evaluate.yaml")])
    return {
        row.name: {key: row.metrics[key]["mean"] for key in ("kl", "entropy_per_token")}
        for row in read_results(out / "results.jsonl")
    }


def run(folder):
    found = {}
    for where, name_of in (("hub", lambda name: f"user/{name}"), ("here", lambda name: str(folder / name))):
        out = folder / f"made_{where}"
        out.mkdir()
        tokens = of_models(name_of) | merged(name_of, out)
        found[where] = tokens | {"metrics": evaluated(name_of, out / "evaluation", folder / "prompts.jsonl")}
    return found


if __name__ == "__main__":
    result = run(Path(sys.argv[1]))
    Path(sys.argv[1], "found.json").write_text(json.dumps(result))
