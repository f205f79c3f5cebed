"""
The contract with other libraries: every private name of theirs that the package uses, with its signature.

Where one of these tests fails after an upgrade, look at each place that uses the name, then write the new signature
here. Where it fails after a change of the package, see whether a public name would do; if not, add the name.
"""

import importlib
import inspect
from importlib.metadata import version

import pytest
from foreign import found, full_name, signature
from trl import RLOOTrainer

import trl_drcd
from trl_drcd.compat.products import product_library

# Of these versions. Signatures are those of `foreign.signature`: `=` marks a default
VERSIONS = {"trl": "1.16", "transformers": "5.23", "torch": "2.13", "peft": "0.21", "huggingface_hub": "2.4"}
CONTRACT = {
    "trl.models.utils": {"_ForwardRedirection": ""},
    "trl.trainer.base_trainer._BaseTrainer": {"create_model_card": "self, model_name=, dataset_name=, tags="},
    "trl.trainer.rloo_trainer.RLOOTrainer": {
        "_buffered_inputs": "attribute",
        "_calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
        "_compute_loss": "self, model, inputs",
        "_generate_and_score_completions": "self, inputs",
        "_generate_single_turn": "self, prompt_ids, images, multimodal_fields",
        "_get_per_token_logps_and_entropies": (
            "self, model, input_ids, attention_mask, logits_to_keep, batch_size=, compute_entropy=, "
            "compute_aux_loss=, pixel_values=, image_grid_thw=, num_images=, pixel_attention_mask=, spatial_shapes=, "
            "num_tiles=, image_sizes=, token_type_ids=, mm_token_type_ids=, image_position_ids="
        ),
        "_get_train_sampler": "self, dataset=",
        "_last_loaded_step": "attribute",
        "_logs": "attribute",
        "_metrics": "attribute",
        "_name": "attribute",
        "_paper": "attribute",
        "_save_checkpoint": "self, model, trial",
        "_set_signature_columns_if_needed": "self",
        "_signature_columns": "attribute",
        "_step": "attribute",
        "_tag_names": "attribute",
        "_tokenize_prompts": "self, prompts",
        "_tokenizer": "attribute",
        "get_eval_dataloader": "self, eval_dataset=",
        "prediction_step": "self, model, inputs, prediction_loss_only, ignore_keys=",
        "training_step": "self, model, inputs, num_items_in_batch",
    },
    "trl.trainer.utils": {
        "RepeatSampler": "data_source, mini_repeat_count, batch_size=, repeat_count=, shuffle=, seed=",
        "is_async_callable": "func",
        "maybe_gather_lm_head_ctx": "*params",
        "use_adapter": "model, adapter_name",
    },
    "transformers.cache_utils.CacheLayerMixin": {"reorder_cache": "self, beam_idx"},
    "transformers.cache_utils.DynamicLayer": {
        "batch_repeat_interleave": "self, repeats",
        "batch_select_indices": "self, indices",
        "lazy_initialization": "self, key_states, value_states",
        "update": "self, key_states, value_states, *args, **kwargs",
    },
    "transformers.configuration_utils.PreTrainedConfig": {"_name_or_path": "attribute"},
    "transformers.integrations.peft.PeftAdapterMixin": {"_hf_peft_config_loaded": "attribute"},
    "transformers.generation.utils.GenerationMixin": {"_supports_default_dynamic_cache": "cls"},
    "transformers.models.musicgen.modeling_musicgen": {
        "MusicgenSinusoidalPositionalEmbedding": "num_positions, embedding_dim",
    },
    "transformers.models.musicgen.modeling_musicgen.MusicgenSinusoidalPositionalEmbedding": {
        "forward": "self, input_ids, past_key_values_length=",
    },
    "transformers.trainer.Trainer": {
        "_get_grad_norm": "self, model, grad_norm=",
        "_get_output_dir": "self, trial",
        "_load_best_model": "self",
        "_load_rng_state": "self, checkpoint",
        "_maybe_log_save_evaluate": (
            "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate="
        ),
        "_push_from_checkpoint": "self, checkpoint_folder",
        "_save": "self, output_dir=, state_dict=",
        "init_hf_repo": "self, token=, private=",
        "push_to_hub": "self, commit_message=, blocking=, token=, revision=, private=, **kwargs",
        "save_model": "self, output_dir=, _internal_call=",
        "set_initial_training_values": "self, args, dataloader",
        "train": "self, resume_from_checkpoint=, trial=, ignore_keys_for_eval=",
    },
    "transformers.trainer_callback.TrainerCallback": {
        "on_log": "self, args, state, control, **kwargs",
        "on_step_end": "self, args, state, control, **kwargs",
        "on_train_begin": "self, args, state, control, **kwargs",
    },
    "torch.cpu": {"_is_amx_tile_supported": "", "_is_avx512_bf16_supported": ""},
    "torch.Tensor": {"_version": "attribute"},
    "torch.ops.mkl": {
        "_mkl_linear": "X, MKL_W, ORI_W, B, batch_size",
        "_mkl_reorder_linear_weight": "X, batch_size",
    },
    "torch.ops.mkldnn": {
        "_linear_pointwise": "X, W, B, attr, scalars, algorithm",
        "_reorder_linear_weight": "self, batch_size=",
    },
    "torch": {"_C": "attribute"},
    "torch._C": {"_are_functorch_transforms_active": "builtin", "_nn": "attribute"},
    "torch.distributed.distributed_c10d": {"_get_default_store": "", "_set_pg_timeout": "timeout, group="},
    "torch.distributed.fsdp.FSDPModule": {"_get_fsdp_state": "self"},
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": {
        "_fsdp_param_group": "property",
        "_lazy_init": "self",
    },
    "peft.tuners.lora": {"LoraLayer": "base_layer, ephemeral_gpu_offload=, **kwargs"},
    "peft.tuners.tuners_utils": {"BaseTunerLayer": ""},
    "peft.utils.other": {"get_pattern_key": "pattern_keys, key_to_match"},
    "huggingface_hub.hub_mixin.ModelHubMixin": {
        "_from_pretrained": (
            "cls, model_id, revision, cache_dir, force_download, local_files_only, token, **model_kwargs"
        ),
        "_hub_mixin_config": "attribute",
        "_hub_mixin_info": "attribute",
        "_save_pretrained": "self, save_directory",
        "from_pretrained": (
            "cls, pretrained_model_name_or_path, force_download=, token=, cache_dir=, local_files_only=, revision=, "
            "**model_kwargs"
        ),
        "generate_model_card": "self, *args, **kwargs",
        "save_pretrained": (
            "self, save_directory, config=, repo_id=, push_to_hub=, model_card_kwargs=, **push_to_hub_kwargs"
        ),
    },
    # Of Python itself
    "argparse._ActionsContainer": {"_actions": "attribute"},
    "os": {"_exit": "status"},
}
ENTRIES = [(f"{owner}.{name}", arguments) for owner, names in CONTRACT.items() for name, arguments in names.items()]
# What the trainer finds in what a private method returns, or reads through a private object
FOUND_IN_SOURCE = {
    "trl.trainer.rloo_trainer.RLOOTrainer._generate_and_score_completions": ['"advantages": advantages'],
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": ["self.post_forward_mesh_info"],
}


def of_version(name: str) -> str:
    library = name.partition(".")[0]
    return f"{library} {version(library)} (written down of {VERSIONS[library]})" if library in VERSIONS else library


def test_every_private_name_in_use_is_in_the_table():
    known = {name for name, _ in ENTRIES}
    parts = {name.rpartition(".")[2] for name in known}
    missing = {name for name in found(trl_drcd) if (name[2:] not in parts if name[0] == "?" else name not in known)}
    assert not missing, f"private names of other libraries that {__name__} does not have: {sorted(missing)}"


def test_every_name_in_the_table_is_in_use():
    used = found(trl_drcd)
    parts = {name[2:] for name in used if name[0] == "?"}
    stale = [name for name, _ in ENTRIES if name not in used and name.rpartition(".")[2] not in parts]
    assert not stale, f"no longer used: {stale}"


@pytest.mark.parametrize(("name", "arguments"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_the_signature_is_the_one_written_down(name, arguments):
    if name.startswith("torch.ops.") and not product_library():
        pytest.skip("a build of torch without MKL or oneDNN")
    assert signature(name) == arguments, f"{name} of {of_version(name)}"


@pytest.mark.parametrize(("name", "texts"), FOUND_IN_SOURCE.items())
def test_what_is_read_without_a_name_of_its_own_is_there(name, texts):
    owner, _, last = name.rpartition(".")
    module, _, cls = owner.rpartition(".")
    holder = getattr(importlib.import_module(module), cls) if cls[0].isupper() else importlib.import_module(owner)
    source = inspect.getsource(getattr(holder, last))
    assert not [text for text in texts if text not in source], f"{name} of {of_version(name)}"


# ---------------------------------------------------------------- the scan itself


def package(tmp_path, monkeypatch, source):
    """A package with one module."""
    (tmp_path / "sample_package").mkdir()
    (tmp_path / "sample_package" / "__init__.py").write_text("")
    (tmp_path / "sample_package" / "part.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("sample_package", "sample_package.part"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    return importlib.import_module("sample_package")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from trl.models.utils import _ForwardRedirection", {"trl.models.utils._ForwardRedirection"}),
        ("from trl.trainer.utils import use_adapter", {"trl.trainer.utils.use_adapter"}),
        ("from trl import RLOOTrainer\nfrom accelerate.utils import gather", set()),
        ("import torch\ntorch.cpu._is_amx_tile_supported()", {"?._is_amx_tile_supported"}),
        ("def f(x):\n    return getattr(x, '_secret', None)", {"?._secret"}),
        ("class A:\n    def __init__(self):\n        self._own = 1\n\ndef f(a):\n    return a._own", set()),
        (
            "from trl import RLOOTrainer\nclass A(RLOOTrainer):\n    def _own(self):\n        return self._metrics",
            {full_name(RLOOTrainer, "_metrics")},
        ),
        (
            "from trl import RLOOTrainer\n"
            "class A(RLOOTrainer):\n    def f(self):\n        self._step = super()._prepare_inputs(1)",
            {full_name(RLOOTrainer, "_step"), full_name(RLOOTrainer, "_prepare_inputs")},
        ),
        (
            "from trl import RLOOTrainer\nclass A(RLOOTrainer):\n    def evaluate(self):\n        pass",
            {"transformers.trainer.Trainer.evaluate"},
        ),
    ],
)
def test_the_scan_finds(source, expected, tmp_path, monkeypatch):
    assert found(package(tmp_path, monkeypatch, source)) == expected


def test_signatures_are_compact():
    assert signature("trl.trainer.rloo_trainer.RLOOTrainer._metrics") == "attribute"
    assert signature("textwrap.indent") == "text, prefix, predicate="
    with pytest.raises(AttributeError, match="_no_such_name"):
        signature("trl.trainer.rloo_trainer.RLOOTrainer._no_such_name")
